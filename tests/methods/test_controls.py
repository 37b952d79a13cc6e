"""Controls keep what they say they keep and break what they say they break."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from repeatlab.methods.controls import (
    anti_hard,
    falling,
    permuted,
    spaced,
    time_only,
    windowed,
)

traces = st.lists(st.integers(1, 5), min_size=1, max_size=200).map(np.array)
windows = st.integers(1, 60)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture
def run():
    """Return losses that fall with time, and the counts that they ask for."""
    random = np.random.default_rng(0)
    losses = 3 * np.exp(-np.arange(1000) / 300) * random.gamma(8, 1 / 8, 1000)
    return np.clip(np.floor(losses / 0.5), 1, 5).astype(int), losses


def within(counts, losses, window=50) -> float:
    """Return the mean rank correlation of count and loss within windows where counts vary."""
    parts = [slice(i, i + window) for i in range(0, len(counts), window)]
    return np.mean([spearmanr(counts[w], losses[w])[0] for w in parts if np.ptp(counts[w])])


@given(traces, seeds)
def test_a_permutation_keeps_the_histogram(counts, seed):
    assert Counter(permuted(counts, seed=seed).tolist()) == Counter(counts.tolist())
    assert np.array_equal(permuted(counts, seed=seed), permuted(counts, seed=seed))


@given(traces, windows, seeds)
def test_a_windowed_permutation_keeps_the_histogram_of_every_window(counts, window, seed):
    changed = windowed(counts, window=window, seed=seed)
    for start in range(0, len(counts), window):
        w = slice(start, start + window)
        assert Counter(changed[w].tolist()) == Counter(counts[w].tolist())
        assert changed[w].sum() == counts[w].sum()


@given(traces, windows)
def test_time_only_keeps_the_sum_of_every_window_in_counts_that_differ_by_one(counts, window):
    changed = time_only(counts, window=window)
    assert changed.min() >= 1
    for start in range(0, len(counts), window):
        w = slice(start, start + window)
        assert abs(changed[w].sum() - counts[w].sum()) <= 1
        assert np.ptp(changed[w]) <= 1 or len(changed[w]) == 1
    assert changed.sum() == counts.sum()


@given(traces, windows, seeds)
def test_anti_hard_keeps_the_histogram_and_reverses_every_order(counts, window, seed):
    losses = np.random.default_rng(seed).random(len(counts))
    changed = anti_hard(counts, losses, window=window)
    for start in range(0, len(counts), window):
        w = slice(start, start + window)
        assert sorted(changed[w]) == sorted(counts[w])
        assert (np.diff(changed[w][np.argsort(losses[w])]) <= 0).all()


@given(traces, st.integers(1, 30))
def test_spaced_keeps_the_visits_of_every_batch_and_the_order_of_fresh_ones(counts, gap):
    visits = spaced(counts, gap=gap)
    assert np.bincount(visits, minlength=len(counts)).tolist() == counts.tolist()
    first = [int(np.flatnonzero(visits == batch)[0]) for batch in range(len(counts))]
    assert first == sorted(first)


def test_spaced_by_hand():
    # 0 and 2 are visited three and two times; repeats come two fresh batches later.
    assert spaced(np.array([3, 1, 2, 1, 1]), gap=2).tolist() == [0, 1, 2, 0, 3, 4, 0, 2]


def test_the_association_is_kept_broken_or_turned(run):
    counts, losses = run
    assert within(counts, losses) > 0.5  # ties among counts keep it from 1
    shuffled = [within(windowed(counts, window=50, seed=s), losses) for s in range(20)]
    assert abs(np.mean(shuffled)) < 3 * np.std(shuffled, ddof=1) / np.sqrt(len(shuffled))
    assert abs(within(time_only(counts, window=50), losses)) < 0.2
    assert within(anti_hard(counts, losses, window=50), losses) < -0.5


def test_the_time_trend_survives_within_windows_but_not_a_global_permutation(run):
    counts, _ = run
    time = np.arange(len(counts))
    kept = spearmanr(windowed(counts, window=50, seed=0), time)[0]
    assert kept == pytest.approx(spearmanr(counts, time)[0], abs=0.1)
    lost = [spearmanr(permuted(counts, seed=s), time)[0] for s in range(20)]
    assert abs(np.mean(lost)) < 3 * np.std(lost, ddof=1) / np.sqrt(len(lost))


@given(traces, st.sampled_from(["linear", "cosine"]))
def test_a_falling_schedule_keeps_the_total_and_follows_its_closed_form(counts, shape):
    changed = falling(counts, shape=shape)
    assert changed.shape == counts.shape
    assert changed.sum() == counts.sum()
    assert changed.min() >= 1
    place = (np.arange(len(counts)) + 0.5) / len(counts)
    share = {"linear": 1 - place, "cosine": (1 + np.cos(np.pi * place)) / 2}[shape]
    ideal = 1 + 2 * (counts.mean() - 1) * share
    # Rounding is carried on: no count is further than 1 from its ideal, nor their running total.
    assert np.abs(changed - ideal).max() < 1 + 1e-9
    assert np.abs(np.cumsum(changed) - np.cumsum(ideal)).max() <= 0.5 + 1e-9


@given(traces, st.sampled_from(["linear", "cosine"]), seeds)
def test_a_falling_schedule_depends_on_the_mean_alone(counts, shape, seed):
    shuffled = np.random.default_rng(seed).permutation(counts)
    assert falling(counts, shape=shape).tolist() == falling(shuffled, shape=shape).tolist()


def test_falling_by_hand():
    # A mean of 3 falls from 5 to 1: ideals 4.5, 3.5, 2.5, 1.5 have totals 4.5, 8, 10.5, 12.
    assert falling(np.array([3, 1, 5, 3]), shape="linear").tolist() == [5, 3, 3, 1]
    # Cosine: 4.848, 3.765, 2.235, 1.152.
    assert falling(np.array([3, 1, 5, 3]), shape="cosine").tolist() == [5, 4, 2, 1]
    assert falling(np.ones(7, dtype=int), shape="cosine").tolist() == [1] * 7


def test_a_falling_schedule_goes_from_high_to_low(run):
    counts, _ = run
    for shape in ("linear", "cosine"):
        thirds = [part.mean() for part in np.array_split(falling(counts, shape=shape), 3)]
        assert thirds[0] > thirds[1] > thirds[2]
        ends = falling(counts, shape=shape)[[0, -1]]
        assert ends.tolist() == [round(2 * counts.mean() - 1), 1]


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="shape must be 'linear' or 'cosine'; not 'step'"):
        falling(np.array([1, 2]), shape="step")


@pytest.mark.parametrize("bad", [[], [0, 1], [[1]], [1.5]])
def test_what_is_no_trace_is_refused(bad):
    with pytest.raises(ValueError, match="a trace must be a non-empty"):
        permuted(np.array(bad), seed=0)
