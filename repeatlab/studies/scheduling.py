"""Many runs, each after those that it needs, spread over the places where they are made.

Every run, or group of runs in lock-step, is one idempotent job (`train_runs`): made twice it is
found in the store, killed it goes on from its checkpoint. So a worker may die at any time, of
memory, of a signal or of a time limit: its job is given to another, a few times. No job waits on
a worker behind another: it would be blamed for the death of that worker, too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice
from math import inf
from threading import Timer
from time import monotonic
from typing import Any, NamedTuple

from repeatlab.core.files import StoreError
from repeatlab.core.signals import Interrupted, Stop, held_back
from repeatlab.store.records import Store
from repeatlab.studies.cluster import Places, Workers, open_workers
from repeatlab.studies.processes import import_libraries
from repeatlab.training.config import RunConfig
from repeatlab.training.prerequisites import prerequisites

# How often it is seen whether to stop, and after how long without a worker the user is told: those
# of this machine are back by then.
LOOK_SECONDS = 0.2
ALONE_SECONDS = 60
TIME_LIMIT_EXIT = 124

Configs = Mapping[str, RunConfig]
Outcomes = Iterator[tuple[str, "Outcome"]]


@contextmanager
def open_trainer(store: Store, places: Places) -> Iterator[Callable[..., Outcomes]]:
    """Yield `train(configs, *, apart=())`, which makes runs by their ids and yields how they ended.

    Each comes after those that it needs. The workers are started with the first runs and end with
    the block. The first Ctrl-C, SIGTERM or SIGHUP in it makes every run leave a checkpoint, and
    `train` raise `Interrupted`; the second ends them at once. The runs in `apart`, which are ids,
    are not trained in lock-step.

    Raises:
        KeyboardInterrupt, SystemExit: after a signal, at the block's end.
    """
    opened: list[Workers] = []
    with held_back() as stop, ExitStack() as stack:

        def train(configs: Configs, *, apart: Container[str] = ()) -> Outcomes:
            if not opened:
                every = with_needs(configs.values()).values()
                on_cpu = all(config.device == "cpu" for config in every)
                workers = open_workers(places, runs=len(every), on_cpu=on_cpu, stop=stop)
                opened.append(stack.enter_context(workers))
            jobs, left = _Jobs(opened[0], store, places.time_limit, stop), dict(configs)
            free = [config for run_id, config in configs.items() if run_id not in apart]
            in_step = _in_step(free, jobs, apart=apart) if places.lockstep else ()
            for run_id, outcome in chain(in_step, _one_by_one(left.values(), jobs)):
                if left.pop(run_id, None):
                    yield run_id, outcome

        yield train


def with_needs(configs: Iterable[RunConfig]) -> dict[str, RunConfig]:
    """Return these runs and all that they need, by run id, the needed ones first."""
    found: dict[str, RunConfig] = {}
    for config in configs:
        if config.run_id not in found:
            found |= with_needs(prerequisites(config)) | {config.run_id: config}
    return found


class _Jobs:
    """The jobs that are under way, each with a name."""

    def __init__(self, workers: Workers, store: Store, limit: float | None, stop: Stop) -> None:
        self.workers, self.store, self._limit, self._stop = workers, store, limit, stop
        self.running: dict[Any, Any] = {}
        self.count, self._last_seen = workers.count(), monotonic()

    def begin(self, name: Any, configs: Iterable[RunConfig]) -> None:
        """Begin the job of a run, or of a group."""
        root = str(self.store.root.resolve())
        what = [config.to_json() for config in configs]
        self.running[self.workers.submit(train_runs, what, root, self._limit)] = name

    def ended(self) -> dict[Any, dict[str, Outcome] | Exception]:
        """Wait until a job ends, and return by name what it gave, or why it gave nothing.

        Raises:
            Interrupted: there was a stop; what was under way has left.
        """
        answers: dict[Any, Any] = {}
        while not answers and not self._stop.is_set():
            answers = self.workers.wait(self.running, LOOK_SECONDS)
            self.count = self.workers.count()
            if self.count:
                self._last_seen = monotonic()
            elif monotonic() > self._last_seen + ALONE_SECONDS:  # the user is told once
                warnings.warn("no worker is left: the study waits for one", stacklevel=2)
                self._last_seen = inf
        if self._stop.is_set():
            self.workers.stop(self.running)
            raise Interrupted("stopped: the runs that were under way have left checkpoints")
        return {self.running.pop(job): answer for job, answer in answers.items()}


def _in_step(configs: Iterable[RunConfig], jobs: _Jobs, *, apart: Container[str]) -> Outcomes:
    """Make the runs that are faster in lock-step.

    Of what a group leaves undone, such as one whose worker has died, nothing is yielded. Neither
    these runs nor those that they need are in one where they are to be `apart`.
    """
    from repeatlab.studies.lockstep.plan import groups

    missing = [
        config
        for run_id, config in with_needs(configs).items()
        if run_id not in apart and not jobs.store.run(config.task.name, run_id).done
    ]
    for round_ in groups(missing, workers=max(1, jobs.count)):
        for number, group in enumerate(round_):
            jobs.begin(number, group)
        while jobs.running:
            for answer in jobs.ended().values():
                if not isinstance(answer, Exception):
                    yield from answer.items()


def _one_by_one(configs: Iterable[RunConfig], jobs: _Jobs) -> Outcomes:
    """Make the runs, and those that they need before them."""
    waiting = with_needs(configs)
    needs = {i: [run.run_id for run in prerequisites(c)] for i, c in waiting.items()}
    made: dict[str, Outcome] = {}
    while waiting or jobs.running:
        ready = (i for i in waiting if all(needed in made for needed in needs[i]))
        # One at least, which waits for the first worker.
        for run_id in list(islice(ready, max(0, max(1, jobs.count) - len(jobs.running)))):
            jobs.begin(run_id, [waiting.pop(run_id)])
        ended = {
            run_id: Outcome(str(answer)) if isinstance(answer, Exception) else answer[run_id]
            for run_id, answer in jobs.ended().items()
        }
        made |= ended
        if any(outcome.failure for outcome in ended.values()):
            ended |= _hopeless(waiting, needs, made)
        yield from ended.items()


def _hopeless(
    waiting: dict[str, RunConfig], needs: Mapping[str, list[str]], made: dict[str, Outcome]
) -> dict[str, Outcome]:
    """Take out the runs that need one that has failed, note them as made, and return them."""
    failed = {}
    for run_id in list(waiting):
        bad = [needed for needed in needs[run_id] if needed in made and made[needed].failure]
        if bad:
            why = f"the run {bad[0]} that it needs failed: {made[bad[0]].failure}"
            failed[run_id] = made[run_id] = Outcome(why)
            del waiting[run_id]
    return failed


# --- on a worker ---------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a job has made of a run.

    Attributes:
        failure: Why it has failed, or None.
        trained: Whether it was trained now and here; else it was found in the store.
    """

    failure: str | None = None
    trained: bool = False


def train_runs(
    configs: Sequence[dict[str, Any]], runs: str, limit: float | None = None, *, stop: Stop
) -> dict[str, Outcome]:
    """Train a run, or several in lock-step; return the outcomes by run id.

    Where a group fails as a whole, nothing is returned, and its runs are to be made one by one. An
    attempt that takes longer than `limit` seconds for each run ends its process: nothing less stops
    what hangs. Waiting for another process that is at the run is no part of that.

    Args:
        configs: The runs', as JSON.
        runs: The store's directory.
        limit: Seconds that a run may take.
        stop: Makes the runs leave checkpoints and be "interrupted".
    """
    from repeatlab.studies.lockstep.group import train_group
    from repeatlab.training.making import train

    found = [RunConfig.from_json(config) for config in configs]
    ids = [run.run_id for run in found]
    trained: set[str] = set()

    @contextmanager
    def watch(under_way: Sequence[RunConfig]) -> Iterator[None]:
        """Note which of these are not done, now that they are this process's, and limit them."""
        missing = [run for run in under_way if not Store(runs).run(run.task.name, run.run_id).done]
        trained.update(run.run_id for run in missing)
        with _ending_after(limit and limit * len(missing), runs, missing):
            yield

    if limit is not None:
        import_libraries()  # no part of it
    failures: dict[str, str | None] = dict.fromkeys(ids)
    try:
        if stop.is_set():
            raise Interrupted
        if len(found) == 1:
            train(found[0], runs, watch=watch, stop=stop)
        else:
            ended = train_group(found, runs, watch=watch, stop=stop)
            failures = dict.fromkeys(trained) | ended  # first what they needed
    except Interrupted:
        failures = dict.fromkeys(ids, "interrupted")
    except Exception as error:
        if len(found) > 1:
            return {}
        failures = {ids[0]: f"{type(error).__name__}: {error}"}
    return {i: Outcome(why, i in trained) for i, why in failures.items()}


@contextmanager
def _ending_after(limit: float | None, runs: str, configs: Sequence[RunConfig]) -> Iterator[None]:
    """End this process where what it does takes longer than `limit` seconds."""

    def end() -> None:
        for config in configs:
            run = Store(runs).run(config.task.name, config.run_id)
            with suppress(OSError, StoreError):
                if not run.done:
                    run.note("failed", error=f"took longer than the time limit of {limit:g} s")
        os._exit(TIME_LIMIT_EXIT)

    timer = Timer(limit or 0, end)
    timer.daemon = True
    if limit:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
