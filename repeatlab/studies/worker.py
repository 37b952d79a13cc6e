"""One run, or a group of runs in lock-step, as the job of a worker: idempotent, and ended in time.

A run that is made twice is found in the store, one that was killed goes on from its checkpoint. So
a job may be given again to another worker, whatever has become of the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any, NamedTuple

from repeatlab.core.files import StoreError
from repeatlab.core.signals import Interrupted, Stop
from repeatlab.store.records import Store
from repeatlab.studies.processes import import_libraries
from repeatlab.training.config import RunConfig

TIME_LIMIT_EXIT = 124


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
    from repeatlab.training.loop import train

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
            failures = train_group(found, runs, watch=watch, stop=stop)
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
