"""What the README shows works as it stands there."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from repeatlab.cli import ROOT
from repeatlab.study import Study

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_loop_makes_its_updates():
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    names = {
        "loader": [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)],
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "cross_entropy": cross_entropy,
    }
    (snippet,) = blocks("python")
    exec(snippet, names)
    assert len(steps) == names["repeater"].max_updates == 5_000


def test_the_methods_are_valid():
    (snippet,) = blocks("yaml")
    methods = yaml.safe_load(snippet)["methods"]
    study = Study.of(name="x", tasks={"x": {"name": "supervised"}}, methods=methods, max_updates=1)
    assert list(study.methods) == list(methods)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
