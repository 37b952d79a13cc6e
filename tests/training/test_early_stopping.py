"""Runs that end for want of a better validation metric: when, with which records, and resumed."""

from __future__ import annotations

import signal
from math import nan
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repeatlab.analysis.frames import curves, final_table, load, to_target
from repeatlab.analysis.paired_differences import Endpoint, pairs
from repeatlab.core.schema import ConfigError, parse
from repeatlab.store.records import Run, Store
from repeatlab.studies.verification import damaged
from repeatlab.tasks import TASKS
from repeatlab.training import weights
from repeatlab.training.config import RunConfig
from repeatlab.training.early_stopping import EarlyStopping, Patience
from repeatlab.training.making import build_task, torch_settings, train
from repeatlab.training.one_run import CheckpointPlan, Training

T, EVERY, BATCH = 60, 4, 16
REPEATS = {
    "standard": {},
    "fixed5": {"mapping": {"name": "constant", "repeats": 5}},
    "linear": {"mapping": {"name": "linear", "t": 0.4}},
    "until": {"mapping": {"name": "until", "t": 0.05, "max_repeats": 6}},
    "selective": {"sampler": {"name": "selective"}},
}


def run_config(
    method: str | dict = "standard", *, stopping: Any = None, **fields: Any
) -> RunConfig:
    """Return a run at a rate at which the validation loss soon stops falling."""
    data = {
        "task": {"name": "supervised", "lr": 0.2, "batch_size": BATCH},
        "method": REPEATS[method] if isinstance(method, str) else method,
        "max_updates": T,
        "evaluation": {"every": EVERY, "test": False, "early_stopping": stopping},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


def losses(run: Run) -> pd.Series:
    """Return the validation losses of a run by update."""
    evals = run.evals
    chosen = evals[(evals["split"] == "validation") & (evals["metric"] == "loss")]
    return chosen.set_index("update")["value"]


def expected_stop(values: list[float], patience: int) -> int | None:
    """Return the place of the evaluation that ends a run: `patience` after the first minimum."""
    for place in range(len(values)):
        seen = np.array(values[: place + 1])
        seen[np.isnan(seen)] = np.inf
        # Where nothing was a number, waiting began before the first.
        best = int(seen.argmin()) if np.isfinite(seen).any() else -1
        if place - best >= patience:
            return place
    return None


def stop_of(values: list[float], **rule: Any) -> int | None:
    patience = Patience(EarlyStopping(**rule))
    for place, value in enumerate(values):
        patience.see(place, {"loss": value})
        if patience.exhausted:
            return place
    return None


# --- the rule -----------------------------------------------------------------------------------

values = st.lists(st.sampled_from([nan, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=1, max_size=12)


@given(values, st.integers(1, 5))
def test_the_end_is_patience_evaluations_after_the_first_minimum(values, patience):
    assert stop_of(values, patience=patience) == expected_stop(values, patience)


@given(values, st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0]))
def test_more_is_better_mirrors_less_is_better(values, patience, delta):
    rule = {"patience": patience, "min_delta": delta}
    mirrored = stop_of([-value for value in values], mode="max", **rule)
    assert mirrored == stop_of(values, **rule)


def test_a_new_best_must_exceed_the_last_by_more_than_min_delta():
    # Half a unit is not more than half a unit.
    assert stop_of([2.0, 1.75, 1.5, 1.25, 1.0], patience=2, min_delta=0.5) == 2
    assert stop_of([2.0, 1.75, 1.25, 1.0, 0.5], patience=2, min_delta=0.5) is None


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("method", REPEATS)
def test_a_run_ends_where_its_own_losses_say_and_is_the_longer_run_until_then(method, store):
    whole = train(run_config(method), store)
    stopped = train(run_config(method, stopping={"patience": 2}), store)
    series = losses(whole)
    place = expected_stop(series.tolist(), 2)
    assert place is not None  # else nothing is tested here
    end = int(series.index[place])
    assert 0 < end < T
    assert stopped.status == {"status": "complete"}
    series = series.loc[:end]
    assert losses(stopped).equals(series)
    columns = ["update", "fresh_batch", "repeat", "loss", "lr"]
    assert stopped.updates[columns].equals(whole.updates[columns][:end])
    ledger, summary = stopped.summary["ledger"], stopped.summary["early_stopping"]
    assert ledger["updates"] == end
    assert ledger["forward_samples"] == ledger["backward_samples"] == end * BATCH
    assert ledger["fresh_batches"] == whole.updates["fresh_batch"][:end].nunique()
    assert summary == {
        "stopped": True,
        "best": series.min(),
        "best_update": series.idxmin(),
        "unused_updates": T - end,
    }
    assert stopped.summary["final"]["validation.loss"] == series[end]
    assert list(damaged(store)) == []


def test_patience_that_lasts_changes_nothing(store):
    patient = train(run_config(stopping={"patience": T}), store)
    whole = train(run_config(), store)
    assert patient.summary["state_sha256"] == whole.summary["state_sha256"]
    assert patient.summary["ledger"]["updates"] == T
    assert patient.summary["early_stopping"]["unused_updates"] == 0
    assert not patient.summary["early_stopping"]["stopped"]
    assert whole.summary["early_stopping"] is None


def test_a_budget_of_cost_tells_what_of_it_is_left(store):
    budget = {"unit": "cost", "k": 3.0}
    run = train(run_config(stopping={"patience": 2}, budget=budget), store)
    left = run.summary["early_stopping"]
    end = run.summary["ledger"]["updates"]
    assert 0 < end < T
    assert left["unused_updates"] == T - end
    assert left["unused_cost_units"] == pytest.approx((T - end) * BATCH * 4)


def test_a_control_replays_a_source_up_to_its_early_end(store):
    source = run_config("linear", stopping={"patience": 2})
    replay = {"mapping": {"name": "trace", "of": REPEATS["linear"], "control": "replay"}}
    control = train(run_config(replay, stopping={"patience": 2}), store)
    original = train(source, store)
    assert control.summary["state_sha256"] == original.summary["state_sha256"]
    assert control.updates["loss"].equals(original.updates["loss"])


# --- with the weights of the best evaluation ----------------------------------------------------


def test_it_is_part_of_a_run_s_identity():
    plain = run_config(stopping={"patience": 2})
    assert run_config(stopping={"patience": 2, "restore_best": False}).run_id == plain.run_id
    restoring = run_config(stopping={"patience": 2, "restore_best": True})
    assert restoring.run_id != plain.run_id
    assert RunConfig.from_json(restoring.to_json()) == restoring


@pytest.mark.parametrize("task", TASKS)
def test_every_task_comes_back_to_the_weights_that_the_best_evaluation_saw(task, tmp_path):
    # Nothing is so much better than the first evaluation: the best weights are the initial ones.
    rule = {"patience": 5, "min_delta": 1e9, "restore_best": True}
    evaluation = {"every": 2, "splits": ["validation"], "early_stopping": rule, "keep": 2}
    fields = {"name": task, "batch_size": BATCH}
    fields |= {} if task in ("reinforcement", "ppo") else {"ema_decay": 0.5}
    run = run_config(task=fields, evaluation=evaluation, max_updates=4)
    made = train(run, tmp_path)
    assert made.summary["ledger"]["updates"] == 4
    final = made.summary["final"]
    with torch_settings(run.threads, run.seed):
        fresh = build_task(run, "cpu")  # never trained
        for split in ("validation", "test"):
            seen = fresh.evaluate(split)
            assert {m: final[f"{split}.{m}"] for m in seen} == seen
    evals = made.evals.set_index(["split", "update", "metric"])["value"]
    assert evals["validation", 0, "loss"] != evals["validation", 4, "loss"]
    assert evals["test", 4, "loss"] == final["test.loss"]
    assert made.summary["early_stopping"]["restored_update"] == 0
    assert weights.kept(made) == [0]
    for name, network in weights.networks(fresh).items():
        for key, tensor in network.state_dict().items():
            assert tensor.equal(weights.load(made)[name][key])


@pytest.mark.parametrize("patience", [2, T], ids=["stopped", "to the end"])
def test_a_run_is_tested_as_one_that_ends_with_its_best_evaluation(patience, store):
    evaluation = {"every": EVERY, "early_stopping": {"patience": patience, "restore_best": True}}
    restored = train(run_config(evaluation=evaluation | {"keep": 2}), store)
    best = int(losses(restored).idxmin())
    assert 0 < best < restored.summary["ledger"]["updates"]
    shorter = train(run_config(evaluation={"every": EVERY, "keep": 1}, max_updates=best), store)
    assert restored.summary["final"] == shorter.summary["final"]
    assert weights.kept(restored)[-1] == best
    for name, kept in weights.load(shorter).items():
        for key, tensor in kept.items():
            assert tensor.equal(weights.load(restored)[name][key])
    # What was tried afterwards stays in the record, and is paid for.
    plain = train(run_config(stopping={"patience": patience}), store)
    assert losses(restored).equals(losses(plain))
    seconds = {"seconds"}
    ledgers = [
        {name: count for name, count in run.summary["ledger"].items() if name not in seconds}
        for run in (restored, plain)
    ]
    assert ledgers[0] == ledgers[1]


def test_a_diverged_run_comes_back_to_nothing(tmp_path):
    task = {"name": "supervised", "lr": 1e20, "batch_size": BATCH}
    run = train(run_config(task=task, stopping={"patience": 9, "restore_best": True}), tmp_path)
    assert run.status["status"] == "diverged"
    assert run.summary["final"] == {}
    assert run.summary["early_stopping"]["restored_update"] is None


# --- stopped, killed and gone on with -----------------------------------------------------------


def same_record(first: Run, second: Run) -> None:
    """Hold two runs to the same end, bit for bit, but for the time they took."""

    def timeless(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[[name for name in frame if "seconds" not in name]]

    assert first.summary["state_sha256"] == second.summary["state_sha256"]
    assert first.summary["early_stopping"] == second.summary["early_stopping"]
    assert first.summary["final"] == second.summary["final"]
    assert timeless(first.updates).equals(timeless(second.updates))
    assert timeless(first.evals).equals(timeless(second.evals))


@pytest.mark.parametrize("restores", [False, True], ids=["last", "best"])
@pytest.mark.parametrize("method", ["fixed5", "until"])
def test_a_run_stopped_in_its_waiting_is_the_unbroken_run(
    method, restores, store, tmp_path, monkeypatch
):
    run = run_config(method, stopping={"patience": 3, "restore_best": restores})
    unbroken = train(run, store)
    end = unbroken.summary["ledger"]["updates"]
    best = unbroken.summary["early_stopping"]["best_update"]
    stops = {best + EVERY, best + EVERY + 1, end - 1, end}
    made: list[int] = []
    original = Training.visit

    def visit(self):
        make = original(self)

        def counted(batch):
            make(batch)
            made.append(self.repeater.updates)
            if self.repeater.updates in stops:
                signal.raise_signal(signal.SIGINT)

        return counted

    monkeypatch.setattr(Training, "visit", visit)
    interrupted = 0
    while True:
        try:
            resumed = train(run, tmp_path)
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 4  # at its end there is nothing to interrupt, and it is told all the same
    assert made == list(range(1, end + 1))
    same_record(unbroken, resumed)


@pytest.mark.parametrize(
    "limits",
    [
        {"stopping": {"patience": 2}},
        {"stopping": {"patience": 2, "restore_best": True}},
        {"budget": {"unit": "cost", "k": 2.0}, "method": "selective"},
    ],
    ids=["patience", "best", "budget"],
)
def test_a_kill_before_the_summary_makes_no_further_update(limits, store, tmp_path, monkeypatch):
    run = run_config(**limits)
    unbroken = train(run, store)
    assert unbroken.summary["ledger"]["updates"] < T
    finish = Training.end
    monkeypatch.setattr(Training, "end", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        train(run, tmp_path, plan=CheckpointPlan(updates=1))
    monkeypatch.setattr(Training, "end", finish)
    monkeypatch.setattr(Training, "visit", lambda _: lambda batch: pytest.fail("an update more"))
    same_record(unbroken, train(run, tmp_path))


# --- what the analysis makes of them ------------------------------------------------------------


def test_early_ends_are_neither_diverged_nor_missing_and_nothing_is_extrapolated(
    small_study, tmp_path
):
    evaluation = {"every": 5, "test": False, "early_stopping": {"patience": 1}}
    task = {"name": "supervised", "lr": 0.2, "batch_size": BATCH}
    study = small_study(tasks={"digits": task}, max_updates=100, evaluation=evaluation, seeds=3)
    study.run(tmp_path, workers=0)
    records = load(tmp_path, "small")
    ends = records.runs.set_index(["method", "seed"])["updates"]
    assert ends.min() < ends.max()  # else nothing is tested here
    assert (ends < 100).any()
    assert set(records.runs["status"]) == {"complete"}
    table = final_table(records, "loss").set_index("method")
    assert (table[["missing", "diverged"]] == 0).all(axis=None)
    last = records.evals[records.evals["metric"] == "loss"].query("split == 'validation'")
    last = last.sort_values("update").groupby(["method", "seed"])["value"].last()
    np.testing.assert_allclose(table["loss"], last.groupby("method").mean()[table.index])
    drawn = curves(records.evals, "loss").groupby("method")["update"].max()
    pd.testing.assert_series_equal(
        drawn, ends.groupby("method").min(), check_names=False, check_dtype=False
    )
    missed = to_target(records.evals, "loss", -1.0).set_index(["method", "seed"])
    assert not missed["reached"].any()
    assert missed["update"].equals(ends.loc[missed.index])
    paired = pairs(records, {"digits": Endpoint(metric="loss")})
    assert set(paired["status"]) == {"paired"}
    for row in paired.itertuples():
        assert row.x == min(ends[row.method, row.seed], ends["standard", row.seed])


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"patience": 0}, "patience: must be greater than or equal to 1"),
        ({"patience": 2, "mode": "less"}, "mode: must be 'min' or 'max'"),
        ({"patience": 2, "min_delta": -0.1}, "min_delta: must be greater than or equal"),
        ({}, "patience: Field required"),
    ],
)
def test_a_bad_rule_is_named(rule, message):
    with pytest.raises(ConfigError, match=f"evaluation.early_stopping.{message}"):
        run_config(stopping=rule)


def test_a_rule_needs_the_split_that_it_looks_at():
    evaluation = {"splits": ["train"], "early_stopping": {"patience": 2}}
    with pytest.raises(ConfigError, match="needs the validation split among splits"):
        run_config(evaluation=evaluation)


def test_a_metric_that_the_task_lacks_is_named_before_the_first_update(tmp_path):
    run = run_config(stopping={"patience": 2, "metric": "accurracy", "mode": "max"})
    with pytest.raises(ValueError, match=r"no metric 'accurracy' .known: accuracy, loss, macro_f1"):
        train(run, tmp_path)
    left = Store(tmp_path).run("supervised", run.run_id)
    assert left.status["status"] == "failed"
    assert not (left.path / "updates.arrow").exists()
