"""Datasets as tensors in memory, and minibatches that are a function of (seed, index)."""

from repeatlab import require_lab

require_lab()

from repeatlab.data.batches import Batch, TrainStream, gather, iter_batches
from repeatlab.data.datasets import DATASETS, ImageSet, Splits, load_splits
from repeatlab.data.sources import DataError

__all__ = [
    "DATASETS",
    "Batch",
    "DataError",
    "ImageSet",
    "Splits",
    "TrainStream",
    "gather",
    "iter_batches",
    "load_splits",
]
