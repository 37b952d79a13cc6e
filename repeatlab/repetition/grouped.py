"""Several batches as one, for gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from repeatlab.repetition.mappings import as_count


class Grouped:
    """See `grouped`.

    Attributes:
        loader: The loader of the single batches.
        size: How many make a group.
    """

    def __init__(self, loader: Iterable[Any], size: int) -> None:
        self.loader, self.size = loader, as_count("size", size)

    def __iter__(self) -> Iterator[list[Any]]:
        return groups(iter(self.loader), self.size)

    def __len__(self) -> int:
        return -(-len(self.loader) // self.size)


def grouped(loader: Iterable[Any], size: int) -> Grouped:
    """Return a loader whose batch is a list of `size` batches; an epoch's last may be shorter.

    An update on it accumulates the gradients of its parts, and repeating it repeats them all: T
    counts optimizer steps.

    >>> from repeatlab.repetition.repeater import BatchRepeater
    >>> repeater = BatchRepeater(grouped(range(5), 2), repeats=2, max_updates=4)
    >>> for group in repeater:
    ...     losses = [float(micro_batch) for micro_batch in group]  # backward here, for each
    ...     repeater.report(sum(losses) / len(losses))  # then step, once
    ...     print(group)
    [0, 1]
    [0, 1]
    [2, 3]
    [2, 3]

    Raises:
        ValueError: `size` below 1.
    """
    return Grouped(loader, size)


def groups(iterator: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` items; the last may be shorter."""
    while group := list(islice(iterator, size)):
        yield group
