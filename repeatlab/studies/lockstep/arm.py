"""One run among those in lock-step: its own repeater, batches, rates, evaluations and records."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from repeatlab.core.stopwatch import Stopwatch
from repeatlab.repetition.repeater import NonFiniteLoss
from repeatlab.training.one_run import Training


class Arm(Training):
    """A run whose updates are made by its group.

    Attributes:
        clock: Of the whole group.
        life: What is left of it, see `lived`; None when it has left the group.
        batch: The batch that it is at.
    """

    clock: Stopwatch
    life: Generator[Any, float | None, None] | None = None
    batch: Any = None

    def lived(self) -> Generator[Any, float | None, None]:
        """Yield the batch of each update, to be sent its loss, and again while the step is made."""
        end = None
        try:
            for batch in self.visits():
                self.updates.report((yield batch))
                yield
        except NonFiniteLoss as error:
            end = error
        with self.clock.standing():
            self.end(end)

    def pause(self) -> None:
        """See `Training`; the clock of all stands meanwhile."""
        with self.clock.standing():
            super().pause()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a run alone: a view would bring all arms' weights with it."""
        state = super().state_dict()
        return state | {"task": _copied(state["task"])}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
