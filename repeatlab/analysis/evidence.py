"""What the runs of a plan say about its arms: comparisons, doses, what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.declaration import LEAST_DOSE, Declaration, Goal
from repeatlab.analysis.frames import Records
from repeatlab.analysis.updates_saved import Paired

Times = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Dose:
    """How much an arm repeated on one task, over its seeds.

    Attributes:
        mean: E[N], updates a fresh batch.
        repeated: The share of fresh batches that were visited more than once; NaN without visits.
    """

    mean: float
    repeated: float


@dataclass(frozen=True)
class Evidence:
    """What the verdicts rest on.

    Attributes:
        at_end: Arm -> task -> the arm against the standard one at T.
        until: Arm -> task -> seeds and both arms' updates until the target.
        controls: Control -> task -> the real arm against it at T.
        variants: Pair of variants -> task -> the first against the second at T.
        hardness: Task -> seeds, and the real arm's rank correlation of first loss and N of each.
        dose: Arm -> task -> its dose.
        seeds: Task -> seeds that every arm in question has.
        lacking: What is planned and not there, a line each.
        coarse: Task -> the share of the updates until the target that lies between the two
            evaluations around it, median over runs: less than it, no time to the target tells.
    """

    at_end: dict[str, dict[str, Paired]]
    until: dict[str, dict[str, Times]]
    controls: dict[str, dict[str, Paired]]
    variants: dict[tuple[str, str], dict[str, Paired]]
    hardness: dict[str, tuple[np.ndarray, np.ndarray]]
    dose: dict[str, dict[str, Dose]]
    seeds: dict[str, int]
    lacking: list[str] = field(default_factory=list)
    coarse: dict[str, float] = field(default_factory=dict)


def gather(
    declared: Declaration,
    own: Records,
    budgets: Mapping[float, Records],
    *,
    split: str = "validation",
) -> Evidence:
    """Return what the runs say about the arms of a plan.

    Args:
        declared: The plan.
        own: The arms at T.
        budgets: Ratio -> the standard arm at that many T, each with its own schedule. Where 1 is
            among them, that is the curve's value at T, else the one in `own`.
        split: Which split's metric decides at the end; the way to the target is the validation
            split's, since the test split is read once.
    """
    tables = {task: TaskValues(declared, task, own, budgets, split) for task in declared.goals}

    def compare(arm: str, other: str) -> dict[str, Paired]:
        found = {task: table.paired(arm, other) for task, table in tables.items()}
        return {task: paired for task, paired in found.items() if paired is not None}

    pairs = [(a, b) for i, a in enumerate(declared.variants) for b in declared.variants[i + 1 :]]
    until, coarse = _until(declared, own)
    return Evidence(
        at_end={arm: compare(arm, declared.against) for arm in declared.repeating},
        until=until,
        coarse=coarse,
        controls={control: compare(declared.real, control) for control in declared.controls},
        variants={pair: compare(*pair) for pair in pairs},
        hardness=_hardness(declared, own),
        dose={arm: doses(own, arm) for arm in declared.repeating},
        seeds={task: min(table.made.values()) for task, table in tables.items()},
        lacking=[line for table in tables.values() for line in table.lacking()],
    )


class TaskValues:
    """The final metric of one task, by arm and seed, and of the standard arm by budget."""

    def __init__(
        self,
        declared: Declaration,
        task: str,
        own: Records,
        budgets: Mapping[float, Records],
        split: str,
    ) -> None:
        self.declared, self.task = declared, task
        goal = declared.goals[task]
        self.arms = final_values(own, task, goal, split)
        self.standard = {
            ratio: final_values(records, task, goal, split).get(declared.against, {})
            for ratio, records in budgets.items()
        }
        self.standard.setdefault(1.0, self.arms.get(declared.against, {}))

    def paired(self, arm: str, other: str) -> Paired | None:
        """Return one arm against another at T; None with fewer than two common seeds.

        A diverged run is worth what the worst run of the comparison is that has come to its end, at
        whatever budget: it ranks last, and by no more than others do. So one seed cannot outweigh
        all others by the size of a number that nobody would have waited for, which would leave
        nothing to be found on the task. Exchanging the runs of a pair changes no such value, so the
        sign flip stays exact.
        """
        ours, theirs = self.arms.get(arm, {}), self.arms.get(other, {})
        ratios = sorted(self.standard)
        known = [set(ours), set(theirs), *(set(self.standard[r]) for r in ratios)]
        seeds = sorted(set.intersection(*known))
        if len(seeds) < 2:
            return None
        columns = [ours, theirs, *(self.standard[r] for r in ratios)]
        ends = np.array([[column[seed] for column in columns] for seed in seeds])
        lost = np.isnan(ends)
        ends[lost] = 0.0 if lost.all() else ends[~lost].min()
        return Paired(ends[:, 0], ends[:, 1], ends[:, 2:], np.array(ratios), np.array(seeds))

    @property
    def made(self) -> dict[str, int]:
        """The seeds of every arm that a hypothesis is about, and of the standard one by budget."""
        declared = self.declared
        named = [declared.against, *declared.repeating, *declared.controls]
        absent = declared.left_out.get(self.task, ())
        found = {arm: len(self.arms.get(arm, {})) for arm in named if arm not in absent}
        return found | {f"{declared.against} at {r:g} T": len(v) for r, v in self.standard.items()}

    def lacking(self) -> list[str]:
        """Return what is planned and not there, a line each."""
        planned = self.declared.seeds_on(self.task)
        return [
            f"{self.task}, {name}: {count} of {planned} seeds"
            for name, count in self.made.items()
            if count < planned
        ]


def final_values(
    records: Records, task: str, goal: Goal, split: str
) -> dict[str, dict[int, float]]:
    """Return arm -> seed -> the metric at T, more being better; NaN where a run diverged."""
    column = f"{split}.{goal.metric}"
    chosen = records.done[records.done["task"] == task]
    chosen = chosen.reindex(columns=["method", "seed", "status", column])
    if not np.isfinite(chosen[column].to_numpy(float)).any():  # it was not evaluated on this split
        chosen = chosen[chosen["status"] == "diverged"]
    found: dict[str, dict[int, float]] = {}
    for method, seed, status, value in chosen.itertuples(index=False):
        lost = status == "diverged" or not np.isfinite(value)
        found.setdefault(method, {})[int(seed)] = np.nan if lost else goal.sign * value
    return found


def doses(records: Records, arm: str) -> dict[str, Dose]:
    """Return task -> how much `arm` repeated there."""
    runs, visits = records.done, records.updates
    groups = runs[runs["method"] == arm].groupby("task", sort=False)
    again: Mapping[str, float] = {}
    if len(visits):
        visits = visits[visits["method"] == arm]
        last = visits.groupby(["task", "seed", "fresh_batch"])["repeat"].max()
        again = (last > 0).groupby("task").mean()
    return {
        task: Dose(
            float(group["updates"].sum() / group["fresh_batches"].sum()),
            float(again.get(task, np.nan)),
        )
        for task, group in groups
    }


def repeating(found: Mapping[str, Any], doses: Mapping[str, Dose]) -> dict[str, Any]:
    """Return what was found on the tasks on which an arm repeats, by its doses."""
    return {
        task: one for task, one in found.items() if task in doses and doses[task].mean >= LEAST_DOSE
    }


def updates_until(run: pd.DataFrame, goal: Goal, limit: float) -> tuple[float, float]:
    """Return the updates until the target, interpolated between evaluations; `limit` if missed.

    And what share of them lies between the evaluations around it; NaN where there are none.

    Args:
        run: The rows of one run, of the metric in question, in order.
        goal: The metric's target.
        limit: The budget, which a run that misses the target counts as.
    """
    x = run["update"].to_numpy(float)
    y = goal.sign * (run["value"].to_numpy(float) - goal.target)
    hits = np.flatnonzero(y >= 0)
    if not len(hits):
        return limit, np.nan
    first = int(hits[0])
    if first == 0:
        return min(float(x[0]), limit), np.nan
    before, apart = y[first - 1], x[first] - x[first - 1]
    back = apart * y[first] / (y[first] - before) if np.isfinite(before) else 0.0
    return min(float(x[first] - back), limit), float(apart / x[first])


def _until(
    declared: Declaration, records: Records
) -> tuple[dict[str, dict[str, Times]], dict[str, float]]:
    """Return `Evidence.until` and `Evidence.coarse`."""
    found: dict[str, dict[str, Times]] = {arm: {} for arm in declared.arms}
    coarse = {}
    for task, goal in declared.goals.items():
        rows = records.measured(goal.metric, "validation")
        rows = rows[(rows["task"] == task) & rows["method"].isin([declared.against, *found])]
        crossings = {
            key: updates_until(run, goal, goal.updates)
            for key, run in rows.groupby(["method", "seed"], sort=False)
        }
        shares = [share for _, share in crossings.values() if np.isfinite(share)]
        coarse |= {task: float(np.median(shares))} if shares else {}
        times: dict[str, dict[int, float]] = {}
        for (arm, seed), (time, _) in crossings.items():
            times.setdefault(arm, {})[seed] = time
        theirs = times.get(declared.against, {})
        for arm in found:
            ours = times.get(arm, {})
            seeds = sorted(ours.keys() & theirs.keys())
            if len(seeds) > 1:
                both = (np.array([of[s] for s in seeds]) for of in (ours, theirs))
                found[arm][task] = np.array(seeds), *both
    return found, coarse


def hardness(updates: pd.DataFrame, *, window: int = 50) -> float:
    """Return the rank correlation of first loss and N within windows of fresh batches of one run.

    Within a window training time has hardly passed, so that what is left is which batches got the
    extra updates: 1 is the hardest, 0 is no matter which, also where N never varies.

    Args:
        updates: The rows of `Records.updates` of one run.
        window: Fresh batches in a window.
    """
    first = updates[(updates["repeat"] == 0) & np.isfinite(updates["loss"])]
    ranks = first.groupby(first["fresh_batch"] // window)[["loss", "repeats"]]
    centred = ranks.rank() - ranks.transform("size").to_numpy()[:, None] / 2 - 0.5
    loss, repeats = centred["loss"].to_numpy(), centred["repeats"].to_numpy()
    scale = np.sqrt((loss @ loss) * (repeats @ repeats))
    return float(loss @ repeats / scale) if scale > 0 else 0.0


def _hardness(declared: Declaration, own: Records) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    updates = own.updates
    found: dict[str, dict[int, float]] = {}
    if len(updates):
        chosen = updates[updates["method"] == declared.real]
        for (task, seed), run in chosen.groupby(["task", "seed"]):
            found.setdefault(task, {})[seed] = hardness(run, window=declared.window)
    return {task: (np.array([*of]), np.array([*of.values()])) for task, of in found.items()}
