"""Weights that a run keeps: which, of what, and that they are those it was evaluated with."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score

from repeatlab.core.files import StoreError, write_sealed
from repeatlab.core.schema import parse
from repeatlab.data import load_splits
from repeatlab.data.augment import normalize
from repeatlab.store.records import Run
from repeatlab.tasks import TASKS
from repeatlab.tasks.models import small_cnn
from repeatlab.training import weights
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

T, BATCH = 30, 16


def run_config(
    task: str = "supervised", settings: dict[str, Any] | None = None, **fields: Any
) -> RunConfig:
    data = {
        "task": {"name": task, "batch_size": BATCH} | (settings or {}),
        "max_updates": T,
        "evaluation": {"every": 10, "splits": ["validation"], "test": False, "keep": 3},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


@pytest.mark.parametrize("task", TASKS)
def test_the_weights_at_the_end_are_those_of_the_run_s_own_state(task, tmp_path, monkeypatch):
    from repeatlab.training.one_run import Training

    ended = []
    finish = Training.end

    def watched(self, *given, **named):
        ended.append(self.task)
        finish(self, *given, **named)

    monkeypatch.setattr(Training, "end", watched)
    evaluation = {"splits": [], "test": False, "keep": 1}
    run = train(run_config(task, max_updates=2, evaluation=evaluation), tmp_path)
    assert weights.kept(run) == [2]
    kept = weights.load(run)
    modules = {n: m for n, m in vars(ended[0]).items() if isinstance(m, torch.nn.Module)}
    assert modules
    assert kept.keys() == modules.keys()
    for name, module in modules.items():
        assert digest(kept[name]) == digest(module.state_dict())


def test_kept_weights_are_those_that_the_run_was_evaluated_with(tmp_path):
    run = train(run_config(settings={"lr": 0.05, "ema_decay": 0.9}), tmp_path)
    assert weights.kept(run) == [10, 20, 30]
    data = load_splits("digits")
    images = normalize(data.validation.images, data.mean, data.std)
    found = run.evals.query("split == 'validation' and metric == 'accuracy'")
    for update, accuracy in zip(found["update"], found["value"], strict=True):
        if not update:
            continue
        network = small_cnn(1, 10, width=16)
        network.load_state_dict(weights.load(run, update)["ema"])
        with torch.no_grad():
            assert accuracy == accuracy_score(data.validation.labels, network(images).argmax(1))


def test_the_last_evaluations_are_kept_and_no_others(tmp_path):
    evaluation = {"every": 7, "splits": [], "test": False, "keep": 2}
    run = train(run_config(evaluation=evaluation), tmp_path)
    assert weights.kept(run) == [28, 30]
    none = train(run_config(evaluation=evaluation | {"keep": 0}), tmp_path)
    assert weights.kept(none) == []
    # To keep is not to train otherwise.
    assert none.summary["state_sha256"] == run.summary["state_sha256"]


def test_a_run_that_stops_early_keeps_the_weights_of_its_end(tmp_path):
    evaluation = {"every": 2, "test": False, "keep": 1, "early_stopping": {"patience": 2}}
    run = train(run_config(settings={"lr": 0.5}, evaluation=evaluation), tmp_path)
    end = run.summary["ledger"]["updates"]
    assert end < T
    assert weights.kept(run) == [end]


def test_weights_that_are_missing_or_damaged_are_named(tmp_path):
    evaluation = {"splits": [], "test": False, "keep": 1}
    run = train(run_config(max_updates=2, evaluation=evaluation), tmp_path)
    with pytest.raises(StoreError, match=r"no weights after update 1: .* \(kept: \[2\]\)"):
        weights.load(run, 1)
    path = run.path / "weights-000000002.pt"
    content = path.read_bytes()
    saved = torch.load(path, weights_only=True)  # as others may
    assert digest(saved) == digest(weights.load(run))
    saved["model"]["0.bias"][0] += 1
    torch.save(saved, path)
    changed = path.read_bytes()
    for spoilt in (changed, content[: len(content) // 2], b""):
        path.write_bytes(spoilt)
        with pytest.raises(StoreError, match="is damaged: its content does not fit its digest"):
            weights.load(run)
    path.unlink()
    with pytest.raises(StoreError, match=r"keeps no weights: set evaluation.keep"):
        weights.load(run)


def test_kept_weights_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("weights ran code",))

    content = BytesIO()
    torch.save(Evil(), content)
    write_sealed(tmp_path / "weights-000000001.pt", content.getvalue())
    with pytest.raises(StoreError, match="cannot be read"):
        weights.load(Run(tmp_path))
