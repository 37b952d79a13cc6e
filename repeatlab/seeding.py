"""Random numbers as a function of (seed, stream, index), so that arms share them.

Common random numbers: every arm of one seed starts from the same weights and sees the same k-th
fresh batch under the same augmentation, whatever it did in between. No generator is carried from
one draw to the next, so there is also nothing to checkpoint.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
