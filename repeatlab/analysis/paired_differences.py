"""Pairs of runs: a method against another arm, seed by seed, task by task. Never imports torch.

A pair is two runs of one seed, which start equal and see the same fresh batches in the same order.
Differences are positive where the method is better, whatever the metric. What cannot be compared
stays in the tables and says why: a missing run leaves its pair empty, a diverged run (or one whose
metric is not finite) is worse than any number and better than none, and two of them are a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.frames import AXES, LOWER_IS_BETTER, RUN_KEYS, Records, with_cost

PAIR_COLUMNS = [*RUN_KEYS, "against", "status", "x", "sign", "value", "other"]
PAIR_COLUMNS += ["difference"]
# Of a pair; of all but the missing ones there is a difference.
PAIRED, DIVERGED, MISSING, APART = "paired", "diverged", "missing", "no common range"
MEASURES = ("value", "average", "target", "speed")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What is compared on a task.

    Attributes:
        metric: Of the evaluations.
        split: On which split.
        target: What a run should reach, None where the field knows no such value.
        k: A backward's time in forwards, without which nothing can be compared at equal cost. It
            differs from task to task.
    """

    metric: str
    split: str = "validation"
    target: float | None = None
    k: float | None = None

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return -1 if self.metric in LOWER_IS_BETTER else 1


def pairs(
    records: Records,
    endpoints: Mapping[str, Endpoint],
    *,
    axis: str = "update",
    measure: str = "value",
    against: str = "standard",
    methods: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return one row per task, method and seed that either of the two arms plans.

    Each run is interpolated linearly between its evaluations, up to the largest x that both runs
    of the pair cover; nothing is extrapolated. Below its first x, where calibration is paid, a run
    is what it was before the first update. With a learning-rate schedule the run that is read
    before its end is read before its rate has come down: at equal fresh batches that is most often
    the standard arm.

    Args:
        records: The runs.
        endpoints: Task -> what is compared on it. A task that the records do not hold gives a row
            without a seed for each method, so that it is seen to be missing.
        axis: At equal what: "update", "cost", "fresh_batches", "environment_steps" or "seconds".
        measure: "value" at the end, "average" of the metric over the axis, x until the "target"
            (at most the largest common x, which is what a miss gets; whether a run diverged after
            it got there does not matter), or "speed": the target's where the endpoint has one, else
            the average.
        against: The other arm.
        methods: Which; by default all but the other arm.

    Returns:
        Columns task, method, seed, against, status ("paired", "diverged", "missing", "no common
        range"), x, sign (1 where more is better), value and other (of the method and the other
        arm, worst possible where diverged), difference (positive: the method is better).

    Raises:
        ValueError: unknown axis or measure, or a target or k is needed where there is none.
    """
    for name, given, known in (("axis", axis, AXES), ("measure", measure, MEASURES)):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; not {given!r}")
    without = [task for task, endpoint in endpoints.items() if endpoint.target is None]
    if measure == "target" and without:
        raise ValueError(f"there is no target for {', '.join(without)}; measure 'speed' needs none")
    without = [task for task, endpoint in endpoints.items() if endpoint.k is None]
    if axis == "cost" and without:
        raise ValueError(f"k must be given for {', '.join(without)} to compare at equal cost")
    curves = _curves(records, endpoints, axis)
    runs = records.runs
    every = runs["method"].unique() if methods is None else methods
    rows: list[dict[str, Any]] = []
    for task, endpoint in endpoints.items():
        planned = runs[runs["task"] == task]
        status = {(r.method, r.seed): r.status for r in planned.itertuples()}
        for method in every:
            seeds = {s for m, s in status if m == method}
            if len(planned) and (method == against or not seeds):
                continue
            seeds |= {s for m, s in status if m == against}
            for seed in sorted(seeds) or [pd.NA]:
                arms = [
                    _Arm(status.get((arm, seed), MISSING), curves.get((task, arm, seed)))
                    for arm in (method, against)
                ]
                keys = {"task": task, "method": method, "seed": seed, "against": against}
                rows.append(keys | _compare(*arms, endpoint, measure))
    return pd.DataFrame(rows, columns=PAIR_COLUMNS).astype({"seed": "Int64"})


@dataclass(frozen=True)
class _Arm:
    status: str
    curve: tuple[np.ndarray, np.ndarray, bool] | None

    @property
    def diverged(self) -> bool:
        ended = self.curve is not None and not np.isfinite(self.curve[1][-1])
        return self.status == "diverged" or (self.status == "complete" and ended)

    @property
    def missing(self) -> bool:
        return not self.diverged and (self.status != "complete" or self.curve is None)

    def reach(self) -> float:
        """Return the largest x that the run covers; a diverged one covers nothing."""
        return np.inf if self.diverged else self.curve[0][-1]


def _curves(records: Records, endpoints: Mapping[str, Endpoint], axis: str) -> dict:
    """Return (task, method, seed) -> (x, values, whether it starts before the first update)."""
    found = {}
    for task, endpoint in endpoints.items():
        measured = records.measured(endpoint.metric, endpoint.split)
        chosen = measured[measured["task"] == task]
        if axis == "cost":
            chosen = with_cost(chosen, endpoint.k)
        for keys, run in chosen.groupby(RUN_KEYS, sort=False):
            values = run["value"].to_numpy(float)
            found[keys] = run[axis].to_numpy(float), values, run["update"].iloc[0] == 0
    return found


def _compare(ours: _Arm, theirs: _Arm, endpoint: Endpoint, measure: str) -> dict[str, Any]:
    if ours.missing or theirs.missing:
        return {"status": MISSING}
    if measure == "speed":
        measure = "average" if endpoint.target is None else "target"
    limit = min(ours.reach(), theirs.reach())
    # Two diverged runs have no range in common, and need none: they tie.
    x = limit if np.isfinite(limit) else np.nan
    value, other = (_read(arm, limit, endpoint, measure) for arm in (ours, theirs))
    if value is None or other is None:
        return {"status": APART, "x": x}
    sign = -1 if measure == "target" else endpoint.sign
    diverged = ours.diverged or theirs.diverged or not np.isfinite([value, other]).all()
    return {
        "status": DIVERGED if diverged else PAIRED,
        "x": x,
        "sign": sign,
        "value": value,
        "other": other,
        "difference": 0.0 if value == other else sign * (value - other),
    }


def _read(arm: _Arm, limit: float, endpoint: Endpoint, measure: str) -> float | None:
    """Return the measure of a run up to x = `limit`, None where its evaluations do not cover it."""
    worst = -endpoint.sign * np.inf
    if arm.diverged and measure != "target":
        return worst
    x, values, from_start = arm.curve or (np.empty(0), np.empty(0), True)
    if limit <= 0 or (not arm.diverged and limit < x[0] and not from_start):
        return None
    if measure == "target":
        hits = x[endpoint.sign * values >= endpoint.sign * endpoint.target]
        return min(float(hits[0]), limit) if len(hits) else limit
    result = float(np.interp(limit, x, values))
    if measure == "average":
        if not from_start:
            return None
        inside = x < limit
        grid = np.concatenate([[0.0], x[inside], [limit]])
        heights = np.concatenate([values[:1], values[inside], [result]])
        result = float(np.trapezoid(heights, grid) / limit)
    return result if np.isfinite(result) else worst
