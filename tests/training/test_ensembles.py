"""Weights that a run keeps, and ensembles of them, against scipy and scikit-learn by hand."""

from __future__ import annotations

from io import BytesIO
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from device_without_float64 import device
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss

from repeatlab.core.files import StoreError, write_sealed
from repeatlab.core.schema import parse
from repeatlab.data import load_splits
from repeatlab.data.augment import normalize
from repeatlab.store.records import Run
from repeatlab.tasks import TASKS
from repeatlab.tasks.models import small_cnn
from repeatlab.training import ensembles, weights
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.ensembles import Member, evaluate, of_checkpoints, of_seeds
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


LEARNS = {"supervised": {"lr": 0.05, "ema_decay": 0.9}, "semisupervised": {"lr": 0.05, "mu": 1}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[Run]]:
    """Return three runs of different seeds of each classifier."""
    store = tmp_path_factory.mktemp("runs")
    return {
        task: [train(run_config(task, LEARNS[task], seed=seed), store) for seed in range(3)]
        for task in LEARNS
    }


def logits_by_hand(state: dict[str, torch.Tensor], split: str = "validation") -> np.ndarray:
    """Return the logits of a bare network with these weights on the digits."""
    data = load_splits("digits")
    network = small_cnn(1, 10, width=16)
    network.load_state_dict(state)
    images = getattr(data, split).images
    with torch.no_grad():
        return network(normalize(images, data.mean, data.std)).double().numpy()


def probabilities(run: Run, update: int, network: str) -> np.ndarray:
    return softmax(logits_by_hand(weights.load(run, update)[network]), axis=1)


LABELS = load_splits("digits").validation.labels.numpy()


def held_to(row: Any, predicted: np.ndarray) -> None:
    """Hold a row of the table to scikit-learn's accuracy and log loss of these probabilities."""
    assert row["accuracy"] == accuracy_score(LABELS, predicted.argmax(1))
    assert row["nll"] == pytest.approx(log_loss(LABELS, predicted, labels=range(10)), rel=1e-6)


# --- what is kept -------------------------------------------------------------------------------


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


def test_the_last_evaluations_are_kept_and_no_others(runs, tmp_path):
    assert weights.kept(runs["supervised"][0]) == [10, 20, 30]
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


# --- ensembles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", LEARNS)
@pytest.mark.parametrize("network", ["model", "ema"])
def test_an_ensemble_of_seeds_is_the_mean_of_softmax_by_hand(task, network, runs):
    report = evaluate(of_seeds(runs[task], network=network))
    every = [probabilities(run, T, network) for run in runs[task]]
    for place, predicted in enumerate(every):
        held_to(report.table.iloc[place], predicted)
    held_to(report.table.loc["ensemble"], np.mean(every, axis=0))
    np.testing.assert_allclose(
        np.exp(report.log_probabilities), np.mean(every, axis=0), rtol=1e-5, atol=1e-9
    )
    mean = report.table.loc["mean of members"]
    assert mean["nll"] == pytest.approx(np.mean([log_loss(LABELS, p) for p in every]), rel=1e-6)
    # Jensen's inequality.
    assert report.table.loc["ensemble", "nll"] < mean["nll"]


@pytest.mark.parametrize("task", LEARNS)
def test_the_single_member_is_what_the_run_itself_evaluated(task, runs):
    run = runs[task][0]
    row = evaluate(of_seeds([run])).table.iloc[0]
    assert row["accuracy"] == run.summary["final"]["validation.accuracy"]
    assert row["nll"] == pytest.approx(run.summary["final"]["validation.loss"], rel=1e-9)


def test_an_ensemble_of_one_run_s_checkpoints_and_its_average(runs):
    run = runs["supervised"][0]
    report = evaluate(of_checkpoints(run, network="model"))
    every = [probabilities(run, update, "model") for update in (10, 20, 30)]
    held_to(report.table.loc["ensemble"], np.mean(every, axis=0))
    both = [Member(run, T, "model"), Member(run, T, "ema")]
    every = [probabilities(run, T, network) for network in ("model", "ema")]
    held_to(evaluate(both).table.loc["ensemble"], np.mean(every, axis=0))


def test_an_ensemble_is_evaluated_where_the_device_has_no_float64(runs):
    members = of_seeds(runs["supervised"][:2])
    with device() as where:
        found = evaluate(members, device=where)
    np.testing.assert_allclose(found.table["nll"], evaluate(members).table["nll"], rtol=1e-5)


def test_an_ensemble_of_one_is_its_member(runs):
    table = evaluate(of_seeds(runs["supervised"][:1])).table
    for row in ("mean of members", "ensemble"):
        assert table.loc[row].tolist() == pytest.approx(table.iloc[0].tolist())


def test_the_test_split_is_read_when_it_is_asked_for(runs):
    run = runs["supervised"][0]
    found = evaluate(of_seeds([run], network="model"), "test").table.iloc[0]
    predicted = softmax(logits_by_hand(weights.load(run)["model"], "test"), axis=1)
    labels = load_splits("digits").test.labels.numpy()
    assert found["accuracy"] == accuracy_score(labels, predicted.argmax(1))


def test_the_cost_is_that_of_the_members_runs_each_once(runs):
    of_runs = runs["supervised"]
    table = evaluate(of_seeds(of_runs)).table
    assert table["updates"].tolist() == [T, T, T, T, 3 * T]
    assert table["cost_units"].tolist() == [T * BATCH * 3] * 4 + [3 * T * BATCH * 3]
    assert table["networks"].tolist() == [1, 1, 1, 1, 3]
    dear = evaluate(of_seeds(of_runs), k=3.5).table
    assert dear["cost_units"].tolist() == [T * BATCH * 4.5] * 4 + [3 * T * BATCH * 4.5]
    seconds = sum(run.summary["ledger"]["seconds"] for run in of_runs)
    assert table.loc["ensemble", "seconds"] == pytest.approx(seconds)
    one = evaluate(of_checkpoints(of_runs[0])).table.loc["ensemble"]
    assert one["updates"] == T
    assert one["cost_units"] == T * BATCH * 3
    assert one["networks"] == 3


def test_what_a_member_s_calibration_cost_is_in_the_table(tmp_path):
    method = {"mapping": {"name": "threshold", "t": "auto"}}
    calibration = {"updates": 8}
    run = train(run_config(method=method, calibration=calibration), tmp_path)
    row = evaluate(of_seeds([run])).table.iloc[0]
    assert row["updates"] == T + 8
    assert row["cost_units"] == (T + 8) * BATCH * 3


def test_the_mean_of_probabilities_holds_where_they_underflow():
    members = torch.tensor([[[-2000.0, 0.0]], [[-1990.0, 0.0]]], dtype=torch.float64)
    mean = ensembles.mean_log_probabilities(members)
    assert mean[0, 0].item() == pytest.approx(-1990 + np.log1p(np.exp(-10)) - log(2))


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(set(TASKS) - set(LEARNS)))
def test_tasks_without_classes_are_refused_with_the_reason(task, tmp_path):
    evaluation = {"splits": [], "test": False, "keep": 1}
    run = train(run_config(task, max_updates=1, evaluation=evaluation), tmp_path)
    with pytest.raises(ValueError, match=f"probabilities of classes; not {task}"):
        evaluate([Member(run, 1, "model")])


def test_bad_members_are_named(runs, tmp_path):
    members = of_seeds(runs["supervised"])
    with pytest.raises(ValueError, match="at least one member"):
        evaluate([])
    with pytest.raises(ValueError, match="members must differ"):
        evaluate([members[0], members[0]])
    with pytest.raises(ValueError, match="split must be 'validation' or 'test', not 'train'"):
        evaluate(members, "train")
    with pytest.raises(ValueError, match=r"no network 'swa' \(known: model, ema\)"):
        evaluate([Member(members[0].run, T, "swa")])
    none = train(run_config(max_updates=1, evaluation={"splits": [], "test": False}), tmp_path)
    with pytest.raises(StoreError, match="keeps no weights"):
        of_seeds([none])
