"""One run among those in lock-step: its own repeater, batches, rates, evaluations and records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from repeatlab.core.stopwatch import Stopwatch
from repeatlab.training.training import Training


class Arm(Training):
    """A run whose updates are made by its group.

    Attributes:
        coming: The batches of its updates, each to be asked for when the last update is made.
        batch: The batch that it is at.
    """

    coming: Iterator[Any]
    batch: Any = None

    def start(self, state: dict[str, Any] | None, clock: Stopwatch) -> None:
        """Get ready for the first update, or for those that are left after `state`."""
        self.clock = clock
        self.begin(state)
        self.coming = self.visits()

    def report(self, loss: float) -> None:
        """Tell the loss of the batch that the arm is at.

        Raises:
            NonFiniteLoss: it is NaN or infinite; the update is not to be made.
        """
        self.repeater.report(loss)
        if self.step_size is not None:
            self.rates.scale(self.step_size(torch.tensor(loss), self.repeater.stats))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a run alone: a view would bring all arms' weights with it."""
        state = super().state_dict()
        return state | {"task": _copied(state["task"])}

    def _pause(self) -> None:
        with self.clock.standing():
            super()._pause()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
