"""Labelled image datasets as tensors in memory, split into three parts.

All runs are tested on the same test images. They tune on the same validation images too, unless
asked to draw those by seed, so that conclusions are not of one split. A new dataset is one loader
function and one line in `DATASETS`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repeatlab.core.seeding import generator
from repeatlab.data import own_data, sources, stl10

SPLIT_SEED = 0  # of the split that all runs share


@dataclass(frozen=True)
class ImageSet:
    """Images and their classes.

    Attributes:
        images: uint8, (n, channels, height, width), 0 to 255.
        labels: int64, (n,), from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str | torch.device) -> ImageSet:
        """Return the set on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def subset(self, indices: np.ndarray) -> ImageSet:
        """Return the samples at `indices` (int64, (m,)), in that order."""
        chosen = torch.from_numpy(indices).to(self.labels.device)
        return ImageSet(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Splits:
    """One dataset, split.

    Attributes:
        name: The dataset's name in `DATASETS`; of one's own, its file and a digest of its content.
        train: What updates are made on.
        validation: What is tuned on.
        test: Read once, at the end.
        classes: Number of classes.
        mean: Mean of each channel over the train split, of pixels scaled to [0, 1].
        std: Standard deviation of the same pixels (divisor n).
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def evaluated(self, split: str) -> ImageSet:
        """Return what metrics are computed on.

        Args:
            split: "validation" or "test"; for "train" as many training samples as the validation
                split has, always the same.
        """
        if split != "train":
            return getattr(self, split)
        return self.train.subset(self.train_subset().numpy())

    def train_subset(self) -> Tensor:
        """Return the numbers of the training samples that `evaluated("train")` holds: int64."""
        return fixed_order(self.train)[: len(self.validation)]


def fixed_order(data: ImageSet) -> Tensor:
    """Return the numbers of all samples in a random order that is always the same: int64, (n,)."""
    return torch.randperm(len(data), generator=generator(0, "train subset"))


# A loader returns what may be trained on, what must not, and how many of the former validate.
Loader = Callable[[str | Path | None], tuple[ImageSet, ImageSet, int]]


def load_splits(
    name: str,
    *,
    device: str | torch.device = "cpu",
    validation: int | None = None,
    root: str | Path | None = None,
    split_seed: int = SPLIT_SEED,
) -> Splits:
    """Load a dataset into the memory of `device`.

    Args:
        name: A key of `DATASETS`, or the path of one's own data; see `data.own_data`.
        device: Where images and labels go.
        validation: Number of validation samples, taken class by class out of the training part;
            by default 5,000 (`mnist`, `cifar10`), 500 (`stl10`) or a fifth of all.
        root: The data directory; by default `$REPEATLAB_DATA`, else `~/.cache/repeatlab`.
        split_seed: Which of the training part validate; the test split is always the same.

    Raises:
        ValueError: `name` is unknown, or `validation` leaves a class out of a split.
        DataError: Files are missing, damaged or not as they must be.
    """
    if own_data.is_path(name):
        name, development, test, default_validation = _own(name, root)
    elif name in DATASETS:
        development, test, default_validation = DATASETS[name](root)
    else:
        known = ", ".join(repr(key) for key in sorted(DATASETS))
        raise ValueError(
            f"`dataset` must be one of {known}, or the path of a folder or .npz file; not {name!r}."
        )
    count = default_validation if validation is None else validation
    classes = int(development.labels.max()) + 1
    if not classes <= count <= len(development) - classes:
        raise ValueError(
            f"`validation` must leave every class of {name} in both splits: from {classes} to"
            f" {len(development) - classes} samples; not {count}."
        )
    train, held_out = _stratified_split(development, count, split_seed)
    mean, std = _moments(train.images)
    return Splits(name, train.to(device), held_out.to(device), test.to(device), classes, mean, std)


def _stratified_split(
    data: ImageSet, held_out: int, seed: int = SPLIT_SEED
) -> tuple[ImageSet, ImageSet]:
    """Split off `held_out` samples, each class in proportion; the same ones for the same seed."""
    from sklearn.model_selection import train_test_split

    kept, taken = train_test_split(
        np.arange(len(data)), test_size=held_out, stratify=data.labels, random_state=seed % 2**32
    )
    return data.subset(np.sort(kept)), data.subset(np.sort(taken))


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of `images` / 255, in float64.

    From counts of the 256 values, which are exact: no rounding that depends on the summation
    order, and no float copy of the whole dataset.
    """
    value = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256)
        share = counts.to(torch.float64) / channel.numel()
        mean.append(float(share @ value))
        std.append(float((share @ (value - mean[-1]) ** 2).sqrt()))
    return tuple(mean), tuple(std)


@cache  # small, and most of what building a task takes: a study builds hundreds
def _digits(root: str | Path | None) -> tuple[ImageSet, ImageSet, int]:
    """1,797 digits of 8 x 8 pixels, shipped with scikit-learn; 60 % train, 20 %, 20 %."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Sixteen grey levels stretched to the usual range, so that one normalisation serves all.
    pixels = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    whole = ImageSet(
        torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(bunch.target.astype(np.int64))
    )
    return _fifths(whole)


def _fifths(whole: ImageSet) -> tuple[ImageSet, ImageSet, int]:
    fifth = round(len(whole) / 5)
    development, test = _stratified_split(whole, fifth)
    return development, test, fifth


def _own(dataset: str, root: str | Path | None) -> tuple[str, ImageSet, ImageSet, int]:
    name, train, test = own_data.load(dataset, root)
    if test is None:
        return name, *_fifths(ImageSet(*train))
    return (
        name,
        ImageSet(*train),
        ImageSet(*test),
        max(round(len(train[1]) / 5), int(train[1].max()) + 1),
    )


def _mnist(root: str | Path | None) -> tuple[ImageSet, ImageSet, int]:
    """60,000 + 10,000 digits of 28 x 28 pixels."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    folder = sources.prepare(sources.MNIST, root) / "MNIST" / "raw"

    def part(prefix: str) -> ImageSet:
        images = read_image_file(str(folder / f"{prefix}-images-idx3-ubyte"))
        return ImageSet(
            images.unsqueeze(1), read_label_file(str(folder / f"{prefix}-labels-idx1-ubyte"))
        )

    return part("train"), part("t10k"), 5_000


def _cifar10(root: str | Path | None) -> tuple[ImageSet, ImageSet, int]:
    """50,000 + 10,000 colour images of 32 x 32 pixels."""
    folder = sources.prepare(sources.CIFAR10, root) / "cifar-10-batches-py"

    def part(*files: str) -> ImageSet:
        # Pickles run code: these files have been held to their checksums.
        batches = [pickle.loads((folder / file).read_bytes(), encoding="latin1") for file in files]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch["labels"] for batch in batches]).astype(np.int64)
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))

    return part(*(f"data_batch_{i}" for i in range(1, 6))), part("test_batch"), 5_000


def _stl10(root: str | Path | None) -> tuple[ImageSet, ImageSet, int]:
    """5,000 + 8,000 colour images of 96 x 96 pixels; see `data.stl10` for those without labels."""
    return ImageSet(*stl10.labelled("train", root)), ImageSet(*stl10.labelled("test", root)), 500


DATASETS: dict[str, Loader] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "stl10": _stl10,
}
