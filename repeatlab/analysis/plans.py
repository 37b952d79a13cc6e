"""What the store holds of a registered plan, and what it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.declaration import Declaration
from repeatlab.analysis.evidence import Evidence, TaskValues, gather
from repeatlab.analysis.frames import Records, load
from repeatlab.analysis.over_tasks import OverTasks, over_tasks
from repeatlab.analysis.power import Pilot, pilot_of
from repeatlab.analysis.updates_saved import Paired, Saved, saved
from repeatlab.analysis.verdicts import Verdict, judge
from repeatlab.analysis.viewpoints import stack
from repeatlab.core.files import StoreError
from repeatlab.store.records import Store

# What stands beside the verdicts at own rates on the validation split.
VIEWS = {
    "own rates, validation": ("own", "validation"),
    "own rates, test": ("own", "test"),
    "shared rate, validation": ("shared", "validation"),
}
# Of runs of which none has begun.
COLUMNS = ["task", "method", "seed", "status", "path", "id", "seconds"]


@dataclass(frozen=True)
class PlanRecords:
    """A registered plan and its runs.

    Attributes:
        name: The plan's.
        digest: Its hash, as it was registered before the first run.
        changes: What was amended since, with reasons.
        declared: What the verdicts follow.
        rates: Task -> arm -> what tuning chose.
        stages: "own" and "shared" -> the arms' runs; "tuning" -> those that chose the rates.
        budgets: Ratio -> the runs with the standard arm, at its own rate, at that many T.
    """

    name: str
    digest: str
    changes: list[dict[str, str]]
    declared: Declaration
    rates: Mapping[str, Mapping[str, Mapping[str, Any]]]
    stages: Mapping[str, Records]
    budgets: Mapping[float, Records]

    def values(self, stage: str, split: str) -> dict[str, TaskValues]:
        """Return task -> the final metric of every arm of a stage on a split."""
        own, budgets = self.stages[stage], self.budgets
        return {t: TaskValues(self.declared, t, own, budgets, split) for t in self.declared.goals}

    def evidence(self, stage: str, split: str) -> Evidence:
        """Return the comparisons of a stage on a split."""
        return gather(self.declared, self.stages[stage], self.budgets, split=split)

    @property
    def tuning_hours(self) -> float:
        """Training time of the stage that chose the rates, which more seeds do not lengthen."""
        return core_hours([self.stages["tuning"]], *self.declared.goals)

    @cached_property
    def views(self) -> dict[str, tuple[Evidence, list[Verdict]]]:
        """Every one of `VIEWS` -> its evidence and verdicts; the first is what counts."""
        found = {}
        for view, (stage, split) in VIEWS.items():
            evidence = self.evidence(stage, split)
            found[view] = evidence, judge(evidence, self.declared)
        return found


def load_plan(runs: str | Path, name: str) -> PlanRecords:
    """Return what the store at `runs` holds of the plan `name`.

    Raises:
        StoreError: no such plan is registered there.
    """
    store = Store(runs)
    content = store.read_plan(name)
    if content is None:
        raise StoreError(f"{runs}: no plan {name!r} is registered; `repeatlab run PLAN.yaml` does")
    declared, known = Declaration.from_json(content["declaration"]), set(store.studies())

    def stage(suffix: str) -> Records:
        names = [f"{name}-{task}-{suffix}" for task in declared.goals]
        begun = [study for study in names if study in known]
        return load(runs, begun) if begun else Records(pd.DataFrame(columns=COLUMNS))

    stages = {which: stage(which) for which in ("own", "shared", "tuning")}
    others = {r: stage(f"budget-{r:g}") for r in declared.budgets if r != 1.0}
    return PlanRecords(
        name,
        content["digest"],
        content["changes"],
        declared,
        content.get("rates", {}),
        stages,
        others | {1.0: stages["own"]},
    )


def pilots(plan: PlanRecords) -> dict[str, Pilot]:
    """Return what the plan's runs say of each task, as a pilot of more seeds.

    Raises:
        StoreError: a task has fewer than two seeds of the standard arm at every budget.
    """
    against = plan.declared.against
    found = {}
    for task, values in plan.values("own", "validation").items():
        paired = values.paired(against, against)
        if paired is None:
            raise StoreError(f"plan {plan.name}: a pilot needs two seeds of {against} on {task}")
        spent = core_hours([plan.stages["shared"], *plan.budgets.values()], task)
        found[task] = pilot_of(paired, spent / len(paired.seeds))
    return found


def core_hours(parts: Iterable[Records], *tasks: str) -> float:
    """Return the training time of these tasks' runs, by default of all, in hours of a core.

    A run that several of the parts have counts once.
    """
    runs = stack([pd.DataFrame(columns=COLUMNS), *(part.done for part in parts)])
    chosen = runs[runs["task"].isin(tasks)] if tasks else runs
    return float(chosen.drop_duplicates("id")["seconds"].sum()) / 3600


def arm_over_tasks(
    found: Mapping[str, Paired],
) -> tuple[Saved, dict[str, Saved], OverTasks, list[str]]:
    """Return an arm's effect on these tasks, on each, and on tasks like them (in log ratios).

    A task's standard error is that of the normal whose 68 % limits its test gives: half the width
    of the 95 % interval over 1.96. Where the limits of some, which are returned last, lie beyond
    the budgets, there is no estimate over tasks: without them, which differ most, it would be
    another.
    """
    alone = {task: saved({task: paired}) for task, paired in found.items()}
    limits = np.array([[*effect.interval[:2], effect.ratio] for effect in alone.values()])
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high, middle = np.log(limits).T
        known = np.isfinite(middle) & np.isfinite(high - low) & (high > low)
    beyond = [task for task, is_known in zip(alone, known, strict=True) if not is_known]
    errors = np.where(known, (high - low) / (2 * 1.96), 1.0)
    among = over_tasks(np.full(len(alone), np.nan) if beyond else middle, errors)
    return saved(found), alone, among, beyond
