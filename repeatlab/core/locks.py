"""A lock on a file, between processes; the system lets go of that of a process that has died."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

from repeatlab.core.files import StoreError

POLL_SECONDS = 0.05


@contextmanager
def hold(path: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock, waiting for a process that does; `waiting` is called meanwhile.

    Raises:
        StoreError: the file cannot be made, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(f"{path} cannot be locked: {error.strerror}") from None
    try:
        while not _acquired(path, handle):
            waiting()
            sleep(POLL_SECONDS)
        try:
            yield
        finally:  # a process that was forked meanwhile has the file open, too
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock now; no, where it cannot be known."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # not there, or unreadable
        return False
    try:
        return not _acquired(path, handle, fcntl.LOCK_SH)
    except StoreError:  # without locks nobody holds one
        return False
    finally:
        os.close(handle)


def _acquired(path: Path, handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Try to lock an open file; return whether it is locked now."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what systems call it where somebody else has it
        return False
    except OSError as error:
        raise StoreError(
            f"{path} cannot be locked: {error.strerror}; it must lie on a file system with locks"
        ) from None
    return True
