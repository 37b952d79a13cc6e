"""Hyperparameters of a task and a method, searched for on the validation split.

    # params/search/supervised.yaml
    name: search-supervised
    task: {name: supervised, lr: 0.05}
    method: {mapping: {name: linear, t: 1.0}}
    space:                                    # dotted paths into the run's configuration
      task.lr: {low: 0.005, high: 0.5, log: true}
      method.mapping.max_repeats: {low: 2, high: 8, kind: int}
      task.batch_size: {choices: [32, 64]}
    sampler: {name: random, trials: 20}       # or {name: grid}, of choices alone
    seeds: 3
    metric: loss
    max_updates: 300

A search is a study of runs with a choice at the end. A trial is one run for each seed; its value is
the mean over seeds of the metric on the validation split at the last update. All runs are ordinary
ones of the store, which `runs/studies/<name>.json` names with what was found. A search that is
started again finds them there, goes on to its number of trials, which may be raised, and trains
nothing twice. To look more closely, search again in narrower ranges around the best trial.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Self

import pandas as pd
from pydantic import Field, field_validator, model_validator

from repeatlab.analysis.frames import LOWER_IS_BETTER
from repeatlab.core.environment import commit
from repeatlab.core.files import safe_name
from repeatlab.core.schema import ConfigError, choice, did_you_mean, parse
from repeatlab.store.records import Run, Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.scheduling import Outcome, with_needs
from repeatlab.studies.search_space import SAMPLERS, Dimension, Point
from repeatlab.studies.study import StudyError, failure_message, make_runs
from repeatlab.training.config import CalibrationConfig, EvaluationConfig, PositiveInt, RunConfig

# Budget, seeds and machine are the same for all trials.
SpacePath = Annotated[str, Field(pattern=r"^(task|method|calibration)\..")]


class Search(RunConfig):
    """A run, of which some values are varied, how, and what decides.

    `task` and `method` have a value wherever they need one; what the space varies is replaced.
    `seed` is that of what is tried.
    """

    name: str
    space: Annotated[dict[SpacePath, Dimension], Field(min_length=1)]
    """Dotted path into the run's configuration -> where to look."""
    sampler: choice("sampler", SAMPLERS)
    """How the space is searched."""
    seeds: PositiveInt = 1
    """Runs of a trial, with seeds counted from 0."""
    metric: str
    """The metric on the validation split at the last update, averaged over seeds."""
    evaluation: EvaluationConfig = EvaluationConfig(test=False)
    calibration: CalibrationConfig = CalibrationConfig()

    @property
    def points(self) -> list[Point]:
        """What is tried: a function of space, sampler and seed alone."""
        return self.sampler.build()(self.space, self.seed)

    def configs(self, point: Point) -> list[RunConfig]:
        """Return the runs of a trial, seed by seed, with the values of `point` at its paths.

        Raises:
            ConfigError: a path leads nowhere, or a value is refused.
        """
        fields = {name: value for name, value in self if name in RunConfig.model_fields}
        fields |= {
            "task": self.task.model_dump(),
            "method": self.method.model_dump(exclude_unset=True),
            "calibration": self.calibration.model_dump(),
        }
        for path, value in point.items():
            _place(fields, path, value)
        config = parse(RunConfig, fields)
        # Only runs that are calibrated depend on how: the others keep their identity.
        same = {} if config.method.depends_on_calibration else {"calibration": None}
        return [config.model_copy(update={**same, "seed": seed}) for seed in range(self.seeds)]

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, value: str) -> str:
        return safe_name("search name", value)

    @field_validator("evaluation")
    @classmethod
    def _never_test(cls, value: EvaluationConfig) -> EvaluationConfig:
        if (value.test and "test" in value.model_fields_set) or "validation" not in value.splits:
            raise ValueError("must have test: false and validation in splits: a search goes by it")
        return value.model_copy(update={"test": False})

    @model_validator(mode="after")
    def _corners_are_runs(self) -> Self:
        for path, dimension in self.space.items():
            if self.sampler.name == "grid" and not hasattr(dimension, "choices"):
                raise ValueError(f"space.{path}: must be {{choices: [...]}} for a grid")
        for values in product(*(dimension.ends for dimension in self.space.values())):
            point = dict(zip(self.space, values, strict=True))
            try:
                self.configs(point)
            except ConfigError as error:
                raise ValueError(f"space: with {describe(point)}: {error}") from None
        return self


def describe(point: Point) -> str:
    """Return the values of `point` by path, for a message."""
    return ", ".join(f"{path} = {value}" for path, value in point.items())


def _place(fields: dict[str, Any], path: str, value: Any) -> None:
    """Put `value` at the dotted `path`."""
    *parents, name = path.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: {parent} is {fields!r}, which has no parts")
    fields[name] = value


@dataclass(frozen=True)
class Trial:
    """One trial and what became of it.

    Attributes:
        params: Dotted paths and the values tried.
        value: Mean of the metric over seeds; None where a run diverged.
        reason: Then, which and when: "diverged at update 7 (seed 0)".
        runs: Ids of its runs, seed by seed.
    """

    params: Point
    value: float | None
    reason: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class SearchReport:
    """The result of a search.

    Attributes:
        search: What was looked for.
        trials: All trials, in the order in which they were proposed.
        cost: The ledgers of all its runs, added up: `repeatlab.cost.cost_units(cost, k)` is what
            they come to. Diverged ones count, and those that the store had before; a run that
            several trials share counts once.
    """

    search: Search
    trials: Sequence[Trial]
    cost: dict[str, float]

    @property
    def best(self) -> Trial | None:
        """The trial with the best value, the first of equals; None where none has a value.

        Its value is the best of many and so flatters: train anew, with other seeds, to report one.
        """
        have = [trial for trial in self.trials if trial.value is not None]
        best = min if self.search.metric in LOWER_IS_BETTER else max
        return best(have, key=lambda trial: trial.value, default=None)

    @property
    def warnings(self) -> list[str]:
        """What to be wary of: best values at the ends of the space."""
        if self.best is None:
            return ["all trials diverged: there is no best one"]
        ends = {path: self.search.space[path].end_at(v) for path, v in self.best.params.items()}
        return [
            f"the best {path}, {self.best.params[path]}, lies at the {end} end of what was "
            f"searched ({self.search.space[path]}): look further there"
            for path, end in ends.items()
            if end
        ]

    @property
    def table(self) -> pd.DataFrame:
        """One row per trial: the values tried, the metric, and why there is none."""
        name = f"validation.{self.search.metric}"
        return pd.DataFrame([{**t.params, name: t.value, "reason": t.reason} for t in self.trials])

    def __str__(self) -> str:
        shown = self.table.to_string(na_rep="", float_format="{:.4g}".format)
        lines = [shown, *(f"warning: {warning}" for warning in self.warnings)]
        if self.best is not None:
            lines.insert(1, f"best: {describe(self.best.params)} with {self.best.value:.6g}")
        cost = f"{self.cost['updates']} updates, {self.cost['forward_samples']} samples forward"
        return "\n".join([*lines, f"cost: {len(self.trials)} trials, {cost}"])


def run_search(
    search: Search, runs: str | Path = "runs", *, workers: int | None = None
) -> SearchReport:
    """Make the trials that are missing, their runs spread over processes.

    Runs that the store has are not made again. A diverged trial is a result.

    Args:
        search: What to try.
        runs: Directory of the run store.
        workers: Processes, each of one thread; by default one for each core. 0 trains in this
            process, one run after another.

    Raises:
        ConfigError: a task refuses a value, or the metric is unknown.
        DataError: a task lacks its data.
        StudyError: runs have failed; the others were made.
        StoreError: the store cannot be written.
    """
    store = Store(runs)
    store.check_writable()
    # Not in lock-step: what a group makes of a run would depend on how many workers there are.
    places = Places(workers=workers, lockstep=False)
    return search_with(search, store, partial(make_runs, store=store, places=places))


def search_with(
    search: Search, store: Store, make: Callable[[dict[str, RunConfig]], Mapping[str, Outcome]]
) -> SearchReport:
    """Make all trials of a search, and write down what it found.

    Args:
        search: What to try.
        store: Where the runs are.
        make: Makes those, by their ids, that the store lacks; see `make_runs`.
    """
    points = search.points
    configs = {config.run_id: config for point in points for config in search.configs(point)}
    missing = {i: config for i, config in configs.items() if not _run(store, config).done}
    failed = {
        _run(store, configs[i]).path: outcome.failure
        for i, outcome in make(missing).items()
        if outcome.failure and not _ended(store, configs[i])
    }
    if failed:
        raise StudyError(failure_message(failed, of=len(missing)))
    cost = Counter()
    for config in configs.values():
        cost.update(_run(store, config).summary.get("ledger", {}))
    report = SearchReport(search, [_trial(search, point, store) for point in points], dict(cost))
    store.write_study(search.name, _manifest(report))
    return report


def _trial(search: Search, point: Point, store: Store) -> Trial:
    """Return what became of a trial whose runs were made."""
    configs, values, reasons = search.configs(point), [], []
    for config in configs:
        ended = _ended(store, config)
        value = nan if ended else _value(_run(store, config).summary["final"], search.metric)
        values.append(value)
        if not isfinite(value):
            why = f"diverged at update {ended[0]}" if ended else f"the metric is {value}"
            reasons.append(f"{why} (seed {config.seed})")
    runs = tuple(config.run_id for config in configs)
    return Trial(point, None if reasons else fmean(values), "; ".join(reasons), runs)


def _value(final: Mapping[str, float], metric: str) -> float:
    known = {m.removeprefix("validation."): v for m, v in final.items() if m.startswith("valid")}
    if metric not in known:
        raise ConfigError(f"metric: unknown metric {metric!r}; {did_you_mean(metric, known)}")
    return known[metric]


def _ended(store: Store, config: RunConfig) -> list[int]:
    """Return at which updates the run, and runs that it needs, diverged."""
    made = [_run(store, needed).summary for needed in with_needs([config]).values()]
    return [summary["update"] for summary in made if summary.get("status") == "diverged"]


def _run(store: Store, config: RunConfig) -> Run:
    return store.run(config.task.name, config.run_id)


def _manifest(report: SearchReport) -> dict[str, Any]:
    """Return what a reader needs to find the search's runs, and what it found."""
    search, task = report.search, report.search.task.name
    names = [describe(trial.params) for trial in report.trials]
    runs = [
        {"task": task, "method": name, "seed": seed, "run": [task, run]}
        for name, trial in zip(names, report.trials, strict=True)
        for seed, run in enumerate(trial.runs)
    ]
    trials = [asdict(trial) for trial in report.trials]
    return {
        "name": search.name,
        "max_updates": search.max_updates,
        "methods": names,
        "runs": runs,
        "search": search.to_json(),
        "found": {"warnings": report.warnings, "cost": report.cost, "trials": trials},
        "commit": commit(),
    }
