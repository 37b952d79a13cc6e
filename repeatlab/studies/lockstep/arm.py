"""One run among those in lock-step: its own repeater, batches, rates, evaluations and records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from repeatlab.core.stopwatch import Stopwatch
from repeatlab.training.training import Training


class Arm(Training):
    """A run whose updates are made by its group.

    Args:
        clock: Of the whole group.
        **parts: As of `Training`.

    Attributes:
        coming: The batches of its updates, each to be asked for when the last update is made.
        batch: The batch that it is at.
        report: What is told the loss of this batch; raises where the update is not to be made.
    """

    coming: Iterator[Any]
    batch: Any = None

    def __init__(self, *run: Any, clock: Stopwatch, **parts: Any) -> None:
        super().__init__(*run, clock=clock, **parts)
        self._stopwatch = clock
        self.report = self.updates.report

    def start(self, state: dict[str, Any] | None) -> None:
        """Get ready for the first update, or for those that are left after `state`."""
        self.begin(state)
        self.coming = self.visits()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a run alone: a view would bring all arms' weights with it."""
        state = super().state_dict()
        return state | {"task": _copied(state["task"])}

    def pause(self) -> None:
        """See `Training`; the clock of all stands meanwhile."""
        with self._stopwatch.standing():
            super().pause()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
