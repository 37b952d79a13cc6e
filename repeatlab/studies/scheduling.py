"""Many runs, each after those that it needs, spread over the places where they are made.

Every run is one idempotent job (`repeatlab.studies.worker`), so that a worker may die at any time,
of memory, of a signal or of a time limit; the scheduler hands its job to another, three times at
most. No job waits on a worker behind another: it would be blamed for the death of that worker, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any
from uuid import uuid4

from repeatlab.store.records import Store
from repeatlab.studies.cluster import Places, open_client
from repeatlab.studies.worker import group_job, run_job, stop_training, train_job
from repeatlab.training.config import RunConfig
from repeatlab.training.prerequisites import prerequisites

# How long Ctrl-C waits for runs to leave their checkpoints.
LEAVE_SECONDS = 60
# How often workers are counted that may have joined, and after how many counts without any the user
# is told: those of this machine are back by then.
COUNT_SECONDS = 5
COUNTS_WITHOUT = 12


def execute(
    configs: Mapping[str, RunConfig],
    store: Store,
    places: Places,
    *,
    apart: Container[str] = (),
) -> Iterator[tuple[str, str | None]]:
    """Make all runs, each after those that it needs; yield run ids with why they failed, or None.

    Ctrl-C makes every run leave a checkpoint before it is passed on.

    Args:
        configs: The runs by their ids.
        store: Where their records go.
        places: Where they are made.
        apart: The ids of runs that are not to train in lock-step.
    """
    root = str(store.root.resolve())
    left = dict(configs)
    groupable = {i: config for i, config in configs.items() if i not in apart}

    def ended(outcomes: Mapping[str, str | None]) -> Iterator[tuple[str, str | None]]:
        return ((i, why) for i, why in outcomes.items() if left.pop(i, None) is not None)

    if places.workers == 0 and places.scheduler is None:
        for outcomes in _in_step(groupable, store, places, apart=apart):
            yield from ended(outcomes)
        for run_id, config in left.items():
            yield run_id, train_job(config.to_json(), root)
        return
    with open_client(places, with_needs(configs.values())) as client:
        for outcomes in _in_step(groupable, store, places, client, apart=apart):
            yield from ended(outcomes)
        yield from spread(left, client, root, time_limit=places.time_limit)


def _in_step(
    configs: Mapping[str, RunConfig],
    store: Store,
    places: Places,
    client: Any = None,
    *,
    apart: Container[str] = (),
) -> Iterator[dict[str, str | None]]:
    """Make the runs that are faster in lock-step, and yield the outcomes of each group of them.

    What a group leaves undone, such as one whose worker has died, is in no outcome. Neither these
    runs nor those that they need are in one where they are to be `apart`.
    """
    from repeatlab.studies.lockstep.plan import groups

    if not places.lockstep:
        return
    root, limit = str(store.root.resolve()), places.time_limit
    missing = [
        config
        for run_id, config in with_needs(configs.values()).items()
        if run_id not in apart and not store.run(config.task.name, run_id).done
    ]
    token = uuid4().hex
    for round_ in groups(missing, workers=max(1, len(client.nthreads())) if client else 1):
        jobs = [[config.to_json() for config in group] for group in round_]
        if client is None:
            for job in jobs:
                yield group_job(job, root)
            continue
        running = {
            number: client.submit(group_job, job, root, limit=limit, study=token, pure=False)
            for number, job in enumerate(jobs)
        }
        try:
            while running:
                for future in _ended(running).values():
                    yield future.result() if future.exception() is None else {}
        except (KeyboardInterrupt, GeneratorExit):
            _leave(client, token, list(running.values()))
            raise


def with_needs(configs: Iterable[RunConfig]) -> dict[str, RunConfig]:
    """Return these runs and all that they need, by run id, the needed ones first."""
    found: dict[str, RunConfig] = {}
    for config in configs:
        found |= with_needs(prerequisites(config)) | {config.run_id: config}
    return found


def spread(
    configs: Mapping[str, RunConfig], client: Any, root: str, *, time_limit: float | None = None
) -> Iterator[tuple[str, str | None]]:
    """Make all runs on a Dask client's workers; yields as `execute` does, and leaves as it does.

    Args:
        configs: The runs by their ids.
        client: The client.
        root: The store's directory, as the workers see it.
        time_limit: As in `Places`.
    """
    waiting, running = with_needs(configs.values()), {}
    outcomes: dict[str, str | None] = {}
    futures: dict[str, Any] = {}
    workers, without, token = len(client.nthreads()), 0, uuid4().hex
    how = {"limit": time_limit, "study": token}
    try:
        while waiting or running:
            # One at least, which waits for the first worker.
            for run_id in _next(waiting, outcomes, room=max(1, workers) - len(running)):
                config = waiting.pop(run_id).to_json()
                # A key of this call's own: another study's job may have another store.
                key = f"run-{run_id}-{token}"
                running[run_id] = client.submit(run_job, config, root, key=key, **how)
            # What no worker waits for comes now, while all are at work: to ask for their number and
            # to forget the ended, whose message would hold back a submission for 10 ms.
            workers = len(client.nthreads())
            without = 0 if workers else without + 1
            if without == COUNTS_WITHOUT:
                warnings.warn("no worker is left: the study waits for one", stacklevel=2)
            futures.clear()
            futures = _ended(running)
            ended = {run_id: _reason(future) for run_id, future in futures.items()}
            if any(ended.values()):
                ended |= _hopeless(waiting, outcomes | ended)
            outcomes |= ended
            yield from ((run_id, why) for run_id, why in ended.items() if run_id in configs)
    except (KeyboardInterrupt, GeneratorExit):  # the latter: it was pressed where this is read
        _leave(client, token, list(running.values()))
        raise


def _next(
    waiting: Mapping[str, RunConfig], outcomes: Mapping[str, str | None], *, room: int
) -> list[str]:
    """Return the ids of the next runs, `room` at most, of which all that they need is done."""
    ready = (
        run_id
        for run_id, config in waiting.items()
        if all(needed.run_id in outcomes for needed in prerequisites(config))
    )
    return list(islice(ready, max(0, room)))


def _ended(running: dict[Any, Any]) -> dict[Any, Any]:
    """Wait a moment for jobs to end; take their futures out and return them.

    Raises:
        ConnectionError: the scheduler is gone.
    """
    from distributed import wait
    from distributed.client import FuturesCancelledError

    try:
        wait(list(running.values()), timeout=COUNT_SECONDS, return_when="FIRST_COMPLETED")
    except TimeoutError:
        pass
    except FuturesCancelledError as error:
        raise ConnectionError(
            "scheduler: it has ended, or given up the study's runs. What was under way goes on "
            "from its checkpoints when the same command is given again"
        ) from error
    return {job: running.pop(job) for job, future in list(running.items()) if future.done()}


def _hopeless(waiting: dict[str, RunConfig], outcomes: Mapping[str, str | None]) -> dict[str, str]:
    """Take out the runs that need one that has failed, and return the reason."""
    failed: dict[str, str] = {}
    for run_id, config in list(waiting.items()):
        for needed in prerequisites(config):
            why = outcomes.get(needed.run_id) or failed.get(needed.run_id)
            if why is not None:
                failed[run_id] = f"the run {needed.run_id} that it needs failed: {why}"
                waiting.pop(run_id, None)
    return failed


def _reason(future: Any) -> str | None:
    """Return why a run failed in a worker, or None."""
    from distributed import KilledWorker

    if future.status == "finished":  # known here; for an error the scheduler is asked
        return None
    error = future.exception()
    if isinstance(error, KilledWorker):
        return "its worker died at every attempt (memory, a signal or the time limit)"
    return str(error)


def _leave(client: Any, study: str, running: list[Any]) -> None:
    """Make the study's runs leave a checkpoint, and wait until they have."""
    from distributed import wait

    with suppress(Exception):  # a scheduler that is gone: leave at once
        client.run(stop_training, study)
        wait(running, timeout=LEAVE_SECONDS)
