"""The primitive: dynamic batch repetition in anybody's PyTorch loop.

repeater = BatchRepeater(loader, repeats=Linear(t=1.2), max_updates=5_000)
for batch in repeater:
    loss = loss_fn(model, batch)
    repeater.report(loss)  # right after the forward: the copy overlaps backward and step
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import isfinite, nan
from typing import Any

import numpy as np
import torch

from repeatlab.repetition.endless_loader import EndlessLoader
from repeatlab.repetition.loss_reader import LossReader
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import Constant
from repeatlab.repetition.visit_log import NonFiniteLoss, VisitLog


class BatchRepeater:
    """Yields each batch of `loader` as often as `repeats` asks, `max_updates` times in all.

    The first forward on a fresh batch decides N and drives the first of its N updates, so N updates
    cost N forwards. The last batch's N is cut to what is left. What it costs: under 1 us of
    bookkeeping an update on the CPU; on CUDA one wait per fresh batch, which overlaps backward and
    step, and none where the mapping does not need the loss.

    In a torch.distributed process group the loss that decides is the mean over the ranks, so that
    all ranks make the same number of updates on their batch. Under `DistributedDataParallel`,
    `data_parallel.losses_with_gradients` spares it a message of its own.

    Args:
        loader: A re-iterable of batches, iterated again when it ends (see `EndlessLoader`).
        repeats: An int, a `Mapping`, or any function of (loss, LossStats) that returns N >= 1.
        max_updates: T, the exact number of batches to yield.
        refresh: A function of the batch that gives repeats a fresh view of it, such as a new random
            crop; by default repeats see the same view.
        progress: A function that returns which share of the run is over, in [0, 1], for mappings
            that go by the clock; by default the share of T.
        reduce: A function of the 0-d loss tensor that returns the one to decide on, in place of the
            mean over the ranks, or a function that is called for its value after the step.
        join: A function of the losses of this rank's repeats, (n,), that returns the ones to
            record; where it talks to other ranks, all must call `drain` and `state_dict` together.
        block: How many losses of repeats are gathered before they are fetched together, on CUDA
            or for `join`.

    Attributes:
        max_updates: T.
        updates: Updates made or under way: batches whose loss has been reported.
        fresh_batch: Index of the current fresh batch, from 0; -1 before the first.
        repeat: How often the loss of the current batch has been reported.
        repeats: N of the current batch, cut to what is left of T; 0 while it is undecided.
        stats: The `LossStats` that the mapping sees.

    Raises:
        ValueError: `max_updates` below 1, an empty loader, a loss that is not a scalar, a mapping
            that returns less than 1.
        RuntimeError: `report` missing, or called without a batch to report on.
        NonFiniteLoss: the loss is NaN or infinite. A loss on the CPU raises in `report`, before its
            update is made; one on CUDA, or joined with those of other ranks, raises when it is
            read, naming the first such update.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        repeats: int | Callable[[float, LossStats], int] = 1,
        *,
        max_updates: int,
        refresh: Callable[[Any], Any] | None = None,
        progress: Callable[[], float] | None = None,
        reduce: Callable[[torch.Tensor], Any] | None = None,
        join: Callable[[torch.Tensor], torch.Tensor] | None = None,
        block: int = 256,
    ) -> None:
        if isinstance(max_updates, bool) or not isinstance(max_updates, int) or max_updates < 1:
            raise ValueError(f"max_updates must be an integer of at least 1, not {max_updates!r}")
        self.max_updates = max_updates
        self.updates = 0
        self.fresh_batch = -1
        self.repeat = 0
        self.repeats = 0
        self._mapping = Constant(repeats) if isinstance(repeats, int) else repeats
        if not callable(self._mapping):
            raise ValueError(f"repeats must be an integer or a mapping, not {repeats!r}")
        self._needs_loss = getattr(self._mapping, "needs_loss", True)
        self._asks_again = getattr(self._mapping, "asks_again", False)
        self.stats = LossStats(getattr(self._mapping, "window", 1000))
        self._loader = EndlessLoader(loader)
        self._reader = LossReader(reduce)
        self._refresh = refresh
        self._progress = progress or (lambda: self.updates / self.max_updates)
        self._joins = join is not None
        self._visits = VisitLog(block, join)
        self._batch: Any = None  # the current one, held while visits to it are left
        self._awaiting_report = False
        self._asking = False  # the last visit's loss will tell whether there is another

    def __len__(self) -> int:
        return self.max_updates

    @property
    def host_reads(self) -> int:
        """How often the host has waited for a loss on the device."""
        return self._reader.host_reads + self._visits.fetches

    def __iter__(self) -> Iterator[Any]:
        while self.updates < self.max_updates:
            self._read_pending()
            if self._batch is None or 0 < self.repeats <= self.repeat:
                self._next_fresh_batch()
            batch = self._batch
            if self.repeat and self._refresh is not None:
                batch = self._refresh(batch)
            self._awaiting_report = True
            yield batch
            if self._awaiting_report:
                raise RuntimeError(
                    f"no loss was reported for update {self.updates} (fresh batch "
                    f"{self.fresh_batch}): call repeater.report(loss) right after the forward"
                )
        self._batch = None
        self._settle()
        self._loader.release()

    def stop(self) -> None:
        """Make the visit under way the last one; the current batch's N is cut to its visits.

        Those of them that have been drained before keep the N that was planned.
        """
        self._settle()
        self.max_updates = self.updates + self._awaiting_report
        visits = self.repeat + self._awaiting_report
        if self.repeats > visits:
            self.repeats = self._visits.counts[-1] = visits

    def report(self, loss: torch.Tensor | float) -> None:
        """Tell the loss of the batch just yielded: a 0-d tensor or a float, once per batch."""
        if not self._awaiting_report:
            raise RuntimeError(
                f"report() has no batch to report on (last: update {self.updates - 1}, fresh batch "
                f"{self.fresh_batch}): call it once for each batch, inside the loop"
            )
        is_tensor = isinstance(loss, torch.Tensor)
        if is_tensor and loss.ndim:
            raise ValueError(
                f"the loss of fresh batch {self.fresh_batch} must be a scalar, not a tensor of "
                f"shape {tuple(loss.shape)}: reduce it first, for example with loss.mean()"
            )
        if not is_tensor:
            try:
                loss = float(loss)
            except (TypeError, ValueError):
                raise ValueError(
                    f"the loss of fresh batch {self.fresh_batch} must be a scalar, not {loss!r}"
                ) from None
        self._awaiting_report = False
        self.updates += 1
        self.repeat += 1
        if not self.repeats:
            self._visits.losses.append(nan)
            value = self._reader.start(loss)
            if value is not None:
                self._decide(value)
        elif self._asks_again and self._may_go_on:
            self._visits.losses.append(nan)
            self._asking = True
            value = self._reader.start(loss)
            if value is not None:
                self._ask(value)
        elif self._joins or (is_tensor and loss.is_cuda):
            # A copy: a CUDA graph, for one, writes its next loss over this one.
            self._visits.defer(loss.detach().clone() if is_tensor else torch.tensor(loss))
        else:
            loss = loss.item() if is_tensor else loss
            self._visits.losses.append(loss)
            if not isfinite(loss):
                raise NonFiniteLoss(loss, self.updates - 1, self.fresh_batch)

    @property
    def _finished(self) -> bool:
        """Whether all visits to the current batch are made."""
        return 0 < self.repeats <= self.repeat

    @property
    def _may_go_on(self) -> bool:
        """Whether this visit, the last one planned, may be followed by another."""
        left = self.updates < self.max_updates
        return left and self.repeat == self.repeats < self._mapping.most

    def _read_pending(self) -> None:
        """Wait for the loss on which the current batch's N still depends."""
        if self.repeat and not self.repeats:
            self._decide(self._reader.wait())
        elif self._asking:
            self._ask(self._reader.wait())

    def _ask(self, loss: float) -> None:
        """Plan one more visit if the mapping wants it for the loss of the last one."""
        self._asking = False
        self._visits.losses[-1] = loss
        if not isfinite(loss):
            raise NonFiniteLoss(loss, self.updates - 1, self.fresh_batch)
        if self._mapping(loss, self.stats) > 1:
            self.repeats += 1
            self._visits.counts[-1] = self.repeats

    def _decide(self, loss: float) -> None:
        """Turn the first loss of the current batch into its N."""
        self._visits.losses[-1] = loss
        # Should anything raise, this visit stays undecided and the batch's last one.
        self.repeats = self.repeat
        self._visits.counts.append(0)
        if not isfinite(loss):
            raise NonFiniteLoss(loss, self.updates - 1, self.fresh_batch)
        self.repeats = self._visits.counts[-1] = self._count(self._mapping(loss, self.stats), 1)
        self.stats.observe(loss)

    def _count(self, count: int, done: int) -> int:
        """Return N, checked and cut to what is left of T; `done` visits are made already."""
        repeats = int(count)
        if repeats < 1 or repeats != count:
            raise ValueError(
                f"{self._mapping!r} asked for {count!r} updates on fresh batch {self.fresh_batch}: "
                "a mapping must return an integer of at least 1"
            )
        left = self.max_updates - self.updates + done
        return repeats if repeats < left else left

    def _next_fresh_batch(self) -> None:
        resumed = self._batch is None and self.repeat and not self._finished
        self._batch = self._loader.next_batch()
        if resumed:  # in mid-repeat: the batch is an old one
            return
        self.fresh_batch += 1
        self.stats.index = self.fresh_batch
        self.stats.progress = self._progress()
        self.repeat = self.repeats = 0
        if not self._needs_loss:
            self.repeats = self._count(self._mapping(0.0, self.stats), 0)
            self._visits.counts.append(self.repeats)

    def _settle(self) -> None:
        """Decide what is undecided, and fetch the losses that are still on the device."""
        self._read_pending()
        self._visits.fetch()

    @property
    def held(self) -> int:
        """Visits of the current batch that `drain` keeps back, because its N may still grow."""
        return self.repeat if self._asks_again and self.repeat < self.repeats else 0

    def drain(self) -> dict[str, np.ndarray]:
        """Return the visits since the last call, one row per update, and forget them.

        Can be called after `NonFiniteLoss`: the last row is then the first non-finite loss. Where
        the mapping asks again after every visit, those of a batch come when its N is known.

        Returns:
            Columns of equal length: `update`, `fresh_batch`, `repeat` (0 for the first visit),
            `repeats` (N, cut to what was left of T; 0 if a loss that was not finite left it
            undecided) as int64, and `loss` as float64. The loss that decided is the mean over the
            ranks, that of a repeat is this rank's.
        """
        self._settle()
        return self._visits.drain(self.held)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, in the middle of a repeat too.

        Take it at the end of the loop's body, when the update is complete; a batch whose loss has
        not been reported is yielded again. Undrained visits are not part of it.
        """
        self._settle()
        unreported = self._awaiting_report and self.repeat == 0
        unfinished = self._batch is not None and not self._finished
        return {
            "updates": self.updates,
            "fresh_batch": self.fresh_batch - unreported,
            "repeat": self.repeat,
            "repeats": 0 if unreported else self.repeats,
            "loader": self._loader.state_dict(rewind=unfinished),
            "stats": self.stats.state_dict(),
            "held": self._visits.losses[len(self._visits.losses) - self.held :],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same loader, mapping and max_updates."""
        self.updates, self.fresh_batch = state["updates"], state["fresh_batch"]
        self.repeat, self.repeats = state["repeat"], state["repeats"]
        self._loader.load_state_dict(state["loader"])
        self.stats.load_state_dict(state["stats"])
        self._batch, self._awaiting_report = None, False
        held = list(state["held"])
        if self.repeats:
            done = self.repeat - len(held)
            first = self.updates - len(held)
            self._visits.restart(first, self.fresh_batch, done, [self.repeats], held)
        else:
            self._visits.restart(self.updates, self.fresh_batch + 1, 0, [])
