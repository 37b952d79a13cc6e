"""Statistics against scipy, statsmodels, definitions written out, and closed forms."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from repeatlab.analysis.statistics import (
    Effect,
    Flips,
    Interval,
    flip_interval,
    holm,
    paired_effect,
    sign_flip,
    signed_ranks,
    smallest_p,
)

FIXED = np.array([0.8, -0.3, 1.4, 0.2, 0.9, -0.1, 0.7, 1.1])
whole = st.lists(st.integers(-6, 6), min_size=1, max_size=9)


# --- sign flips -------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [FIXED, FIXED[:5], -FIXED, np.array([1.0, 1.0, 2.0, -4.0])])
def test_the_exact_sign_flip_is_scipys(values):
    expected = stats.permutation_test(
        (values,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip(values) == pytest.approx(expected.pvalue)


@given(whole)
def test_the_exact_sign_flip_counts_all_signs(values):
    values = np.array(values, dtype=float)
    sums = [abs(np.dot(signs, values)) for signs in product([1, -1], repeat=len(values))]
    assert sign_flip(values) == pytest.approx(np.mean(np.array(sums) >= abs(values.sum())))


def test_tenths_tie_as_their_wholes_do():
    tenths = np.array([0.1, 0.2, 0.3, -0.1, 0.4, 0.2])  # sums of 0.1 and 0.2 round differently
    assert sign_flip(tenths) == sign_flip(np.rint(10 * tenths))


def test_random_flips_come_close_to_all_of_them():
    exact = sign_flip(FIXED)
    drawn = sign_flip(FIXED, flips=Flips(0, 20_000))
    assert drawn == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 20_000))
    assert drawn == sign_flip(FIXED, flips=Flips(0, 20_000))


def test_random_flips_never_give_a_p_of_zero():
    assert sign_flip(np.full(40, 1.0), flips=Flips(resamples=99)) == 1 / 100


@given(st.integers(1, 20))
def test_equal_signs_give_the_smallest_p_there_is(n):
    assert sign_flip(np.arange(1, n + 1)) == pytest.approx(smallest_p(n))


def test_what_has_no_sign_shows_nothing():
    assert sign_flip(np.zeros(8)) == 1
    assert sign_flip(np.array([0.0, 0.0, 1.0, 2.0])) == smallest_p(2) == 0.5
    # Ties need no enumeration: however many they are, the p of the others is exact.
    assert sign_flip(np.array([0.0] * 30 + [1.0, 2.0, 3.0])) == smallest_p(3)
    assert np.isnan(sign_flip(np.array([])))


def test_the_sign_flip_keeps_its_level_at_every_small_n():
    """All signs of the same sizes are equally likely under the null: their p-values are counted."""
    for n in range(1, 10):
        sizes = np.random.default_rng(n).exponential(size=n)
        p = np.array([sign_flip(sizes * signs) for signs in product([1, -1], repeat=n)])
        assert np.mean(p < 0.05) <= 0.05
        assert np.mean(p <= 0.2) <= 0.2


# --- ranks ------------------------------------------------------------------------------------


@given(whole)
def test_signed_ranks_are_scipys_ranks_of_the_sizes(values):
    values = np.array(values, dtype=float)
    rest = values[values != 0]
    expected = np.sign(rest) * stats.rankdata(np.abs(rest))
    ranks = signed_ranks(values)
    assert ranks[values != 0].tolist() == expected.tolist()
    assert not ranks[values == 0].any()


def test_flipped_signed_ranks_are_wilcoxons_test():
    expected = stats.wilcoxon(FIXED, method="exact").pvalue
    assert sign_flip(signed_ranks(FIXED)) == pytest.approx(expected)


# --- intervals --------------------------------------------------------------------------------


def _rejected(values, shift) -> bool:
    """Return whether the sign flip rejects that the values lie around `shift`, in exact numbers."""
    moved = [Fraction(v) - shift for v in values]
    seen = abs(sum(moved))
    sums = [sum(m * s for m, s in zip(moved, turn, strict=True))
            for turn in product([1, -1], repeat=len(moved))]  # fmt: skip
    return Fraction(sum(abs(each) >= seen for each in sums), len(sums)) < Fraction(1, 20)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=8))
def test_the_limits_are_the_shifts_that_the_sign_flip_does_not_reject(values):
    low, high, kind = flip_interval(np.array(values))
    assert kind == "sign flip"
    nearly = Fraction(1, 10**6)
    for limit, outwards in ((low, -nearly), (high, nearly)):
        if np.isinf(limit):
            assert not _rejected(values, Fraction(1000) * (1 if limit > 0 else -1))
        else:
            at = Fraction(limit).limit_denominator(1000)
            assert float(at) == pytest.approx(limit, abs=1e-12)
            assert not _rejected(values, at)
            assert _rejected(values, at + outwards)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=10))
def test_p_is_below_5_percent_iff_the_interval_excludes_0(tenths):
    for values in (np.array(tenths) / 10, np.append(np.array(tenths) / 10, -np.inf)):
        effect = paired_effect(values)
        low, high, _ = effect.interval
        assert (effect.p < 0.05) == (not low <= 0 <= high)


@pytest.mark.parametrize("n", [30, 48])
@pytest.mark.parametrize("shift", np.linspace(-0.6, 0.6, 13))
def test_random_signs_decide_the_same_for_p_and_interval(n, shift):
    values = np.random.default_rng(n).normal(size=n) + shift
    low, high, _ = flip_interval(values, flips=Flips(20))
    assert (sign_flip(values) < 0.05) == (not low <= 0 <= high)


def test_random_signs_come_close_to_the_exact_limits():
    values = np.random.default_rng(0).normal(size=16)
    exact, drawn = flip_interval(values), flip_interval(values, flips=Flips(0, 20_000))
    assert drawn[:2] == pytest.approx(exact[:2], abs=0.03)


def test_many_ties_leave_p_exact_and_the_interval_says_the_same():
    effect = paired_effect(np.array([0.0] * 30 + [1.0, 2, 3, 4, 5, 6]))
    assert effect.p == smallest_p(6) < 0.05
    assert 0 < effect.interval.low < effect.interval.high
    effect = paired_effect(np.array([0.0] * 30 + [1.0, 2, 3, 4, 5]))
    assert effect.interval.low <= 0


def test_five_values_have_no_limits_and_equal_ones_none_to_speak_of():
    assert flip_interval(FIXED[:5]) == Interval(-np.inf, np.inf, "sign flip")
    assert flip_interval(np.array([])).kind == "none"
    assert flip_interval(np.full(8, 2.0)) == Interval(2.0, 2.0, "sign flip")


def test_eighteen_differences_are_enumerated():
    values = np.random.default_rng(1).normal(size=18)
    halves = [[np.dot(values[part], signs) for signs in product([1, -1], repeat=9)]
              for part in (slice(0, 9), slice(9, 18))]  # fmt: skip
    sums = np.add.outer(*halves)
    assert sign_flip(values) == np.mean(np.abs(sums) >= abs(values.sum()) - 1e-12)


# --- effects ----------------------------------------------------------------------------------


def test_an_effect_is_the_plain_paired_analysis():
    effect = paired_effect(FIXED)
    assert effect.estimate == pytest.approx(FIXED.mean())
    assert effect.interval[:2] == pytest.approx(flip_interval(FIXED)[:2])
    assert effect.p == sign_flip(FIXED)
    assert (effect.n, effect.smallest_p) == (8, 2**-7)


def test_pairs_with_a_diverged_run_are_judged_by_ranks():
    values = np.array([0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, -np.inf])
    effect = paired_effect(values)
    finite = np.where(np.isinf(values), -99.0, values)  # any number below the rest has its rank
    assert effect.p == pytest.approx(stats.wilcoxon(finite, method="exact").pvalue)
    assert (effect.interval, effect.estimate) == (Interval(-np.inf, np.inf, "signed ranks"), 0.9)
    # Eight of eight diverged or were worse: the side is known, how far it goes is not.
    lost = paired_effect(np.array([*(-values[:7]), -np.inf]))
    assert lost.p == 2**-7
    assert lost.interval.low == -np.inf
    assert lost.interval.high < 0
    assert lost.direction(lost.p) == -1


def test_no_difference_no_effect():
    effect = paired_effect(np.array([]))
    assert effect.n == 0
    assert np.isnan([effect.estimate, effect.p]).all()
    assert effect.direction(0.001) == 0


@pytest.mark.parametrize(
    ("low", "high", "p", "direction"),
    [
        (0.1, 0.9, 0.01, 1),
        (-0.9, -0.1, 0.01, -1),
        (-0.1, 0.9, 0.01, 0),
        (0.1, 0.9, 0.05, 0),
        (0.1, 0.9, np.nan, 0),
        (np.nan, np.nan, 0.01, 0),
    ],
)
def test_interval_and_p_must_agree(low, high, p, direction):
    assert Effect(0.5, Interval(low, high, "sign flip"), 0.01, 8, 8).direction(p) == direction


# --- Holm -------------------------------------------------------------------------------------

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=7)


@given(probabilities)
def test_holm_is_the_closure_of_bonferroni(p):
    """Adjusted p_i is the largest of min(p_S) |S| over all sets S of hypotheses that hold i."""
    places = range(len(p))
    sets = [s for size in range(1, len(p) + 1) for s in combinations(places, size)]
    expected = [
        max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in places
    ]
    assert holm(p) == pytest.approx(expected)


def test_holm_is_statsmodels():
    reason = "statsmodels is not installed; the closure test holds Holm to its definition"
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason=reason)
    p = np.random.default_rng(0).uniform(size=(20, 48)) ** 3
    for row in p:
        assert holm(row) == pytest.approx(multitest.multipletests(row, method="holm")[1])


def test_what_cannot_be_computed_keeps_its_place_in_the_family():
    adjusted = holm([0.01, np.nan, 0.02])
    assert adjusted[[0, 2]] == pytest.approx([0.03, 0.04])
    assert np.isnan(adjusted[1])
    assert holm([]).shape == (0,)


def test_importing_costs_no_scipy_stats():
    code = "import sys, repeatlab.analysis.statistics; sys.exit('scipy.stats' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
