"""Inference from few seeds: pure functions on arrays, seeded, without a view of what they mean.

Measured by simulation at n = 8 (`tests/benchmarks/test_decisions.py`): BCa limits that say 95 %
hold the mean of normal, skewed and heavy-tailed differences 88, 85 and 86 % of the time, as eight
values resampled spread too little; Student's hold it 95, 90 and 96 %. The difference of two arms
that do not differ is symmetric, where Student's limits hold at least what they say. So decisions
rest on them and on the sign-flip test; the bootstrap is shown beside them, and serves where no
formula does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit  # scipy.stats takes a second: imported where it is needed

ALPHA = 0.05  # false verdicts that a decision may make
LEVEL = 1 - ALPHA
EXACT_UP_TO = 16  # differences whose 2^n sign patterns are enumerated
RESAMPLES = 9999


class Interval(NamedTuple):
    """Confidence limits, and how they were found: "none" where nothing can be said."""

    low: float
    high: float
    kind: str


NO_INTERVAL = Interval(np.nan, np.nan, "none")


# --- paired differences -----------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """A paired effect, positive in favour of the first arm.

    Attributes:
        estimate: Mean over strata of the strata's mean difference.
        interval: Its confidence limits.
        p: Two-sided sign-flip p.
        n: Differences, over all strata.
        smallest_p: The smallest p that any signs of these differences could give.
    """

    estimate: float
    interval: Interval
    p: float
    n: int
    smallest_p: float

    def direction(self, p: float) -> int:
        """Return 1 or -1 where interval and (adjusted) `p` agree on the sign, 0 otherwise.

        The sign flip alone controls false positives; the interval guards against a small p beside
        limits that include 0.
        """
        if not p < ALPHA:
            return 0
        return int(self.interval.low > 0) - int(self.interval.high < 0)


def paired_effect(strata: Sequence[np.ndarray], *, seed: int = 0) -> Effect:
    """Return the effect that paired differences show, one array (n_j,) per stratum (task).

    Strata weigh alike, whatever their n_j. A difference may be infinite, where one run of the pair
    is worse than any number: then a stratum alone is judged by signed ranks (Hodges and Lehmann's
    estimate and limits, in the unit of the differences), and one among several enters as its signed
    ranks, scaled to the root mean square 1. Whether it is so does not depend on the signs, hence
    the test stays exact.
    """
    strata = [np.asarray(s, dtype=float) for s in strata if len(s)]
    n = sum(map(len, strata))
    if not n:
        return Effect(np.nan, NO_INTERVAL, np.nan, 0, np.nan)
    if len(strata) == 1 and not np.isfinite(strata[0]).all():
        values, parts = signed_ranks(strata[0]), strata
        estimate, interval = hodges_lehmann(strata[0])
    else:
        parts = [s if np.isfinite(s).all() else _unit(signed_ranks(s)) for s in strata]
        values = np.concatenate([s / (len(s) * len(parts)) for s in parts])
        estimate, interval = float(values.sum()), student_interval(parts)
    smallest = smallest_p(np.count_nonzero(values))
    return Effect(estimate, interval, sign_flip(values, seed=seed), n, smallest)


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.sqrt(np.mean(values**2))


def sign_flip(
    differences: np.ndarray,
    *,
    seed: int = 0,
    exact_up_to: int = EXACT_UP_TO,
    resamples: int = RESAMPLES,
) -> float:
    """Return the two-sided p of the sum of `differences` (n,) under random signs.

    Exact by enumeration of all 2^n signs, by `resamples` random ones above `exact_up_to` (and then
    (hits + 1) / (resamples + 1), which is valid too). Exchanging the two runs of a pair turns the
    sign of its difference, so the test holds at its level for every n whenever the arms do not
    differ.
    """
    values = np.asarray(differences, dtype=float)
    if not len(values):
        return np.nan
    values = values[values != 0]  # a zero has no sign to flip
    seen = abs(values.sum()) - 1e-12 * np.abs(values).sum()  # another order rounds differently
    if len(values) > exact_up_to:
        sums = _random_signs(len(values), seed, resamples) @ values
        return (np.count_nonzero(np.abs(sums) >= seen) + 1) / (resamples + 1)
    sums = np.zeros(1)
    for value in values[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums + values[:1].sum()) >= seen))


@lru_cache(maxsize=4)
def _random_signs(n: int, seed: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(resamples, n))


def smallest_p(n: int, *, exact_up_to: int = EXACT_UP_TO, resamples: int = RESAMPLES) -> float:
    """Return the smallest two-sided sign-flip p that `n` differences unlike 0 can reach: 2^(1 - n).

    >>> [smallest_p(n) for n in (0, 1, 5, 6, 8)]
    [1.0, 1.0, 0.0625, 0.03125, 0.0078125]
    """
    exact = min(1.0, 2.0 ** (1 - n))
    return exact if n <= exact_up_to else max(exact, 1 / (resamples + 1))


def student_interval(strata: Sequence[np.ndarray], *, level: float = LEVEL) -> Interval:
    """Return Student's limits of the mean over strata of the strata's means.

    With several strata the degrees of freedom are Welch's and Satterthwaite's. A stratum of one
    value says nothing of its spread, and so there are no limits.
    """
    if not len(strata) or min(map(len, strata)) < 2:
        return NO_INTERVAL
    mean = np.mean([np.mean(s) for s in strata])
    variances = np.array([np.var(s, ddof=1) / len(s) for s in strata]) / len(strata) ** 2
    total = variances.sum()
    if total == 0:
        return Interval(float(mean), float(mean), "t")
    freedom = total**2 / np.sum(variances**2 / (np.array([len(s) for s in strata]) - 1))
    half = stdtrit(freedom, (1 + level) / 2) * np.sqrt(total)
    return Interval(float(mean - half), float(mean + half), "t")


def bootstrap_interval(
    values: np.ndarray, *, level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return the bootstrap limits of the mean of `values` (n,): BCa (Efron 1987), or percentile.

    BCa is undefined on constant data, for one; `kind` says which it was. See the module's note on
    how little they cover at small n.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return NO_INTERVAL
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is degenerate: the kind says so
            low, high = bootstrap(
                (values,),
                np.mean,
                confidence_level=level,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite([low, high]).all():
            break
    return Interval(float(low), float(high), method.lower())


def signed_ranks(differences: np.ndarray) -> np.ndarray:
    """Return each difference's sign times the rank of its size, ties at their mean rank.

    A difference of 0 gets 0 and is not ranked (Wilcoxon 1945).
    """
    values = np.asarray(differences, dtype=float)
    ranks = np.zeros(len(values))
    sizes = np.abs(values[values != 0])
    if len(sizes):
        _, place, counts = np.unique(sizes, return_inverse=True, return_counts=True)
        ranks[values != 0] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return np.sign(values) * ranks


def hodges_lehmann(differences: np.ndarray, *, level: float = LEVEL) -> tuple[float, Interval]:
    """Return the median of the pairwise means of `differences`, and the signed-rank limits.

    The limits invert Wilcoxon's test (Hodges and Lehmann 1963) and stand infinite differences: a
    limit may be infinite, and below six differences at 95 % both are.
    """
    values = np.asarray(differences, dtype=float)
    first, second = np.triu_indices(len(values))
    with np.errstate(invalid="ignore"):
        means = (values[first] + values[second]) / 2
    # Where worst meets best the mean is anything: the wider limits are taken.
    lower = np.sort(np.where(np.isnan(means), -np.inf, means))
    upper = np.sort(np.where(np.isnan(means), np.inf, means))
    counts = np.ones(1)
    for rank in range(1, len(values) + 1):
        counts = np.convolve(counts, np.eye(1, rank + 1, rank)[0] + np.eye(1, rank + 1)[0])
    tail = np.cumsum(counts / counts.sum())
    cut = int(np.count_nonzero(tail <= (1 - level) / 2))
    centre = float(np.median(np.where(np.isnan(means), 0.0, means)))
    if not cut:
        return centre, Interval(-np.inf, np.inf, "signed ranks")
    return centre, Interval(float(lower[cut - 1]), float(upper[-cut]), "signed ranks")


# --- several comparisons, several tasks -------------------------------------------------------


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


def probability_of_improvement(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Return P(A > B): mean over tasks of how often a run of A is above one of B, ties half.

    Args:
        ours: One array (runs of A,) per task.
        theirs: One array (runs of B,) per task; it may be longer or shorter.

    Source: Agarwal et al. 2021 (rliable), the Mann-Whitney statistic of each task.
    """
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a, dtype=float)[:, None], np.asarray(b, dtype=float)[None]
        shares.append(((a > b) + 0.5 * (a == b)).mean() if a.size and b.size else np.nan)
    return float(np.mean(shares)) if shares else np.nan


def iqm(values: np.ndarray) -> np.ndarray:
    """Return the interquartile mean along the last axis: without the lowest and highest quarter.

    A quarter of n values is rounded down, as in rliable (Agarwal et al. 2021).

    >>> float(iqm(np.arange(1, 11))), float(iqm([0, 1, 2, 3, 100]))
    (5.5, 2.0)
    """
    values = np.sort(np.asarray(values, dtype=float), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(axis=-1)


def stratified_interval(
    strata: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray] = iqm,
    *,
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return percentile limits of a statistic of all strata's values together (rliable).

    Each stratum, the runs of one task, is resampled within itself, so that every task keeps its
    number of runs. The tasks are taken as given: nothing is said of others.

    Args:
        strata: One array (n_j,) per task.
        statistic: A function of an array (resamples, sum of n_j) along its last axis.
    """
    strata = [np.asarray(s, dtype=float) for s in strata if len(s)]
    if not strata or min(map(len, strata)) < 2:
        return NO_INTERVAL
    random = np.random.default_rng(seed)
    drawn = [s[random.integers(len(s), size=(resamples, len(s)))] for s in strata]
    values = statistic(np.concatenate(drawn, axis=-1))
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(values, tails, method="inverted_cdf")  # no mean of two infinities
    return Interval(float(low), float(high), "percentile")
