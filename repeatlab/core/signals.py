"""Ctrl-C that comes where it must wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def _nothing() -> None:
    pass


@contextmanager
def held_back(
    *, pressed: Callable[[], None] = _nothing, over: Callable[[], None] = _nothing
) -> Iterator[None]:
    """Hold back the first Ctrl-C until the block's end, whatever that is; the second comes at once.

    Signals reach the main thread only: in another one nothing is held back.

    Args:
        pressed: Called at the first Ctrl-C.
        over: Called at the block's end if it was pressed.

    Raises:
        KeyboardInterrupt: it was pressed; in place of the block's own error, too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, first = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: Any) -> None:
        nonlocal first
        first = True
        pressed()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if first:
            raise KeyboardInterrupt(str(error)) from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        if first:
            over()
    if first:
        raise KeyboardInterrupt
