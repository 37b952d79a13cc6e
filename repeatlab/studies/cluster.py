"""Where runs are made: in this process, in processes of this machine, or on any Dask cluster."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

from repeatlab.core.signals import held_back
from repeatlab.training.config import RunConfig

# Dask gives up a local worker that is absent at this time after its end; its nanny never does.
NEVER = "1000 days"
# Of Dask's own list without its MALLOC_TRIM_THRESHOLD_, which makes the allocator hand memory back
# after every update: the digits CNN took 1.4 to 1.5 times the processor time.
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _renew_pool() -> None:
    """Give a process that was just copied a pool of its own for Dask's scheduler.

    The copied pool counts on its thread, which was not copied with it: no run would ever begin.
    """
    if "distributed.utils" in sys.modules:
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="Dask-Offload")
        sys.modules["distributed.utils"]._offload_executor = pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pool)


@dataclass(frozen=True)
class Places:
    """Where runs are made.

    Attributes:
        workers: Processes on this machine, each of one thread; None takes one for each core, or
            `runs_per_gpu` for each GPU, 0 trains in this process.
        scheduler: Address of a Dask scheduler whose workers train instead; they need this package,
            and the store under the same path. A worker makes one run at a time.
        time_limit: Seconds that one attempt at a run may take before its process is ended; None
            waits for ever. Without effect in this process.
        runs_per_gpu: How many workers share a GPU; they take the machine's GPUs in turn.
        lockstep: Whether runs of small networks train as groups (`repeatlab.studies.lockstep`)
            where that is faster.
    """

    workers: int | None = None
    scheduler: str | None = None
    time_limit: float | None = None
    runs_per_gpu: int = 1
    lockstep: bool = True


@contextmanager
def open_client(places: Places, configs: Mapping[str, RunConfig]) -> Iterator[Any]:
    """Yield a Dask client of the workers that are to make these runs, by their ids.

    Raises:
        ConnectionError: there is no scheduler at the address, or its encryption is another.
    """
    if places.scheduler is not None:
        with _connected(places.scheduler) as client:
            yield client
        return
    gpus = [] if all(config.device == "cpu" for config in configs.values()) else _gpus()
    most = len(gpus) * places.runs_per_gpu if gpus else os.cpu_count() or 1
    with local_client(min(places.workers or most, len(configs))) as client:
        if gpus:
            _share_gpus(client, gpus, places.runs_per_gpu)
        yield client


def _connected(address: str) -> Any:
    from distributed import Client

    try:
        return Client(address)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConnectionError(
            f"scheduler: no connection to {address}: {error}. It must be the address that `dask "
            "scheduler` prints, such as tcp://HOST:8786; one with tls:// needs the certificates of "
            "Dask's configuration (distributed.comm.tls), which README shows how to set"
        ) from error


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

    settings = {
        "distributed.deploy.lost-worker-timeout": NEVER,
        "distributed.worker.preload": [__name__],
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(ONE_THREAD, 1),
        "distributed.worker.multiprocessing-method": "forkserver" if forked else "spawn",
    }
    with dask.config.set(settings), ExitStack() as opened:
        # A cluster whose start is broken off cannot be closed: in a notebook its processes stay.
        with held_back():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                # Not its fixed port, which another study may have.
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.ERROR,
                # The server's environment is that of its start.
                env=dict(os.environ) if forked else None,
            )
            client = opened.enter_context(Client(opened.enter_context(cluster)))
        yield client


def dask_setup(worker: Any) -> None:
    """Dask calls this in every local worker: Ctrl-C reaches all processes of a terminal or kernel.

    It would end the worker in the middle of an update; this study's own process passes it on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start_fork_server() -> bool:
    """Begin to import the libraries in a process whose copies become workers, now and later.

    False where there is to be none: CUDA must not be touched before a copy is made, and a process
    that is itself a copy of one with such a server cannot reach it.
    """
    if sys.platform != "linux" or _gpus():
        return False
    for name in ONE_THREAD:  # as Dask does for workers that are no copies
        os.environ.setdefault(name, "1")
    forkserver.set_forkserver_preload(["repeatlab.studies.preload"])
    try:
        forkserver.ensure_running()
    except ChildProcessError:
        return False
    return True
