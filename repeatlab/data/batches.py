"""Minibatches as a function of (seed, index): every arm of a seed sees the same k-th one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repeatlab.core.seeding import generator
from repeatlab.data.augment import crop_flip, crop_flip_draws, normalize, random_crop_flip
from repeatlab.data.datasets import ImageSet


class Batch(NamedTuple):
    """One minibatch of b samples, on the device of the dataset.

    Attributes:
        images: float32, (b, channels, height, width), augmented and normalised.
        labels: int64, (b,).
        indices: int64, (b,): which samples of the set these are.
        index: Which fresh batch this is, from 0.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    index: int


class TrainStream:
    """The endless sequence of fresh minibatches of one run.

    Every epoch visits the samples in a new random order; the rest that does not fill a batch is
    left out of that epoch, as with `DataLoader(shuffle=True, drop_last=True)`.

    Args:
        data: The train split; batches are made on its device.
        batch_size: Samples in a batch, at most `len(data)`.
        seed: The run's seed.
        mean: One value for each channel, of pixels scaled to [0, 1].
        std: One value for each channel, of pixels scaled to [0, 1].
        crop_padding: Zero pixels on each side before a random crop; 0 does not crop.
        flip: Whether to mirror each image at even odds.
        fill: Whether samples that are fewer than a batch are repeated to fill it: an epoch then
            visits each of them as often as it takes.

    Raises:
        ValueError: `batch_size` is below 1, or above the number of samples without `fill`.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 0,
        flip: bool = False,
        fill: bool = False,
    ) -> None:
        self._places = len(data) * (ceil(batch_size / len(data)) if fill else 1)
        if not 1 <= batch_size <= self._places:
            raise ValueError(
                f"`batch_size` must be from 1 to the {len(data)} samples of the train split;"
                f" not {batch_size}."
            )
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.crop_padding = crop_padding
        self.flip = flip
        # On the device once: a transfer in every batch would make the host wait.
        self._mean = torch.tensor(mean, dtype=torch.float32, device=data.images.device)
        self._std = torch.tensor(std, dtype=torch.float32, device=data.images.device)
        self._epoch: int | None = None
        self._order = torch.empty(0)

    @property
    def batches_per_epoch(self) -> int:
        """Number of full batches in one pass over the data."""
        return self._places // self.batch_size

    def fresh_batch(self, index: int, view: int = 0) -> Batch:
        """Return the fresh batch number `index`, from 0.

        Args:
            index: Any, in any order: nothing depends on what was asked for before.
            view: 0 for the batch's own augmentation; other numbers show the same samples under
                other draws.
        """
        return self.batch_of(self.indices(index), index, view)

    def fresh_batches(self, first: int, count: int) -> list[Batch]:
        """Return the fresh batches from number `first` on, made together: cheaper if small.

        Equal to `fresh_batch` of each; their images are views of one tensor.
        """
        numbers = range(first, first + count)
        indices = torch.cat([self.indices(number) for number in numbers])
        images = self.data.images.index_select(0, indices)
        options = {"padding": self.crop_padding, "flip": self.flip}
        if any(options.values()):
            draws = [generator(self.seed, "augment", number) for number in numbers]
            drawn = [crop_flip_draws(self.batch_size, draw, **options) for draw in draws]
            top, left, mirrored = torch.cat(drawn, 1).to(images.device, non_blocking=True)
            images = crop_flip(images, top, left, mirrored, padding=self.crop_padding)
        columns = (
            normalize(images, self._mean, self._std),
            self.data.labels.index_select(0, indices),
            indices,
        )
        parts = zip(*(column.split(self.batch_size) for column in columns), numbers, strict=True)
        return [Batch(*part) for part in parts]

    def indices(self, index: int) -> Tensor:
        """Return which samples the fresh batch number `index` holds: int64, (batch_size,)."""
        if index < 0:
            raise ValueError(f"`index` of a fresh batch counts from 0; not {index}.")
        epoch, place = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self._places, generator=generator(self.seed, "order", epoch))
            self._order = (order % len(self.data)).to(self.data.labels.device, non_blocking=True)
            self._epoch = epoch
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def batch_of(self, indices: Tensor, index: int, view: int = 0) -> Batch:
        """Return a batch of samples that the caller has chosen.

        Args:
            indices: int64, (b,), into the data, of any length and with repeats if so wished.
            index: The fresh batch this is; with `view` it decides the augmentation.
            view: As in `fresh_batch`.
        """
        indices = indices.to(self.data.labels.device)
        # Not images[indices]: on the CPU index_select copies whole images, 20 times faster.
        images = self.data.images.index_select(0, indices)
        if self.crop_padding or self.flip:
            draws = generator(self.seed, f"augment/{view}" if view else "augment", index)
            images = random_crop_flip(images, draws, padding=self.crop_padding, flip=self.flip)
        return Batch(
            normalize(images, self._mean, self._std),
            self.data.labels.index_select(0, indices),
            indices,
            index,
        )


def gather(batches: Sequence[Any], picks: Tensor, index: int) -> Any:
    """Return the samples `picks` of several batches laid end to end, as fresh batch `index`.

    Args:
        batches: Named tuples of tensors, (b, ...) each, with the index last.
        picks: int64, (m,), from 0 to the samples of all `batches`, with repeats if so wished.
        index: The fresh batch that they make up.
    """
    columns = map(torch.cat, zip(*(batch[:-1] for batch in batches), strict=True))
    picked = (column.index_select(0, picks.to(column.device)) for column in columns)
    return type(batches[0])(*picked, index)


def iter_batches(
    data: ImageSet, batch_size: int, mean: Sequence[float], std: Sequence[float]
) -> Iterator[Batch]:
    """Yield all of `data` once, in order, normalised but not augmented.

    The last batch holds what is left. `batch_size` only bounds memory: use what fits.
    """
    everything = torch.arange(len(data), device=data.labels.device)
    for index, indices in enumerate(everything.split(batch_size)):
        # The samples lie side by side: a slice, not a gather.
        images = data.images[index * batch_size : (index + 1) * batch_size]
        labels = data.labels[index * batch_size : (index + 1) * batch_size]
        yield Batch(normalize(images, mean, std), labels, indices, index)
