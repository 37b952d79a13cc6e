"""Tasks that stand before another one: a slow loader's, and one whose parts somebody times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import sleep
from typing import Any

from repeatlab.tasks import Task

# A task's methods that make fresh batches, and those that a run calls besides its steps.
BATCHES = ("fresh_batch", "candidates", "batch_of")
PARTS = {
    **dict.fromkeys((*BATCHES, "refresh", "resample"), "data"),
    **dict.fromkeys(("sample_losses", "gradient_bounds"), "scoring"),
    "evaluate": "evaluation",
}


class StandIn:
    """What another task is, apart from what a subclass does in its place."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


class SlowTask(StandIn):
    """A task of which every batch takes `delay` seconds more."""

    def __init__(self, task: Task, delay: float) -> None:
        super().__init__(task)
        self._delay = delay

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.task, name)
        return partial(self._late, found) if name in BATCHES else found

    def _late(self, make: Callable[..., Any], *given: Any) -> Any:
        sleep(self._delay)
        return make(*given)


class ObservedTask(StandIn):
    """A task that tells when each part of a run ends.

    Whenever a step is neither going backward nor moving weights it is going forward; what comes
    after its last move, such as an average of the weights, counts as optimizer.

    Args:
        task: The task; its optimizer steps tell `lap` of their parts from now on.
        lap: Called with "data", "scoring", "forward", "backward", "optimizer" or "evaluation" at
            the end of each, and with "recording" at the end of all that is none of these.
    """

    def __init__(self, task: Task, lap: Callable[[str], None]) -> None:
        super().__init__(task)
        self._lap = lap
        for step in task.optimizer_steps:
            step.lap = lap

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.task, name)
        return partial(self._observed, found, PARTS[name]) if name in PARTS else found

    def _observed(self, work: Callable[..., Any], part: str, *given: Any) -> Any:
        self._lap("recording")
        done = work(*given)
        self._lap(part)
        return done

    def step(self, batch: Any, report: Callable[..., None], weights: Any = None) -> None:
        """See `Task`."""
        lap = self._lap

        def reported(*losses: Any) -> None:
            lap("forward")
            report(*losses)
            lap("recording")

        lap("recording")
        self.task.step(batch, reported, weights)
        lap("optimizer")
