"""Seeds for an effect: against a closed form, and in its limits."""

from __future__ import annotations

import numpy as np
from scipy.stats import nct, t

from repeatlab.analysis.power import Pilot, power_table

RATIOS = np.array([0.5, 0.7, 1.0, 1.4, 2.0])


def pilot(slope: float, spread: float = 1.0, hours: float = 0.5) -> Pilot:
    return Pilot(RATIOS, slope * np.log(RATIOS), spread, hours)


def test_power_is_that_of_a_t_test():
    """One task, 12 seeds: the sign flip of paired differences of sd sqrt(2) is nearly Student's."""
    shift = -np.log1p(-0.25) * 3 / np.sqrt(2 / 12)
    expected = nct.sf(t.ppf(0.975, 11), 11, shift)
    table = power_table({"a": pilot(3)}, margin=0.1, share=0.25, seeds=[12], studies=200)
    assert abs(table["power"][0] - expected) < 0.11  # three standard errors of 200 studies


def test_more_seeds_find_more_and_cost_more():
    table = power_table({"a": pilot(6), "b": pilot(6)}, margin=0.2, seeds=[3, 6, 10], studies=60)
    assert table["power"].is_monotonic_increasing
    assert table["equivalence"].is_monotonic_increasing
    assert list(table["hours"]) == [3.0, 6.0, 10.0]


def test_three_seeds_can_decide_nothing():
    table = power_table({"a": pilot(100)}, margin=0.1, seeds=[3], studies=20)
    assert (table["power"][0], table["equivalence"][0]) == (0, 0)


def test_a_task_that_does_not_move_with_the_budget_never_shows_equivalence():
    table = power_table({"a": pilot(0.0)}, margin=0.1, seeds=[8], studies=60)
    assert table["equivalence"][0] < 0.05
