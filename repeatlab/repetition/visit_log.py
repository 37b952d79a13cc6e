"""What a repeater remembers of its visits until it is asked: their losses and the batches' N."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import isfinite

import numpy as np
import torch


class NonFiniteLoss(ArithmeticError):
    """A reported loss was NaN or infinite.

    Attributes:
        loss: The loss.
        update: Index of the update it drives, from 0.
        fresh_batch: Index of its fresh batch, from 0.
    """

    def __init__(self, loss: float, update: int, fresh_batch: int) -> None:
        super().__init__(loss, update, fresh_batch)
        self.loss, self.update, self.fresh_batch = loss, update, fresh_batch

    def __str__(self) -> str:
        return f"the loss is {self.loss} at update {self.update} (fresh batch {self.fresh_batch})"


class VisitLog:
    """Every loss and every N since the last drain, in lists: all that the training loop pays for.

    Attributes:
        losses: One per visit; NaN while it is still on the device.
        counts: N, one per decided fresh batch.
        fetches: How often losses were brought from the device.
    """

    def __init__(
        self,
        block: int,
        join: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        history: int = 1_000_000,
    ) -> None:
        self.block, self.history = block, history
        self._join = join  # from this rank's losses, (n,), to those of all
        self.fetches = 0
        self.restart(0, 0, 0, [])

    def restart(
        self,
        update: int,
        fresh_batch: int,
        repeat: int,
        counts: list[int],
        losses: Sequence[float] = (),
    ) -> None:
        """Begin with visit number `repeat` to `fresh_batch`, where `counts` and `losses` do."""
        self._first_update, self._first_batch, self._skipped = update, fresh_batch, repeat
        self.losses: list[float] = list(losses)
        self.counts = counts
        self._deferred: list[tuple[int, torch.Tensor]] = []

    def tell(self, loss: float, row: int | None = None) -> None:
        """Fill in a visit's loss, by default the last one's.

        Raises:
            NonFiniteLoss: it is not finite; what came after has no meaning and is forgotten.
        """
        row = len(self.losses) - 1 if row is None else row
        self.losses[row] = loss
        if not isfinite(loss):
            del self.losses[row + 1 :]
            raise NonFiniteLoss(loss, self._first_update + row, int(self._expand()[0][row]))

    def defer(self, loss: torch.Tensor) -> None:
        """Leave the last visit's loss on the device until a block of them is full."""
        self._deferred.append((len(self.losses) - 1, loss))
        if len(self._deferred) >= self.block:
            self.fetch()

    def fetch(self) -> None:
        """Bring the deferred losses to the host in one copy."""
        if not self._deferred:
            return
        rows, losses = zip(*self._deferred, strict=True)
        self._deferred = []
        self.fetches += 1
        stacked = torch.stack(losses)
        if self._join is not None:
            stacked = self._join(stacked)
        for row, loss in zip(rows, stacked.tolist(), strict=True):
            self.tell(loss, row)

    def trim(self) -> None:
        """Forget, with a warning, what lies before the last `history` of twice as many visits."""
        if len(self.losses) > 2 * self.history:
            warnings.warn(
                f"{len(self.losses)} visits have not been drained, and the older half is "
                "forgotten: call repeater.drain() now and then, or set history",
                stacklevel=4,
            )
            self.fetch()
            self.drain(held=self.history)

    def _expand(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return fresh batch, repeat index and N of every visit in `losses`."""
        # An undecided batch (its loss was not finite) has one visit and no N.
        counts = np.array(self.counts, dtype=np.int64)
        lengths = np.maximum(counts, 1)
        rows = slice(self._skipped, self._skipped + len(self.losses))
        batch = np.repeat(np.arange(len(counts)), lengths)
        repeat = np.arange(len(batch)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self._first_batch + batch[rows], repeat[rows], counts[batch[rows]]

    def drain(self, held: int = 0) -> dict[str, np.ndarray]:
        """Return the visits but for the last `held`, as `BatchRepeater.drain`, and forget them."""
        kept = self.losses[len(self.losses) - held :]
        del self.losses[len(self.losses) - held :]
        batch, repeat, counts = self._expand()
        rows = {
            "update": self._first_update + np.arange(len(self.losses)),
            "fresh_batch": batch,
            "repeat": repeat,
            "repeats": counts,
            "loss": np.array(self.losses, dtype=np.float64),
        }
        if len(batch):
            update = self._first_update + len(self.losses)
            unfinished = repeat[-1] + 1 < counts[-1]
            next_batch = int(batch[-1]) + (not unfinished)
            next_repeat = int(repeat[-1]) + 1 if unfinished else 0
            left = self.counts[next_batch - self._first_batch :]
            self.restart(update, next_batch, next_repeat, left, kept)
        else:
            self.losses = kept
        return rows
