"""Frames and statistics against scipy, closed forms and hand-made records."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from repeatlab.analysis.frames import (
    Records,
    curves,
    final_table,
    load,
    mean_interval,
    target_summary,
    to_target,
)
from repeatlab.core.files import StoreError
from repeatlab.store.records import Store


def _evals(values: dict[tuple[str, int], list[float]], x=None) -> pd.DataFrame:
    """Return evaluations of one metric at updates 0, 10, 20, ... (or `x[method, seed]`)."""
    rows = []
    for (method, seed), series in values.items():
        for step, value in enumerate(series):
            rows.append(
                {
                    "task": "t",
                    "method": method,
                    "seed": seed,
                    "update": 10 * step,
                    "fresh_batches": (x or {}).get((method, seed), [10 * i for i in range(99)])[
                        step
                    ],
                    "seconds": 0.1 * step,
                    "split": "validation",
                    "metric": "accuracy",
                    "value": value,
                }
            )
    return pd.DataFrame(rows)


def test_the_interval_is_scipys():
    values = np.array([1.0, 4.0, 2.5, 3.0, 7.0])
    mean, low, high = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(3.5)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_one_run_has_no_interval():
    mean, low, high = mean_interval(np.array([[1.0, 2.0]]))
    assert mean.tolist() == [1.0, 2.0]
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_curves_at_shared_updates_are_plain_means():
    frame = curves(_evals({("a", 0): [0.0, 0.5, 1.0], ("a", 1): [0.2, 0.7, 0.8]}), "accuracy")
    assert frame["update"].tolist() == [0, 10, 20]
    assert frame["mean"].tolist() == pytest.approx([0.1, 0.6, 0.9])
    assert set(frame["n"]) == {2}


def test_curves_interpolate_within_what_every_seed_covers():
    x = {("a", 0): [0, 10, 20], ("a", 1): [0, 5, 15]}
    evals = _evals({("a", 0): [0.0, 1.0, 2.0], ("a", 1): [0.0, 0.5, 1.5]}, x)
    frame = curves(evals, "accuracy", x="fresh_batches")
    # Both runs are the line value = x / 10, so their mean is it, up to the end of the shorter.
    assert frame["fresh_batches"].max() == 15
    assert frame["mean"].to_numpy() == pytest.approx(frame["fresh_batches"].to_numpy() / 10)


def test_a_miss_is_censored_not_imputed():
    evals = _evals({("a", 0): [0.1, 0.9, 0.7], ("a", 1): [0.1, 0.2, 0.3]})
    times = to_target(evals, "accuracy", 0.9)
    assert times["reached"].tolist() == [True, False]
    assert times["update"].tolist() == [10, 20]


def test_a_target_that_was_met_before_the_first_update_was_met():
    values = {("a", 0): [0.95, 0.96], ("a", 1): [0.9, 0.9], ("b", 0): [0.1, 0.95]}
    times = to_target(_evals(values), "accuracy", 0.9)
    summary = target_summary(times).set_index("method")
    assert summary["update"].to_dict() == {"a": 0, "b": 10}
    # And where every method has met it at once.
    everybody = target_summary(to_target(_evals(values), "accuracy", 0.05))
    assert everybody["update"].tolist() == [0, 0]


def test_what_diverged_stays_a_miss_to_the_end():
    values = {("a", 0): [0.1, 0.2], ("a", 1): [0.9, 0.3], ("b", 0): [0.1, 0.2, 0.3, 0.4]}
    evals = _evals(values)
    evals["status"] = np.where(evals["method"] == "a", "diverged", "complete")
    times = to_target(evals, "accuracy", 0.9).set_index(["method", "seed"])
    # The one had reached it before it diverged; of the other it is known that it never will.
    assert times["reached"].to_dict() == {("a", 0): False, ("a", 1): True, ("b", 0): False}
    assert times["update"].to_dict() == {("a", 0): 30, ("a", 1): 0, ("b", 0): 30}
    assert curves(evals, "accuracy").groupby("method")["diverged"].first().to_dict() == {
        "a": 2,
        "b": 0,
    }


def test_lower_is_better_for_losses():
    evals = _evals({("a", 0): [2.0, 1.0, 0.5]}).assign(metric="loss")
    assert to_target(evals, "loss", 1.0)["update"].tolist() == [10]


@pytest.mark.parametrize(
    ("hits", "median"), [([10, 20, 30], 20), ([10, 20, None], 20), ([10, None, None], np.inf)]
)
def test_the_median_counts_misses_as_infinite(hits, median):
    rows = [("t", "a", s, hit is not None, hit or 50, hit or 50, 1.0) for s, hit in enumerate(hits)]
    columns = ["task", "method", "seed", "reached", "update", "fresh_batches", "seconds"]
    summary = target_summary(pd.DataFrame(rows, columns=columns))
    assert summary["update"].item() == median
    assert summary["reached"].item() == sum(hit is not None for hit in hits)


@pytest.fixture
def mixed(small_study, tmp_path):
    """Return the records of a study with complete, diverged, failed and missing runs."""
    study = small_study(
        tasks={
            "digits": {"name": "supervised", "lr": 0.05},
            "wild": {"name": "supervised", "lr": 1e12},
        },
        methods={"standard": {}, "linear": {"mapping": {"name": "linear", "t": 0.5}}},
    )
    study.run(tmp_path, workers=0)
    store = Store(tmp_path)
    first, second = (store.run(*run["run"]) for run in store.read_study("small")["runs"][:2])
    (first.path / "summary.json").unlink()
    first.note("interrupted")
    for file in second.path.iterdir():
        file.unlink()
    return load(tmp_path, "small")


def test_nothing_is_silently_dropped(mixed):
    counts = mixed.runs.groupby("task")["status"].value_counts().to_dict()
    assert counts == {
        ("digits", "complete"): 2,
        ("digits", "interrupted"): 1,
        ("digits", "missing"): 1,
        ("wild", "diverged"): 4,
    }
    assert len(mixed.missing) == 2
    assert len(mixed.run_ids) == 6
    table = final_table(mixed, "accuracy").set_index(["task", "method"])
    assert table["missing"].sum() == 2
    assert table.loc[("wild", "standard"), "diverged"] == 2
    assert np.isnan(table.loc[("wild", "standard"), "accuracy"])


def test_an_interval_needs_more_than_the_one_run_left(mixed):
    table = final_table(mixed, "accuracy").set_index(["task", "method"])
    assert table.loc[("digits", "standard"), "accuracy"] > 0
    assert np.isnan(table.loc[("digits", "standard"), "low"])


def test_calibration_is_part_of_the_time(small_study, tmp_path):
    study = small_study(seeds=1)
    study.run(tmp_path, workers=0)
    evals = load(tmp_path, "small").evals
    start = evals[evals["update"] == 0].groupby("method")["seconds"].first()
    assert start["standard"] == 0
    assert start["linear"] > 0


def test_data_that_was_looked_at_and_calibration_are_part_of_fresh_batches(small_study, tmp_path):
    methods = {
        "standard": {},
        "linear": {"mapping": {"name": "linear", "t": "auto"}},
        "rho": {"sampler": {"name": "rho_loss", "presample": 3, "holdout_updates": 4}},
    }
    study = small_study(methods=methods, seeds=1)
    study.run(tmp_path, workers=0)
    records = load(tmp_path, "small")
    evals = records.evals[records.evals["metric"] == "loss"].groupby("method")["fresh_batches"]
    counted = records.runs.set_index("method")["fresh_batches"]
    # Of calibration there are 8 batches; of the two models that rho-loss trains, 4 each.
    assert evals.first().to_dict() == {"standard": 0, "linear": 8, "rho": 8}
    assert evals.last().to_dict() == {
        "standard": 25,
        "linear": 8 + counted["linear"],
        "rho": 8 + 3 * 25,
    }


def test_calibration_in_a_simulator_is_part_of_its_steps(small_study, tmp_path):
    task = {"name": "reinforcement", "hidden": [8], "evaluation_episodes": 2}
    study = small_study(
        tasks={"cartpole": task},
        methods={"linear": {"mapping": {"name": "linear", "t": "auto"}}},
        seeds=1,
    )
    study.run(tmp_path, workers=0)
    records = load(tmp_path, "small")
    steps = records.evals.groupby("update")["environment_steps"].first()
    ledger = records.runs.iloc[0]
    assert ledger["calibration_environment_steps"] > 0
    assert steps.loc[0] >= ledger["calibration_environment_steps"]
    assert steps.max() == ledger["environment_steps"] + ledger["calibration_environment_steps"]


def test_an_unknown_study_tells_how_to_make_it(tmp_path):
    with pytest.raises(
        StoreError, match=r"no study 'x' \(it holds: none\); run the task's notebook"
    ):
        load(tmp_path, "x")


def test_reading_and_drawing_never_import_torch():
    code = (
        "import sys, repeatlab.figures, repeatlab.analysis.frames; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_limits_of_few_runs_hold_only_what_a_run_can_give():
    ends = {"return": [500.0, 480.0, 250.0], "accuracy": [0.99, 0.97, 0.9], "loss": [0.1, 0.2, 3.0]}
    frame = pd.DataFrame({f"validation.{name}": values for name, values in ends.items()})
    known = {"task": "t", "method": "standard", "status": "complete", "updates": 4, "seconds": 1.0}
    records = Records(frame.assign(**known, fresh_batches=4, seed=range(3), id=list("abc")))
    limits = {name: final_table(records, name)[["low", "high"]].to_numpy()[0] for name in ends}
    assert limits["return"][1] == 500
    assert 0 < limits["return"][0] < 410
    assert limits["accuracy"][1] == 1
    assert limits["accuracy"][0] < 0.95
    assert limits["loss"][0] < 0  # a task may define a loss that falls below 0


def test_the_limits_of_a_curve_hold_only_what_a_run_can_give():
    for name, least, most in (("return", 0, 500), ("accuracy", 0, 1), ("loss", -np.inf, np.inf)):
        ends = {("standard", seed): [0.0, value] for seed, value in enumerate((0.1, 0.9, 0.95))}
        curve = curves(_evals(ends).assign(metric=name), name)
        mean, low, high = mean_interval(np.array([0.1, 0.9, 0.95]))
        assert curve["low"].iloc[-1] == pytest.approx(max(low, least))
        assert curve["high"].iloc[-1] == pytest.approx(min(high, most))
        assert curve["mean"].iloc[-1] == pytest.approx(mean)
