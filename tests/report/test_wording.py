"""Verdicts in words: what a reader is told of comparisons whose numbers are known."""

from __future__ import annotations

import numpy as np
import pytest

from repeatlab.analysis.declaration import Declaration, Goal
from repeatlab.analysis.plans import PlanRecords
from repeatlab.analysis.statistics import Interval
from repeatlab.analysis.updates_saved import Paired, Saved, saved
from repeatlab.analysis.verdicts import Comparison, Verdict
from repeatlab.report.paper.wording import effect, for_people, what_can_be_decided


def plan(n: int, arms: tuple[str, ...] = ("linear", "quantile")) -> PlanRecords:
    goals = {"digits": Goal("accuracy", 0.9, 400)}
    declared = Declaration(goals=goals, seeds=n, margin=0.1, arms=arms, real="linear")
    return PlanRecords("made", "0" * 16, [], declared, {}, {}, {})


def comparison(ratio: float, low: float, high: float, *, equal: float = 0.0, n: int = 8):
    limits = Interval(low, high, "sign flip")
    return Comparison(Saved(ratio, limits, limits, 0.01, n, 1, equal), 0.02, "-")


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (comparison(1.25, 1.0 / 1.1, 2.0), "saved 20 % of the updates (95 %: -10 % to 50 %)"),
        (comparison(0.8, 0.5, 1.25), "cost 25 % more updates (95 %: -20 % to 100 %)"),
        (comparison(0.8, 0.0, 0.9), "cost 25 % more updates (95 %: 11 % to no bound)"),
        (comparison(0.8, 0.5, np.inf), "cost 25 % more updates (95 %: no bound to 100 %)"),
        (
            comparison(1.25, 0.0, np.inf),
            "saved 20 % of the updates (its limits lie beyond every budget that was tried)",
        ),
        (comparison(1.0, 1.0, 1.0, equal=1.0), "was equal in every pair of runs"),
        (
            comparison(1.25, 0.0, np.inf, n=3),
            "saved 20 % of the updates (with so few seeds there are no limits)",
        ),
    ],
)
def test_an_effect_in_words(one, said):
    assert effect(one) == said


def test_three_seeds_decide_nothing_five_equivalence_and_eight_either():
    """p is 2^(1 - n) at best; H1 to H3 of two arms are five comparisons, of three seven."""
    assert "nothing can be decided" in what_can_be_decided(plan(3))
    assert "equivalence can be shown at this scale, a difference cannot" in (
        what_can_be_decided(plan(5))
    )
    assert 5 * 2**-7 < 0.05 < 7 * 2**-7
    assert "either way" in what_can_be_decided(plan(8))
    assert "a difference cannot" in what_can_be_decided(plan(8, ("linear", "quantile", "third")))


def test_a_verdict_names_dose_and_margin():
    arms = [{"arm": "linear", "mean_n": 1.304, "rates": [0.5, 2.0]}]
    one = comparison(1.25, 1.0 / 1.1, 2.0)
    verdict = Verdict("H2", "It is better.", "-", "equivalent", "-", {"linear": one})
    assert for_people(verdict, plan(8), arms) == (
        "The runs show no difference that would matter (by the margin of 10 %). Linear (1.30 "
        "visits a batch) saved 20 % of the updates (95 %: -10 % to 50 %)."
    )
    hardly = [{"arm": "linear", "mean_n": 1.02, "rates": [1.0, 1.0]}]
    told = for_people(Verdict("H1", "-", "-", "not tested", "-", {}), plan(8), hardly)
    assert told.startswith("This was not tested")
    assert told.endswith("Mean visits of a batch: linear 1.02.")


def test_the_least_p_that_is_said_is_one_that_the_verdicts_can_give():
    """Above 12 seeds their flips are drawn: fewer than there are."""
    steady = Paired(
        np.ones(30), np.zeros(30), np.zeros((30, 3)), np.array([0.5, 1, 2]), np.arange(30)
    )
    p = saved({"a": steady}).p
    assert f"p cannot fall below {p:.2g}:" in what_can_be_decided(plan(30))
