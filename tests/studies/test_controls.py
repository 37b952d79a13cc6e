"""The laboratory's own controls, at the scale of the quick profile: found, not found, equal.

The scale was chosen on other seeds than the eight that are judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from repeatlab.analysis.controls import CONTROLS, FINDS, controls_table, verdict
from repeatlab.analysis.evidence import hardness
from repeatlab.analysis.plan_tables import arms_table
from repeatlab.analysis.plans import load_plan
from repeatlab.cli import ROOT
from repeatlab.core.schema import parse
from repeatlab.report.notebooks import read_job
from repeatlab.store.records import Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.plan import Plan, run_plan

PLAN = read_job(ROOT / "params" / "quick" / "controls.yaml", ROOT).parameters["plan"]
NAME = PLAN["name"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return a store in which the plan has been run, in this process."""
    store = tmp_path_factory.mktemp("runs")
    run_plan(parse(Plan, PLAN), store, places=Places(workers=0))
    return store


def row(runs: Path, control: str):
    return controls_table(load_plan(runs, NAME)).set_index("control").loc[control]


def solved(runs: Path, control: str) -> tuple[int, int]:
    arm, other = row(runs, control)["reached"].split(" : ")
    return int(arm), int(other)


def test_it_finds_what_is_there_and_nothing_where_nothing_is(runs):
    table = controls_table(load_plan(runs, NAME))
    assert len(table) == len(CONTROLS)
    assert table["passed"].all(), table.to_string()
    assert verdict(table) == FINDS


def test_repetition_wins_at_one_low_rate_and_at_own_rates_nothing_is_left(runs):
    at_shared = solved(runs, "repetition at one low rate for all")
    at_own = solved(runs, "repetition at own rates, equal updates")
    assert at_shared[0] >= at_shared[1] + 4
    assert min(at_own) >= 7
    rates = load_plan(runs, NAME).rates["updates"]
    assert rates["standard"]["rate"] > 1
    assert row(runs, "repetition at own rates, equal updates")["p"] > 0.05


def test_at_equal_fresh_data_repetition_is_ahead_each_arm_at_its_best_rate(runs):
    arm, other = solved(runs, "repetition at equal fresh data, own rates")
    assert arm >= other + 4
    plan = load_plan(runs, NAME)
    own = plan.stages["own"].runs
    seen = own.groupby(["task", "method"])["fresh_batches"].unique()
    assert seen["updates", "fixed3"].tolist() == seen["third", "standard"].tolist() == [400]
    # The same said of one table: fresh data that the standard arm needs for it, over those used.
    reuse = arms_table(plan).set_index(["task", "arm"]).loc[("updates", "fixed3")]
    assert reuse["reuse_low"] > 1


def test_an_arm_that_visits_once_is_equal_to_the_bit_in_every_run(runs):
    own = load_plan(runs, NAME).stages["own"]
    losses = {
        arm: own.updates[(own.updates["method"] == arm) & (own.updates["task"] == "updates")]
        for arm in ("standard", "once")
    }
    assert losses["standard"]["loss"].tolist() == losses["once"]["loss"].tolist()
    assert row(runs, "one visit a batch: equal to the bit")["equal_pairs"] == 1.0


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
        ("updates-shared", ("standard", "fixed3"), "repetition at one low rate for all"),
        ("updates-own", ("once", "fixed3"), "one visit a batch: equal to the bit"),
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
            run | {"seed": (run["seed"] + 1) % 8} if run["method"] == "once" else run
            for run in found
        ]

    with damaged(runs, "updates-own", shift) as said:
        assert said.startswith("FAIL: one visit a batch")


def test_a_run_that_is_missing_is_a_failure_and_not_left_out(runs):
    def without_a_seed(found: list[dict]) -> list[dict]:
        return [run for run in found if (run["method"], run["seed"]) != ("hard", 7)]

    with damaged(runs, "planted-own", without_a_seed) as said:
        assert said.count("is missing") == 2
