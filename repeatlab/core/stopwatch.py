"""A clock that can stand still, and of which several may have their share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Seconds that have passed while it was running; at first it stands.

    Args:
        clock: What it goes by.

    Attributes:
        arms: How many share its time from now on: one's seconds are what it shows.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.arms = 1
        self._clock = clock
        self._seconds = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        """Return one arm's seconds so far."""
        if self._since is not None:
            now = self._clock()
            self._seconds += (now - self._since) / self.arms
            self._since = now
        return self._seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run meanwhile."""
        self._since = self._clock()
        try:
            yield
        finally:
            self()
            self._since = None

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Stand still meanwhile."""
        self()
        self._since = None
        try:
            yield
        finally:
            self._since = self._clock()
