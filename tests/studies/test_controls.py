"""The laboratory's own controls, at the scale of the quick profile: found, not found, equal.

The scale was chosen on other seeds than those that are judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from repeatlab.analysis.controls import CONTROLS, FINDS, VACUOUS, controls_table, verdict
from repeatlab.analysis.evidence import hardness
from repeatlab.analysis.plans import load_plan
from repeatlab.cli import ROOT
from repeatlab.core.schema import parse
from repeatlab.figures.controls import FAILED, PASSED, control_rows
from repeatlab.store.records import Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.parameter_files import read_job
from repeatlab.studies.plan import Plan, run_plan

PLAN = read_job(ROOT / "params" / "quick" / "controls.yaml", ROOT).parameters["plan"]
NAME = PLAN["name"]
LOW_RATE = "repetition, one low rate for all"
FRESH_DATA = "repetition, equal fresh data, own rates"
EQUAL_UPDATES = "repetition, equal updates, own rates"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return a store in which the plan has been run, in this process."""
    store = tmp_path_factory.mktemp("runs")
    run_plan(parse(Plan, PLAN), store, places=Places(workers=0))
    return store


def row(runs: Path, control: str):
    return controls_table(load_plan(runs, NAME)).set_index("control").loc[control]


def solved(runs: Path, task: str, stage: str, arm: str) -> list[bool]:
    """Return seed by seed whether the target was reached at T, read from the runs' own rows."""
    done = load_plan(runs, NAME).stages[stage].done
    chosen = done[(done["task"] == task) & (done["method"] == arm)].sort_values("seed")
    return (chosen["validation.explained"] >= PLAN["tasks"][task]["target"]).tolist()


def test_it_finds_what_is_there_and_nothing_where_nothing_is(runs):
    table = controls_table(load_plan(runs, NAME))
    assert len(table) == len(CONTROLS)
    assert table["passed"].all(), table.to_string()
    assert verdict(table) == FINDS


def test_repetition_wins_at_one_low_rate_and_at_own_rates_nothing_is_left(runs):
    at_shared, at_own = (
        [sum(solved(runs, "updates", stage, arm)) for arm in ("fixed8", "standard")]
        for stage in ("shared", "own")
    )
    assert at_shared[0] >= at_shared[1] + 4
    assert min(at_own) >= PLAN["seeds"] - 1
    assert row(runs, LOW_RATE)["reached"] == "{} : {}".format(*at_shared)
    assert row(runs, EQUAL_UPDATES)["reached"] == "{} : {}".format(*at_own)
    rates = load_plan(runs, NAME).rates["updates"]
    assert rates["standard"]["rate"] > 1


def test_at_equal_fresh_data_repetition_is_ahead_each_arm_at_its_best_rate(runs):
    arm, other = (
        sum(solved(runs, task, "own", name))
        for task, name in (("updates", "fixed8"), ("fresh", "standard"))
    )
    assert arm >= other + 4
    plan = load_plan(runs, NAME)
    seen = plan.stages["own"].runs.groupby(["task", "method"])["fresh_batches"].unique()
    assert seen["updates", "fixed8"].tolist() == seen["fresh", "standard"].tolist() == [250]


def test_the_difference_is_that_of_the_way_to_the_target(runs):
    """0 where nothing is explained, 1 from the target on, whatever is explained above it."""
    done = load_plan(runs, NAME).stages["own"].done
    ends = done[done["task"] == "planted"].pivot(
        index="seed", columns="method", values="validation.explained"
    )
    way = np.minimum(np.maximum(ends, 0), 0.5) / 0.5
    expected = (way["hard"] - way["windowed"]).mean()
    assert row(runs, "hardness against any batch")["difference"] == pytest.approx(expected)


def test_an_arm_that_visits_once_is_equal_to_the_bit_in_every_run(runs):
    own = load_plan(runs, NAME).stages["own"]
    losses = {
        arm: own.updates[(own.updates["method"] == arm) & (own.updates["task"] == "updates")]
        for arm in ("standard", "once")
    }
    assert len(losses["once"]) == PLAN["seeds"] * PLAN["tasks"]["updates"]["max_updates"]
    assert losses["standard"]["loss"].tolist() == losses["once"]["loss"].tolist()


def test_where_hardness_helps_the_extra_visits_go_to_the_hard(runs):
    updates = load_plan(runs, NAME).stages["own"].updates
    planted = updates[updates["task"] == "planted"]
    found = {
        arm: [hardness(run) for _, run in planted[planted["method"] == arm].groupby("seed")]
        for arm in ("hard", "windowed", "anti_hard")
    }
    assert min(found["hard"]) > 0.5
    assert max(map(abs, found["windowed"])) < 0.3
    assert max(found["anti_hard"]) < 0


# --- planted faults ---------------------------------------------------------------------------


@contextmanager
def damaged(runs: Path, stage: str, change: Callable[[list[dict]], list[dict]]) -> Iterator[str]:
    """Give what the laboratory says of itself with a study's file changed."""
    store, name = Store(runs), f"{NAME}-{stage}"
    right = store.read_study(name)
    store.write_study(name, right | {"runs": change([dict(run) for run in right["runs"]])})
    try:
        yield verdict(controls_table(load_plan(runs, NAME)))
    finally:
        store.write_study(name, right)


def swapping(one: str, other: str) -> Callable[[list[dict]], list[dict]]:
    names = {one: other, other: one}
    return lambda found: [
        run | {"method": names.get(run["method"], run["method"])} for run in found
    ]


@pytest.mark.parametrize(
    ("stage", "arms", "control"),
    [
        ("updates-shared", ("standard", "fixed8"), LOW_RATE),
        ("updates-own", ("once", "fixed8"), "one visit a batch, by a mapping"),
        ("planted-own", ("hard", "windowed"), "hardness against any batch"),
        ("planted-own", ("hard", "anti_hard"), "hardness against easiness"),
    ],
)
def test_the_labels_of_two_arms_swapped_are_found(runs, stage, arms, control):
    with damaged(runs, stage, swapping(*arms)) as said:
        assert said.startswith("FAIL: ")
        assert control in said
    assert verdict(controls_table(load_plan(runs, NAME))) == FINDS


def test_arms_whose_pairs_are_of_different_seeds_are_not_equal_to_the_bit(runs):
    def shift(found: list[dict]) -> list[dict]:
        return [
            run | {"seed": (run["seed"] + 1) % PLAN["seeds"]} if run["method"] == "once" else run
            for run in found
        ]

    with damaged(runs, "updates-own", shift) as said:
        assert said.startswith("FAIL: one visit a batch")


def test_a_run_that_is_missing_is_a_failure_and_not_left_out(runs):
    def without_a_seed(found: list[dict]) -> list[dict]:
        return [run for run in found if (run["method"], run["seed"]) != ("hard", 3)]

    with damaged(runs, "planted-own", without_a_seed) as said:
        assert said.count("missing") == 2


def test_nothing_found_where_no_arm_finds_the_target_is_no_control(runs):
    """At the shared low rate of one visit a batch hardly a run does: two such arms are alike."""

    def at_the_low_rate(found: list[dict]) -> list[dict]:
        low = {run["seed"]: run["run"] for run in shared if run["method"] == "standard"}
        others = [run for run in found if run["method"] not in ("fixed8", "standard")]
        both = [
            run | {"run": low[run["seed"] if run["method"] == "standard" else 9 - run["seed"]]}
            for run in found
            if run not in others
        ]
        return others + both

    shared = Store(runs).read_study(f"{NAME}-updates-shared")["runs"]
    with damaged(runs, "updates-own", at_the_low_rate) as said:
        assert f"{EQUAL_UPDATES}: {VACUOUS}" in said


# --- the figure -------------------------------------------------------------------------------


def test_the_figure_shows_a_control_that_fails_in_another_colour(runs):
    with damaged(runs, "planted-own", swapping("hard", "windowed")):
        table = controls_table(load_plan(runs, NAME))
    (axes,) = control_rows(table).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_color() == FAILED for dot in dots] == (~table["passed"]).tolist()
    assert {dot.get_color() for dot in dots} == {PASSED, FAILED}
    assert [dot.get_xdata()[0] for dot in dots] == table["difference"].tolist()
