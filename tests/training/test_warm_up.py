"""Rates that rise at first: a run's against torch's schedulers."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from repeatlab.core.schema import parse
from repeatlab.tasks.supervised import Supervised
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.one_run import Training

T, BATCH, LR = 24, 32, 0.02


def run_config(method: dict[str, Any], task: str = "supervised", **fields: Any) -> RunConfig:
    data = {
        "task": {"name": task, "lr": LR, "batch_size": BATCH},
        "method": method,
        "max_updates": T,
        "evaluation": {"splits": [], "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


def reference_rates(base: float, make_scheduler, updates: int = T) -> list[float]:
    """Return the rate at each update of a real optimizer under a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = make_scheduler(optimizer)
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "fall"),
    [
        ({"name": "constant", "warm_up": 0.25}, lambda o: LinearLR(o, 1.0, 1.0)),
        ({"name": "cosine", "warm_up": 0.25}, lambda o: CosineAnnealingLR(o, T - 6)),
    ],
    ids=["constant", "cosine"],
)
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_record_and_the_optimizer_follow_torch_s_scheduler(
    schedule, fall, repeats, tmp_path, monkeypatch
):
    seen = []
    step = Supervised.step

    def watched(self, *given, **named):
        seen.append([group["lr"] for o in self.optimizers for group in o.param_groups])
        step(self, *given, **named)

    monkeypatch.setattr(Supervised, "step", watched)
    mapping = {"mapping": {"name": "constant", "repeats": repeats}}
    run = train(run_config({"schedule": schedule} | mapping), tmp_path)
    expected = reference_rates(
        LR, lambda o: SequentialLR(o, [LinearLR(o, 1 / 7, 1.0, 6), fall(o)], milestones=[6])
    )
    assert run.updates["lr"].tolist() == pytest.approx(expected, rel=1e-9)
    assert seen == [[pytest.approx(rate, rel=1e-9)] for rate in expected]


def test_every_optimizer_of_a_task_is_warmed_alike(tmp_path, monkeypatch):
    from repeatlab.tasks.generative import Generative

    seen = []
    step = Generative.step

    def watched(self, *given, **named):
        seen.append([group["lr"] for o in self.optimizers for group in o.param_groups])
        step(self, *given, **named)

    monkeypatch.setattr(Generative, "step", watched)
    method = {"schedule": {"name": "constant", "warm_up": 0.67}}
    train(run_config(method, "generative", max_updates=3), tmp_path)
    assert [len(rates) for rates in seen] == [2, 2, 2]
    expected = [LR * factor for factor in (1 / 3, 2 / 3, 1.0)]
    assert [rates[0] for rates in seen] == pytest.approx(expected)
    first = [rate / expected[0] for rate in seen[0]]
    for rates, rate in zip(seen, expected, strict=True):
        assert [r / rate for r in rates] == pytest.approx(first)


def test_n_as_a_step_size_multiplies_what_the_warm_up_gives(tmp_path):
    method = {
        "apply": "step_size",
        "mapping": {"name": "constant", "repeats": 3},
        "schedule": {"name": "constant", "warm_up": 0.17},
    }
    run = train(run_config(method), tmp_path)
    factors = [0.2, 0.4, 0.6, 0.8] + [1.0] * (T - 4)
    assert run.updates["lr"].tolist() == pytest.approx([3 * LR * factor for factor in factors])


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_the_rate_is_restored_on_resume(name, tmp_path, monkeypatch):
    schedule = {"name": name, "warm_up": 0.5}
    mapping = {"name": "constant", "repeats": 2}
    run = run_config({"schedule": schedule, "mapping": mapping})
    unbroken = train(run, tmp_path / "unbroken")
    original = Training.visit

    def visit(self):
        make = original(self)

        def stopped(batch):
            make(batch)
            if self.repeater.updates == 7:
                signal.raise_signal(signal.SIGINT)

        return stopped

    monkeypatch.setattr(Training, "visit", visit)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "stopped")
    resumed = train(run, tmp_path / "stopped")
    assert resumed.updates["lr"].equals(unbroken.updates["lr"])
    assert resumed.updates["loss"].equals(unbroken.updates["loss"])
    assert resumed.summary["state_sha256"] == unbroken.summary["state_sha256"]
