"""The primitive: dynamic batch repetition in anybody's PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf, nan
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch

from repeatlab.repetition.endless_loader import EndlessLoader
from repeatlab.repetition.held_batch import changed, versions, view
from repeatlab.repetition.loss_reader import LossReader
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import Constant, as_count
from repeatlab.repetition.random_states import process_states, restore_process
from repeatlab.repetition.visit_log import NonFiniteLoss as NonFiniteLoss
from repeatlab.repetition.visit_log import VisitLog

_FLOAT32 = torch.float32


class BatchRepeater:
    """Yields each batch of `loader` as often as `repeats` asks, `max_updates` times in all.

        repeater = BatchRepeater(loader, Quantile(), max_updates=epochs * len(loader))
        for batch in repeater:
            loss = loss_fn(model, batch)
            repeater.report(loss)  # right after the forward: the copy overlaps backward and step
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    The first forward on a fresh batch decides N and drives the first of its N updates, so N updates
    cost N forwards. The last batch's N is cut to what is left. What it costs: under 1 us of
    bookkeeping an update on the CPU; on CUDA one wait per fresh batch, which overlaps backward and
    step, and none where the mapping does not need the loss.

    One repeater serves the whole run, and `epochs(n)` divides it. Made anew for every epoch, it
    would forget its losses, and a `Uniform` would draw the same N each time.

    Every visit gets a copy of the batch's dicts, lists and tuples, never of its tensors: one that
    was changed in place since the visit before is an error.

    In a torch.distributed process group the loss that decides is the mean over the ranks, so that
    all ranks make the same number of updates on their batch. Under `DistributedDataParallel`,
    `distributed.losses_with_gradients` spares it a message of its own. A framework shards among
    ranks only what it knows as a DataLoader: let it prepare the loader, or give that a
    `DistributedSampler`, and repeat what comes out.

    Args:
        loader: A re-iterable of batches, iterated again when it ends, or a function that returns an
            iterator for each pass (see `EndlessLoader`; `grouped` for gradient accumulation).
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
        history: How many of the latest visits `drain` can count on. Where twice as many wait for
            it, about 80 MB, the older half is forgotten, with a warning.

    Attributes:
        max_updates: T.
        updates: Updates made or under way: batches whose loss has been reported.
        fresh_batch: Index of the current fresh batch, from 0; -1 before the first.
        repeat: Number of the current visit to it, from 0, as in the column of that name.
        repeats: N of the current batch, cut to what is left of T; 0 while it is undecided.
        mapping: What decides N; a `Constant` where `repeats` was an int.
        stats: The `LossStats` that the mapping sees.

    Raises:
        ValueError: `max_updates` below 1, a loader that is empty or can be read only once, a loss
            that is not a real scalar, a mapping that returns less than 1.
        RuntimeError: `report` missing, or called without a batch to report on; a tensor of a batch
            changed in place between visits; iterated again after all updates were made.
        NonFiniteLoss: the loss is NaN or infinite. A loss on the CPU raises in `report`, before its
            update is made; one on CUDA, or joined with those of other ranks, raises when it is
            read, naming the first such update.
    """

    def __init__(
        self,
        loader: Iterable[Any] | Callable[[], Iterator[Any]],
        repeats: int | Callable[[float, LossStats], int] = 1,
        *,
        max_updates: int,
        refresh: Callable[[Any], Any] | None = None,
        progress: Callable[[], float] | None = None,
        reduce: Callable[[torch.Tensor], Any] | None = None,
        join: Callable[[torch.Tensor], torch.Tensor] | None = None,
        block: int = 256,
        history: int = 1_000_000,
    ) -> None:
        self.max_updates = as_count("max_updates", max_updates)
        self.updates = 0
        self.fresh_batch = -1
        self.repeat = 0
        self.repeats = 0
        self.mapping = Constant(repeats) if isinstance(repeats, Integral) else repeats
        if not callable(self.mapping):
            raise ValueError(f"repeats must be an integer or a mapping, not {repeats!r}")
        needs_loss = getattr(self.mapping, "needs_loss", True)
        # Where the loss does not matter there is none to check and round.
        self._planned = None if needs_loss else getattr(self.mapping, "repeats_for", self.mapping)
        self._asks_again = getattr(self.mapping, "asks_again", False)
        self._revisits = getattr(self.mapping, "most", 2) > 1
        self.stats = LossStats(getattr(self.mapping, "window", 1000))
        self._loader = EndlessLoader(loader)
        self._reader = LossReader(reduce)
        self._refresh = refresh
        self._progress = progress
        self._joins = join is not None
        self._visits = VisitLog(
            as_count("block", block), join, history=as_count("history", history)
        )
        self._first = 0  # updates that were made before this object came to be
        self._done = 0  # visits to the current batch whose loss is reported
        self._batch: Any = None  # the current one, held while visits to it are left
        self._tensors: list[torch.Tensor] = []  # those in it
        self._versions: list[int] | None = None  # of them, at the first visit here
        self._copies = False  # whether every visit needs containers of its own
        self._awaiting_report = False
        self._waiting = False  # for the last visit's loss: N, or another visit, depends on it

    def __len__(self) -> int:
        """Return how many batches it yields in all; of a resumed one, from the resume on."""
        return self.max_updates - self._first

    @property
    def epoch(self) -> int:
        """Index of the pass over the loader that the current fresh batch is from."""
        return self._loader.epoch

    @property
    def host_reads(self) -> int:
        """How often the host has waited for a loss on the device."""
        return self._reader.host_reads + self._visits.fetches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the loader's iterator, and so of its threads and workers.

        Where it was left early they would live on for the batches to come. Iterated again, it goes
        on from there. Persistent workers of a loader that is no plain DataLoader are that loader's.
        """
        self._loader.release()

    def __getstate__(self) -> dict[str, Any]:
        """Return a copy's contents; what was not reported comes again there."""
        self._settle()
        return self.__dict__ | {"_awaiting_report": False, "_versions": None, "_tensors": []}

    def __iter__(self) -> Iterator[Any]:
        if self.updates >= self.max_updates > self._first:
            raise RuntimeError(
                f"all max_updates={self.max_updates} updates are made: max_updates counts those of "
                "all epochs together; divide them by repeater.epochs(n), or make another repeater"
            )
        return self._visits_until(inf)

    def epochs(self, n: int) -> Iterator[tuple[int, Epoch]]:
        """Divide the updates into `n` equal parts: yield each part's index and its batches.

            repeater = BatchRepeater(loader, Quantile(), max_updates=90 * len(loader))
            for epoch, batches in repeater.epochs(90):
                for batch in batches:
                    ...  # as ever, with repeater.report(loss)
                validate(model)

        Of a resumed repeater, those that are left, the first from where it stopped. One that is
        left early is made up for by the next. `repeater.epoch` is the pass over the loader.
        """
        n = as_count("n", n)
        for part in range(n):
            end = self.max_updates * (part + 1) // n
            if self.updates < min(end, self.max_updates):
                yield part, Epoch(self, end)

    def _visits_until(self, end: float) -> Iterator[Any]:
        """Yield the batches of the updates that are left before number `end`."""
        while self.updates < self.max_updates and self.updates < end:
            if self._waiting:
                self._read()
            if self._batch is None or 0 < self.repeats <= self._done:
                self._next_fresh_batch()
            self.repeat = self._done
            batch = self._view() if self._revisits else self._batch
            if self._done and self._refresh is not None:
                batch = self._refresh(batch)
            self._awaiting_report = True
            yield batch
            if self._awaiting_report:
                raise RuntimeError(
                    f"no loss was reported for update {self.updates} (fresh batch "
                    f"{self.fresh_batch}): call repeater.report(loss) right after the forward, or "
                    "repeater.skip() to make no update"
                )
        if self.updates >= self.max_updates:
            self._batch, self._tensors = None, []
            self._settle()
            self._loader.release()

    def _view(self) -> Any:
        """Return the current batch as the loader gave it."""
        if not self._done or self._versions is None:
            self._tensors = []
            batch = view(self._batch, self._tensors)
            self._copies = batch is not self._batch
            self._versions = versions(self._tensors)
            return batch
        if versions(self._tensors) != self._versions:
            raise RuntimeError(
                f"{changed(self._batch, self._versions)} (fresh batch {self.fresh_batch}) was "
                "changed in place between visits, so that repeats would see something else: "
                "change a copy, x = x - 1 in place of x.sub_(1)"
            )
        return view(self._batch, []) if self._copies else self._batch

    def stop(self) -> None:
        """Make the visit under way the last one; the current batch's N is cut to its visits.

        Those of them that have been drained before keep the N that was planned.
        """
        self._settle()
        self.max_updates = self.updates + self._awaiting_report
        self._cut(self._done + self._awaiting_report)

    def skip(self) -> None:
        """Make no update on the batch just yielded, in place of `report`; on all ranks alike.

        At its first visit it is as if the loader had not yielded it; at a later one the repeats
        that are left are dropped.
        """
        self._expect_report("skip")
        self._awaiting_report = False
        if self._done:
            self._cut(self._done)
            return
        if self.repeats:
            self._visits.counts.pop()
        self.fresh_batch -= 1
        self.repeats, self._batch = 0, None

    def report(self, loss: torch.Tensor | float) -> None:
        """Tell the loss of the batch just yielded: a 0-d tensor or a float, once per batch."""
        if not self._awaiting_report:
            self._expect_report("report")
        is_tensor = isinstance(loss, torch.Tensor)
        on_device = is_tensor and not loss.is_cpu
        if is_tensor:
            unusual = on_device or loss.dtype is not _FLOAT32
            if loss.ndim or (unusual and (loss.is_meta or loss.is_complex())):
                raise self._no_scalar(f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}", loss)
        elif type(loss) is not float:
            try:
                if np.iscomplexobj(loss):
                    raise TypeError
                loss = float(loss)
            except (TypeError, ValueError, OverflowError):
                raise self._no_scalar(repr(loss), loss) from None
        waits = not self.repeats or (
            self._asks_again
            and self._done + 1 == self.repeats < self.mapping.most
            and self.updates + 1 < self.max_updates
        )
        defers = not waits and (self._joins or (on_device and loss.is_cuda))
        # What can fail comes before anything is counted: a refused loss can be reported again.
        if waits:
            value = self._reader.start(loss)
        elif defers:
            # A copy: a CUDA graph, for one, writes its next loss over this one.
            value = loss.detach().clone() if is_tensor else torch.tensor(loss)
        else:
            value = loss.item() if is_tensor else loss
        self._awaiting_report, self._waiting = False, waits
        self.updates += 1
        self._done += 1
        self._visits.losses.append(nan)
        if defers:
            self._visits.defer(value)
        elif not waits:
            self._visits.tell(value)
        elif value is not None:
            self._decide(value)

    def _expect_report(self, name: str) -> None:
        if not self._awaiting_report:
            raise RuntimeError(
                f"{name}() has no batch to report on (last: update {self.updates - 1}, fresh batch "
                f"{self.fresh_batch}): call it once for each batch, inside the loop"
            )

    def _no_scalar(self, what: str, loss: Any) -> ValueError:
        advice = ": reduce it first, for example with loss.mean()" if np.ndim(loss) else ""
        return ValueError(
            f"the loss of fresh batch {self.fresh_batch} must be a scalar, not {what}{advice}"
        )

    def _cut(self, visits: int) -> None:
        """Let the current batch have no more than `visits`."""
        if self.repeats > visits:
            self.repeats = self._visits.counts[-1] = visits

    @property
    def _finished(self) -> bool:
        """Whether all visits to the current batch are made."""
        return 0 < self.repeats <= self._done

    def _decide(self, loss: float) -> None:
        """Turn the loss of the last visit into N: all of it, or whether there is one visit more."""
        self._waiting = False
        if self.repeats:
            self._visits.tell(loss)
            if self.mapping(loss, self.stats) > 1:
                self.repeats = self._visits.counts[-1] = self.repeats + 1
            return
        # Should anything raise, this visit stays undecided and the batch's last one.
        self.repeats = self._done
        self._visits.counts.append(0)
        self._visits.tell(loss)
        self._plan(self.mapping(loss, self.stats))
        self.stats.observe(loss)

    def _plan(self, count: int) -> None:
        """Set N to what the mapping asked for, cut to what is left of T."""
        repeats = int(count)
        if repeats < 1 or repeats != count:
            raise ValueError(
                f"{self.mapping!r} asked for {count!r} updates on fresh batch {self.fresh_batch}: "
                "a mapping must return an integer of at least 1"
            )
        left = self.max_updates - self.updates + self._done
        self.repeats = self._visits.counts[-1] = min(repeats, left)

    def _next_fresh_batch(self) -> None:
        resumed = self._batch is None and self._done and not self._finished
        self._batch = self._loader.next_batch()
        if resumed:  # in mid-repeat: the batch is an old one
            return
        self.fresh_batch += 1
        self.stats.index = self.fresh_batch
        done = self._progress
        self.stats.progress = self.updates / self.max_updates if done is None else done()
        self._done = self.repeats = 0
        self._visits.trim()
        if self._planned is not None:
            self._visits.counts.append(0)
            self._plan(self._planned(0.0, self.stats))

    def _read(self) -> None:
        """Wait for the loss on which the current batch's N still depends."""
        if self._waiting:
            self._decide(self._reader.wait())

    def _settle(self) -> None:
        """Decide what is undecided, and fetch the losses that are still on the device."""
        self._read()
        self._visits.fetch()

    @property
    def held(self) -> int:
        """Visits of the current batch that `drain` keeps back, because its N may still grow."""
        return self._done if self._asks_again and self._done < self.repeats else 0

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
        not been reported is yielded again. Undrained visits are not part of it. The random states
        of torch (on the CPU), `random` and numpy are: orders are drawn from them. Every rank saves
        its own where their loaders draw apart.
        """
        self._settle()
        unreported = self._awaiting_report and self._done == 0
        unfinished = self._batch is not None and not self._finished
        return {
            "updates": self.updates,
            "fresh_batch": self.fresh_batch - unreported,
            "repeat": self._done,
            "repeats": 0 if unreported else self.repeats,
            "loader": self._loader.state_dict(held=unfinished),
            "stats": self.stats.state_dict(),
            "held": self._visits.losses[len(self._visits.losses) - self.held :],
            "random": process_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same loader, mapping and max_updates.

        Sets the random states of torch, `random` and numpy: load it last, right before the loop.
        (Another rank's are left; those on CUDA devices are yours to keep.)

        Raises:
            ValueError: it holds more updates than max_updates; nothing is changed then.
        """
        if state["updates"] > self.max_updates:
            raise ValueError(
                f"the state holds {state['updates']} updates, max_updates is {self.max_updates}: "
                "resume with the max_updates it was saved with"
            )
        self.updates, self.fresh_batch = state["updates"], state["fresh_batch"]
        self.repeat = self._done = state["repeat"]
        self.repeats, self._first = state["repeats"], state["updates"]
        self._loader.load_state_dict(state["loader"])
        self.stats.load_state_dict(state["stats"])
        self._batch, self._versions, self._awaiting_report = None, None, False
        self._waiting = False
        held = list(state["held"])
        if self.repeats:
            done = self._done - len(held)
            first = self.updates - len(held)
            self._visits.restart(first, self.fresh_batch, done, [self.repeats], held)
        else:
            self._visits.restart(self.updates, self.fresh_batch + 1, 0, [])
        restore_process(state["random"])


@dataclass(frozen=True)
class Epoch:
    """One part of a repeater's updates: those that are left of it, to iterate once.

    Attributes:
        repeater: The repeater.
        end: The number of updates that it ends with.
    """

    repeater: BatchRepeater
    end: int

    def __iter__(self) -> Iterator[Any]:
        return self.repeater._visits_until(self.end)

    def __len__(self) -> int:
        return max(0, min(self.end, self.repeater.max_updates) - self.repeater.updates)
