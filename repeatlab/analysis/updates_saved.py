"""How many updates an arm saves: the budget that the standard arm needs for the arm's metric.

The standard arm is trained at several budgets, each with its own schedule (0.5, 0.7, 1, 1.4 and 2
T, say). Where its metric equals that of an arm at T is the arm's *equivalent budget* r T, and the
arm has saved the share 1 - 1/r of the updates that the standard arm would have needed.

The test. For every ratio r the paired differences

    d_s(r) = (arm_s - other_s) - (standard_s(r T) - standard_s(T))

are put to the sign flip, s over seeds; `standard_s` is interpolated between that seed's budgets,
linearly in log T. With the standard arm as the other one this is arm_s - standard_s(r T). The
interval holds every r that is not rejected (Fieller's construction with a sign flip in place of
Student's t), and the p of "no difference" is that of r = 1: interval and p are one test. Where a
difference is so large that no budget of the standard arm reaches it, a limit lies beyond the
budgets and is infinite. An arm that is better at T saves updates, whatever the standard arm does at
smaller budgets: where its metric falls as the budget grows, ratios on the other side of 1 that give
the same metric are none of the arm's.

Several tasks. Each task's differences are divided by the spread of its standard arm within the
budgets beside T, which no exchange of two runs of a pair changes, so that the flip stays exact, and
which a constant effect does not enter, so that nothing saturates. Tasks weigh alike; seeds are
flipped as wholes, over all tasks at once, which holds whatever the correlation between tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from repeatlab.analysis.statistics import ALPHA, Flips, Interval, sign_flips, smallest_p

# Seeds whose 2^n flips are enumerated, and random ones above: of every ratio of the grid.
FLIPS = Flips(exact_up_to=12, resamples=4_999)
STEPS = 30  # of the grid of ratios, on each side of 1; limits are found more finely
FINE = 12  # steps between two ratios of the grid, where a limit is
MOST_TIMES = 4.0  # sooner or later than so many times is beyond what is told
NOISE = 1e-9  # relative: spreads below are rounding, not spread


@dataclass(frozen=True)
class Paired:
    """One comparison on one task, a row per seed; more of every value is better.

    Attributes:
        arm: Shape (n,), the metric of the arm at T.
        other: Shape (n,), that of what it is compared with at T.
        standard: Shape (n, budgets), that of the standard arm at every budget.
        ratios: Shape (budgets,), the budgets in units of T, increasing, 1 among them.
        seeds: Shape (n,), which seeds the rows are.
    """

    arm: np.ndarray
    other: np.ndarray
    standard: np.ndarray
    ratios: np.ndarray
    seeds: np.ndarray

    def __post_init__(self) -> None:
        if not (np.diff(self.ratios) > 0).all() or not np.isclose(self.ratios, 1.0).any():
            raise ValueError(f"ratios must increase, with 1 among them; not {self.ratios}")

    @property
    def scale(self) -> float:
        """The spread of the standard arm over seeds, within the budgets other than T.

        Without another budget, or where those have none, that of the sums of arm and other, which
        no exchange of the two changes either. 0 where everything is equal up to rounding.
        """
        beside = self.standard[:, ~np.isclose(self.ratios, 1.0)]
        spreads = (beside.T, (self.arm + self.other)[None] / np.sqrt(2))
        size = max(np.abs(self.standard).max(), np.abs(self.arm).max(), np.abs(self.other).max())
        for values in spreads:
            if values.size and values.shape[-1] > 1:
                spread = float(np.sqrt(np.var(values, axis=-1, ddof=1).mean()))
                if spread > NOISE * size:
                    return spread
        return 0.0

    def differences(self, log_ratios: np.ndarray) -> np.ndarray:
        """Return d_s(r), shape (n, ratios); what is below rounding is 0, as equal runs are."""
        knots, each = np.log(self.ratios), np.eye(len(self.ratios))
        weights = np.stack([np.interp([*log_ratios, 0.0], knots, budget) for budget in each])
        shifts = self.standard @ (weights[:, :-1] - weights[:, -1:])
        apart = (self.arm - self.other)[:, None] - shifts
        size = np.abs(self.standard).max() + np.abs(self.arm).max() + np.abs(self.other).max()
        return np.where(np.abs(apart) <= NOISE * size, 0.0, apart)


@dataclass(frozen=True)
class Saved:
    """Updates saved, each as a ratio r of budgets: above 1 the arm is better.

    Attributes:
        ratio: Estimate: the equivalent budget in units of T.
        interval: Its 95 % limits.
        within: Its 90 % limits, by which two one-sided tests of 5 % decide on equivalence.
        p: Two-sided, of r = 1.
        seeds: How many.
        tasks: How many.
        equal: The share of pairs that are equal, to rounding.
    """

    ratio: float
    interval: Interval
    within: Interval
    p: float
    seeds: int
    tasks: int
    equal: float

    def direction(self, p: float | None = None, alpha: float = ALPHA) -> int:
        """Return 1 (better), -1 (worse) or 0 (not decided) by `p`, adjusted where there are more.

        A p below 0.05 and 95 % limits that exclude 1 are the same event, but for limits beyond the
        budgets.
        """
        p = self.p if p is None else p
        if not p < alpha:
            return 0
        return int(self.interval.low > 1) - int(self.interval.high < 1)

    def equivalent(self, margin: float) -> bool:
        """Return whether the 90 % interval lies within `margin`, a share of updates saved."""
        low, high = 1 - margin, 1 / (1 - margin)
        return bool(self.within.low > low and self.within.high < high)


def share_saved(ratio: float) -> float:
    """Return the share of updates saved of an equivalent budget: 1 - 1/r.

    >>> [round(share_saved(r), 3) for r in (0.5, 1.0, 1.25, 2.0)]
    [-1.0, 0.0, 0.2, 0.5]
    """
    return 1 - 1 / ratio if ratio > 0 else -np.inf


def least_p(n: int) -> float:
    """Return the smallest p that `saved` can give on `n` seeds, whatever they show."""
    return smallest_p(n, flips=FLIPS)


def saved(tasks: Mapping[str, Paired], *, seed: int = 0) -> Saved:
    """Return the updates that an arm saves at T, over all `tasks` together.

    Args:
        tasks: The comparison on each.
        seed: Of the random flips, which serve above 12 seeds.
    """
    parts = list(tasks.values())
    lowest = max(np.log(part.ratios[0]) for part in parts)
    highest = min(np.log(part.ratios[-1]) for part in parts)
    at_one = [part.differences(np.zeros(1))[:, 0] for part in parts]
    # What does not vary has no weight beside other tasks, and needs none where it is the only one.
    alone = 1.0 if len(parts) == 1 else 0.0
    vary = [(p.seeds, p.scale or alone, p) for p in parts if p.scale or alone]

    def rows(grid: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(seeds, part.differences(grid) / scale) for seeds, scale, part in vary]

    return _invert(_grid(lowest, highest), rows, at_one, seed)


def saved_until(
    times: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    limits: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Saved:
    """Return the updates that an arm saves on its way to the target, over all tasks together.

    The ratio is that of the other arm's time to the arm's: above 1 the arm is there sooner. The
    test is the sign flip of the differences of their logarithms, shifted.

    Args:
        times: Task -> (seeds, times of the arm, times of the other), each (n,), in updates; a run
            that misses counts as the budget, so that two misses tie.
        limits: Task -> the budget. The gain of a pair with a miss is known to be as much or more
            only, of two misses nothing is known: no ratio is rejected for what they do not show.
        seed: Of the random flips.
    """
    grid = _grid(np.log(1 / MOST_TIMES), np.log(MOST_TIMES))
    gains, bounds = [], []
    for task, (seeds, ours, theirs) in times.items():
        limit = np.inf if limits is None else limits[task]
        gains.append((seeds, np.log(np.maximum(theirs, 1.0)) - np.log(np.maximum(ours, 1.0))))
        least = np.where(theirs >= limit, 0.0, -np.inf)[:, None]
        most = np.where(ours >= limit, 0.0, np.inf)[:, None]
        bounds.append((least, most))

    def rows(grid: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            (seeds, np.clip(gain[:, None] - grid, *bound))
            for (seeds, gain), bound in zip(gains, bounds, strict=True)
        ]

    return _invert(grid, rows, [gain for _, gain in gains], seed)


def _grid(lowest: float, highest: float) -> np.ndarray:
    """Return logarithms of ratios from `lowest` to `highest`, 0 among them."""
    below = np.linspace(lowest, 0, STEPS, endpoint=False)
    return np.concatenate([below, np.linspace(0, highest, STEPS + 1)])


def _invert(
    grid: np.ndarray,
    rows: Callable[[np.ndarray], list[tuple[np.ndarray, np.ndarray]]],
    at_one: list[np.ndarray],
    seed: int,
) -> Saved:
    """Return what the test says of every ratio, tasks alike, whole seeds flipped.

    Args:
        grid: Logarithms of ratios, shape (m,).
        rows: Such a grid -> of each task that varies its seeds (n,) and its differences (n, m).
        at_one: Of every task the differences at the ratio 1, shape (n,).
        seed: Of the random flips.
    """

    def summed(ratios: np.ndarray) -> np.ndarray:
        parts = rows(ratios)
        return by_seed(parts, len(at_one)) if parts else np.zeros((0, len(ratios)))

    def p_values(ratios: np.ndarray) -> np.ndarray:
        return sign_flips(summed(ratios), seed=seed, flips=FLIPS)

    values, p = summed(grid), p_values(grid)
    means, one = values.sum(axis=0), int(np.searchsorted(grid, 0.0))
    wide, narrow = (_accepted(grid, p, means, p_values, alpha) for alpha in (0.05, 0.10))
    # Where no ratio of the grid is kept, limits are the grid's own: never beyond the wider ones.
    low, high = max(wide.low, narrow.low), min(wide.high, narrow.high)
    return Saved(
        ratio=_crossing(grid, means),
        interval=wide,
        within=narrow._replace(low=low, high=high),
        p=float(p[one]),
        seeds=max(map(len, at_one)),
        tasks=len(at_one),
        equal=float(np.mean(np.concatenate(at_one) == 0)),
    )


def by_seed(parts: Sequence[tuple[np.ndarray, np.ndarray]], tasks: int) -> np.ndarray:
    """Return the means over `tasks`, tasks alike, in a row for each seed: (all seeds, m).

    Args:
        parts: Of each task that varies its seeds (n,) and its differences (n, m).
        tasks: How many there are.
    """
    labels = np.unique(np.concatenate([seeds for seeds, _ in parts]))
    total = np.zeros((len(labels), parts[0][1].shape[1]))
    for seeds, differences in parts:
        total[np.searchsorted(labels, seeds)] += differences / (len(seeds) * tasks)
    return total


def _crossing(grid: np.ndarray, means: np.ndarray) -> float:
    """Return the ratio at which the mean difference is 0, nearest to 1; the edge if there is none.

    It is sought where the standard arm has more updates if the arm is better at T, else where it
    has fewer. Where nothing differs at T it is 1.
    """
    at_one = means[np.searchsorted(grid, 0.0)]
    side = (grid >= 0) if at_one > 0 else (grid <= 0)
    grid, means = grid[side], means[side]
    exact = np.flatnonzero(means == 0)
    turns = np.flatnonzero(np.sign(means[:-1]) * np.sign(means[1:]) < 0)
    at = [grid[i] for i in exact]
    at += [grid[i] - means[i] * (grid[i + 1] - grid[i]) / (means[i + 1] - means[i]) for i in turns]
    if at:
        return float(np.exp(min(at, key=abs)))
    # Better than the standard arm at every budget, or worse.
    return np.inf if at_one > 0 else 0.0


def _accepted(
    grid: np.ndarray,
    p: np.ndarray,
    means: np.ndarray,
    p_values: Callable[[np.ndarray], np.ndarray],
    alpha: float,
) -> Interval:
    """Return the hull of the ratios that the test does not reject; 0 or infinity at an edge.

    Where 1 is rejected, on the side of 1 where the arm is, by the mean difference there.
    """
    kept, one = p >= alpha, int(np.searchsorted(grid, 0.0))
    better = means[one] > 0
    if not kept[one]:
        kept &= grid > 0 if better else grid < 0
    inside = np.flatnonzero(kept)
    edges = np.concatenate([[-np.inf], grid, [np.inf]])
    if not len(inside):  # between two ratios of the grid, or beyond all of them
        signs = np.sign(means[one:] if better else means[one::-1])
        same = int(np.argmax(np.append(signs, 0) != signs[0]))  # so many from 1 on, 1 included
        low, high = edges[one + same : one + same + 2] if better else edges[one - same + 1 :][:2]
        low, high = (max(low, NOISE), high) if better else (low, min(high, -NOISE))
    else:
        low = _limit(edges[inside[0]], grid[inside[0]], p_values, alpha)
        high = _limit(edges[inside[-1] + 2], grid[inside[-1]], p_values, alpha)
    return Interval(float(np.exp(low)), float(np.exp(high)), "sign flip")


def _limit(
    rejected: float, kept: float, p_values: Callable[[np.ndarray], np.ndarray], alpha: float
) -> float:
    """Return where between two ratios the test begins to reject.

    Halfway between the last that is kept and the first that is rejected, so that a rejected 1 is
    never a limit.
    """
    if not np.isfinite(rejected):
        return rejected
    fine = np.linspace(kept, rejected, FINE + 1)
    out = np.flatnonzero(p_values(fine) < alpha)
    first = int(out[0]) if len(out) else FINE
    return float((fine[first - 1] + fine[first]) / 2)
