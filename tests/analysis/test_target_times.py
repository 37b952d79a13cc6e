"""Survival curves against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from repeatlab.analysis.target_times import kaplan_meier

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
