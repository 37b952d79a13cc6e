"""A loader read without end, from any position, in an order that a resume can replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch

_END = object()


class EndlessLoader:
    """Iterates `loader` again and again and knows where it is.

    Before every epoch it calls `set_epoch(epoch)` on the loader's samplers that have it, as
    distributed training needs. A loader with a method `iter_from(position)` is resumed through it;
    any other is resumed by replaying the epoch's order from the random state it began with, which
    reproduces a shuffling `DataLoader`. Augmentation drawn from the global generator while batches
    are made is not reproduced: draw it from epoch and index.

    Attributes:
        epoch: Index of the current pass over the loader.
        position: How many batches of this pass have been taken.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._rng: list[torch.Tensor] | None = None
        self.epoch = 0
        self.position = 0

    def next_batch(self) -> Any:
        """Return the next batch, beginning another pass where this one ends.

        Raises:
            ValueError: if a pass yields nothing.
        """
        while True:
            if self._iterator is None:
                self._iterator = self._open()
            for batch in self._iterator:  # the fastest way to take one
                self.position += 1
                return batch
            if self.position == 0:
                raise ValueError(
                    f"the loader yielded no batch in epoch {self.epoch}: it must hold at least one "
                    "and be re-iterable (a generator can be read only once)"
                )
            self.epoch, self.position = self.epoch + 1, 0
            self._iterator = self._rng = None

    def release(self) -> None:
        """Let go of the pass's iterator, and so of threads and processes that it may have.

        The next batch would come from a new one, at the same position.
        """
        self._iterator = None

    def state_dict(self, *, rewind: bool = False) -> dict[str, Any]:
        """Return the position; with `rewind`, the one before the batch taken last."""
        return {
            "epoch": self.epoch,
            "position": self.position - 1 if rewind else self.position,
            "rng": self._rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._rng, self._iterator = state["rng"], None

    def _open(self) -> Iterator[Any]:
        """Start the pass `epoch` at `position`."""
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        if hasattr(self._loader, "iter_from"):
            return self._loader.iter_from(self.position)
        if self._rng is None:
            self._rng = [torch.get_rng_state(), *(g.get_state() for g in self._generators())]
            return iter(self._loader)
        with torch.random.fork_rng(devices=()):
            return self._replay()

    def _replay(self) -> Iterator[Any]:
        global_state, *states = self._rng
        torch.set_rng_state(global_state)
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)
        iterator = iter(self._loader)
        if self.position == 0:
            # A sampler draws its order when its first index is asked for: that belongs in here.
            return chain(list(islice(iterator, 1)), iterator)
        for _ in range(self.position):
            if next(iterator, _END) is _END:
                raise ValueError(
                    f"the loader ended before batch {self.position} of epoch {self.epoch}, where "
                    "the saved state left off: resume with the loader it was saved with"
                )
        return iterator

    def _samplers(self) -> list[Any]:
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        candidates = (
            getattr(self._loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        )
        return _distinct(candidates)

    def _generators(self) -> list[torch.Generator]:
        owners = (self._loader, *self._samplers())
        generators = (getattr(owner, "generator", None) for owner in owners)
        return _distinct(g for g in generators if isinstance(g, torch.Generator))


def _distinct(objects: Iterable[Any]) -> list[Any]:
    return list({id(o): o for o in objects if o is not None}.values())
