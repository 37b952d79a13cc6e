"""Where runs are made: in this process, in processes of this machine, or on any Dask cluster.

Every run is one idempotent job: made twice it is found in the store, killed it goes on from its
checkpoint. So a worker may die at any time, of SIGKILL, of memory or of a time limit; the scheduler
hands its job to another, three times at most.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Timer
from typing import Any

from repeatlab.config import RunConfig
from repeatlab.prerequisites import prerequisites
from repeatlab.records import Store

TIME_LIMIT_EXIT = 124
# How long Ctrl-C waits for runs to leave their checkpoints.
LEAVE_SECONDS = 60


@dataclass(frozen=True)
class Places:
    """Where runs are made.

    Attributes:
        workers: Processes on this machine, each of one thread; None takes one for each core, 0
            trains in this process.
        scheduler: Address of a Dask scheduler whose workers train instead; they need this package,
            and the store under the same path.
        time_limit: Seconds that one attempt at a run may take before its process is ended; None
            waits for ever. Without effect in this process.
        runs_per_gpu: How many workers share a GPU; they take the machine's GPUs in turn.
    """

    workers: int | None = None
    scheduler: str | None = None
    time_limit: float | None = None
    runs_per_gpu: int = 1


def execute(
    configs: Mapping[str, RunConfig], store: Store, places: Places
) -> Iterator[tuple[str, str | None]]:
    """Make all runs, each after those that it needs; yield run ids with why they failed, or None.

    Ctrl-C makes every run leave a checkpoint before it is passed on.
    """
    root = str(store.root.resolve())
    if places.workers == 0 and places.scheduler is None:
        for run_id, config in configs.items():
            yield run_id, train_job(config.to_json(), root)
        return
    with _client(places, len(with_needs(configs.values()))) as client:
        try:
            yield from spread(configs, client, root, time_limit=places.time_limit)
        except KeyboardInterrupt:
            _leave(client)
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
    """Make all runs on a Dask client's workers; yields as `execute` does.

    Args:
        configs: The runs by their ids.
        client: The client.
        root: The store's directory, as the workers see it.
        time_limit: As in `Places`.
    """
    from distributed import as_completed

    jobs: dict[str, Any] = {}
    for run_id, config in with_needs(configs.values()).items():
        needs = [jobs[needed.run_id] for needed in prerequisites(config)]
        # The key makes a run that is submitted twice one job.
        jobs[run_id] = client.submit(
            train_job, config.to_json(), root, needs, limit=time_limit, key=f"run-{run_id}"
        )
    futures = {jobs[run_id]: run_id for run_id in configs}
    for future in as_completed(list(futures)):
        error = future.exception()
        yield futures[future], future.result() if error is None else _reason(error)


def _reason(error: BaseException) -> str:
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return "its worker died at every attempt (memory, a signal or the time limit)"
    return str(error)


def train_job(
    config: dict[str, Any], runs: str, after: Any = None, *, limit: float | None = None
) -> str | None:
    """Train one run in a worker; return why it failed, or None.

    Idempotent, since Dask may execute a job twice: a run in the store is not made again. `after`
    only makes the scheduler wait for the runs that this one needs. An attempt that takes longer
    than `limit` seconds ends its process: nothing less stops what hangs.
    """
    from repeatlab.loop import train
    from repeatlab.training import Interrupted

    run = RunConfig.from_json(config)
    watch = Timer(limit, _end_process, (run, runs, limit)) if limit else None
    if watch is not None:
        watch.daemon = True
        watch.start()
    try:
        train(run, runs)
    except Interrupted:
        return "interrupted"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if watch is not None:
            watch.cancel()
    return None


def _end_process(run: RunConfig, runs: str, limit: float) -> None:
    directory = Store(runs).run(run.task.name, run.run_id)
    with suppress(OSError):
        directory.note("failed", error=f"took longer than the time limit of {limit:g} s")
    os._exit(TIME_LIMIT_EXIT)


def _stop_training() -> None:
    from repeatlab.training import STOP

    STOP.set()


def _leave(client: Any) -> None:
    """Make every worker's run leave a checkpoint, and wait until they have."""
    from distributed import wait

    futures = list(client.futures.values())
    with suppress(Exception):  # a second Ctrl-C, a scheduler that is gone: leave at once
        client.run(_stop_training)
        running = [client.futures[f.key] for f in futures if f.key in client.futures]
        wait([f for f in running if f.status == "pending"], timeout=LEAVE_SECONDS)


@contextmanager
def _client(places: Places, jobs: int) -> Iterator[Any]:
    from distributed import Client

    if places.scheduler is not None:
        with Client(places.scheduler) as client:
            yield client
        return
    with local_client(min(places.workers or os.cpu_count() or 1, jobs)) as client:
        _share_gpus(client, places.runs_per_gpu)
        yield client


def _share_gpus(client: Any, runs_per_gpu: int) -> None:
    """Give each worker one GPU, `runs_per_gpu` workers to each, where there are any."""
    import torch

    count = torch.cuda.device_count()
    if count:
        for number, address in enumerate(client.scheduler_info(n_workers=-1)["workers"]):
            gpu = str(number // runs_per_gpu % count)
            client.run(os.environ.__setitem__, "CUDA_VISIBLE_DEVICES", gpu, workers=[address])


@contextmanager
def local_client(workers: int) -> Iterator[Any]:
    """Yield the client of a Dask cluster of single-threaded processes on this machine."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
