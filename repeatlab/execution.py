"""Where runs are made: in this process, in processes of this machine, or on any Dask cluster.

Every run is one idempotent job: made twice it is found in the store, killed it goes on from its
checkpoint. So a worker may die at any time, of SIGKILL, of memory or of a time limit; the scheduler
hands its job to another, three times at most. No job waits on a worker behind another: it would be
blamed for the death of that worker, too.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from multiprocessing import forkserver
from threading import Timer
from typing import Any

from repeatlab.config import RunConfig
from repeatlab.prerequisites import prerequisites
from repeatlab.records import Store, StoreError

TIME_LIMIT_EXIT = 124
# How long Ctrl-C waits for runs to leave their checkpoints.
LEAVE_SECONDS = 60
# How often workers are counted that may have joined.
COUNT_SECONDS = 5
# Dask gives up a local worker that is absent at this time after its end; its nanny never does.
NEVER = "1000 days"
# Of Dask's own list without its MALLOC_TRIM_THRESHOLD_, which makes the allocator hand memory back
# after every update: the digits CNN took 1.4 to 1.5 times the processor time.
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What the first run of a process imports late, most of its seconds: torch's optimizers import its
# compiler. None of this package: a notebook's next study trains with the code as it is then.
LATE_IMPORTS = ("torch._dynamo", "sklearn.datasets", "sklearn.model_selection", "pyarrow.parquet")


class RunFailed(RuntimeError):
    """A run failed in a worker; the message says why."""


@dataclass(frozen=True)
class Places:
    """Where runs are made.

    Attributes:
        workers: Processes on this machine, each of one thread; None takes one for each core, or
            `runs_per_gpu` for each GPU, 0 trains in this process.
        scheduler: Address of a Dask scheduler whose workers train instead; they need this package,
            and the store under the same path. Ctrl-C stops all runs on them.
        time_limit: Seconds that one attempt at a run may take before its process is ended; None
            waits for ever. Without effect in this process.
        runs_per_gpu: How many workers share a GPU; they take the machine's GPUs in turn.
        lockstep: Whether runs of small networks train as groups (`repeatlab.lockstep`) where that
            is faster.
    """

    workers: int | None = None
    scheduler: str | None = None
    time_limit: float | None = None
    runs_per_gpu: int = 1
    lockstep: bool = True


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
        for outcomes in _in_step(groupable, store, places):
            yield from ended(outcomes)
        for run_id, config in left.items():
            yield run_id, train_job(config.to_json(), root)
        return
    with _client(places, with_needs(configs.values())) as client:
        for outcomes in _in_step(groupable, store, places, client):
            yield from ended(outcomes)
        yield from spread(left, client, root, time_limit=places.time_limit)


def _in_step(
    configs: Mapping[str, RunConfig], store: Store, places: Places, client: Any = None
) -> Iterator[dict[str, str | None]]:
    """Make the runs that are faster in lock-step, and yield the outcomes of each group of them.

    What a group leaves undone, such as one whose worker has died, is in no outcome.
    """
    from repeatlab.lockstep.plan import groups

    if not places.lockstep:
        return
    root, limit = str(store.root.resolve()), places.time_limit
    all_runs = with_needs(configs.values()).values()
    missing = [c for c in all_runs if not store.run(c.task.name, c.run_id).done]
    for round_ in groups(missing, workers=_threads(client) if client else 1):
        jobs = [[config.to_json() for config in group] for group in round_]
        if client is None:
            for job in jobs:
                yield group_job(job, root)
            continue
        running = {
            number: client.submit(group_job, job, root, limit=limit, pure=False)
            for number, job in enumerate(jobs)
        }
        try:
            while running:
                for future in _ended(running).values():
                    yield future.result() if future.exception() is None else {}
        except (KeyboardInterrupt, GeneratorExit):
            _leave(client, list(running.values()))
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
    try:
        while waiting or running:
            for run_id in _next(waiting, outcomes, room=_threads(client) - len(running)):
                config = waiting.pop(run_id).to_json()
                # The key makes a run that is submitted twice one job.
                running[run_id] = client.submit(
                    run_job, config, root, limit=time_limit, key=f"run-{run_id}"
                )
            ended = {run_id: _reason(future) for run_id, future in _ended(running).items()}
            if any(ended.values()):
                ended |= _hopeless(waiting, outcomes | ended)
            outcomes |= ended
            yield from ((run_id, why) for run_id, why in ended.items() if run_id in configs)
    except (KeyboardInterrupt, GeneratorExit):  # the latter: it was pressed where this is read
        _leave(client, list(running.values()))
        raise


def _threads(client: Any) -> int:
    """Return how many runs can be under way: one at least, which waits for the first worker."""
    return max(1, sum(client.nthreads().values()))


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
    """Wait a moment for jobs to end; take their futures out and return them."""
    from distributed import wait

    with suppress(TimeoutError):
        wait(list(running.values()), timeout=COUNT_SECONDS, return_when="FIRST_COMPLETED")
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

    error = future.exception()
    if isinstance(error, KilledWorker):
        return "its worker died at every attempt (memory, a signal or the time limit)"
    return None if error is None else str(error)


def run_job(config: dict[str, Any], runs: str, *, limit: float | None = None) -> None:
    """Train one run in a worker, as `train_job`; that it did not fail needs no fetching.

    Raises:
        RunFailed: it failed.
    """
    why = train_job(config, runs, limit=limit)
    if why is not None:
        raise RunFailed(why)


def train_job(config: dict[str, Any], runs: str, *, limit: float | None = None) -> str | None:
    """Train one run in a worker; return why it failed, or None.

    Idempotent, since Dask may execute a job twice: a run in the store is not made again. An attempt
    that takes longer than `limit` seconds ends its process: nothing less stops what hangs.
    """
    from repeatlab.data_parallel import TeamBroken
    from repeatlab.loop import train
    from repeatlab.training import Interrupted

    run = RunConfig.from_json(config)
    import_late()
    with _ending_after(limit, [run], runs):
        try:
            train(run, runs)
        except Interrupted:
            return "interrupted"
        except TeamBroken:
            raise  # no other run can be trained by these processes
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def group_job(
    configs: Sequence[dict[str, Any]], runs: str, *, limit: float | None = None
) -> dict[str, str | None]:
    """Train runs in lock-step; return by run id why one failed, or None.

    As `train_job`, with the time of as many attempts. Where the group as a whole fails, nothing is
    returned, and its runs are to be made one by one.
    """
    from repeatlab.lockstep.group import train_group
    from repeatlab.training import Interrupted

    found = [RunConfig.from_json(config) for config in configs]
    import_late()
    with _ending_after(limit and limit * len(found), found, runs):
        try:
            return train_group(found, runs)
        except Interrupted:
            return {run.run_id: "interrupted" for run in found}
        except Exception:
            return {}


def import_late() -> None:
    """Import what a process's first run would import: no part of the run, nor of its time limit."""
    for module in LATE_IMPORTS:
        import_module(module)


@contextmanager
def _ending_after(limit: float | None, configs: Sequence[RunConfig], runs: str) -> Iterator[None]:
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


def _stop_training(stop: bool) -> None:
    from repeatlab.training import STOP

    STOP.set() if stop else STOP.clear()


def _leave(client: Any, running: list[Any]) -> None:
    """Make every worker's run leave a checkpoint, and wait until they have."""
    from distributed import wait

    with suppress(Exception):  # a scheduler that is gone: leave at once
        client.run(_stop_training, True)
        wait(running, timeout=LEAVE_SECONDS)
        for future in running:
            future.release()  # it would answer for its run when that is asked for again
        client.run(_stop_training, False)  # a cluster may outlive this study


@contextmanager
def _client(places: Places, configs: Mapping[str, RunConfig]) -> Iterator[Any]:
    from distributed import Client

    if places.scheduler is not None:
        with Client(places.scheduler) as client:
            yield client
        return
    gpus = [] if all(config.device == "cpu" for config in configs.values()) else _gpus()
    most = len(gpus) * places.runs_per_gpu if gpus else os.cpu_count() or 1
    with local_client(min(places.workers or most, len(configs))) as client:
        if gpus:
            _share_gpus(client, gpus, places.runs_per_gpu)
        yield client


def _gpus() -> list[str]:
    """Return the names under which this process sees its GPUs."""
    import torch

    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names else [str(number) for number in range(count)]


def gpu_of(worker: int, gpus: Sequence[str], runs_per_gpu: int) -> str:
    """Return the GPU of a worker: `runs_per_gpu` neighbours share one.

    >>> [gpu_of(worker, ["0", "1"], 2) for worker in range(6)]
    ['0', '0', '1', '1', '0', '0']
    """
    return gpus[worker // runs_per_gpu % len(gpus)]


def _share_gpus(client: Any, gpus: Sequence[str], runs_per_gpu: int) -> None:
    """Give each worker one GPU; also a process that comes in the place of one that died."""
    from distributed import WorkerPlugin

    class OneGPU(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            gpu = gpu_of(int(worker.name), gpus, runs_per_gpu)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu

    client.register_plugin(OneGPU())


@contextmanager
def local_client(workers: int) -> Iterator[Any]:
    """Yield the client of a Dask cluster of single-threaded processes on this machine."""
    forked = _start_fork_server()
    import dask
    from distributed import Client, LocalCluster

    with (
        dask.config.set(
            {
                "distributed.deploy.lost-worker-timeout": NEVER,
                "distributed.nanny.pre-spawn-environ": dict.fromkeys(ONE_THREAD, 1),
                "distributed.worker.multiprocessing-method": "forkserver" if forked else "spawn",
            }
        ),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=logging.ERROR,
            # The server's environment is that of its start.
            env=dict(os.environ) if forked else None,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _start_fork_server() -> bool:
    """Begin to import the libraries in a process whose copies become workers, now and later.

    False where there is to be none: CUDA must not be touched before a copy is made, and a process
    that is itself a copy of one with such a server cannot reach it.
    """
    if sys.platform != "linux" or _gpus():
        return False
    for name in ONE_THREAD:  # as Dask does for workers that are no copies
        os.environ.setdefault(name, "1")
    forkserver.set_forkserver_preload(["distributed", "torch", *LATE_IMPORTS])
    try:
        forkserver.ensure_running()
    except ChildProcessError:
        return False
    return True
