"""Data pipeline: batches from memory against torchvision's dataset, transforms and DataLoader.

Inside the clock: from nothing to `BATCHES` augmented, normalised float32 minibatches of 64 on the
CPU, one thread and no worker processes on either side, the epoch's shuffle included. Outside:
reading the files. Both sides run in turn in one process; the figure is the median of the rounds'
ratios, as the seconds of one machine say nothing about another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from repeatlab.data import TrainStream, load_splits
from repeatlab.data.sources import DIRECTORY_VARIABLE

BATCH_SIZE = 64
BATCHES = 40
ROUNDS = 9


def data_root(marker: str) -> Path:
    root = os.environ.get(DIRECTORY_VARIABLE)
    if not root or not (Path(root) / marker).exists():
        pytest.skip(f"set {DIRECTORY_VARIABLE} to a directory that holds {marker}")
    return Path(root)


def seconds(make: Callable[[], Iterator]) -> float:
    """Return the time for the first `BATCHES` batches of `make()`."""
    start = perf_counter()
    for _ in islice(make(), BATCHES):
        pass
    return perf_counter() - start


def compare(name: str, ours: Callable, theirs: Callable, benchmark, capsys) -> None:
    """Run both in turn and report how many times faster `ours` is."""
    (images, labels), batch = next(theirs()), next(ours())
    assert batch.images.shape == images.shape
    assert batch.images.dtype == images.dtype
    assert batch.labels.shape == labels.shape

    seconds(ours), seconds(theirs)  # warm up
    ratios, rates = [], []
    for _ in range(ROUNDS):
        slow, fast = seconds(theirs), seconds(ours)
        ratios.append(slow / fast)
        rates.append((BATCHES * BATCH_SIZE / slow, BATCHES * BATCH_SIZE / fast))
    benchmark.pedantic(seconds, args=(ours,), rounds=ROUNDS)
    benchmark.extra_info.update(ratio=median(ratios), ratios=ratios, rounds=ROUNDS)
    slow, fast = (median(side) / 1000 for side in zip(*rates, strict=True))
    with capsys.disabled():
        print(
            f"\n{name:8s} torchvision {slow:6.1f} k images/s   in memory {fast:6.1f} k images/s"
            f"   ratio {median(ratios):5.1f} ({min(ratios):.1f} to {max(ratios):.1f},"
            f" {ROUNDS} rounds)"
        )


def fresh_batches(splits, **augmentation) -> Callable[[], Iterator]:
    def make() -> Iterator:
        stream = TrainStream(
            splits.train,
            batch_size=BATCH_SIZE,
            seed=0,
            mean=splits.mean,
            std=splits.std,
            **augmentation,
        )
        return map(stream.fresh_batch, range(BATCHES))

    return make


def test_cifar10(benchmark, capsys):
    root = data_root("cifar-10-batches-py")
    splits = load_splits("cifar10", root=root)
    steps = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(splits.mean, splits.std),
    ]
    data = datasets.CIFAR10(root, train=True, transform=transforms.Compose(steps))
    loader = DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True)
    ours = fresh_batches(splits, crop_padding=4, flip=True)
    compare("cifar10", ours, lambda: iter(loader), benchmark, capsys)


def test_mnist(benchmark, capsys):
    root = data_root("MNIST/raw")
    splits = load_splits("mnist", root=root)
    steps = [transforms.ToTensor(), transforms.Normalize(splits.mean, splits.std)]
    data = datasets.MNIST(root, train=True, transform=transforms.Compose(steps))
    loader = DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True)
    compare("mnist", fresh_batches(splits), lambda: iter(loader), benchmark, capsys)
