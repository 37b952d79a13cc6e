"""Where the time of an update goes: a watch in the loop that trains a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import isnan, nan
from typing import Any

import torch

PARTS = ("forward", "backward", "optimizer", "recording", "data")


class Watch:
    """How much of a clock each part takes.

    Attributes:
        totals: Sums by part.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last = clock, nan
        self.totals = dict.fromkeys(PARTS, 0.0)

    def lap(self, part: str) -> None:
        """Count what has passed since the last lap for `part`; the first one only starts."""
        now = self._clock()
        if not isnan(self._last):
            self.totals[part] += now - self._last
        self._last = now


@contextmanager
def watched(task: Any, clock: Callable[[], float]) -> Iterator[Watch]:
    """Watch what a task does in here, from the making of its first batch, or its first step, on.

    Whenever `step` is neither going backward nor moving weights it is going forward. What comes
    after the last optimizer's step, such as a moving average of the weights, counts as optimizer,
    and everything outside of `step` and `fresh_batch`, and `report`, as recording.

    Args:
        task: A task, or what stands for one; its `step` and `fresh_batch` are replaced meanwhile.
        clock: What to read, such as the time, or a count of operations.
    """
    watch = Watch(clock)
    lap, step, fresh_batch = watch.lap, task.step, task.fresh_batch

    def watched_batch(index: int) -> Any:
        lap("recording")
        batch = fresh_batch(index)
        lap("data")
        return batch

    def watched_step(batch: Any, report: Callable[..., None], weights: Any = None) -> None:
        def watched_report(*reported: Any) -> None:
            lap("forward")
            report(*reported)
            lap("recording")

        lap("recording")
        step(batch, watched_report, weights)
        lap("optimizer")

    with ExitStack() as stack:
        stack.enter_context(_replaced(task, "fresh_batch", watched_batch))
        stack.enter_context(_replaced(task, "step", watched_step))
        # What Tensor.backward calls.
        backward = _between(lap, "forward", torch.autograd.backward, "backward")
        stack.enter_context(_replaced(torch.autograd, "backward", backward))
        for optimizer in task.optimizers:
            zero_grad = _between(lap, "forward", optimizer.zero_grad, "optimizer")
            stack.enter_context(_replaced(optimizer, "zero_grad", zero_grad))
            hook = optimizer.register_step_post_hook(lambda *_: lap("optimizer"))
            stack.callback(hook.remove)
        yield watch


def _between(
    lap: Callable[[str], None], before: str, work: Callable[..., Any], after: str
) -> Callable[..., Any]:
    """Return `work` with a lap at its start, for what was `before` it, and one at its end."""

    def watched(*arguments: Any, **options: Any) -> Any:
        lap(before)
        done = work(*arguments, **options)
        lap(after)
        return done

    return watched


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    had, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
