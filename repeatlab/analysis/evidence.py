"""What the runs of a plan say about its arms: comparisons, doses, what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from repeatlab.analysis.declaration import Declaration, Goal
from repeatlab.analysis.frames import Records
from repeatlab.analysis.updates_saved import Paired

DONE = ("complete", "diverged")
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
        hardness: Task -> rank correlation of first loss and N by seed, of the real arm.
        dose: Arm -> task -> its dose.
        seeds: Task -> seeds that every arm in question has.
        lacking: What is planned and not there, a line each.
    """

    at_end: dict[str, dict[str, Paired]]
    until: dict[str, dict[str, Times]]
    controls: dict[str, dict[str, Paired]]
    variants: dict[tuple[str, str], dict[str, Paired]]
    hardness: dict[str, np.ndarray]
    dose: dict[str, dict[str, Dose]]
    seeds: dict[str, int]
    lacking: list[str] = field(default_factory=list)


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
    looked_at = dict.fromkeys([*declared.arms, declared.real, *declared.variants])
    return Evidence(
        at_end={arm: compare(arm, declared.against) for arm in looked_at if arm},
        until={arm: _until(declared, own, arm) for arm in declared.arms},
        controls={control: compare(declared.real, control) for control in declared.controls},
        variants={pair: compare(*pair) for pair in pairs},
        hardness=_hardness(declared, own),
        dose={arm: doses(own, arm) for arm in looked_at if arm},
        seeds={task: table.complete_seeds() for task, table in tables.items()},
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
        everything = [own, *budgets.values()]
        worst = min((_worst(r, task, goal) for r in everything if len(r.runs)), default=np.nan)
        self.arms = final_values(own, task, goal, split, worst)
        self.standard = {
            ratio: final_values(records, task, goal, split, worst).get(declared.against, {})
            for ratio, records in budgets.items()
        }
        self.standard.setdefault(1.0, self.arms.get(declared.against, {}))

    def paired(self, arm: str, other: str) -> Paired | None:
        """Return one arm against another at T; None with fewer than two common seeds."""
        ours, theirs = self.arms.get(arm, {}), self.arms.get(other, {})
        ratios = sorted(self.standard)
        known = [set(ours), set(theirs), *(set(self.standard[r]) for r in ratios)]
        seeds = sorted(set.intersection(*known))
        if len(seeds) < 2:
            return None
        return Paired(
            np.array([ours[s] for s in seeds]),
            np.array([theirs[s] for s in seeds]),
            np.array([[self.standard[r][s] for r in ratios] for s in seeds]),
            np.array(ratios),
            np.array(seeds),
        )

    def needed(self) -> list[str]:
        """Return the arms that a hypothesis is about."""
        declared = self.declared
        names = [*declared.arms, declared.real, *declared.controls, *declared.variants]
        absent = declared.left_out.get(self.task, ())
        known = dict.fromkeys([declared.against, *names])
        return [name for name in known if name and name not in absent]

    def complete_seeds(self) -> int:
        """Return how many seeds every needed arm has, and the standard one at every budget."""
        counts = [len(self.arms.get(arm, {})) for arm in self.needed()]
        return min([*counts, *map(len, self.standard.values())])

    def lacking(self) -> list[str]:
        """Return what is planned and not there, a line each."""
        planned = self.declared.seeds_on(self.task)
        made = {arm: len(self.arms.get(arm, {})) for arm in self.needed()}
        made |= {f"{self.declared.against} at {r:g} T": len(v) for r, v in self.standard.items()}
        return [
            f"{self.task}, {name}: {count} of {planned} seeds"
            for name, count in made.items()
            if count < planned
        ]


def final_values(
    records: Records, task: str, goal: Goal, split: str, worst: float
) -> dict[str, dict[int, float]]:
    """Return arm -> seed -> the metric at T, more being better; `worst` where a run diverged."""
    runs = records.runs
    column = f"{split}.{goal.metric}"
    found: dict[str, dict[int, float]] = {}
    if not len(runs) or column not in runs:
        return found
    chosen = runs[(runs["task"] == task) & runs["status"].isin(DONE)]
    for row in chosen[["method", "seed", "status", column]].itertuples(index=False):
        value = goal.sign * row[3]
        lost = row.status == "diverged" or not np.isfinite(value)
        found.setdefault(row.method, {})[int(row.seed)] = worst if lost else float(value)
    return found


def _worst(records: Records, task: str, goal: Goal) -> float:
    """Return the worst value that any run had at any time: what a diverged run is worth."""
    rows = records.measured(goal.metric, "validation")
    values = goal.sign * rows.loc[rows["task"] == task, "value"].to_numpy(float)
    values = values[np.isfinite(values)]
    return float(values.min()) if len(values) else np.nan


def doses(records: Records, arm: str) -> dict[str, Dose]:
    """Return task -> how much `arm` repeated there."""
    runs = records.done
    found = {}
    for task, group in runs[runs["method"] == arm].groupby("task", sort=False):
        visits = records.updates
        visits = visits[(visits["task"] == task) & (visits["method"] == arm)]
        keys = ["seed", "fresh_batch"]
        count = visits.groupby(keys)["repeat"].max() if len(visits) else None
        found[task] = Dose(
            float(group["updates"].sum() / group["fresh_batches"].sum()),
            float((count > 0).mean()) if count is not None else np.nan,
        )
    return found


def updates_until(run: pd.DataFrame, goal: Goal, limit: float) -> float:
    """Return the updates until the target, interpolated between evaluations; `limit` if missed.

    Args:
        run: The rows of one run, of the metric in question, in order.
        goal: The metric's target.
        limit: The budget, which a run that misses the target counts as.
    """
    x = run["update"].to_numpy(float)
    y = goal.sign * (run["value"].to_numpy(float) - goal.target)
    hits = np.flatnonzero(y >= 0)
    if not len(hits):
        return limit
    first = int(hits[0])
    if first == 0:
        return min(float(x[0]), limit)
    before = y[first - 1]
    if not np.isfinite(before):
        return min(float(x[first]), limit)
    crossing = x[first - 1] + (x[first] - x[first - 1]) * before / (before - y[first])
    return min(float(crossing), limit)


def _until(declared: Declaration, records: Records, arm: str) -> dict[str, Times]:
    found = {}
    for task, goal in declared.goals.items():
        rows = records.measured(goal.metric, "validation")
        rows = rows[rows["task"] == task]
        times = {
            key: updates_until(run, goal, goal.updates)
            for key, run in rows.groupby(["method", "seed"], sort=False)
        }
        seeds = sorted(
            {s for m, s in times if m == arm} & {s for m, s in times if m == declared.against}
        )
        if len(seeds) > 1:
            ours = np.array([times[arm, s] for s in seeds])
            theirs = np.array([times[declared.against, s] for s in seeds])
            found[task] = np.array(seeds), ours, theirs
    return found


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


def _hardness(declared: Declaration, own: Records) -> dict[str, np.ndarray]:
    updates = own.updates
    chosen = updates[updates["method"] == declared.real] if len(updates) else updates
    found: dict[str, list[float]] = {}
    if len(chosen):
        for (task, _), run in chosen.groupby(["task", "seed"]):
            found.setdefault(task, []).append(hardness(run, window=declared.window))
    return {task: np.array(values) for task, values in found.items()}
