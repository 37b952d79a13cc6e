"""Pairs, findings and tables from hand-made runs, mixed stores among them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from repeatlab.analysis.comparison import comparison_table
from repeatlab.analysis.declaration import Goal
from repeatlab.analysis.evidence import updates_until
from repeatlab.analysis.frames import Records, final_table, load, to_target, together, with_cost
from repeatlab.analysis.paired_differences import Endpoint, pairs
from repeatlab.analysis.statistics import flip_interval, holm, sign_flip
from repeatlab.analysis.target_times import kaplan_meier
from repeatlab.cost import Ledger
from repeatlab.store.records import Store

ACCURACY, LOSS = Endpoint(metric="accuracy", k=2.0), Endpoint(metric="loss")
EVERY, BATCH = 10, 4


@pytest.fixture
def records(tmp_path):
    """Return a function that writes runs to a store and reads them as records.

    A run is given by its values at updates 0, 10, 20, ..., or by its status where it has none.
    `repeats` is how many updates a method makes of a fresh batch, `calibration` what t cost it,
    `holdout` the seconds that its sampler needed beforehand, `pretraining` those of (task, method).
    """

    def make(
        runs,
        *,
        metric="accuracy",
        repeats=None,
        calibration=None,
        holdout=None,
        pretraining=None,
        name="made",
    ) -> Records:
        store, planned = Store(tmp_path), []
        for task, method, seed in runs:
            values, status = runs[task, method, seed], "complete"
            if isinstance(values, tuple):
                values, status = values
            run_id = f"{task}-{method}-{seed}"
            run = store.run(name, run_id)
            planned.append({"task": task, "method": method, "seed": seed, "run": [name, run_id]})
            if status != "missing":
                writer = store.begin(run, {}, {})
                for place, value in enumerate(values):
                    done = place * EVERY
                    ledger = Ledger(
                        updates=done,
                        fresh_batches=done // (repeats or {}).get(method, 1),
                        forward_samples=done * BATCH,
                        backward_samples=done * BATCH,
                        seconds=float(done),
                        calibration_forward_samples=(calibration or {}).get(method, 0),
                        calibration_backward_samples=(calibration or {}).get(method, 0),
                        calibration_seconds=float((calibration or {}).get(method, 0)),
                        holdout_seconds=(holdout or {}).get(method, 0.0),
                        pretraining_seconds=(pretraining or {}).get((task, method), 0.0),
                    ).to_json()
                    writer.evals(done, {"validation": {metric: value}}, ledger)
                if status == "failed":
                    writer.fail(RuntimeError("lost"))
                else:
                    final = {f"validation.{metric}": values[-1]} if status == "complete" else {}
                    writer.finish(status, {"ledger": ledger, "final": final})
        store.write_study(name, {"name": name, "max_updates": 20, "runs": planned})
        return load(tmp_path, name)

    return make


def values_of(frame: pd.DataFrame, column: str) -> list:
    return frame.set_index(["task", "method", "seed"])[column].tolist()


# --- pairs ------------------------------------------------------------------------------------


def test_positive_is_better_whatever_the_metric(records):
    runs = {("t", "standard", 0): [0, 1, 2.0], ("t", "linear", 0): [0, 1, 3.5]}
    assert pairs(records(runs), {"t": ACCURACY})["difference"].tolist() == [1.5]
    as_loss = records(runs, metric="loss", name="other")
    assert pairs(as_loss, {"t": LOSS})["difference"].tolist() == [-1.5]


def test_at_equal_fresh_batches_the_longer_run_is_read_before_its_end(records):
    runs = {("t", "standard", 0): [0.0, 0.4, 0.8], ("t", "twice", 0): [0.0, 0.3, 0.5]}
    frame = pairs(records(runs, repeats={"twice": 2}), {"t": ACCURACY}, axis="fresh_batches")
    # 20 updates are 20 fresh batches of the standard arm and 10 of the other.
    assert frame[["x", "value", "other"]].to_numpy().tolist() == [[10, 0.5, 0.4]]


def test_values_between_evaluations_are_interpolated(records):
    runs = {("t", "standard", 0): [0.0, 0.4, 0.8], ("t", "often", 0): [0.0, 0.3, 0.5]}
    frame = pairs(records(runs, repeats={"often": 4}), {"t": ACCURACY}, axis="fresh_batches")
    assert frame["x"].item() == 5
    assert frame["other"].item() == pytest.approx(0.2)


def test_calibration_is_charged_at_equal_cost_and_seconds_but_is_no_update(records):
    runs = {("t", "standard", 0): [0.0, 0.4, 0.8], ("t", "linear", 0): [0.0, 0.4, 0.8]}
    # Half of what the 20 updates with 4 samples each cost.
    study = records(runs, calibration={"linear": 10 * BATCH})
    at = {
        axis: pairs(study, {"t": ACCURACY}, axis=axis).iloc[0]
        for axis in ("update", "cost", "seconds")
    }
    assert at["update"]["difference"] == 0
    assert at["cost"]["x"] == 20 * BATCH * 3
    assert at["cost"]["value"] == pytest.approx(0.4)
    # 40 s of calibration are more than the standard arm's 20: nothing has been learnt by then.
    assert at["seconds"]["value"] == 0.0


def test_what_a_sampler_needed_beforehand_is_part_of_its_time(records):
    runs = {("t", "standard", 0): [0.0, 0.4, 0.8], ("t", "rho", 0): [0.0, 0.4, 0.8]}
    frame = pairs(records(runs, holdout={"rho": 15.0}), {"t": ACCURACY}, axis="seconds")
    assert frame[["x", "value", "other"]].to_numpy().tolist() == [[20, pytest.approx(0.2), 0.8]]


def test_what_a_task_had_behind_it_moves_its_arms_alike(records):
    arms = ("standard", "twice", "thrice")
    runs = {(task, arm, 0): [0.0, 0.4, 0.8] for task in ("known", "new") for arm in arms}
    # One and the same pretraining, on three processes that were not equally fast.
    took = {("known", "standard"): 7.0, ("known", "twice"): 5.0, ("known", "thrice"): 6.0}
    study = records(runs, pretraining=took)
    starts = study.evals.query("update == 0").groupby("task")["seconds"].unique()
    assert {task: seconds.tolist() for task, seconds in starts.items()} == {
        "known": [6.0],
        "new": [0.0],
    }
    frame = pairs(study, {"known": ACCURACY, "new": ACCURACY}, axis="seconds")
    assert frame["x"].tolist() == [26, 26, 20, 20]
    assert frame["difference"].tolist() == [0] * 4
    table = final_table(study, "accuracy").groupby("task")["seconds"].unique()
    assert {task: seconds.tolist() for task, seconds in table.items()} == {
        "known": [26.0],
        "new": [20.0],
    }


def test_the_cost_is_the_ledgers(records):
    ledger = Ledger(
        forward_samples=7, backward_samples=5, scoring_samples=11,
        calibration_forward_samples=3, calibration_backward_samples=3, holdout_forward_samples=2,
        pretraining_forward_samples=13, pretraining_backward_samples=9,
    )  # fmt: skip
    rows = pd.DataFrame([{"task": "a"} | ledger.to_json(), {"task": "b"} | ledger.to_json()])
    cost = with_cost(rows, {"a": 1.5, "b": 2.0})["cost"]
    assert cost.tolist() == [ledger.cost_units(1.5), ledger.cost_units(2.0)]
    assert with_cost(rows, 2.0)["cost"].tolist() == [ledger.cost_units(2.0)] * 2
    later = ("scoring", "holdout", "pretraining")
    old = rows.drop(columns=[name for name in rows if name.startswith(later)])
    assert with_cost(old, 2.0)["cost"].tolist() == [7 + 2 * 5 + 3 * 3] * 2


def test_a_split_that_was_read_once_has_no_other_range(records):
    """Only the end was evaluated: at the same end it compares, before it nothing is known."""
    study = records({("t", "standard", 0): [0.0, 0.5, 0.8], ("t", "twice", 0): [0.0, 0.5, 0.9]})
    last = study.evals[study.evals["update"] == 20]
    last.loc[last["method"] == "twice", "fresh_batches"] = 10
    study.__dict__["evals"] = last
    assert pairs(study, {"t": ACCURACY})["difference"].item() == pytest.approx(0.1)
    apart = pairs(study, {"t": ACCURACY}, axis="fresh_batches")
    assert apart["status"].item() == "no common range"
    note = comparison_table(apart)["note"].item()
    assert note == "1 of 1 pairs without a range in common (t seed 0)"


def test_what_was_not_counted_cannot_be_compared_on(records):
    study = records({("t", arm, 0): [0.0, 0.5] for arm in ("standard", "linear")})
    frame = pairs(study, {"t": ACCURACY}, axis="environment_steps")
    assert frame["status"].item() == "no common range"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "epoch"}, "axis must be one of update, .*; not 'epoch'"),
        ({"axis": "cost"}, "k must be given for t to compare at equal cost"),
    ],
)
def test_a_wrong_question_names_the_right_ones(records, options, message):
    study = records({("t", "standard", 0): [0.0], ("t", "linear", 0): [0.0]})
    with pytest.raises(ValueError, match=message):
        pairs(study, {"t": Endpoint(metric="accuracy")}, **options)


# --- mixed stores -----------------------------------------------------------------------------


def test_a_diverged_run_is_worst_and_two_tie(records):
    runs = {
        ("t", "standard", 0): [0.1, 0.5, 0.6],
        ("t", "linear", 0): ([0.1, 0.9], "diverged"),
        ("t", "standard", 1): ([0.1], "diverged"),
        ("t", "linear", 1): [0.1, 0.2, 0.1],
        ("t", "standard", 2): ([0.1], "diverged"),
        ("t", "linear", 2): ([0.1, 0.9], "diverged"),
        ("t", "standard", 3): [0.1, 0.5, 0.6],
        ("t", "linear", 3): [0.1, 0.5, np.nan],
    }
    study = records(runs)
    frame = pairs(study, {"t": ACCURACY})
    assert frame["difference"].tolist() == [-np.inf, np.inf, 0, -np.inf]
    assert set(frame["status"]) == {"diverged"}
    row = comparison_table(frame).iloc[0]
    assert (row["n"], row["n_diverged"], row["n_missing"]) == (4, 4, 0)
    assert row["interval"] == "signed ranks"
    assert "4 diverged, counted as worst by rank" in row["note"]
    as_loss = records(runs, metric="loss", name="other")
    assert pairs(as_loss, {"t": LOSS})["difference"].tolist() == [-np.inf, np.inf, 0, -np.inf]


def test_what_a_run_did_after_it_reached_the_target_does_not_matter(records):
    """Times to target and their survival curve say the same of one that diverged later."""
    runs = {
        ("t", "standard", 0): [0.1, 0.5, 0.9],
        ("t", "linear", 0): ([0.5, 0.9], "diverged"),
        ("t", "standard", 1): ([0.1, 0.6], "diverged"),
        ("t", "linear", 1): ([0.1, 0.1], "diverged"),
        ("t", "standard", 2): [0.1, 0.1, 0.9],
        ("t", "linear", 2): ([0.1, 0.1], "diverged"),
    }
    study = records(runs)
    goal, rows = Goal("accuracy", 0.4, 20), study.measured("accuracy", "validation")
    until = {m: updates_until(run, goal, 20)[0] for m, run in rows.groupby(["method", "seed"])}
    assert [until["linear", seed] for seed in range(3)] == [0, 20, 20]
    times = to_target(study.evals, "accuracy", 0.4).set_index(["method", "seed"])
    assert times["reached"].tolist() == [True, True, True, False, True, False]
    ours = times.loc["linear"]
    assert kaplan_meier(ours["update"], ours["reached"]).tolist()[0][:2] == [
        0,
        pytest.approx(2 / 3),
    ]


@pytest.fixture
def mixed(records) -> Records:
    better = {
        ("t", method, seed): [0, 0.5, 0.5 + 0.01 * seed + (method != "standard") * (1 + seed) / 20]
        for method in ("standard", "full", "lost", "short", "single")
        for seed in range(8)
    }
    better["t", "lost", 2] = ([], "missing")
    better["t", "lost", 5] = ([0, 0.5], "failed")
    for seed in range(1, 8):
        del better["t", "single", seed]
        if seed > 5:
            del better["t", "short", seed]
    return records(better)


def test_every_row_says_what_it_rests_on(mixed):
    table = comparison_table(pairs(mixed, {"t": ACCURACY})).set_index("method")
    assert table["n"].to_dict() == {"full": 8, "lost": 6, "short": 6, "single": 1}
    assert table["n_missing"].to_dict() == {"full": 0, "lost": 2, "short": 2, "single": 7}
    notes = table["note"].to_dict()
    assert notes["full"] == ""
    assert notes["lost"] == "2 of 8 pairs missing (t seed 2, 5)"
    assert notes["short"] == "2 of 8 pairs missing (t seed 6, 7)"
    assert notes["single"] == (
        "7 of 8 pairs missing (t seed 1, 2, 3, 4, 5, 6, 7); n = 1: p cannot fall below 1"
    )


def test_what_misses_a_run_is_undecided_and_does_not_help_the_others(mixed):
    table = comparison_table(pairs(mixed, {"t": ACCURACY})).set_index("method")
    assert table["decision"].to_dict() == {
        "full": "better",
        "lost": "undecided",
        "short": "undecided",
        "single": "undecided",
    }
    assert table.loc["full", "p_adjusted"] == 4 * 2**-7
    assert table["p_adjusted"].isna().tolist() == [False, True, True, True]


def test_a_task_without_any_run_is_missing_for_every_method(mixed):
    endpoints = {"t": ACCURACY, "nowhere": ACCURACY}
    table = comparison_table(pairs(mixed, endpoints))
    absent = table[table["task"] == "nowhere"]
    assert absent["method"].tolist() == ["standard", "full", "lost", "short", "single"]
    assert set(absent["note"]) == {"1 of 1 pairs missing (nowhere)"}
    assert set(absent["n"]) == {0}
    assert absent["difference"].isna().all()


def test_without_a_standard_arm_all_pairs_are_missing(records):
    study = records({("t", "linear", seed): [0.0, 0.5] for seed in range(3)})
    frame = pairs(study, {"t": ACCURACY})
    assert frame["status"].tolist() == ["missing"] * 3


def test_no_records_no_rows():
    frame = pairs(together({}), {"t": ACCURACY})
    assert frame.empty
    assert comparison_table(frame).empty


def test_studies_together_keep_their_tasks_apart(records):
    one = records({("digits", arm, 0): [0.0, 1.0] for arm in ("standard", "a")})
    two = {
        (task, arm, 0): [0.0, 2.0] for task in ("digits", "letters") for arm in ("standard", "a")
    }
    study = together({"first": one, "second": records(two, name="other")})
    tasks = ["first", "second: digits", "second: letters"]
    assert study.runs["task"].unique().tolist() == tasks
    highest = study.evals.groupby("task")["value"].max()
    assert highest[tasks].tolist() == [1.0, 2.0, 2.0]


# --- tables -----------------------------------------------------------------------------------


@pytest.fixture
def study(records) -> Records:
    random = np.random.default_rng(5)
    runs = {}
    for task in ("a", "b"):
        for seed in range(8):
            start = random.normal()
            for method, gain in (("standard", 0), ("up", 2), ("same", 0)):
                runs[task, method, seed] = [0, 0, start + gain + random.normal()]
    return records(runs)


def test_a_row_is_the_paired_analysis_of_its_task(study):
    frame = pairs(study, {"a": ACCURACY, "b": ACCURACY})
    table = comparison_table(frame, seed=1)
    for row in table.itertuples():
        mine = frame[(frame["task"] == row.task) & (frame["method"] == row.method)]
        d = mine["difference"].to_numpy()
        assert row.difference == pytest.approx(d.mean())
        assert (row.low, row.high, row.interval) == flip_interval(d)
        assert row.p == sign_flip(d)
    assert table["p_adjusted"].tolist() == pytest.approx(holm(table["p"]).tolist())
    pd.testing.assert_frame_equal(table, comparison_table(frame, seed=1))


def test_p_could_have_been_so_small_at_best(study):
    table = comparison_table(pairs(study, {"a": ACCURACY, "b": ACCURACY}))
    for place in range(len(table)):
        best = table["p"].to_numpy().copy()
        best[place] = 2**-7
        assert table["least_p_adjusted"][place] == pytest.approx(holm(best)[place])


def _pairs(values: dict[str, tuple[list[float], list[float]]]) -> pd.DataFrame:
    """Return the pairs of `linear` with the standard arm: task -> both arms' values by seed."""
    rows = [
        pd.DataFrame(
            {"task": task, "seed": range(len(ours)), "value": np.array(ours, float),
             "other": np.array(theirs, float)}
        )
        for task, (ours, theirs) in values.items()
    ]  # fmt: skip
    frame = pd.concat(rows).assign(method="linear", against="standard", sign=1, status="paired")
    return frame.assign(difference=frame["value"] - frame["other"])


def test_pairs_without_any_difference_are_equal_not_few():
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    row = comparison_table(_pairs({"t": (values, values)})).iloc[0]
    assert (row["decision"], row["note"]) == ("equal", "all 8 pairs are equal")


def test_a_family_of_seven_cannot_be_decided_with_eight_seeds(records):
    runs = {}
    for seed in range(8):
        for place, method in enumerate(["standard", *"abcdefg"]):
            runs["t", method, seed] = [0, 0, place + 0.01 * seed * place]
    study = records(runs)
    for methods, decision in ((list("abcdef"), "better"), (list("abcdefg"), "undecided")):
        frame = pairs(study, {"t": ACCURACY}, methods=methods)
        assert set(comparison_table(frame)["decision"]) == {decision}
