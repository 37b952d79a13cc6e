"""Inference from few seeds: pure functions on arrays, seeded, without a view of what they mean.

Decisions rest on the sign-flip test, which is exact for every n where two arms do not differ, and
on the interval that inverts it: p is below 0.05 iff the 95 % interval excludes 0. Below six
differences there is no such p, and the limits are infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np  # scipy.stats takes a second: imported where it is needed
import pandas as pd

ALPHA = 0.05  # false verdicts that a decision may make
LEVEL = 1 - ALPHA


class Interval(NamedTuple):
    """Confidence limits, and how they were found: "none" where nothing can be said."""

    low: float
    high: float
    kind: str


class Flips(NamedTuple):
    """How many differences have all their 2^n signs enumerated, and the random signs beyond."""

    exact_up_to: int = 20
    resamples: int = 9999


FLIPS = Flips()
NO_INTERVAL = Interval(np.nan, np.nan, "none")


# --- paired differences -----------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """A paired effect, positive in favour of the first arm.

    Attributes:
        estimate: Mean difference.
        interval: Its confidence limits.
        p: Two-sided sign-flip p.
        n: Differences.
        unequal: How many of them are not 0.
    """

    estimate: float
    interval: Interval
    p: float
    n: int
    unequal: int

    @property
    def equal(self) -> bool:
        """Whether there are differences, all of them 0."""
        return self.n > 0 and not self.unequal

    @property
    def smallest_p(self) -> float:
        """The smallest p that any signs of these differences could give; NaN without any."""
        return smallest_p(self.unequal) if self.n else np.nan

    def direction(self, p: float) -> int:
        """Return 1 or -1 where interval and (adjusted) `p` agree on the sign, 0 otherwise."""
        if not p < ALPHA:
            return 0
        return int(self.interval.low > 0) - int(self.interval.high < 0)


def paired_effect(differences: np.ndarray, *, seed: int = 0) -> Effect:
    """Return the effect that paired differences (n,) show.

    A difference may be infinite, where one run of the pair is worse than any number: then they are
    judged by signed ranks, told by their median, and of limits only the side of 0 is known. Whether
    it is so does not depend on the signs, hence the test stays exact.
    """
    values = np.asarray(differences, dtype=float)
    if not len(values):
        return Effect(np.nan, NO_INTERVAL, np.nan, 0, 0)
    if np.isfinite(values).all():
        scores, estimate = values, float(values.mean())
        interval = flip_interval(values, seed=seed)
    else:
        # The median, of an even number the lower one: a mean of two infinities is none.
        scores, estimate = signed_ranks(values), float(np.sort(values)[(len(values) - 1) // 2])
        interval = Interval(-np.inf, np.inf, "signed ranks")
    p, total = sign_flip(scores, seed=seed), float(scores.sum())
    unequal = int(np.count_nonzero(values))
    return Effect(estimate, _agreeing(interval, p, total), p, len(values), unequal)


def _agreeing(interval: Interval, p: float, total: float) -> Interval:
    """Return the interval with 0 in it iff `p` is not below ALPHA; else on the side of `total`.

    They may differ where ties let p be exact and the limits be of random signs, or where ranks tie.
    """
    low, high, kind = interval
    if p >= ALPHA:
        return Interval(min(low, 0.0), max(high, 0.0), kind)
    beyond = float(np.finfo(float).tiny)
    if low <= 0 <= high:
        low, high = (beyond, high) if total > 0 else (low, -beyond)
    return Interval(low, high, kind)


def sign_flip(differences: np.ndarray, *, seed: int = 0, flips: Flips = FLIPS) -> float:
    """Return the two-sided p of the sum of `differences` (n,) under random signs.

    Exact by enumeration of all 2^n signs, or by random ones (and then (hits + 1) / (resamples + 1),
    which is valid too). Exchanging the two runs of a pair turns the
    sign of its difference, so the test holds at its level for every n whenever the arms do not
    differ.
    """
    values = np.asarray(differences, dtype=float)
    if not len(values):
        return np.nan
    values = values[values != 0][:, None]  # a zero has no sign to flip
    return float(sign_flips(values, seed=seed, flips=flips)[0])


def sign_flips(differences: np.ndarray, *, seed: int = 0, flips: Flips = FLIPS) -> np.ndarray:
    """Return the p of `sign_flip` of each column of `differences` (n, m), all with the same signs.

    Rows of 0 stay, and change nothing but whether the signs are enumerated.
    """
    seen = np.abs(differences.sum(axis=0))  # but for what another order rounds
    seen = seen - 1e-12 * np.abs(differences).sum(axis=0)
    if len(differences) > flips.exact_up_to:
        sums = _random_signs(len(differences), seed, flips.resamples) @ differences
        return (np.count_nonzero(np.abs(sums) >= seen, axis=0) + 1) / (flips.resamples + 1)
    # Turning all signs leaves the size of the sum: the first one stays.
    sums = differences[:1].sum(axis=0, keepdims=True)
    for row in differences[1:]:
        sums = np.concatenate([sums + row, sums - row])
    return np.mean(np.abs(sums) >= seen, axis=0)


@lru_cache(maxsize=4)
def _random_signs(n: int, seed: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(resamples, n))


def smallest_p(n: int, *, flips: Flips = FLIPS) -> float:
    """Return the smallest two-sided sign-flip p that `n` differences unlike 0 can reach: 2^(1 - n).

    >>> [smallest_p(n) for n in (0, 1, 5, 6, 8)]
    [1.0, 1.0, 0.0625, 0.03125, 0.0078125]
    """
    exact = min(1.0, 2.0 ** (1 - n))
    return exact if n <= flips.exact_up_to else max(exact, 1 / (flips.resamples + 1))


def flip_interval(
    values: np.ndarray, *, level: float = LEVEL, seed: int = 0, flips: Flips = FLIPS
) -> Interval:
    """Return the shifts of `values` (n,) that the sign flip of their sum does not reject.

    With the signs of some values less a shift turned, the sum is as far from 0 as it was iff the
    shift lies between the mean of these values and that of the others. So the limits are order
    statistics of such means: exact, or of random sets where there are too many.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return NO_INTERVAL
    if len(values) <= flips.exact_up_to:  # sets without the first value, and the rest of each
        sums, counts = (_subset_sums(each[1:]) for each in (values, np.ones(len(values))))
    else:
        turned = (_random_signs(len(values), seed, flips.resamples) + 1) / 2
        sums, counts = (np.append(0.0, part) for part in (turned @ values, turned.sum(axis=1)))
    dust = 0.5e-12 * np.abs(values).sum()  # what counts as 0 in `sign_flip`
    means = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for part, count in ((sums, counts), (values.sum() - sums, len(values) - counts)):
            means.append(np.where(np.abs(part) <= dust, 0.0, part) / count)
    none = (counts <= 0) | (counts >= len(values))  # nothing turned, or all: always as far
    least = ceil(round((1 - level) * len(sums), 9)) - 1
    low = np.partition(np.where(none, -np.inf, np.minimum(*means)), least)[least]
    high = np.partition(np.where(none, -np.inf, -np.maximum(*means)), least)[least]
    return Interval(float(low), float(-high), "sign flip")


def _subset_sums(values: np.ndarray) -> np.ndarray:
    """Return the sums of all 2^n subsets of `values` (n,), the empty one's first."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums


def signed_ranks(differences: np.ndarray) -> np.ndarray:
    """Return each difference's sign times the rank of its size, ties at their mean rank.

    A difference of 0 gets 0 and is not ranked (Wilcoxon 1945).
    """
    values = np.asarray(differences, dtype=float)
    sizes = pd.Series(np.abs(values)).where(values != 0)
    return np.sign(values) * sizes.rank().fillna(0).to_numpy()


# --- several comparisons ----------------------------------------------------------------------


def holm(p: Sequence[float]) -> np.ndarray:
    """Return Holm's adjusted p, shape (m,): below alpha, none is false with probability 1 - alpha.

    A NaN, a comparison that was planned but cannot be made, stays one and keeps its place in the
    family: the others do not get easier by it.
    """
    p = np.asarray(p, dtype=float)
    filled = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(filled, kind="stable")
    adjusted = np.maximum.accumulate(filled[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.minimum(adjusted, 1.0)
    return np.where(np.isnan(p), np.nan, result)
