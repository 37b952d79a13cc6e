"""Semi-supervised data: which images keep their label, and the order of those without."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repeatlab.core.seeding import generator
from repeatlab.data.datasets import ImageSet


def labelled_subset(data: ImageSet, labels: int | None, split_seed: int) -> ImageSet:
    """Return `labels` of the samples, each class in proportion; the same ones for a `split_seed`.

    None returns all of them.

    Raises:
        ValueError: there are not that many, or too few for every class to have one.
    """
    from sklearn.model_selection import train_test_split

    if labels is None or labels == len(data):
        return data
    classes = len(data.labels.unique())
    if not classes <= labels <= len(data) - classes:
        raise ValueError(
            f"`labels` must be from {classes}, one of every class, to {len(data) - classes}, or"
            f" null for all {len(data)}; not {labels}."
        )
    chosen, _ = train_test_split(
        np.arange(len(data)),
        train_size=labels,
        stratify=data.labels.cpu(),
        random_state=split_seed,
    )
    return data.subset(np.sort(chosen))


class EpochOrder:
    """An endless sequence of indices, epoch after epoch in new orders, in pieces of one size.

    Unlike `TrainStream` it leaves none out: a piece reaches over the end of an epoch.

    Args:
        total: Number of samples.
        size: Of a piece; may be 0, or above `total`.
        seed: The run's seed.
        name: Of the random stream.
    """

    def __init__(self, total: int, size: int, *, seed: int, name: str) -> None:
        self.total, self.size, self.seed, self.name = total, size, seed, name
        self._epoch: int | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    def piece(self, index: int) -> Tensor:
        """Return the piece number `index`, from 0: int64, (size,), on the CPU."""
        return self.between(index * self.size, (index + 1) * self.size)

    def between(self, position: int, end: int) -> Tensor:
        """Return what the sequence holds from `position` to before `end`: int64, on the CPU."""
        pieces = [self._order[:0]]
        while position < end:
            epoch, place = divmod(position, self.total)
            if epoch != self._epoch:
                draws = generator(self.seed, self.name, epoch)
                self._order, self._epoch = torch.randperm(self.total, generator=draws), epoch
            pieces.append(self._order[place : place + end - position])
            position += len(pieces[-1])
        return torch.cat(pieces)
