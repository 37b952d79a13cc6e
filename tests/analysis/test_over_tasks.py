"""Effects over tasks against statsmodels, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student
from statsmodels.stats.meta_analysis import combine_effects

from repeatlab.analysis.over_tasks import over_tasks


@pytest.mark.parametrize("seed", range(6))
def test_mean_and_tau_are_those_of_statsmodels(seed):
    random = np.random.default_rng(seed)
    errors = random.uniform(0.1, 0.5, size=6)
    effects = random.normal(0.2, 0.6, size=6) + errors * random.normal(size=6)
    expected = combine_effects(effects, errors**2, method_re="iterated", use_t=True)
    found = over_tasks(effects, errors)
    assert found.tau**2 == pytest.approx(expected.tau2, abs=1e-4)
    assert found.mean == pytest.approx(expected.mean_effect_re, abs=1e-4)
    if expected.scale_hksj_re >= 1:
        half = student.ppf(0.975, 5) * expected.sd_eff_w_re_hksj
        assert found.interval.high - found.mean == pytest.approx(half, rel=1e-3)


def test_equal_tasks_have_no_spread_and_errors_alone_decide():
    found = over_tasks(np.full(4, 0.3), np.full(4, 0.1))
    assert found.tau == 0
    assert found.mean == pytest.approx(0.3)
    half = student.ppf(0.975, 3) * 0.1 / 2
    assert found.interval.high == pytest.approx(0.3 + half)
    assert found.prediction.high > found.interval.high


def test_what_is_not_known_of_a_task_is_left_out():
    found = over_tasks(np.array([0.1, np.nan, 0.3]), np.array([0.1, np.nan, np.inf]))
    assert (found.tasks, found.mean) == (1, pytest.approx(0.1))


def test_an_error_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        over_tasks(np.array([0.1]), np.array([0.0]))


def test_a_claim_about_tasks_keeps_its_level_where_effects_vary_around_none():
    """Six tasks with effects of sd 0.5 around 0: limits hold 0 in 95 % (V7)."""
    random = np.random.default_rng(0)
    misses = predicted = 0
    for _ in range(400):
        true = random.normal(0, 0.5, size=7)
        errors = random.uniform(0.2, 0.4, size=6)
        found = over_tasks(true[:6] + errors * random.normal(size=6), errors)
        misses += not found.interval.low <= 0 <= found.interval.high
        predicted += found.prediction.low <= true[6] <= found.prediction.high
    assert misses / 400 <= 0.07
    assert predicted / 400 >= 0.9
