"""A loader read without end, from any position, in an order that a resume can replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from repeatlab.repetition.grouped import Grouped, groups
from repeatlab.repetition.random_states import (
    States,
    kept_process_states,
    packed,
    parts_of,
    process_states,
    restore_process,
    restore_within,
    states_within,
)
from repeatlab.repetition.skipping import Skipping, has_index_sampler

_END = object()
# Where iterators come from that cannot begin again. One of a class of the user's own may.
_READ_ONCE = ("builtins", "itertools", "_io", "torch.utils.data.dataloader")


class EndlessLoader:
    """Iterates `loader` again and again and knows where it is.

    Before every epoch it calls `set_epoch(epoch)` on the loader and whatever in it has that method:
    samplers, data set, loaders within. A resume goes to a position by the best way that there is:

    | the loader                                | how                                            |
    |-------------------------------------------|------------------------------------------------|
    | has `iter_from(position)`                 | that                                           |
    | has `state_dict` and `load_state_dict`    | by its state before the last batch             |
    | a `DataLoader` with an index sampler      | the sampler leaves out indices; nothing loaded |
    | any other                                 | the pass is read again up to there             |

    The last two repeat the pass's order from the random states it began with, those of the process
    and those of generators that the loader's parts hold. A batch that is made again has new
    augmentation where that is drawn from a generator of the process: draw it from epoch and index.

    Attributes:
        epoch: Index of the current pass over the loader; the first is the one that the loader's
            own parts are set to, 0 if none says.
        position: How many batches of this pass have been taken.
    """

    def __init__(self, loader: Iterable[Any] | Callable[[], Iterator[Any]]) -> None:
        self._size = 0  # of a group; 0 where batches are not grouped
        if isinstance(loader, Grouped):
            loader, self._size = loader.loader, loader.size
        kind = type(loader)
        if isinstance(loader, Iterator) and kind.__module__ in _READ_ONCE:
            raise ValueError(
                f"the loader must be an iterable that can be read again, not a {kind.__name__}: "
                "give what it is made of, or a function that makes it anew, for example "
                "lambda: zip(images, labels)"
            )
        iterable = hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
        if not (iterable or callable(loader) or hasattr(loader, "iter_from")):
            raise ValueError(f"the loader must be an iterable of batches, not {loader!r}")
        self._loader = loader
        self._given = iterable  # else it is a function that gives what to read
        # What holds its batches in order draws nothing, and so has no states to keep.
        self._draws = kind not in (list, tuple, range, str, np.ndarray, torch.Tensor)
        self._has_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._has_state &= not hasattr(loader, "iter_from")
        self._state: Any = None  # the loader's own, from before the last batch
        self._iterator: Iterator[Any] | None = None
        self._skipping: Skipping | None = None
        self._over_it: Iterable[Any] | None = None  # the DataLoader with that sampler
        self._start: States | None = None  # the random states that this pass began with
        self._resumed: dict[str, Any] | None = None  # a state that the next batch goes on from
        self._begun = 0  # passes, and those before a resume
        self.position = 0
        self.epoch = self._own_epoch()

    def next_batch(self) -> Any:
        """Return the next batch, beginning another pass where this one ends.

        Raises:
            ValueError: if a pass yields nothing.
        """
        while True:
            if self._iterator is None:
                self._iterator = self._open()
            if self._has_state:
                self._state = self._own_state()
            batch = next(self._iterator, _END)
            if batch is not _END:
                self.position += 1
                return batch
            if self.position == 0:
                raise ValueError(
                    f"the loader yielded no batch in epoch {self.epoch}: it must hold at least one "
                    "and be re-iterable"
                )
            self.epoch, self.position = self.epoch + 1, 0
            self._iterator = self._start = None

    def release(self) -> None:
        """Let go of the pass's iterator, and so of threads and processes that it may have.

        The next batch would come from a new one, at the same position.
        """
        self._resumed = self.state_dict()
        self._iterator = self._skipping = self._over_it = None

    def state_dict(self, *, held: bool = False) -> dict[str, Any]:
        """Return the position; with `held`, the one before the batch taken last."""
        state = self._resumed
        if state is None:
            drawn = self._draws and not hasattr(self._loader, "iter_from")
            state = {
                "epoch": self.epoch,
                "position": self.position,
                "held": False,
                "passes": self._begun,
                "start": packed(self._skipping.states if self._skipping else self._start),
                "now": packed(states_within(self._loader)) if drawn else {},
                "own": self._state,
            }
        return state | {"position": state["position"] - 1, "held": True} if held else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._resumed, self._iterator = state, None

    def __getstate__(self) -> dict[str, Any]:
        """Return a copy's contents: it goes on from here by an iterator of its own."""
        dropped = {"_resumed": self.state_dict(), "_iterator": None}
        dropped |= {"_skipping": None, "_over_it": None}
        return self.__dict__ | dropped

    def _open(self) -> Iterator[Any]:
        """Begin the pass `epoch`, or go on in it from the resumed state."""
        resumed, self._resumed = self._resumed, None
        if resumed is None and not self._begun:
            self.epoch = self._own_epoch()
        for part in self._parts():
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        if hasattr(self._loader, "iter_from"):
            self._begun += 1
            return self._grouped(self._loader.iter_from(self.position * (self._size or 1)))
        if resumed is None or resumed["start"] is None:
            if resumed is not None:
                self._begun = resumed["passes"]
                restore_within(self._loader, resumed["now"])
            return self._grouped(self._begin())
        with kept_process_states():
            iterator = self._replay(resumed)
            if resumed["held"]:
                iterator = chain(list(islice(iterator, 1)), iterator)
        # Without workers the sampler does, when its first index is asked for.
        if self._skipping is None or self._loader.num_workers or resumed["held"]:
            restore_within(self._loader, resumed["now"])
        return iterator

    def _begin(self) -> Iterator[Any]:
        self._begun += 1
        if has_index_sampler(self._loader):
            self._prepare_skipping()
            return iter(self._over_it)
        self._start = {}
        if self._draws:
            self._start = {"process": process_states(), "within": states_within(self._loader)}
        return self._read()

    def _read(self) -> Iterator[Any]:
        # What iterates may be no iterable itself.
        return islice(self._loader if self._given else self._loader(), None)

    def _replay(self, resumed: dict[str, Any]) -> Iterator[Any]:
        """Return an iterator at a pass's position, in the order it was drawn in."""
        first, self._begun = not self._begun, resumed["passes"]
        self._start, position = resumed["start"], self.position
        if has_index_sampler(self._loader):
            self._prepare_skipping()
            size = self._size or 1
            held = size * resumed["held"]
            self._skipping.replay = self._start, position * size, held, resumed["now"]
            return self._grouped(iter(self._over_it))
        if first and self._begun > 1 and self._workers_persist():
            self._read()  # as then, the first iterator has drawn its workers' seed before
        if self._draws:
            restore_process(self._start["process"])
            restore_within(self._loader, self._start["within"])
        self._state = resumed["own"]
        self._has_state = self._state is not None
        if self._has_state:
            return self._from_own_state(position + resumed["held"], resumed["held"])
        iterator = self._grouped(self._read())
        if sum(1 for _ in islice(iterator, position)) < position:
            raise ValueError(
                f"the loader ended before batch {self.position} of epoch {self.epoch}, where "
                "the saved state left off: resume with the loader it was saved with"
            )
        return iterator

    def _from_own_state(self, taken: int, held: bool) -> Iterator[Any]:
        """Return an iterator that follows batch number `taken` of a pass, or begins with it."""
        if taken > 1 or self._begun > 1:  # else the loader is as it was made
            self._loader.load_state_dict(self._state)
        iterator = self._grouped(self._read())
        last = list(islice(iterator, 1))
        if not last:  # a state from before the first batch may be the end of the pass before
            iterator = self._grouped(self._read())
            last = list(islice(iterator, 1))
        return chain(last, iterator) if held else iterator

    def _prepare_skipping(self) -> None:
        if self._skipping is None:
            # A last group may be shorter.
            self._skipping = Skipping(self._loader, slack=max(0, self._size - 1))
            self._over_it = self._skipping.make()

    def _grouped(self, iterator: Iterator[Any]) -> Iterator[Any]:
        return groups(iterator, self._size) if self._size else iterator

    def _own_state(self) -> Any:
        """Return the loader's own state, where it has one after all."""
        try:
            return self._loader.state_dict()
        except (AttributeError, NotImplementedError):  # a wrapper of a loader without one
            self._has_state = False
            return None

    def _parts(self) -> list[Any]:
        inner = self._draws and not hasattr(self._loader, "iter_from")
        return list(parts_of(self._loader).values()) if inner else [self._loader]

    def _own_epoch(self) -> int:
        """Return the epoch that the loader's own parts are set to."""
        parts = (part for part in self._parts() if hasattr(part, "set_epoch"))
        epochs = (getattr(part, "epoch", None) for part in parts)
        return max((epoch for epoch in epochs if type(epoch) is int), default=0)

    def _workers_persist(self) -> bool:
        return any(
            getattr(part, "persistent_workers", False) and getattr(part, "num_workers", 0)
            for part in self._parts()
        )
