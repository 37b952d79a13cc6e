"""A plan: one file that declares a comparison before its first run, and the studies that follow.

    name: quick
    seeds: 8                          # counted from 0, of every arm on every task
    margin: 0.1                       # share of updates saved below which an effect is none
    budgets: [0.5, 0.7, 1, 1.4, 2]    # of the standard arm, in units of T
    tuning: {rates: [0.25, 0.5, 1, 2, 4], seeds: 3, tie: 1}
    methods: {include: [../methods.yaml]}
    tasks:
      digits:
        task: {name: supervised, dataset: digits, lr: 0.02}
        max_updates: 400
        metric: accuracy
        target: 0.9
        methods: {windowed: null}   # is not run on this task
    judged: {arms: [linear, quantile], real: linear, controls: [windowed], variants: [linear]}

Four stages, each an ordinary study of the store (`NAME-TASK-STAGE`): *tuning*, on seeds that are
used nowhere else, gives every arm that changes N, the step or the data the same grid, trials and
seeds, judged on the validation split; a best rate on the grid's edge widens it. *own* trains every
arm at the rate that was chosen for it, a control at that of the arm whose counts it replays;
*shared* trains them all at the task's rate; *budget-R* trains the standard arm for R T updates, at
the rate that was chosen for it at T.

The test that follows takes the chosen rates as they are. Two equal arms for which noise has chosen
different rates do differ: with one tuning seed a test of 5 % calls one of them better or worse in
about 18 % of comparisons. From two seeds on, settings that are within noise of an arm's best are
ties, and ties go to one rate for all arms (`choose`): then it is 5 to 6 %.

The plan's digest is registered in the store before the first run. A plan that has changed since is
refused, unless the change is amended with a reason, which every verdict then shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from repeatlab.analysis.declaration import Declaration, Goal
from repeatlab.analysis.evidence import final_values
from repeatlab.analysis.frames import Records, load
from repeatlab.analysis.statistics import ALPHA
from repeatlab.core.files import digest_of_content, safe_name
from repeatlab.core.schema import ConfigError, Model, check_known, parse, read_yaml, with_value
from repeatlab.store.records import Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.method_files import with_included
from repeatlab.studies.settings import with_settings
from repeatlab.studies.study import Report, Study, run_studies
from repeatlab.training.config import (
    CalibrationConfig,
    Device,
    EvaluationConfig,
    LoaderConfig,
    MethodConfig,
    PositiveInt,
    TaskChoice,
)

Positive = Annotated[float, Field(gt=0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Numbers = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]


class Tuning(Model):
    """How rates are chosen: the same effort for every arm."""

    rates: Numbers = (0.25, 0.5, 1.0, 2.0, 4.0)
    """In units of the task's own rate."""
    seeds: PositiveInt = 2
    tie: Annotated[float, Field(ge=0)] = 1.0
    """So many standard errors of a difference below an arm's best a setting ties with it; 0 takes
    the best one. With one seed there is no error to go by."""
    first_seed: PositiveInt = 1000
    """Tuning's seeds count from here: none of them is a seed of the comparison."""
    widen: Annotated[int, Field(ge=0, le=8)] = 2
    """How often the grid may grow by one rate on the side where the best one lies on its edge."""


class PlannedTask(Model):
    """One task of a plan: what is trained, for how long, and what it is judged by."""

    task: TaskChoice
    max_updates: PositiveInt
    metric: str
    target: float
    seeds: PositiveInt | None = None
    """By default the plan's."""
    evaluation: EvaluationConfig = EvaluationConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    loader: LoaderConfig = LoaderConfig()
    device: Device = "auto"
    lockstep: bool = True
    methods: dict[str, MethodConfig | None] = Field(default_factory=dict)
    """Arms that differ on this task; null leaves one out."""
    grids: dict[str, dict[str, list[Any]]] = Field(default_factory=dict)
    """Arm -> field of its method ("mapping.t") -> values that are tried with every rate."""

    @property
    def goal(self) -> Goal:
        """What it is judged by."""
        return Goal(self.metric, self.target, self.max_updates)


class Judged(Model):
    """Which arms the hypotheses are about; see `repeatlab.analysis.declaration`."""

    against: str = "standard"
    arms: Names
    real: str
    controls: Names = ()
    variants: Names = ()
    window: PositiveInt = 50


class Plan(Model):
    """See the module."""

    name: str
    seeds: PositiveInt
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.1
    budgets: Numbers = (0.5, 0.7, 1.0, 1.4, 2.0)
    tuning: Tuning = Tuning()
    methods: Annotated[dict[str, MethodConfig], Field(min_length=1)]
    tasks: Annotated[dict[str, PlannedTask], Field(min_length=1)]
    judged: Judged

    @model_validator(mode="after")
    def _names_what_it_has(self) -> Self:
        safe_name("plan name", self.name)
        judged = self.judged
        for field, value in judged.model_dump(exclude={"window"}).items():
            for name in (value,) if isinstance(value, str) else value:
                check_known(f"judged.{field}", "method", name, self.methods)
        if 1.0 not in self.budgets or not min(self.budgets) < 1.0 < max(self.budgets):
            raise ValueError(
                "budgets must hold 1.0, the budget of all arms, and both less and more"
            )
        for label in self.tasks:
            self._check_task(label, self.arms(label))
            self.study(label, "shared", self.arms(label))
        return self

    def _check_task(self, label: str, arms: Mapping[str, MethodConfig]) -> None:
        task, where, judged = self.tasks[label], f"tasks.{label}", self.judged
        first, seeds = self.tuning.first_seed, task.seeds or self.seeds
        if first < seeds:
            raise ValueError(
                f"tuning.first_seed must be above the seeds of {where}, {seeds}; not {first}"
            )
        if judged.against not in arms:
            raise ValueError(f"{where}.methods: {judged.against!r} cannot be left out")
        for name in self._left_out(task):
            check_known(f"{where}.methods", "method", name, self.methods)
        for name in task.grids:
            check_known(f"{where}.grids", "method", name, arms)
        if "accuracy" in task.metric and not 0 < task.target <= 1:
            raise ValueError(f"{where}.target must be a share, as accuracy is; not {task.target}")
        here = [n for n in judged.controls if n in arms and judged.real in arms]
        for name in here:
            source, real = _source(arms[name]), arms[judged.real]
            same = arms[name].mapping == real.mapping
            same = same and task.grids.get(name) == task.grids.get(judged.real)
            if not (source == judged.real if source else same):
                raise ValueError(
                    f"{where}: judged.controls: {name!r} must replay judged.real, {judged.real!r}, "
                    "or have its mapping and grid"
                )

    @staticmethod
    def _left_out(task: PlannedTask) -> tuple[str, ...]:
        return tuple(name for name, method in task.methods.items() if method is None)

    def arms(self, label: str) -> dict[str, MethodConfig]:
        """Return the methods of one task."""
        changed = self.tasks[label].methods
        every = self.methods | changed
        return {name: method for name, method in every.items() if method is not None}

    def study(
        self,
        label: str,
        stage: str,
        methods: Mapping[str, MethodConfig],
        *,
        ratio: float = 1.0,
        seeds: int | tuple[int, ...] | None = None,
    ) -> Study:
        """Return one stage of one task as a study."""
        planned = self.tasks[label]
        updates = max(1, round(ratio * planned.max_updates))
        every = min(planned.evaluation.every, updates)
        shared = {name: value for name, value in planned if name in Study.model_fields}
        return Study(
            **shared
            | {
                "name": f"{self.name}-{label}-{stage}",
                "tasks": {label: planned.task},
                "methods": dict(methods),
                "seeds": seeds or planned.seeds or self.seeds,
                "max_updates": updates,
                "evaluation": planned.evaluation.model_copy(update={"every": every}),
                "plan": self.digest,
            }
        )

    @property
    def digest(self) -> str:
        """The hash of all that the plan says."""
        return digest_of_content(self.model_dump(mode="json"))

    def declaration(self) -> Declaration:
        """Return the part that the verdicts follow."""
        goals = {label: task.goal for label, task in self.tasks.items()}
        own = {label: task.seeds for label, task in self.tasks.items() if task.seeds}
        return Declaration(
            goals=goals,
            seeds=self.seeds,
            margin=self.margin,
            budgets=self.budgets,
            seeds_of=own,
            left_out={label: self._left_out(task) for label, task in self.tasks.items()},
            **self.judged.model_dump(),
        )

    def cautions(self) -> list[str]:
        """Return what the plan cannot decide, however its runs end, a line each."""
        declared, lines = self.declaration(), []
        if declared.least_p >= ALPHA:
            lines.append(
                f"seeds: with {declared.most_seeds}, p among the {declared.family} comparisons of "
                f"H1 to H3 is never below {declared.least_p:.2g}: no arm can be better or worse"
            )
        if self.tuning.seeds == 1:
            lines.append(
                "tuning.seeds: with 1, noise chooses the rates of equal arms, and about 18 % of "
                "comparisons call one of them better or worse"
            )
        lines += [
            f"tasks.{label}.evaluation.every: {task.evaluation.every} of {task.max_updates} is not "
            f"below the margin, {self.margin:g}: times to the target cannot be equivalent"
            for label, task in self.tasks.items()
            if task.evaluation.every >= self.margin * task.max_updates
        ]
        return lines


def is_plan(path: Path) -> bool:
    """Return whether a parameter file is a plan's: it says what is judged."""
    return "judged" in read_yaml(path)


def read_plan(path: str | Path, settings: Iterable[str] = ()) -> Plan:
    """Return the plan of a YAML file, with the methods that it includes.

    Args:
        path: The file.
        settings: What is set in it besides; see `with_settings`.

    Raises:
        ConfigError: the file is missing or wrong; the message names each field.
    """
    path = Path(path)
    content = read_yaml(path)
    if isinstance(content.get("methods"), dict):
        content["methods"] = with_included(content["methods"], path, "methods")
    return parse(Plan, with_settings(content, settings, str(path)), source=str(path))


def register(plan: Plan, store: Store, *, amend: str | None = None) -> dict[str, Any]:
    """Write the plan into the store before its first run; return what the store has of it.

    Raises:
        ConfigError: the store has this plan with other content, and no reason to `amend` it.
    """
    found = store.read_plan(plan.name)
    content = plan.model_dump(mode="json")
    if found is None:
        found = {"changes": []}
    elif found["digest"] != plan.digest:
        changed = ", ".join(_differences(found["plan"], content))
        if not amend:
            raise ConfigError(
                f"plan {plan.name}: it was registered as {found['digest']} and has changed since "
                f"({changed}). Give it another name, or say why with --amend: every verdict will "
                "then show it"
            )
        entry = {"from": found["digest"], "fields": changed, "reason": amend}
        found["changes"] = [*found["changes"], entry]
    found |= {
        "digest": plan.digest,
        "plan": content,
        "declaration": asdict(plan.declaration()),
    }
    store.write_plan(plan.name, found)
    return found


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the paths at which two plans differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = [_differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys]
        return [line for part in parts for line in part]
    return [] if old == new else [path]


# --- tuning -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What tuning chose for an arm.

    Attributes:
        rate: In units of the task's.
        fields: Of its method, besides.
        trials: Settings tried, all with the same seeds.
        on_edge: Whether it is still the grid's first or last.
        updates: Gradient updates that the choice has cost.
    """

    rate: float
    fields: dict[str, Any]
    trials: int
    on_edge: bool
    updates: int


def _source(method: MethodConfig) -> str | None:
    return method.source if isinstance(method.source, str) else None


def with_fields(method: MethodConfig, rate: float, fields: Mapping[str, Any]) -> MethodConfig:
    """Return the method at another rate, with other values at dotted paths."""
    content = method.model_dump(mode="json", exclude_unset=True)
    content["rate"] = rate * method.rate
    for path, value in fields.items():
        content = with_value(content, path, value)
    return MethodConfig.model_validate(content)


def settings(plan: Plan, label: str, arm: str, rates: Iterable[float]) -> dict[str, tuple]:
    """Return the name of every setting of an arm -> (rate, fields)."""
    grids = plan.tasks[label].grids.get(arm, {})
    found = {}
    for rate, *values in product(rates, *grids.values()):
        fields = dict(zip(grids, values, strict=True))
        told = "".join(f" {key}={value}" for key, value in fields.items())
        found[f"{arm} rate={rate:g}{told}"] = (rate, fields)
    return found


def tuning_study(plan: Plan, label: str, rates: Mapping[str, tuple[float, ...]]) -> Study:
    """Return the study of every arm at each of its rates, on tuning's seeds."""
    arms = plan.arms(label)
    methods = {
        name: with_fields(arms[arm], *setting)
        for arm, grid in rates.items()
        for name, setting in settings(plan, label, arm, grid).items()
    }
    first = plan.tuning.first_seed
    seeds = tuple(range(first, first + plan.tuning.seeds))
    return plan.study(label, "tuning", methods, seeds=seeds)


def choose(
    plan: Plan, label: str, rates: Mapping[str, tuple[float, ...]], records: Records
) -> dict[str, Choice]:
    """Return the setting of every arm by its mean metric on validation, over tuning's seeds.

    Settings within `tuning.tie` standard errors of an arm's best tie with it; the error is that of
    a difference of two means, from the spread over seeds at the arms' best settings. Of those that
    tie an arm gets the one whose rate is nearest to the one that is best for the arms together (by
    their median), so that without evidence to the contrary all have the same. A setting of which a
    run diverged is worse than any that ended.
    """
    planned, tuning = plan.tasks[label], plan.tuning
    ends = {
        name: np.array([*of_seeds.values()])
        for name, of_seeds in final_values(records, label, planned.goal, "validation").items()
    }
    means = {name: -np.inf if np.isnan(v).any() else float(v.mean()) for name, v in ends.items()}
    known = {arm: settings(plan, label, arm, grid) for arm, grid in rates.items()}
    best = {}
    for arm, tried in known.items():
        best[arm] = max((n for n in tried if n in means), key=means.get, default="")
        if not best[arm]:
            raise ConfigError(f"tasks.{label}: no run of {arm} has ended, so no rate can be chosen")
    several = [n for n in best.values() if means[n] > -np.inf and len(ends[n]) > 1]
    squares = [np.var(ends[n], ddof=1) / len(ends[n]) for n in several]
    error = tuning.tie * np.sqrt(2 * np.mean(squares)) if several else 0.0
    of_rate = {
        rate: [
            max(means.get(n, -np.inf) for n, setting in tried.items() if setting[0] == rate)
            for tried in known.values()
        ]
        for rate in tuning.rates
    }
    together = max(of_rate, key=lambda rate: np.median(of_rate[rate]))
    found = {}
    for arm, tried in known.items():
        near = [n for n in tried if means.get(n, np.nan) >= means[best[arm]] - error]
        chosen = min(near, key=lambda n: (abs(np.log(known[arm][n][0] / together)), -means[n]))
        rate, fields = tried[chosen]
        on_edge = len(rates[arm]) > 1 and rate in (min(rates[arm]), max(rates[arm]))
        cost = len(tried) * tuning.seeds * planned.max_updates
        found[arm] = Choice(rate, fields, len(tried), on_edge, cost)
    return found


def wider(grid: tuple[float, ...], rate: float) -> tuple[float, ...]:
    """Return the grid with one rate more beyond `rate`, one of its ends, as far as the last step.

    >>> wider((0.5, 1.0, 2.0), 2.0), wider((0.5, 1.0, 2.0), 0.5)
    ((0.5, 1.0, 2.0, 4.0), (0.25, 0.5, 1.0, 2.0))
    """
    grid = tuple(sorted(grid))
    if rate == grid[-1]:
        return (*grid, grid[-1] ** 2 / grid[-2])
    return (grid[0] ** 2 / grid[1], *grid)


# --- all stages -------------------------------------------------------------------------------


def run_plan(
    plan: Plan,
    runs: str | Path,
    *,
    places: Places | None = None,
    amend: str | None = None,
    only: Sequence[str] = (),
) -> Report:
    """Register the plan and make what the store lacks of its stages.

    A plan that was killed goes on where it stopped: rates are chosen anew from the same records.

    Args:
        plan: The plan, registered as a whole.
        runs: Directory of the run store.
        places: Where runs are made.
        amend: Why it has changed since it was registered.
        only: The tasks to run now, by default all; the others may follow.

    Raises:
        ConfigError: the plan has changed since it was registered, or has no such task or metric.
        StudyError: some runs failed.
    """
    store = Store(runs)
    for label in only:
        check_known("tasks", "task", label, plan.tasks)
    labels = list(dict.fromkeys(only)) or list(plan.tasks)
    for label in labels:
        if f"{plan.name}-{label}-tuning" not in store.studies():
            check_goal(plan, label)
    register(plan, store, amend=amend)
    choices = tune(plan, runs, labels, places=places)
    registered = store.read_plan(plan.name)
    registered["rates"] = registered.get("rates", {}) | {
        label: {arm: asdict(choice) for arm, choice in of_every_arm(plan, label, found).items()}
        for label, found in choices.items()
    }
    store.write_plan(plan.name, registered)
    return run_studies(compared(plan, choices), runs, places=places)


def check_goal(plan: Plan, label: str) -> None:
    """Raise a ConfigError unless a run of the task can reach its target, and has not before it."""
    from repeatlab.training.making import build_task  # which loads torch

    goal, where = plan.tasks[label].goal, f"tasks.{label}"
    plan.tasks[label].task.prepare()
    run = plan.study(label, "own", plan.arms(label)).planned()[0]
    metrics = build_task(run.config, "cpu").evaluate("validation")
    check_known(f"{where}.metric", "metric", goal.metric, metrics)
    if goal.sign * (metrics[goal.metric] - goal.target) >= 0:
        start = f"without which {goal.metric} is {metrics[goal.metric]:.4g}"
        raise ConfigError(f"{where}.target must take training, {start}; not {goal.target}")


def tune(
    plan: Plan, runs: str | Path, labels: Sequence[str], *, places: Places | None = None
) -> dict[str, dict[str, Choice]]:
    """Train the grids of tasks, widened where the chosen rate lies on an edge; return choices."""
    rates = {  # controls take their source's
        label: {
            k: plan.tuning.rates for k, method in plan.arms(label).items() if not _source(method)
        }
        for label in labels
    }
    choices: dict[str, dict[str, Choice]] = {}
    for _ in range(plan.tuning.widen + 1):
        studies = [tuning_study(plan, label, grids) for label, grids in rates.items()]
        run_studies(studies, runs, places=places)
        choices = {
            label: choose(plan, label, rates[label], load(runs, f"{plan.name}-{label}-tuning"))
            for label in labels
        }
        edges = [(k, arm) for k, found in choices.items() for arm in found if found[arm].on_edge]
        if not edges:
            break
        for label, arm in edges:
            rates[label][arm] = wider(rates[label][arm], choices[label][arm].rate)
    return choices


def of_every_arm(plan: Plan, label: str, choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Return the choice for every arm of a task: a control, untried, has its source's rate."""
    found = {}
    for name, method in plan.arms(label).items():
        source = _source(method)
        found[name] = Choice(choices[source].rate, {}, 0, False, 0) if source else choices[name]
    return found


def compared(plan: Plan, choices: Mapping[str, Mapping[str, Choice]]) -> list[Study]:
    """Return the studies after tuning: at own rates, at the shared one, and the budgets."""
    studies = []
    for label, of_task in choices.items():
        every = of_every_arm(plan, label, of_task)
        arms = plan.arms(label)
        own = {name: with_fields(arms[name], one.rate, one.fields) for name, one in every.items()}
        studies.append(plan.study(label, "own", own))
        studies.append(plan.study(label, "shared", arms))
        against = {plan.judged.against: own[plan.judged.against]}
        studies += [
            plan.study(label, f"budget-{ratio:g}", against, ratio=ratio)
            for ratio in plan.budgets
            if ratio != 1.0
        ]
    return studies
