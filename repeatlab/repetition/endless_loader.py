"""A loader read without end, from any position, in an order that a resume can replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from repeatlab.repetition.grouped import Grouped, groups
from repeatlab.repetition.random_states import (
    kept_process_states,
    parts_of,
    restore,
    restore_within,
    states_of,
    states_within,
)
from repeatlab.repetition.skipping import SkippingSampler, has_index_sampler

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
        self._anywhere = hasattr(loader, "iter_from")
        self._has_state = not self._anywhere and hasattr(loader, "load_state_dict")
        self._state: Any = None  # the loader's own, from before the last batch
        # A last group may be shorter.
        slack = max(0, self._size - 1)
        self._sampler = SkippingSampler(loader, slack) if has_index_sampler(loader) else None
        self._over_it: Iterable[Any] | None = None  # the loader with that sampler
        self._iterator: Iterator[Any] | None = None
        self._start: Any = None  # the random states that this pass began with
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
        self._iterator = self._over_it = None

    def state_dict(self, *, held: bool = False) -> dict[str, Any]:
        """Return the position; with `held`, the one before the batch taken last."""
        state = self._resumed or {
            "epoch": self.epoch,
            "position": self.position,
            "held": False,
            "passes": self._begun,
            "start": self._sampler.states if self._sampler else self._start,
            "now": {} if self._anywhere else states_within(self._loader),
            "own": self._state,
        }
        return state | {"position": state["position"] - 1, "held": True} if held else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._resumed, self._iterator = state, None

    def __getstate__(self) -> dict[str, Any]:
        """Return a copy's contents: it goes on from here by an iterator of its own."""
        return self.__dict__ | {
            "_resumed": self.state_dict(),
            "_iterator": None,
            "_over_it": None,
        }

    def _open(self) -> Iterator[Any]:
        """Begin the pass `epoch`, or go on in it from the resumed state."""
        resumed, self._resumed = self._resumed, None
        if resumed is None and not self._begun:
            self.epoch = self._own_epoch()
        for part in self._parts():
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        if resumed and resumed["start"]:
            return self._replay(resumed)
        if resumed:
            self._begun = resumed["passes"]
            restore_within(self._loader, resumed["now"])
        self._begun += 1
        if not self._sampler and not self._anywhere:
            self._start = states_of(self._loader)
        return self._read()

    def _read(self) -> Iterator[Any]:
        """Return an iterator of the loader's next pass."""
        if self._anywhere:
            source = self._loader.iter_from(self.position * (self._size or 1))
        elif self._sampler:
            if self._over_it is None:
                self._over_it = self._sampler.over_it()
            source = self._over_it
        else:
            source = self._loader if self._given else self._loader()
        iterator = islice(source, None)  # what iterates may be no iterable itself
        return groups(iterator, self._size) if self._size else iterator

    def _replay(self, resumed: dict[str, Any]) -> Iterator[Any]:
        """Return an iterator at a pass's position, in the order it was drawn in."""
        first, self._begun = not self._begun, resumed["passes"]
        start, held, now = resumed["start"], resumed["held"], resumed["now"]
        with kept_process_states():
            if self._sampler:
                size = self._size or 1
                self._sampler.replay = start, self.position * size, held * size, now
                iterator = self._read()
            else:
                if first and self._begun > 1 and self._workers_persist():
                    self._read()  # as then, the first iterator has drawn its workers' seed before
                restore(self._loader, start)
                self._start, self._state = start, resumed["own"]
                self._has_state = self._state is not None
                iterator = self._from_own_state(held) if self._has_state else self._skipped()
            if held:
                iterator = chain(list(islice(iterator, 1)), iterator)
        # Without workers the sampler does again, when its first index is asked for.
        restore_within(self._loader, now)
        return iterator

    def _skipped(self) -> Iterator[Any]:
        """Return an iterator at the position, up to which the pass is read again."""
        iterator = self._read()
        if sum(1 for _ in islice(iterator, self.position)) < self.position:
            raise ValueError(
                f"the loader ended before batch {self.position} of epoch {self.epoch}, where "
                "the saved state left off: resume with the loader it was saved with"
            )
        return iterator

    def _from_own_state(self, held: bool) -> Iterator[Any]:
        """Return an iterator that follows the batch taken last, or begins with it."""
        # Of one that is as it was made there is nothing to load; somebody else may have moved it.
        if self.position + held > 1 or self._begun > 1 or not _same(self._own_state(), self._state):
            self._loader.load_state_dict(self._state)
        iterator = self._read()
        last = list(islice(iterator, 1))
        if not last:  # a state from before the first batch may be the end of the pass before
            iterator = self._read()
            last = list(islice(iterator, 1))
        return chain(last, iterator) if held else iterator

    def _own_state(self) -> Any:
        """Return the loader's own state, where it has one after all."""
        try:
            return self._loader.state_dict()
        except (AttributeError, NotImplementedError):  # a wrapper of a loader without one
            self._has_state = False
            return None

    def _parts(self) -> list[Any]:
        return [self._loader] if self._anywhere else list(parts_of(self._loader).values())

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


def _same(state: Any, other: Any) -> bool:
    """Return whether two states are equal; where they do not say, as of tensors, they are not."""
    try:
        return bool(state == other)
    except (RuntimeError, ValueError):
        return False
