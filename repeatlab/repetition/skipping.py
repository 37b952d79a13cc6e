"""A DataLoader that begins in the middle of a pass without loading what came before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from repeatlab.repetition.random_states import (
    States,
    kept_process_states,
    restore,
    restore_within,
    states_of,
)


def has_index_sampler(loader: Any) -> bool:
    """Whether this is torch's own DataLoader over a data set that is asked for indices."""
    return type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)


class SkippingSampler:
    """The index sampler of a DataLoader; remembers from which random states a pass was drawn.

    A sampler may draw its order where it is iterated or where its first index is asked for, and the
    DataLoader itself draws a seed for its workers somewhere between. So both states are kept.

    Args:
        loader: The DataLoader.
        slack: How many batches fewer than those to leave out there may be.

    Attributes:
        states: Those of the pass under way; None before its first index.
        replay: For the next pass: its states, how many batches to leave out, how many after them
            were drawn from those states too, and the states within the loader after that.
    """

    def __init__(self, loader: DataLoader, slack: int = 0) -> None:
        self._loader, self._slack = loader, slack
        self._place = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self.states: list[States] | None = None
        self.replay: tuple[list[States], int, int, States] | None = None

    def over_it(self) -> DataLoader:
        """Return a loader as the one given, over this sampler."""
        # To be held by who iterates it, not here: a cycle would keep its workers alive.
        loader = copy.copy(self._loader)
        vars(loader)[self._place] = self  # a DataLoader refuses to have it assigned
        return loader

    def __iter__(self) -> Iterator[Any]:
        sampler = getattr(self._loader, self._place)
        if self.replay is not None:
            return self._rest(sampler)
        return self._watched(states_of(self._loader), iter(sampler))

    def _watched(self, drawn: States, indices: Iterator[Any]) -> Iterator[Any]:
        self.states = [drawn, states_of(self._loader)]
        yield from indices

    def _rest(self, sampler: Any) -> Iterator[Any]:
        """Yield what is left of a pass after the batches to leave out."""
        (self.states, skipped, drawn_too, now), self.replay = self.replay, None
        drawn, asked = self.states
        with kept_process_states():
            restore(self._loader, drawn)
            indices = iter(sampler)
            restore(self._loader, asked)
            if sum(1 for _ in islice(indices, skipped)) < skipped - self._slack:
                raise ValueError(
                    f"the sampler ended before batch {skipped}, where the saved state left off: "
                    "resume with the loader it was saved with"
                )
            first = list(islice(indices, drawn_too))
            restore_within(self._loader, now)
        yield from first
        yield from indices
