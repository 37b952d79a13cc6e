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

PAIR_COLUMNS = [*RUN_KEYS, "against", "status", "x", "value", "other", "difference"]
# Of a pair; of all but the missing ones there is a difference.
PAIRED, DIVERGED, MISSING, APART = "paired", "diverged", "missing", "no common range"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What is compared on a task.

    Attributes:
        metric: Of the evaluations.
        split: On which split.
        k: A backward's time in forwards, without which nothing can be compared at equal cost. It
            differs from task to task.
    """

    metric: str
    split: str = "validation"
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
        against: The other arm.
        methods: Which; by default all but the other arm.

    Returns:
        Columns task, method, seed, against, status ("paired", "diverged", "missing", "no common
        range"), x, value and other (of the method and the other
        arm, worst possible where diverged), difference (positive: the method is better).

    Raises:
        ValueError: unknown axis, or a k is needed where there is none.
    """
    if axis not in AXES:
        raise ValueError(f"axis must be one of {', '.join(AXES)}; not {axis!r}")
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
                rows.append(keys | _compare(*arms, endpoint))
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


def _compare(ours: _Arm, theirs: _Arm, endpoint: Endpoint) -> dict[str, Any]:
    if ours.missing or theirs.missing:
        return {"status": MISSING}
    limit = min(ours.reach(), theirs.reach())
    # Two diverged runs have no range in common, and need none: they tie.
    x = limit if np.isfinite(limit) else np.nan
    value, other = (_read(arm, limit, endpoint) for arm in (ours, theirs))
    if value is None or other is None:
        return {"status": APART, "x": x}
    diverged = ours.diverged or theirs.diverged or not np.isfinite([value, other]).all()
    return {
        "status": DIVERGED if diverged else PAIRED,
        "x": x,
        "value": value,
        "other": other,
        "difference": 0.0 if value == other else endpoint.sign * (value - other),
    }


def _read(arm: _Arm, limit: float, endpoint: Endpoint) -> float | None:
    """Return a run's metric at x = `limit`, None where its evaluations do not cover it."""
    worst = -endpoint.sign * np.inf
    if arm.diverged:
        return worst
    x, values, from_start = arm.curve
    if limit <= 0 or (limit < x[0] and not from_start):
        return None
    result = float(np.interp(limit, x, values))
    return result if np.isfinite(result) else worst
