"""What a mapping may know of the losses before the one it decides on."""

from __future__ import annotations

import struct
from contextlib import suppress
from math import sqrt
from typing import Any

import numpy as np

_FLOAT32 = struct.Struct("f")


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
        mean: Mean of the recent losses; 0 before the first.
    """

    def __init__(self, window: int = 0) -> None:
        if window < 0:
            raise ValueError(f"window must be 0 or more, not {window}")
        self.index = 0
        self.progress = 0.0
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared deviations from the mean
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
    def std(self) -> float:
        """Population standard deviation of the recent losses; 0 before the first."""
        size = min(self.count, len(self._ring))
        return sqrt(max(0.0, self._squares) / size) if size else 0.0

    def quantile(self, q: float) -> float:
        """Return the `q`-quantile of the recent losses (linear interpolation)."""
        if not self.count or not len(self._ring):
            return float("nan")
        # np.quantile's default method, a few times faster on a window's worth of numbers.
        losses = sorted(self.recent.tolist())
        below, rest = divmod(q * (len(losses) - 1), 1)
        low, high = losses[int(below)], losses[min(int(below) + 1, len(losses) - 1)]
        return low + (high - low) * rest

    def observe(self, loss: float) -> None:
        """Add the loss of the fresh batch that has just been decided on."""
        window = len(self._ring)
        if window:
            # What is beyond float32's range stays as it is, as in a mapping.
            with suppress(OverflowError):
                loss = _FLOAT32.unpack(_FLOAT32.pack(loss))[0]
            self._update_moments(loss, window)
        self.count += 1

    def _update_moments(self, loss: float, window: int) -> None:
        """Welford's update of mean and squares, sliding once the window is full."""
        slot, old_mean, old_squares = self.count % window, self.mean, self._squares
        if self.count < window:
            self.mean += (loss - old_mean) / (self.count + 1)
            self._squares += (loss - old_mean) * (loss - self.mean)
        else:
            dropped = self._ring.item(slot)
            self.mean += (loss - dropped) / window
            self._squares += (loss - dropped) * (loss - self.mean + dropped - old_mean)
        self._ring[slot] = loss
        if slot == window - 1 or self._squares < old_squares / 2:
            # Once a window, from scratch: rounding must not add up over a long run. And when a
            # spike leaves the window: what remains may be smaller than the spike's rounding.
            self.mean = float(self._ring.mean())
            self._squares = float(((self._ring - self.mean) ** 2).sum())

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on, as plain numbers and lists."""
        return {
            "index": self.index,
            "progress": self.progress,
            "count": self.count,
            "mean": self.mean,
            "squares": self._squares,
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
        self.mean, self._squares = state["mean"], state["squares"]
        self._ring[:] = state["ring"]
