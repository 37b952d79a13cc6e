"""What a mapping may know of the losses before the one it decides on."""

from __future__ import annotations

from typing import Any

import numpy as np

from repeatlab.repetition.mappings import float32


class LossStats:
    """Fresh-batch index and the most recent fresh-batch losses.

    The loss being decided on is never among them, so an outlier does not raise its own limit.
    Losses are kept in float32 precision, in which mappings compare them: one that equals all recent
    losses lies exactly on their mean.

    Args:
        window: How many recent losses to keep; 0 keeps none.

    Attributes:
        index: Index of the fresh batch being decided on, from 0.
        progress: Share of the run that was over before it, in [0, 1]: of its updates, or of what it
            may spend.
        count: How many losses have been observed in all.
    """

    def __init__(self, window: int = 0) -> None:
        self.index = 0
        self.progress = 0.0
        self.count = 0
        self._ring = np.zeros(window)

    @property
    def window(self) -> int:
        """Capacity of the window of recent losses."""
        return len(self._ring)

    @property
    def recent(self) -> np.ndarray:
        """The last `min(count, window)` losses, shape (k,), in no particular order."""
        return self._ring[: min(self.count, len(self._ring))]

    @property
    def full(self) -> bool:
        """Whether the window has been filled once."""
        return self.count >= len(self._ring)

    @property
    def mean(self) -> float:
        """Mean of the recent losses; 0 before the first."""
        return float(self.recent.mean()) if len(self.recent) else 0.0

    @property
    def std(self) -> float:
        """Population standard deviation of the recent losses; 0 before the first."""
        return float(self.recent.std()) if len(self.recent) else 0.0

    def quantile(self, q: float) -> float:
        """Return the `q`-quantile of the recent losses (linear interpolation)."""
        if not len(self.recent):
            return float("nan")
        # np.quantile's default method, a few times faster on a window's worth of numbers.
        losses = sorted(self.recent.tolist())
        below, rest = divmod(q * (len(losses) - 1), 1)
        low, high = losses[int(below)], losses[min(int(below) + 1, len(losses) - 1)]
        return low + (high - low) * rest

    def observe(self, loss: float) -> None:
        """Add the loss of the fresh batch that has just been decided on."""
        if len(self._ring):
            self._ring[self.count % len(self._ring)] = float32(loss)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on, as plain numbers and lists."""
        return {
            "index": self.index,
            "progress": self.progress,
            "count": self.count,
            "ring": self._ring.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`.

        Raises:
            ValueError: if the state was written with another window.
        """
        if len(state["ring"]) != len(self._ring):
            raise ValueError(
                f"the state holds a window of {len(state['ring'])} losses, "
                f"the mapping asks for {len(self._ring)}: resume with the mapping it was saved with"
            )
        self.index, self.count = state["index"], state["count"]
        self.progress = state["progress"]
        self._ring[:] = state["ring"]
