"""The gradients of a run's updates as backward leaves them, and their norms for the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repeatlab.tasks.optimization import OptimizerStep


def with_gradient(optimizer: Any) -> Iterator[Tensor]:
    """Yield the optimizer's weights that have a gradient."""
    for group in optimizer.param_groups:
        yield from (weight for weight in group["params"] if weight.grad is not None)


class GradientNorms:
    """The squared norm of every update's gradient, |g|^2, that of all its optimizers' weights.

    It is what backward leaves: of the loss that is descended, before clipping, a pull, or a penalty
    that an optimizer adds by itself. Values stay on the device until they are drained.

    Args:
        steps: The task's; none where nothing is to be recorded.
    """

    def __init__(self, steps: Sequence[OptimizerStep]) -> None:
        self._made: list[Tensor | float] = []
        self._now: Tensor | float = 0.0
        self._on = bool(steps)
        for step in steps:
            step.watch(self._see)

    @torch.no_grad()
    def _see(self, optimizer: Any) -> None:
        self._now = self._now + sum(w.grad.square().sum() for w in with_gradient(optimizer))

    def ended(self) -> None:
        """Take in that an update has ended."""
        if self._on:
            self._made.append(self._now)
            self._now = 0.0

    def drain(self, count: int) -> dict[str, np.ndarray]:
        """Return the column of the first `count`, float64, and forget them; {} where none are.

        NaN where a loss was not finite and made no update.
        """
        found = np.full(count, np.nan)
        made, self._made = self._made[:count], self._made[count:]
        found[: len(made)] = [float(value) for value in made]
        return {"squared_gradient": found} if self._on else {}

    def state_dict(self) -> dict[str, list[float]]:
        """Return what was not drained yet."""
        return {"made": [float(value) for value in self._made]}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore `state_dict()`."""
        self._made = list(state["made"])
