"""Survival curves against scipy and by hand, scores against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from repeatlab.analysis.target_times import (
    algoperf_scores,
    kaplan_meier,
    performance_profile,
    ratios_to_best,
)

TIMES = np.array([10.0, 20.0, 20.0, 30.0, 40.0, 50.0])
REACHED = np.array([True, True, False, True, False, False])


def test_the_curve_is_the_product_written_out():
    curve = kaplan_meier(TIMES, REACHED)
    assert curve[:, 0].tolist() == [10, 20, 30, 40, 50]
    after_30 = 5 / 6 * 4 / 5 * 2 / 3
    assert curve[:, 1] == pytest.approx([5 / 6, 5 / 6 * 4 / 5, after_30, after_30, after_30])


def test_curve_and_limits_are_scipys():
    curve = kaplan_meier(TIMES, REACHED)
    found = stats.ecdf(stats.CensoredData.right_censored(TIMES, ~REACHED)).sf
    limits = found.confidence_interval(0.95, method="log-log")
    np.testing.assert_allclose(curve[:, 1], found.probabilities)
    np.testing.assert_allclose(curve[:, 2], limits.low.probabilities)
    np.testing.assert_allclose(curve[:, 3], limits.high.probabilities)


def test_scores_by_hand():
    assert algoperf_scores([[100, 200], [150, 100]]) == pytest.approx([5 / 6, 11 / 12])


def test_a_miss_is_infinite_and_scores_nothing_even_if_all_miss():
    times = [[100, np.inf, np.inf], [400, 50, np.inf]]
    assert ratios_to_best(times).tolist() == [[1, np.inf, np.inf], [4, 1, np.inf]]
    assert algoperf_scores(times) == pytest.approx([1 / 3, 1 / 3])


def test_the_profile_counts_what_is_solved_within_a_ratio():
    times = [[100, np.inf, 30], [200, 50, 30]]
    shares = performance_profile(times, [1.0, 1.9, 2.0, np.inf])
    expected = [[2 / 3, 2 / 3, 2 / 3, 2 / 3], [2 / 3, 2 / 3, 1, 1]]
    np.testing.assert_allclose(shares, expected)


@given(st.lists(st.lists(st.integers(1, 99), min_size=3, max_size=3), min_size=2, max_size=4))
def test_the_score_is_the_area_under_the_profile(times):
    grid = np.linspace(1, 4, 3001)
    area = performance_profile(times, grid)[:, :-1].mean(axis=1)
    assert algoperf_scores(times) == pytest.approx(area, abs=2e-3)


def test_what_was_solved_before_the_first_update_is_solved():
    assert ratios_to_best([[100, 0, 0], [100, 10, 0]]).tolist() == [[1, 1, 1], [1, np.inf, 1]]
    assert algoperf_scores([[100, 10], [100, 0]]) == pytest.approx([0.5, 1])


@pytest.mark.parametrize("times", [[[-1, 1], [1, 1]], [[np.nan, 1], [1, 1]], [1, 2]])
def test_times_must_be_a_table_of_numbers_from_0(times):
    with pytest.raises(ValueError, match="methods, workloads"):
        algoperf_scores(times)
