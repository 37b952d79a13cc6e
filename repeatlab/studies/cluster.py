"""Where runs are made: in this process, in processes of this machine, or on any Dask cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from repeatlab.core.signals import Stop
from repeatlab.store.records import Run
from repeatlab.studies.processes import LEAVE_SECONDS, WORKER_DIED, LocalWorkers


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
        into: Where each run that is made is shown as soon as it is done, under its name in every
            study that it is made for: `repeatlab.studies.viewers.viewer("tensorboard", "logs")`.
    """

    workers: int | None = None
    scheduler: str | None = None
    time_limit: float | None = None
    runs_per_gpu: int = 1
    lockstep: bool = True
    into: Callable[[Run, str, str, str, int], None] | None = None


@contextmanager
def open_workers(places: Places, *, runs: int, on_cpu: bool, stop: Stop) -> Iterator[Workers]:
    """Yield what makes runs: `Here` says what can be asked of it.

    Args:
        places: Where.
        runs: How many there are: no more workers are started.
        on_cpu: Whether they need no GPU.
        stop: What stops those that are made in this process.

    Raises:
        ConnectionError: there is no scheduler at the address, or its encryption is another.
    """
    if places.scheduler is not None:
        with DaskWorkers(places.scheduler) as workers:
            yield workers
    elif places.workers == 0:
        yield Here(stop)
    else:
        gpus = [] if on_cpu else gpu_names()
        most = len(gpus) * places.runs_per_gpu or os.cpu_count() or 1
        environments = [
            {"CUDA_VISIBLE_DEVICES": gpu_of(worker, gpus, places.runs_per_gpu)} if gpus else {}
            for worker in range(min(places.workers or most, runs))
        ]
        with LocalWorkers(environments) as workers:
            yield workers


def gpu_names() -> list[str]:
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


class Here:
    """This process: a job is done when it is waited for. Other workers have the same methods."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def count(self) -> int:
        """Return how many there are now, one: so many jobs are done at a time."""
        return 1

    def submit(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Let a worker call `function(*args, stop=...)`: return the job, which `wait` does."""
        return partial(function, *args, stop=self._stop)

    def wait(self, jobs: Collection[Any], seconds: float) -> dict[Any, Any]:
        """Wait until a job ends, `seconds` at most; return what it gave, or the exception.

        Here it is done, and its errors are this process's own.

        Raises:
            ConnectionError: there are no workers any more, nor will be.
        """
        job = next(iter(jobs))
        return {job: job()}

    def stop(self, jobs: Collection[Any]) -> None:
        """Make these jobs leave, and wait until they have; here none is under way."""


class DaskWorkers:
    """The workers of a Dask cluster, which may be somebody else's: only the jobs of this are told.

    To be entered: jobs that are under way at the block's end are told to leave.
    """

    def __init__(self, address: str) -> None:
        from distributed import Client, Event

        try:
            self._client = Client(address)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ConnectionError(
                f"scheduler: no connection to {address}: {error}. It must be the address that "
                "`dask scheduler` prints, such as tcp://HOST:8786; one with tls:// needs the "
                "certificates of Dask's configuration (distributed.comm.tls), which "
                "docs/cluster.md shows how to set"
            ) from error
        self._token = f"stop-{uuid4().hex}"
        self._event = Event(self._token, client=self._client)

    def __enter__(self) -> DaskWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(Exception):  # a scheduler that is gone
            self._event.set()
        self._client.close()

    def count(self) -> int:
        """Return how many have joined and not left; `wait` says it if the scheduler is gone."""
        try:
            return len(self._client.nthreads())
        except OSError:
            return 0

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `Here`."""
        return self._client.submit(_in_turn, self._token, function, *args, pure=False)

    def wait(self, jobs: Collection[Any], seconds: float) -> dict[Any, Any]:
        """See `Here`."""
        from distributed import KilledWorker, wait
        from distributed.client import FuturesCancelledError

        # Else it is the latest client of this process that waits.
        with suppress(TimeoutError, FuturesCancelledError), self._client.as_current():
            wait(list(jobs), timeout=seconds, return_when="FIRST_COMPLETED")
        if any(job.cancelled() for job in jobs):
            raise ConnectionError(
                "scheduler: it has ended, or given up the study's runs. What was under way goes on "
                "from its checkpoints when the same command is given again"
            )
        answers = {job: job.exception() or job.result() for job in jobs if job.done()}
        killed = {job: WORKER_DIED for job in answers if isinstance(answers[job], KilledWorker)}
        return answers | killed

    def stop(self, jobs: Collection[Any]) -> None:
        """See `Here`."""
        from distributed import wait

        with suppress(Exception):  # a scheduler that is gone: leave at once
            self._event.set()
            with self._client.as_current():
                wait(list(jobs), timeout=LEAVE_SECONDS)


Workers = Here | LocalWorkers | DaskWorkers

# Runs share torch's random state: one at a time in a process, however many threads a worker has.
_turn = threading.Lock()


def _in_turn(token: str, function: Callable[..., Any], *args: Any) -> Any:
    """Do a job in a Dask worker, and pass on to it that it is to stop."""
    from distributed import Event, get_client

    stop, over = Stop(), threading.Event()
    asked = Event(token, client=get_client())

    def listen() -> None:
        with suppress(Exception):  # the job is over, or the worker
            while not over.is_set():
                if asked.wait(timeout=1):
                    stop.set()
                    return

    threading.Thread(target=listen, daemon=True).start()
    try:
        with _turn:
            return function(*args, stop=stop)
    finally:
        over.set()
