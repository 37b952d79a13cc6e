"""One run, or a group of runs in lock-step, as the job of a worker: idempotent, and ended in time.

A run that is made twice is found in the store, one that was killed goes on from its checkpoint. So
a job may be given again to another worker, whatever has become of the first. In a process there is
one at a time, however many threads a worker has: runs share torch's random state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock, Timer
from typing import Any

from repeatlab.core.files import StoreError
from repeatlab.core.signals import Interrupted, Stop
from repeatlab.store.records import Store
from repeatlab.studies.warm_imports import import_libraries
from repeatlab.training.config import RunConfig

TIME_LIMIT_EXIT = 124
# Held by the job that is under way in this process; what stops it, by its study's token.
_turn, _stops = Lock(), {}
# Studies that are told to leave: by the token of their call, so that no other's runs stop.
_left: set[str] = set()


class RunFailed(RuntimeError):
    """A run failed in a worker; the message says why."""


def run_job(
    config: dict[str, Any], runs: str, *, limit: float | None = None, study: str | None = None
) -> None:
    """Train one run in a worker, as `train_job`; that it did not fail needs no fetching.

    Raises:
        RunFailed: it failed.
    """
    why = train_job(config, runs, limit=limit, study=study)
    if why is not None:
        raise RunFailed(why)


def train_job(
    config: dict[str, Any], runs: str, *, limit: float | None = None, study: str | None = None
) -> str | None:
    """Train one run in a worker; return why it failed, or None.

    Idempotent, since Dask may execute a job twice: a run in the store is not made again. An attempt
    that takes longer than `limit` seconds ends its process: nothing less stops what hangs. Waiting
    for another process that is at the run is no part of that.

    Args:
        config: The run's, as JSON.
        runs: The store's directory.
        limit: Seconds that it may take.
        study: What `stop_training` tells it by.
    """
    from repeatlab.training.data_parallel import TeamBroken
    from repeatlab.training.loop import train

    run = RunConfig.from_json(config)
    import_libraries()
    with _in_turn(study) as stop:
        if stop is not None and stop.is_set():
            return "interrupted"
        try:
            train(run, runs, watch=partial(_ending_after, limit, runs), stop=stop)
        except Interrupted:
            return "interrupted"
        except TeamBroken:
            raise  # no other run can be trained by these processes
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def group_job(
    configs: Sequence[dict[str, Any]],
    runs: str,
    *,
    limit: float | None = None,
    study: str | None = None,
) -> dict[str, str | None]:
    """Train runs in lock-step; return by run id why one failed, or None.

    As `train_job`, with the time of as many attempts. Where the group as a whole fails, nothing is
    returned, and its runs are to be made one by one.
    """
    from repeatlab.studies.lockstep.group import train_group

    found = [RunConfig.from_json(config) for config in configs]
    import_libraries()
    interrupted = {run.run_id: "interrupted" for run in found}
    with _in_turn(study) as stop:
        if stop is not None and stop.is_set():
            return interrupted
        try:
            watch = partial(_ending_after, limit and limit * len(found), runs)
            return train_group(found, runs, watch=watch, stop=stop)
        except Interrupted:
            return interrupted
        except Exception:
            return {}


@contextmanager
def _in_turn(study: str | None) -> Iterator[Stop | None]:
    """Wait for this process's other job, and yield what stops this one."""
    with _turn:
        if study is None:  # in the study's own process, which knows by itself
            yield None
            return
        stop = _stops[study] = Stop()
        if study in _left:
            stop.set()
        try:
            yield stop
        finally:
            del _stops[study]


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

    watch = Timer(limit, end) if limit else None
    if watch is not None:
        watch.daemon = True
        watch.start()
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()


def stop_training(study: str) -> None:
    """Make the study's run in this process leave a checkpoint and end, and begin no other."""
    _left.add(study)
    if study in _stops:
        _stops[study].set()
