"""Worker processes of this machine, which this process alone can reach: nothing listens anywhere.

One process, the nursery, imports the libraries once, which takes seconds; its copies, made in
milliseconds, are the workers. Each has a pair of sockets without a name with the process that it
works for, and ends where the other end does. It knows the libraries alone before its first job, so
that a notebook's next study trains with the package as it is then.
"""

from __future__ import annotations

import atexit
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
LIBRARIES = (
    "torch",
    "torch._dynamo",
    "sklearn.datasets",
    "sklearn.model_selection",
    "pyarrow.parquet",
)
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# So many workers may die of a job before it is given up.
DEATHS = 4
# How long runs may take to leave their checkpoints.
LEAVE_SECONDS = 60
_END, _STOP, _JOB = b"end", b"stop", b"job "


class WorkerDied(RuntimeError):
    """The worker died at every attempt at a job."""

    def __str__(self) -> str:
        return "its worker died at every attempt (memory, a signal or the time limit)"


def import_libraries() -> None:
    """Import them: no part of the run that needs them first, nor of its time limit.

    The garbage collector rests meanwhile: it would go through all that they hold again and again,
    and find no garbage.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        for module in LIBRARIES:
            import_module(module)
    finally:
        if collected:
            gc.enable()


# --- in the process that has the work -----------------------------------------------------------


@dataclass(eq=False)
class Job:
    """Something to be done, and how many workers have died of it."""

    message: bytes
    deaths: int = 0


@dataclass
class _Worker:
    """One end of a worker's sockets, what it is at, and whether it has said anything."""

    number: int
    connection: Connection
    job: Job | None = None
    is_up: bool = False


class LocalWorkers:
    """So many processes, each with one thread and one job at a time.

    A job whose worker dies is given to the one that takes its place. To be entered; the processes
    end with the block, whatever they are at.

    Args:
        count: How many.
        environments: Variables that a worker has beside this process's own, by its number.
    """

    def __init__(self, count: int, environments: Sequence[Mapping[str, str]] = ()) -> None:
        self._environments = environments or [{}] * count
        self._workers: list[_Worker] = []
        self._waiting: deque[Job] = deque()

    def __enter__(self) -> Self:
        self._workers = [self._start(number) for number in range(len(self._environments))]
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            _say(worker, _END)
        for worker in self._workers:
            if worker.is_up:  # until it is gone: nothing else comes but its last answer
                while worker.connection.poll(LEAVE_SECONDS) and _answer(worker) is not None:
                    pass
            worker.connection.close()

    def _start(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            if sys.platform == "linux":
                _nursery(os.getpid()).bear(theirs)
            else:  # libraries of other systems do not bear copies
                _spawn("work_alone", theirs)
        worker = _Worker(number, Connection(ours.detach()))
        environment = {**os.environ, **self._environments[number]}
        _say(worker, pickle.dumps((environment, sys.path, os.getcwd())))
        return worker

    def count(self) -> int:
        """Return how many workers there are."""
        return len(self._workers)

    def submit(self, function: Callable[..., Any], *args: Any) -> Job:
        """Let a worker call `function(*args, stop=...)`; both are pickled."""
        job = Job(_JOB + pickle.dumps((function, args)))
        self._waiting.append(job)
        self._hand_out()
        return job

    def wait(self, jobs: Collection[Job], seconds: float) -> dict[Job, Any]:
        """Wait until a job ends, `seconds` at most; return what it gave, or the exception."""
        workers = {worker.connection: worker for worker in self._workers}
        answers = {}
        for connection in wait(list(workers), seconds):
            worker = workers[connection]
            answer = _answer(worker)
            if answer == ():
                worker.is_up = True
                continue
            job, worker.job = worker.job, None
            if answer is not None:
                answers[job] = answer[0]
                continue
            connection.close()
            self._workers[worker.number] = self._start(worker.number)
            if job is not None:
                job.deaths += 1
                if job.deaths < DEATHS:
                    self._waiting.append(job)
                else:
                    answers[job] = WorkerDied()
        self._hand_out()
        return answers

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.job is None and self._waiting:
                worker.job = self._waiting.popleft()
                _say(worker, worker.job.message)

    def stop(self, jobs: Collection[Job]) -> None:
        """Make what is under way leave, and wait until it has; nothing else is begun."""
        self._waiting.clear()
        for worker in self._workers:
            if worker.job is not None:
                worker.job.deaths = DEATHS  # it is not given to another, either
                _say(worker, _STOP)
        end = monotonic() + LEAVE_SECONDS
        while any(w.job and w.is_up for w in self._workers) and monotonic() < end:
            self.wait(jobs, 1)


def _say(worker: _Worker, message: bytes) -> None:
    """Tell a worker something; one that has died is noticed when it is listened to."""
    with suppress(OSError):
        worker.connection.send_bytes(message)


def _answer(worker: _Worker) -> Any:
    """Return a tuple of what its job gave, or of the error; None where it has died.

    The first is empty: it says that the worker is up.
    """
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        return None


class _Nursery:
    """The process whose copies become workers, as this process sees it."""

    def __init__(self) -> None:
        self._open()
        atexit.register(self.close)

    def _open(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn("bear", theirs)

    def bear(self, connection: socket.socket) -> None:
        """Make a worker at the other end of `connection`."""
        try:
            socket.send_fds(self._socket, [b"."], [connection.fileno()])
        except OSError:  # it was killed
            self.close()
            self._open()
            socket.send_fds(self._socket, [b"."], [connection.fileno()])

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.kill()  # it may be importing still
        self._process.wait()


@cache
def _nursery(process: int) -> _Nursery:
    """Return the nursery of this process, given its id: a copy of a process has another."""
    return _Nursery()


def _spawn(entry: str, connection: socket.socket) -> subprocess.Popen:
    """Start a process in a function of this module, at the other end of `connection`.

    It knows nothing of the program that is running, which need not be fit to be imported. What the
    terminal sends to all processes of a command does not reach it.
    """
    number = connection.fileno()
    code = (
        "import sys; sys.path[:] = sys.argv[3:]; from repeatlab.studies import processes; "
        "getattr(processes, sys.argv[1])(int(sys.argv[2]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, entry, str(number), *sys.path],
        pass_fds=[number],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**dict.fromkeys(ONE_THREAD, "1"), **os.environ},
    )


# --- in the nursery and its copies --------------------------------------------------------------


def bear(descriptor: int) -> None:
    """Be the nursery: make a worker for each descriptor that comes, until none can come."""
    _ignore_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a worker's end
    control = socket.socket(fileno=descriptor)
    import_libraries()
    # Copies share the pages of what no collection of theirs looks at.
    gc.freeze()
    while True:
        _, received, _, _ = socket.recv_fds(control, 1, 1)
        if not received:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _work(Connection(received[0]))
        os.close(received[0])


def work_alone(descriptor: int) -> None:
    """Be a worker that is no copy."""
    _ignore_signals()
    import_libraries()
    _work(Connection(descriptor))


def _ignore_signals() -> None:
    """Leave it to the process that has the work what a signal means for it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _work(connection: Connection) -> None:
    """Do one job after another until the other end is closed."""
    environment, sys.path[:], folder = pickle.loads(connection.recv_bytes())
    os.environ.clear()
    os.environ.update(dict.fromkeys(ONE_THREAD, "1") | environment)
    os.chdir(folder)
    connection.send(())
    jobs: SimpleQueue[tuple[bytes, Stop]] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    while True:
        message, stop = jobs.get()
        try:
            function, args = pickle.loads(message)
            answer = function(*args, stop=stop)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send((answer,))


def _listen(connection: Connection, jobs: SimpleQueue[tuple[bytes, Stop]]) -> None:
    """Take in jobs, ask the last one to stop, and end this process when it is no longer needed."""
    stop = Stop()
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            message = _END
        if message == _END:
            os._exit(0)
        elif message == _STOP:
            stop.set()
        else:
            stop = Stop()
            jobs.put((message.removeprefix(_JOB), stop))
