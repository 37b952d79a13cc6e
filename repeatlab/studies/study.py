"""A study: tasks x methods x seeds, executed over processes, run by run from the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, PlainValidator, ValidationError, field_validator, model_validator
from tqdm.auto import tqdm

from repeatlab.core.environment import commit
from repeatlab.core.files import StoreError, safe_name
from repeatlab.core.html_view import rows_table
from repeatlab.core.schema import Name, check_known, counted, parse, shown
from repeatlab.core.signals import Interrupted
from repeatlab.store.records import Run, Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.scheduling import Outcome, open_trainer
from repeatlab.tasks import TaskConfig
from repeatlab.training.config import (
    CalibrationConfig,
    Common,
    MethodConfig,
    RunConfig,
    TaskChoice,
)

MOST_SEEDS = 10_000
# Of a run that was reported as made.
ABSENT = "it is not in the store: do the workers see the same directory under this path?"


class StudyError(RuntimeError):
    """Some runs failed; the message lists them with their reasons, `report` has the others."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class Planned(NamedTuple):
    """One run of a study."""

    task: str
    method: str
    seed: int
    config: RunConfig


def _seeds(value: Any) -> int | tuple[int, ...]:
    several = isinstance(value, (list, tuple))
    numbers = tuple(value) if several else (value,)
    valid = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    count = len(set(numbers)) if several and valid else value
    if not valid or not 0 < count <= MOST_SEEDS or (several and count < len(numbers)):
        raise ValueError(
            f"must be a count of at least 1 and at most {MOST_SEEDS}, or a list of as many "
            f"different seeds; not {shown(value)}"
        )
    return numbers if several else value


class Study(Common):
    """Every method with every seed on every task, all under the same budget of updates."""

    name: str
    tasks: Annotated[dict[Name, TaskChoice], Field(min_length=1)]
    """What tables and figures call the task -> its configuration."""
    methods: Annotated[dict[Name, MethodConfig], Field(min_length=1)]
    seeds: Annotated[Any, PlainValidator(_seeds)] = 5
    """How many seeds, counted from 0, or which."""
    calibration: CalibrationConfig = CalibrationConfig()
    plan: str | None = None
    """The digest of the plan that it is a stage of."""
    lockstep: bool = True
    """Whether runs of small networks may train as one group where that is faster. Their `seconds`
    are then a share of the group's, which says nothing of an arm: not where time is compared."""

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, value: str) -> str:
        return safe_name("study name", value)

    @classmethod
    def of(cls, **fields: Any) -> Study:
        """Return the study with these fields, naming every bad one in the error."""
        return parse(cls, fields)

    def planned(self) -> list[Planned]:
        """Return all runs, seed by seed, so that an early look has every method."""
        return self._planned

    @cached_property
    def _planned(self) -> list[Planned]:
        seeds = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        return [
            Planned(label, name, seed, self._config(task, name, seed))
            for label, task in self.tasks.items()
            for seed in seeds
            for name in self.methods
        ]

    def _config(self, task: TaskConfig, name: str, seed: int) -> RunConfig:
        fields = {name: value for name, value in self if name in RunConfig.model_fields}
        method = self._with_source(name)
        # Only arms that are calibrated depend on how: the others keep their identity.
        calibration = self.calibration if method.depends_on_calibration else None
        varied = {"task": task, "method": method, "seed": seed, "calibration": calibration}
        return RunConfig(**fields | varied)

    def _with_source(self, name: str) -> MethodConfig:
        """Return the method of this name with the study's method in the place of that in `of`."""
        method, path = self.methods[name], f"methods.{name}.mapping.of"
        if not isinstance(method.source, str):
            return method
        check_known(path, "method", method.source, self.methods)
        source = self.methods[method.source]
        try:
            source.check_source()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        mapping = method.mapping.model_copy(update={"of": source})
        return method.model_copy(update={"mapping": mapping})

    @model_validator(mode="after")
    def _runs_mean_something(self) -> Self:
        for (label, task), name in product(self.tasks.items(), self.methods):
            try:
                self._config(task, name, 0)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"tasks.{label} with methods.{name}: {message}") from None
        return self

    def run(
        self, runs: str | Path = "runs", *, workers: int | None = None, places: Places | None = None
    ) -> Report:
        """Make the runs that the store lacks; see `run_studies`."""
        return run_studies([self], runs, workers=workers, places=places)


@dataclass(frozen=True)
class Report:
    """How the runs of an execution ended.

    Attributes:
        status: Run id to "complete", "diverged" or "failed".
        trained: How many were trained now; the others were in the store.
        retried: Run id to attempts, of those that needed more than one.
    """

    status: dict[str, str]
    trained: int
    retried: Mapping[str, int] = field(default_factory=dict)

    def _counts(self) -> tuple[int, dict[str, int], dict[str, int]]:
        """Return how many runs there are, how they ended, and where they came from."""
        runs = len(self.status)
        now = {"trained now": self.trained, "in the store": runs - self.trained}
        return runs, dict(sorted(Counter(self.status.values()).items())), now

    def __str__(self) -> str:
        runs, *counts = self._counts()
        ended, now = (", ".join(f"{n} {what}" for what, n in part.items()) for part in counts)
        again = f"; {len(self.retried)} took more than one attempt" if self.retried else ""
        return f"{counted(runs, 'run')}: {ended} ({now}){again}"

    def _repr_html_(self) -> str:
        runs, ended, now = self._counts()
        again = {"more than one attempt": len(self.retried)} if self.retried else {}
        return rows_table({"runs": runs} | ended | now | again)


def run_study(
    fields: dict[str, Any], runs: str | Path = "runs", *, workers: int | None = None
) -> Report:
    """Make the runs of the study with these fields that the store lacks; see `run_studies`.

    Where the same study was run by this very code and the store has all of it, that is found out
    from its manifest, without loading torch: a notebook that only draws starts at once.
    """
    return _in_store(fields, Store(runs)) or Study.of(**fields).run(runs, workers=workers)


def _in_store(fields: dict[str, Any], store: Store) -> Report | None:
    """Return the report of a study that is there as a whole, made by this commit, else None."""
    code = commit()
    if code is None or "+changes" in code:
        return None  # other code could give the same fields other runs
    try:
        study = store.read_study(fields["name"])
    except (KeyError, TypeError, ValueError, StoreError):
        return None  # whatever is wrong with them, `Study.of` says it
    handles = [store.run(*run["run"]) for run in study["runs"]]
    same = (study.get("commit"), study.get("study")) == (code, fields)
    if not same or not all(handle.done for handle in handles):
        return None
    return Report({handle.path.name: handle.status["status"] for handle in handles}, trained=0)


def run_studies(
    studies: Sequence[Study],
    runs: str | Path = "runs",
    *,
    workers: int | None = None,
    places: Places | None = None,
) -> Report:
    """Make the runs of `studies` that the store lacks, spread over worker processes.

    A run that fails does not stop the others, one that was begun goes on from its checkpoint, and
    one whose worker dies is tried again by another.

    Args:
        studies: The studies; a run that several need is made once.
        runs: Directory of the run store.
        workers: Processes, each of one thread; by default one for each core. 0 trains in this
            process, one run after another.
        places: Where runs are made, in place of `workers`.

    Raises:
        StudyError: runs have failed, or a task lacks its data.
        StoreError: the store cannot be written.
        Stopped: Ctrl-C, which is a KeyboardInterrupt; every run that was under way has left a
            checkpoint. After SIGTERM and SIGHUP it is SystemExit.
    """
    store = Store(runs)
    store.check_writable()
    configs = {p.config.run_id: p.config for study in studies for p in study.planned()}
    for study in studies:
        store.write_study(study.name, _manifest(study))
    handles = {i: store.run(config.task.name, i) for i, config in configs.items()}
    missing = {i: config for i, config in configs.items() if not handles[i].done}
    alone = (study.planned() for study in studies if not study.lockstep)
    apart = {p.config.run_id for planned in alone for p in planned}
    places = places or Places(workers=workers)

    def show(ended: tuple[str, Outcome]) -> tuple[str, Outcome]:
        handle = handles[ended[0]]
        for study in studies if places.into and handle.done else ():
            for *names, config in study.planned():
                if config.run_id == ended[0]:
                    places.into(handle, study.name, *names)
        return ended

    outcomes = _make(missing, handles, store, places, apart=apart, show=show)
    failed = {i: ABSENT for i in missing if not handles[i].done}
    failed |= {i: outcome.failure for i, outcome in outcomes.items() if outcome.failure}
    # The others were made by another process meanwhile.
    trained = sum(bool(outcome.failure or outcome.trained) for outcome in outcomes.values())
    attempts = {i: handles[i].environment.get("attempts", 1) for i in missing}
    report = Report(
        {i: handle.status["status"] for i, handle in handles.items()},
        trained=trained,
        retried={i: number for i, number in attempts.items() if number > 1},
    )
    if failed:
        lines = [f"{len(failed)} of {len(configs)} runs failed:"]
        lines += [f"  {handles[i].path}: {why}" for i, why in failed.items()]
        raise StudyError("\n".join(lines), report)
    return report


def _make(
    missing: Mapping[str, RunConfig],
    handles: Mapping[str, Run],
    store: Store,
    places: Places,
    *,
    apart: Container[str],
    show: Callable[[tuple[str, Outcome]], tuple[str, Outcome]],
) -> dict[str, Outcome]:
    """Make what is missing, with a bar of progress; of the runs in `apart` none in lock-step.

    What has ended is passed through `show` at once.
    """
    if not missing:
        return {}
    # Once and here, so that what is not there is one message, and workers do not all fetch it.
    for task in {config.task for config in missing.values()}:
        task.prepare()
    with open_trainer(store, places) as train:
        outcomes = map(show, train(missing, apart=apart))
        try:
            return dict(tqdm(outcomes, total=len(missing), desc="runs", unit="run"))
        except Interrupted:
            raise Interrupted(_stopped(handles.values())) from None


def _stopped(handles: Collection[Run]) -> str:
    """Return what a user is told of runs that were stopped."""
    from repeatlab.training.checkpoint import CURRENT

    done = sum(run.done for run in handles)
    left = sum((run.path / CURRENT).exists() for run in handles)
    return (
        f"Stopped: {done} of {len(handles)} runs done, {left} {'has' if left == 1 else 'have'} a "
        "checkpoint; run this again to go on."
    )


def _manifest(study: Study) -> dict[str, Any]:
    """Return what a reader needs to find the study's runs, without the code that makes them."""
    runs = []
    for task, method, seed, config in study.planned():
        place = [config.task.name, config.run_id]
        runs.append({"task": task, "method": method, "seed": seed, "run": place})
    return {
        "name": study.name,
        "max_updates": study.max_updates,
        "methods": list(study.methods),
        "runs": runs,
        "study": study.model_dump(mode="json", exclude_unset=True),
        "plan": study.plan,
        "commit": commit(),
    }
