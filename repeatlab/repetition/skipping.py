"""A DataLoader that begins in the middle of a pass without loading what came before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from repeatlab.repetition.random_states import (
    States,
    kept_process_states,
    process_states,
    restore_process,
    restore_within,
    states_within,
)

_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


def has_index_sampler(loader: Any) -> bool:
    """Whether this is torch's own DataLoader over a data set that is asked for indices."""
    return type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)


class Skipping:
    """The index sampler of a DataLoader; remembers from which random states a pass was drawn.

    A sampler may draw its order where it is iterated or where its first index is asked for, and the
    DataLoader itself draws a seed for its workers somewhere between. So both states are kept.

    Args:
        loader: The DataLoader.
        slack: How many batches fewer than those to leave out there may be.

    Attributes:
        make: Returns a DataLoader as the one given, over this sampler.
        states: Those of the pass under way; None before its first index.
        replay: For the next pass: its states, how many batches to leave out, how many after them
            were drawn from those states too, and the states within the loader after that.
    """

    def __init__(self, loader: DataLoader, slack: int = 0) -> None:
        self._given, self._slack = loader, slack
        self.states: list[States] | None = None
        self.replay: tuple[list[States], int, int, States] | None = None
        batched = loader.batch_sampler is not None
        self._sampler: Iterable[Any] = loader.batch_sampler if batched else loader.sampler
        parts = self._sampler, getattr(self._sampler, "sampler", None)
        modules = {type(part).__module__.partition(".")[0] for part in parts if part is not None}
        self._of_torch = modules == {"torch"}  # whose samplers draw from torch alone
        options = {name: getattr(loader, name) for name in _OPTIONS if hasattr(loader, name)}
        options |= {"batch_sampler": self} if batched else {"sampler": self, "batch_size": None}
        # Held by who iterates it, not here: a cycle would keep its workers alive.
        self.make: Callable[[], DataLoader] = partial(DataLoader, loader.dataset, **options)

    def __iter__(self) -> Iterator[Any]:
        if self.replay is not None:
            return self._rest()
        return self._watched(self._states(), iter(self._sampler))

    def _watched(self, drawn: States, indices: Iterator[Any]) -> Iterator[Any]:
        self.states = [drawn, self._states()]
        yield from indices

    def _rest(self) -> Iterator[Any]:
        """Yield what is left of a pass after the batches to leave out."""
        (self.states, skipped, drawn_too, now), self.replay = self.replay, None
        drawn, asked = self.states
        with kept_process_states():
            self._restore(drawn)
            indices = iter(self._sampler)
            self._restore(asked)
            if sum(1 for _ in islice(indices, skipped)) < skipped - self._slack:
                raise ValueError(
                    f"the sampler ended before batch {skipped}, where the saved state left off: "
                    "resume with the loader it was saved with"
                )
            first = list(islice(indices, drawn_too))
            restore_within(self._given, now)
        yield from first
        yield from indices

    def _states(self) -> States:
        process = process_states(of_torch_alone=self._of_torch)
        return {"process": process, "within": states_within(self._given)}

    def _restore(self, states: States) -> None:
        restore_process(states["process"])
        restore_within(self._given, states["within"])
