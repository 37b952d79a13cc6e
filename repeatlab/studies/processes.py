"""Worker processes of this machine, which this process alone can reach: nothing listens anywhere.

One process, the nursery, imports the libraries once, which takes seconds; its copies, made in
milliseconds, are the workers. Each has a pair of sockets without a name with the process that it
works for, and ends where the other end does. It knows the libraries alone before its first job, so
that a notebook's next study trains with the package as it is then.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from time import monotonic
from typing import Any, Self

from repeatlab.core.signals import SIGNALS, Stop

# Those that a first run would import late: torch's optimizers import its compiler.
LIBRARIES = [
    "torch",
    "torch._dynamo",
    "sklearn.datasets",
    "sklearn.model_selection",
    "pyarrow.parquet",
]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# So many workers may die of a job before it is given up.
DEATHS = 4
# How long runs may take to leave their checkpoints.
LEAVE_SECONDS = 60
_STOP, _END = b"stop", b"end"  # in the place of a job


WORKER_DIED = RuntimeError("its worker died at every attempt (memory, a signal or the time limit)")


def import_libraries() -> None:
    """Import them: no part of the run that needs them first, nor of its time limit."""
    for module in LIBRARIES:
        import_module(module)


# --- in the process that has the work -----------------------------------------------------------


@dataclass(eq=False)
class Job:
    """Something to be done, and how many workers have died of it."""

    message: bytes
    deaths: int = 0


class LocalWorkers:
    """So many processes, each with one thread and one job at a time.

    A job whose worker dies is given to the one that takes its place. To be entered; the processes
    end with the block, whatever they are at.

    Args:
        environments: Of each worker, the variables that it has beside this process's own.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._environments = environments
        self._workers: list[Connection] = []
        self._at: dict[Connection, Job] = {}
        self._waiting: deque[Job] = deque()

    def __enter__(self) -> Self:
        self._workers = [_born(environment) for environment in self._environments]
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            _say(worker, _END)  # copies of this process may hold the connection open
            worker.close()

    def count(self) -> int:
        """Return how many workers there are."""
        return len(self._workers)

    def submit(self, function: Callable[..., Any], *args: Any) -> Job:
        """Let a worker call `function(*args, stop=...)`; both are pickled."""
        job = Job(pickle.dumps((function, args)))
        self._waiting.append(job)
        self._hand_out()
        return job

    def wait(self, jobs: Collection[Job], seconds: float) -> dict[Job, Any]:
        """Wait until a job ends, `seconds` at most; return what it gave, or the exception."""
        answers: dict[Job, Any] = {}
        for worker in wait(self._workers, seconds):
            job = self._at.pop(worker, None)
            try:
                answers[job] = worker.recv()
            except (EOFError, OSError):  # it has died
                worker.close()
                number = self._workers.index(worker)
                self._workers[number] = _born(self._environments[number])
                if job is not None:
                    job.deaths += 1
                    if job.deaths < DEATHS:
                        self._waiting.append(job)
                    else:
                        answers[job] = WORKER_DIED
        self._hand_out()
        return answers

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker not in self._at and self._waiting:
                self._at[worker] = self._waiting.popleft()
                _say(worker, self._at[worker].message)

    def stop(self, jobs: Collection[Job]) -> None:
        """Make what is under way leave, and wait until it has; nothing else is begun."""
        self._waiting.clear()
        for worker, job in self._at.items():
            job.deaths = DEATHS  # it is not given to another, either
            _say(worker, _STOP)
        end = monotonic() + LEAVE_SECONDS
        while self._at and monotonic() < end:
            self.wait(jobs, 1)


def _say(worker: Connection, message: bytes) -> None:
    """Tell a worker something; one that has died is noticed when it is listened to."""
    with suppress(OSError):
        worker.send_bytes(message)


def _born(environment: Mapping[str, str]) -> Connection:
    """Return the connection with a new worker."""
    ours, theirs = socket.socketpair()
    with theirs:
        if sys.platform == "linux":
            try:
                socket.send_fds(_nursery(os.getpid())[0], [b"."], [theirs.fileno()])
            except OSError:  # it was killed
                _nursery.cache_clear()
                socket.send_fds(_nursery(os.getpid())[0], [b"."], [theirs.fileno()])
        else:  # libraries of other systems do not bear copies
            _spawn(theirs)
    worker = Connection(ours.detach())
    _say(worker, pickle.dumps(({**ONE_THREAD, **os.environ, **environment}, sys.path, os.getcwd())))
    return worker


@cache
def _nursery(process: int) -> tuple[socket.socket, subprocess.Popen]:
    """Return the nursery of this process, given its id: a copy of a process has another."""
    ours, theirs = socket.socketpair()
    with theirs:
        return ours, _spawn(theirs)


def _spawn(connection: socket.socket) -> subprocess.Popen:
    """Start a nursery, or a worker where there is none, at the other end of `connection`.

    It knows nothing of the program that is running, which need not be fit to be imported. What the
    terminal sends to all processes of a command does not reach it.
    """
    number = connection.fileno()
    code = (
        "import sys; sys.path[:] = sys.argv[2:]; from repeatlab.studies import processes; "
        "processes.begin(int(sys.argv[1]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(number), *sys.path],
        pass_fds=[number],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=ONE_THREAD | os.environ,
    )


# --- in the nursery and its copies --------------------------------------------------------------


def begin(descriptor: int) -> None:
    """Be the nursery, which makes a worker for each descriptor that comes, until none can come.

    What a signal means is left to the process that has the work.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # it would go through all that they hold again and again, and find no garbage
    import_libraries()
    gc.enable()
    if sys.platform != "linux":
        _work(Connection(descriptor))
    # Copies share the pages of what no collection of theirs looks at.
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a worker's end
    control = socket.socket(fileno=descriptor)
    while received := socket.recv_fds(control, 1, 1)[1]:
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _work(Connection(received[0]))
        os.close(received[0])
    os._exit(0)


def _work(connection: Connection) -> None:
    """Do one job after another until the other end is closed."""
    environment, sys.path[:], folder = pickle.loads(connection.recv_bytes())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    jobs: SimpleQueue[tuple[bytes, Stop]] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    while True:
        message, stop = jobs.get()
        try:
            function, args = pickle.loads(message)
            answer = function(*args, stop=stop)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)


def _listen(connection: Connection, jobs: SimpleQueue[tuple[bytes, Stop]]) -> None:
    """Take in jobs, ask the last one to stop, and end this process when it is no longer needed."""
    stop = Stop()
    with suppress(EOFError, OSError):
        while (message := connection.recv_bytes()) != _END:
            if message == _STOP:
                stop.set()
            else:
                stop = Stop()
                jobs.put((message, stop))
    os._exit(0)
