"""Hyperparameters of a task and a method, searched for on the validation split.

    # params/search/supervised.yaml
    name: search-supervised
    task: {name: supervised, lr: 0.05}
    method: {mapping: {name: linear, t: 1.0}}
    space:                                    # dotted paths into the run's configuration
      task.lr: {low: 0.005, high: 0.5, log: true}
      method.mapping.max_repeats: {low: 2, high: 8, kind: int}
      task.batch_size: {choices: [32, 64]}
    sampler: {name: coarse_to_fine, trials: 20}  # or random, tpe; or grid, of choices alone
    seeds: 3
    metric: loss
    max_updates: 300

A search is a study of runs with a choice at the end. A trial is one run for each seed; its value is
the mean over seeds of the metric on the validation split at the last update. All runs are ordinary
ones of the store, which `runs/studies/<name>.json` names with what was found. A search that is
started again finds them there, goes on to its number of trials, which may be raised, and trains
nothing twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Self

import pandas as pd
from pydantic import Field, field_validator, model_validator
from tqdm.auto import tqdm

from repeatlab.analysis.frames import LOWER_IS_BETTER
from repeatlab.core.environment import commit
from repeatlab.core.files import safe_name
from repeatlab.core.schema import ConfigError, choice, did_you_mean, parse
from repeatlab.store.records import Run, Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.scheduling import open_trainer, with_needs
from repeatlab.studies.search_space import SAMPLERS, Choices, Dimension, Point, Trial, best_of
from repeatlab.studies.study import StudyError
from repeatlab.training.config import CalibrationConfig, EvaluationConfig, PositiveInt, RunConfig

# What a search adds up of its runs' ledgers.
COUNTED = (
    "updates",
    "forward_samples",
    "backward_samples",
    "scoring_samples",
    "environment_steps",
    "seconds",
)
# Budget, seeds and machine are the same for all trials.
SpacePath = Annotated[str, Field(pattern=r"^(task|method|calibration)\..")]
Configs = dict[str, RunConfig]
"""Runs by their ids."""


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
    def lower_is_better(self) -> bool:
        """Whether the metric is to be small."""
        return self.metric in LOWER_IS_BETTER

    def propose(self, trials: Sequence[Trial]) -> list[Point]:
        """Return the points to be tried together after `trials`; none where the search is over."""
        return self.sampler.build().propose(self, trials)

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
        if value.test and "test" in value.model_fields_set:
            raise ValueError("test: must be false: a search never reads the test split")
        if "validation" not in value.splits:
            raise ValueError("splits: must hold validation, by which a search chooses")
        return value.model_copy(update={"test": False})

    @model_validator(mode="after")
    def _corners_are_runs(self) -> Self:
        for path, dimension in self.space.items():
            if self.sampler.name == "grid" and not isinstance(dimension, Choices):
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
class SearchReport:
    """The result of a search.

    Attributes:
        search: What was looked for.
        trials: All trials, in the order in which they were proposed.
        cost: How many runs the trials have made, with those that these needed, and the sums of
            `COUNTED` over them: `repeatlab.cost.cost_units(cost, k)` is what they come to. Diverged
            ones count, and those that the store had before; a run that several trials share counts
            once.
    """

    search: Search
    trials: tuple[Trial, ...]
    cost: dict[str, float]

    @cached_property
    def best(self) -> Trial | None:
        """The complete trial with the best value, the first of equals; None without any.

        Its value is the best of many and so flatters: train anew, with other seeds, to report one.
        """
        return best_of(self.trials, lower_is_better=self.search.lower_is_better)

    @cached_property
    def warnings(self) -> list[str]:
        """What to be wary of: grids that were widened, best values at the ends of the space."""
        if self.best is None:
            return ["no trial is complete: there is no best one"]
        lines = []
        for path, best in self.best.params.items():
            looked = self.search.space[path]
            if isinstance(looked, Choices):
                tried = dict.fromkeys([*looked.choices, *(t.params[path] for t in self.trials)])
                if len(tried) > len(looked.choices):
                    lines.append(f"{path}: the best lay at an end of {looked}, which was widened")
                looked = Choices(choices=tuple(tried))
            if end := looked.end_at(best):
                lines.append(
                    f"the best {path}, {best}, lies at the {end} end of what was searched "
                    f"({looked}): look further there"
                )
        return lines

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per trial: trial, the values tried, the metric, status and the reason for it."""
        metric = f"validation.{self.search.metric}"
        rows = [
            {"trial": number, **t.params, metric: t.value, "status": t.status, "reason": t.reason}
            for number, t in enumerate(self.trials)
        ]
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """Return best, warnings, cost and all trials as JSON-safe values."""
        found = {"best": self.best and asdict(self.best), "warnings": self.warnings}
        return found | {"cost": self.cost, "trials": [asdict(trial) for trial in self.trials]}

    def __str__(self) -> str:
        shown = self.table.to_string(index=False, na_rep="", float_format="{:.4g}".format)
        lines = [shown, *(f"warning: {warning}" for warning in self.warnings)]
        if self.best is not None:
            lines.insert(1, f"best: {describe(self.best.params)} with {self.best.value:.6g}")
        cost = ", ".join(f"{value:g} {name}" for name, value in self.cost.items())
        return "\n".join([*lines, f"cost: {len(self.trials)} trials, {cost}"])


def run_search(
    search: Search, runs: str | Path = "runs", *, workers: int | None = None
) -> SearchReport:
    """Make the trials that are missing, round by round, their runs spread over processes.

    Runs that the store has are not made again. A diverged trial is a result. One that failed does
    not stop the others, and is made again at the next start.

    Args:
        search: What to try.
        runs: Directory of the run store.
        workers: Processes, each of one thread; by default one for each core. 0 trains in this
            process, one run after another.

    Raises:
        ConfigError: a task refuses a value, or the metric is unknown.
        DataError: a task lacks its data.
        StudyError: trials have failed.
        StoreError: the store cannot be written.
    """
    store = Store(runs)
    store.check_writable()

    # Not in lock-step: what a group makes of a run would depend on how many workers there are.
    with open_trainer(store, Places(workers=workers, lockstep=False)) as train:

        def make(configs: Configs) -> dict[str, str]:
            for task in {config.task for config in configs.values()}:
                task.prepare()
            progress = tqdm(train(configs), total=len(configs), desc="runs", unit="run")
            return {run_id: outcome.failure for run_id, outcome in progress if outcome.failure}

        (report,) = run_searches([search], store, make)
    store.write_study(search.name, _manifest(report))
    failed = sum(trial.status == "failed" for trial in report.trials)
    if failed:
        raise StudyError(f"{failed} of {len(report.trials)} trials failed:\n{report}")
    return report


def run_searches(
    searches: Sequence[Search], store: Store, make: Callable[[Configs], Mapping[str, str]]
) -> list[SearchReport]:
    """Go on with searches side by side until each is over; return what they found.

    Args:
        searches: Such as one for each arm that is to be tuned; their runs are made together.
        store: Where the runs are.
        make: Makes those of a round that the store lacks, and returns why those failed that did.
    """
    trials: list[list[Trial]] = [[] for _ in searches]
    runs: list[Configs] = [{} for _ in searches]
    while True:
        rounds = [search.propose(made) for search, made in zip(searches, trials, strict=True)]
        if not any(rounds):
            break
        missing: Configs = {}
        for search, points, known in zip(searches, rounds, runs, strict=True):
            for point in points:
                with suppress(ConfigError):  # which `_judged` notes down
                    asked = {config.run_id: config for config in search.configs(point)}
                    known |= asked
                    missing |= {i: c for i, c in asked.items() if not _run(store, c).done}
        failures = make(missing) if missing else {}
        for search, points, made in zip(searches, rounds, trials, strict=True):
            made += [_judged(search, point, store, failures) for point in points]
    return [
        SearchReport(search, tuple(made), _cost(known, store))
        for search, made, known in zip(searches, trials, runs, strict=True)
    ]


def _judged(search: Search, point: Point, store: Store, failures: Mapping[str, str]) -> Trial:
    """Return what became of a trial whose runs were made, or have failed."""
    try:
        configs = search.configs(point)
    except ConfigError as error:
        return Trial(point, "refused", reason=str(error))
    values, diverged, failed = [], [], []
    for config in configs:
        seed = f"(seed {config.seed})"
        summaries = [_run(store, c).summary for c in with_needs([config]).values()]
        ended = next((s for s in summaries if s.get("status") == "diverged"), None)
        if ended is not None:
            diverged.append(f"diverged at update {ended['update']} {seed}")
        elif not summaries[-1]:
            failed.append(f"{failures[config.run_id]} {seed}")
        else:
            values.append(_value(summaries[-1]["final"], search.metric))
            if not isfinite(values[-1]):
                diverged.append(f"the metric is {values[-1]} {seed}")
    runs = tuple(config.run_id for config in configs)
    if failed or diverged:
        status = "failed" if failed else "diverged"
        return Trial(point, status, reason="; ".join(failed or diverged), runs=runs)
    return Trial(point, "complete", fmean(values), runs=runs)


def _value(final: Mapping[str, float], metric: str) -> float:
    known = {m.removeprefix("validation."): v for m, v in final.items() if m.startswith("valid")}
    if metric not in known:
        raise ConfigError(f"metric: unknown metric {metric!r}; {did_you_mean(metric, known)}")
    return known[metric]


def _cost(configs: Configs, store: Store) -> dict[str, float]:
    """Return what these runs and those that they needed have spent, each counted once."""
    spent = Counter()
    for config in with_needs(configs.values()).values():
        ledger = _run(store, config).summary.get("ledger", {})
        spent["runs"] += bool(ledger)
        # Models that a sampler trained beforehand are no runs; teachers, charged alike, are.
        parts = ("",) if config.method.distillation else ("", "holdout_")
        spent.update({n: sum(ledger.get(part + n, 0) for part in parts) for n in COUNTED})
    return {name: spent[name] for name in ("runs", *COUNTED)}


def _run(store: Store, config: RunConfig) -> Run:
    return store.run(config.task.name, config.run_id)


def _manifest(report: SearchReport) -> dict[str, Any]:
    """Return what a reader needs to find the search's runs, and what it found."""
    search, task = report.search, report.search.task.name
    trials = {describe(trial.params): trial.runs for trial in report.trials}
    return {
        "name": search.name,
        "max_updates": search.max_updates,
        "methods": list(trials),
        "runs": [
            {"task": task, "method": method, "seed": seed, "run": [task, run]}
            for method, runs in trials.items()
            for seed, run in enumerate(runs)
        ],
        "search": search.to_json(),
        "found": report.to_json(),
        "commit": commit(),
    }
