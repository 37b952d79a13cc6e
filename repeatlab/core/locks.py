"""A lock on a file, between processes; the system lets go of that of a process that has died."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from repeatlab.core.files import StoreError


@contextmanager
def hold(path: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock, waiting for a process that does; `waiting` is called meanwhile.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        while not _acquired(lock):
            waiting()
    except OSError as error:
        raise StoreError(f"{path} cannot be locked: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock now."""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # it may not be written, as FileLock asks
        return _is_held_by_another(path)


def _acquired(lock: FileLock) -> bool:
    """Wait a moment for a lock; whether this process has it now."""
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        return False
    return True


def _is_held_by_another(path: Path) -> bool:
    """Whether a process holds a lock that this one can at most read; no, where it cannot."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):  # not Unix, or unreadable
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what systems call it
        return True
    except OSError:
        return False  # no locks on this file system
    finally:
        os.close(handle)
    return False
