"""How a search is executed: trials proposed, their runs made, and what they gave written down."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from repeatlab.core.environment import commit, pick_device
from repeatlab.core.files import StoreError, write_json
from repeatlab.core.schema import ConfigError, did_you_mean
from repeatlab.store.records import Run, Store
from repeatlab.studies.cluster import local_client
from repeatlab.studies.scheduling import spread
from repeatlab.studies.search.model import Search, describe
from repeatlab.studies.search.report import SearchReport, Trial, cost_of
from repeatlab.studies.study import StudyError
from repeatlab.studies.worker import train_job
from repeatlab.tasks import TASKS, TaskConfig, load_task
from repeatlab.training.config import RECORD_VERSION, RunConfig
from repeatlab.training.distillation import teacher_runs
from repeatlab.training.prerequisites import prerequisites

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Configs = dict[str, RunConfig]
"""Runs by their ids."""


def run_search(
    search: Search, runs: str | Path = "runs", *, workers: int | None = None
) -> SearchReport:
    """Make the trials that are missing, round by round, their runs spread over processes.

    Runs that the store has are not made again. A diverged trial is a result. One that failed stays
    open, does not stop the others, and is made again at the next start.

    Args:
        search: What to try.
        runs: Directory of the run store.
        workers: Processes, each of one thread; by default one for each core. 0 trains in this
            process, one run after another.

    Raises:
        ConfigError: a task refuses a value, the metric is unknown, or the log holds another search
            of this name; nothing has been trained then.
        DataError: a task lacks its data.
        StudyError: trials have failed.
        StoreError: the store cannot be written, or the log not be read.
    """
    store = Store(runs)
    store.check_writable()
    log = (store.root / "searches" / f"{search.name}.log").resolve()
    if not log.exists():
        _check_tasks(search)
    study = _open(search, log)
    trained: set[str] = set()
    tried: set[int] = set()
    with ExitStack() as stack:
        rounds = search.sampler.build().rounds(search.total)
        cores = (os.cpu_count() or 1) if workers is None else workers
        train = _trainer(store, min(cores, max(map(len, rounds)) * search.seeds), stack)
        for numbers in rounds:
            _propose(search, study, numbers)
            # Those of a round that was cut short too, but none twice.
            trials = [trial for trial in _unfinished(study) if trial.number not in tried]
            tried |= {trial.number for trial in trials}
            configs = {trial.number: search.configs(trial.params) for trial in trials}
            wanted = {c.run_id: c for trial in configs.values() for c in trial}
            missing = {i: c for i, c in wanted.items() if not _handle(store, c).done}
            trained |= missing.keys()
            failures = train(missing) if missing else {}
            for trial in trials:
                _tell(study, trial, _outcome(search, configs[trial.number], store, failures))
    report = _report(search, study, len(trained))
    manifest = {"search": _definition(search), "commit": commit(), **report.to_json()}
    write_json(log.with_suffix(".json"), manifest)
    failed = [trial for trial in report.trials if trial.status == "failed"]
    if failed:
        raise StudyError(f"{len(failed)} of {len(report.trials)} trials failed:\n{report}")
    return report


def _check_tasks(search: Search) -> None:
    """Build the task of every corner: some values only the data can refuse.

    Raises:
        ConfigError: the device is not there, a task cannot be built, or has not the metric.
    """
    try:
        device = pick_device(search.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    built: set[TaskConfig] = set()
    for point in search.corners():
        config = search.config(point, seed=0).task
        if config in built:
            continue
        try:
            config.prepare()
            task = load_task(TASKS[config.name])(config, seed=0, device=device)
        except ValueError as error:
            raise ConfigError(f"space: with {describe(point)}: {error}") from None
        built.add(config)
    with torch.random.fork_rng():
        metrics = task.evaluate("validation")
    if search.metric not in metrics:
        hint = did_you_mean(search.metric, metrics)
        raise ConfigError(f"metric: unknown metric {search.metric!r}; {hint}")


# --- the journal ------------------------------------------------------------------------------


def _open(search: Search, log: Path) -> optuna.Study:
    """Return the search's trials in its journal, which is made if it is not there.

    Raises:
        ConfigError: the journal holds another search.
        StoreError: it cannot be read.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    log.parent.mkdir(exist_ok=True)
    try:
        _cut_torn_line(log)
        # The lock by default, a symbolic link, is not for every file system.
        backend = JournalFileBackend(str(log), lock_obj=JournalFileOpenLock(str(log)))
        study = optuna.create_study(
            storage=JournalStorage(backend),
            sampler=optuna.samplers.RandomSampler(),  # strategies propose, this one is not asked
            study_name=search.name,
            direction=search.direction,
            load_if_exists=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"{log} cannot be read ({error}): delete it; the runs stay in the store, and the "
            "search goes on from them"
        ) from None
    fixed = {k: v for k, v in _definition(search).items() if k != "trials"}
    stored = study.user_attrs.get("search")
    if stored is None:
        study.set_user_attr("search", fixed)
    elif stored != fixed:
        differing = sorted(key for key in fixed if stored.get(key) != fixed[key])
        raise ConfigError(
            f"{log} holds another search of the name {search.name!r}, which differs in "
            f"{', '.join(differing)}: give another name, or delete the file (the runs stay)"
        )
    return study


def _cut_torn_line(log: Path) -> None:
    """Remove what a kill has left of the last line, which no later one could be read after."""
    data = log.read_bytes() if log.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        log.write_bytes(whole)


def _definition(search: Search) -> dict[str, Any]:
    return {"record_version": RECORD_VERSION, **search.model_dump(mode="json")}


def _propose(search: Search, study: optuna.Study, numbers: range) -> None:
    """Add the trials of a round that the journal lacks, each in one step."""
    from optuna.trial import TrialState, create_trial

    strategy = search.sampler.build()
    distributions = {path: dimension.distribution() for path, dimension in search.space.items()}
    for number in range(len(study.trials), numbers.stop):
        params = strategy.propose(
            number,
            search.space,
            seed=search.seed,
            trials=study.trials,
            direction=search.direction,
        )
        study.add_trial(
            create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
        )


def _unfinished(study: optuna.Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(states=(TrialState.RUNNING,))


def _tell(study: optuna.Study, trial: FrozenTrial, outcome: dict[str, Any]) -> None:
    """Write down what became of a trial; one that failed stays open."""
    from optuna.trial import Trial as OpenTrial
    from optuna.trial import TrialState

    OpenTrial(study, trial._trial_id).set_user_attr("outcome", outcome)
    if outcome["status"] == "complete":
        study.tell(trial.number, outcome["value"])
    elif outcome["status"] == "diverged":
        study.tell(trial.number, state=TrialState.PRUNED)


def _report(search: Search, study: optuna.Study, trained: int) -> SearchReport:
    trials = [
        Trial(trial.number, trial.params, **trial.user_attrs.get("outcome", {}))
        for trial in study.trials
    ]
    metric = f"validation.{search.metric}"
    return SearchReport(metric, search.direction, search.space, tuple(trials), trained)


# --- runs -------------------------------------------------------------------------------------


def _handle(store: Store, config: RunConfig) -> Run:
    return store.run(config.task.name, config.run_id)


def _needs(config: RunConfig) -> list[RunConfig]:
    """Return all runs that must be done before `config`, those first that need none."""
    direct = [*prerequisites(config), *teacher_runs(config)]
    return [run for needed in direct for run in _needs(needed)] + direct


def _trainer(store: Store, workers: int, stack: ExitStack) -> Callable[[Configs], dict[str, str]]:
    """Return a function that makes runs and returns why those failed that did.

    Worker processes are started with the first runs and end with `stack`.
    """
    root = str(store.root.resolve())
    clients: list[Any] = []

    def train(configs: Configs) -> dict[str, str]:
        for task in {config.task for config in configs.values()}:
            task.prepare()
        if workers == 0:
            outcomes = ((i, train_job(config.to_json(), root)) for i, config in configs.items())
        else:
            if not clients:
                clients.append(stack.enter_context(local_client(workers)))
            outcomes = spread(configs, clients[0], root)
        progress = tqdm(outcomes, total=len(configs), desc="runs", unit="run")
        return {run_id: why for run_id, why in progress if why is not None}

    return train


def _outcome(
    search: Search, configs: list[RunConfig], store: Store, failures: dict[str, str]
) -> dict[str, Any]:
    """Return what became of a trial: the fields of `Trial` but for number and params."""
    costs: dict[str, dict[str, float]] = {}
    values, diverged, failed = [], [], []
    for config in configs:
        runs = [_handle(store, run) for run in (*_needs(config), config)]
        ledgers = {run.path.name: run.summary["ledger"] for run in runs if run.done}
        teachers = [ledgers[c.run_id] for c in teacher_runs(config) if c.run_id in ledgers]
        costs |= {name: cost_of(ledger) for name, ledger in ledgers.items()}
        if config.run_id in ledgers:
            costs[config.run_id] = cost_of(ledgers[config.run_id], teachers)
        ended = next((r.summary for r in runs if r.summary.get("status") == "diverged"), None)
        seed = f"(seed {config.seed})"
        if ended is not None:
            diverged.append(f"diverged at update {ended['update']} {seed}")
        elif not runs[-1].done:
            failed.append(f"{failures[config.run_id]} {seed}")
        else:
            values.append(runs[-1].summary["final"].get(f"validation.{search.metric}", nan))
            if not isfinite(values[-1]):
                diverged.append(f"the metric is {values[-1]} {seed}")
    complete = not failed and not diverged
    return {
        "status": "complete" if complete else "failed" if failed else "diverged",
        "value": fmean(values) if complete else None,
        "reason": "; ".join(failed or diverged),
        "runs": [config.run_id for config in configs],
        "costs": costs,
    }
