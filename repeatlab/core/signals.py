"""Ctrl-C, SIGTERM and SIGHUP that come where they must wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# SIGHUP comes when a terminal is closed.
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Interrupted(RuntimeError):
    """What was asked to stop has stopped where it can go on later; the message says where."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, once what was under way has stopped; a notebook shows the message alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Stop:
    """Asks what is under way to stop where it can go on later.

    Set by anybody: another thread, a signal. Asked for by what is under way, which then raises
    `Interrupted`.
    """

    def __init__(self) -> None:
        self._asked = False

    def set(self) -> None:
        """Ask."""
        self._asked = True

    def is_set(self) -> bool:
        """Return whether somebody has asked."""
        return self._asked


@contextmanager
def held_back() -> Iterator[Stop]:
    """Hold back the first signal to stop until the block's end; the second comes at once.

    Yields what the first one sets. Signals reach the main thread only: in another one nothing is
    held back. What is ignored outside the block (`nohup`) is ignored inside it.

    Raises:
        Stopped: it was Ctrl-C; with the message of the block's own error, if there is one.
        SystemExit: it was another; the status is 128 + its number.
    """
    stop, came = Stop(), []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        restore()
        came.append(number)
        stop.set()

    why: Exception | None = None
    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    except Exception as error:
        if not came:
            raise
        why = error
    finally:
        restore()
    if came:
        end = Stopped(*([str(why)] if why else []))
        raise (end if came[0] == signal.SIGINT else SystemExit(128 + came[0])) from why
