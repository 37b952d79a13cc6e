"""Random numbers as a function of (seed, stream, index), so that arms share them.

Common random numbers: every arm of one seed starts from the same weights and sees the same k-th
fresh batch under the same augmentation, whatever it did in between. No generator is carried from
one draw to the next, so there is also nothing to checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Rows that are drawn at a time: a generator for each would cost more than a small update.
BLOCK = 1024


def derive(seed: int, stream: str, index: int = 0) -> int:
    """Return a 63-bit seed for draw `index` of the random `stream` of a run seeded with `seed`.

    Streams are independent: they are keyed by a cryptographic hash, so neighbouring seeds and
    indices share nothing.

    >>> derive(0, "order", 1) == derive(0, "order", 1)
    True
    >>> derive(0, "order", 1) == derive(0, "augment", 1)
    False
    """
    digest = blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """Return a CPU torch generator seeded with `derive(seed, stream, index)`.

    Always on the CPU: the same draws then reach every device.
    """
    import torch

    return torch.Generator().manual_seed(derive(seed, stream, index))


class EndlessDraws:
    """Row i of an endless table of draws, as a function of (seed, stream, i), made block by block.

    Args:
        seed: Of the run.
        stream: Which table this is.
        draw: Returns the rows of a block, given its generator and their numbers.
    """

    def __init__(
        self, seed: int, stream: str, draw: Callable[[torch.Generator, range], Sequence[Any]]
    ) -> None:
        self._seed, self._stream, self._draw = seed, stream, draw
        self._block, self._rows = -1, ()

    def __getitem__(self, index: int) -> Any:
        block, row = divmod(index, BLOCK)
        if block != self._block:
            self._block = block
            numbers = range(block * BLOCK, (block + 1) * BLOCK)
            self._rows = self._draw(generator(self._seed, self._stream, block), numbers)
        return self._rows[row]
