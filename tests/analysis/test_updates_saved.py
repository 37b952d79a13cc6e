"""Updates saved: closed forms, a test by brute force, coverage by simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repeatlab.analysis.statistics import sign_flips
from repeatlab.analysis.updates_saved import Paired, saved, saved_until, share_saved

RATIOS = np.array([0.5, 0.7, 1.0, 1.4, 2.0])


def task(ratio: float, *, n: int = 8, noise: float = 0.1, slope: float = 1.0, seed: int = 0):
    """Return a task on which the arm is as good as the standard one at `ratio` T."""
    random = np.random.default_rng(seed)
    standard = slope * np.log(RATIOS) + noise * random.normal(size=(n, len(RATIOS)))
    arm = slope * np.log(ratio) + noise * random.normal(size=n)
    return Paired(arm, standard[:, 2], standard, RATIOS, np.arange(n))


def test_an_arm_that_is_the_standard_one_at_another_budget_has_its_ratio():
    found = saved({"a": task(1.4, noise=1e-4), "b": task(1.4, noise=1e-4, seed=1)})
    assert found.ratio == pytest.approx(1.4, rel=1e-3)
    assert found.interval.low < 1.4 < found.interval.high
    assert share_saved(1.4) == pytest.approx(1 - 1 / 1.4)


def test_p_is_that_of_all_sign_patterns_by_hand():
    differences = np.random.default_rng(3).normal(size=(7, 2)) + 0.3
    sums = [abs(np.array(signs) @ differences) for signs in product([1, -1], repeat=7)]
    expected = np.mean(np.array(sums) >= np.abs(differences.sum(axis=0)) - 1e-12, axis=0)
    assert sign_flips(differences) == pytest.approx(expected)


@given(
    ratio=st.floats(0.6, 1.6),
    n=st.integers(3, 10),
    noise=st.floats(0.01, 2.0),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
@example(ratio=1.505859375, n=7, noise=0.01, seed=2232)  # no ratio of the grid is in the 90 %
def test_interval_and_p_are_one_test(ratio, n, noise, seed):
    found = saved({"a": task(ratio, n=n, noise=noise, seed=seed)})
    outside = found.interval.low > 1 or found.interval.high < 1
    # Limits lie between rejected ratios, which may surround one that is not rejected.
    assert not outside or found.p < 0.05
    if found.p < 0.05:
        assert outside or found.interval.low < 1 < found.interval.high
    assert found.within.low >= found.interval.low
    assert found.within.high <= found.interval.high


def test_equal_arms_differ_by_nothing_and_are_known_to_be_equal():
    both = task(1.0)
    equal = Paired(both.other, both.other, both.standard, RATIOS, both.seeds)
    found = saved({"a": equal})
    assert (found.ratio, found.p, found.equal) == (1.0, 1.0, 1.0)
    assert found.interval.low < 1 < found.interval.high


def test_a_constant_shift_of_rounding_is_no_difference():
    both = task(1.0)
    shifted = Paired(both.other * (1 + 1e-13), both.other, both.standard, RATIOS, both.seeds)
    assert saved({"a": shifted}).p == 1.0


def test_a_task_that_differs_by_next_to_nothing_does_not_decide_over_the_others():
    """A constant 1e-6 beside five tasks without effect: in its own units it would be huge."""
    others = {str(i): task(1.0, seed=i) for i in range(5)}
    quiet = task(1.0, seed=9)
    constant = Paired(quiet.other + 1e-6, quiet.other, quiet.standard, RATIOS, quiet.seeds)
    assert abs(saved(others | {"c": constant}).ratio - 1) < 0.05


def test_what_no_budget_reaches_lies_beyond_them():
    found = saved({"a": task(50.0, noise=0.01)})
    assert found.ratio == np.inf
    assert found.interval.high == np.inf
    worst = saved({"a": task(0.01, noise=0.01)})
    assert worst.ratio == 0
    assert worst.interval.low == 0


def test_few_seeds_decide_nothing():
    found = saved({"a": task(1.9, n=3, noise=0.01)})
    assert found.p == 0.25
    assert found.direction() == 0
    assert (found.interval.low, found.interval.high) == (0, np.inf)


def test_whole_seeds_are_flipped_over_tasks_that_share_them():
    one = task(1.2, noise=0.5)
    assert saved({"a": one}).p == saved({"a": one, "b": one, "c": one}).p


@pytest.mark.parametrize("ratio", [1.0, 1.15])
def test_limits_cover_the_truth_and_equivalence_keeps_its_level(ratio):
    """300 studies of four tasks with eight seeds: 95 % limits, and 5 % at the margin."""
    found = [
        saved({str(k): task(ratio, slope=3, noise=0.3, seed=10 * i + k) for k in range(4)})
        for i in range(300)
    ]
    cover = np.mean([one.interval.low <= ratio <= one.interval.high for one in found])
    assert cover >= 0.92
    if ratio > 1:
        assert np.mean([one.equivalent(1 - 1 / ratio) for one in found]) <= 0.08
    else:
        assert np.mean([one.p < 0.05 for one in found]) <= 0.08


def test_time_to_a_target_is_a_ratio_of_times():
    seeds = np.arange(8)
    theirs = np.linspace(100, 200, 8)
    found = saved_until({"a": (seeds, theirs / 1.25, theirs)})
    assert found.ratio == pytest.approx(1.25, rel=1e-2)
    assert share_saved(found.ratio) == pytest.approx(0.2, abs=0.01)


def test_two_runs_that_miss_the_target_tie():
    seeds, missed = np.arange(8), np.full(8, 400.0)
    found = saved_until({"a": (seeds, missed, missed)})
    assert (found.p, found.equal) == (1.0, 1.0)
