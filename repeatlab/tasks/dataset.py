"""What the configurations, and the batches, of all tasks on a data set share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from repeatlab.core.schema import ConfigError, did_you_mean
from repeatlab.core.seeding import derive
from repeatlab.data import DATASETS, ImageSet, Splits, TrainStream, load_splits
from repeatlab.data.own_data import is_path
from repeatlab.data.unlabelled import labelled_subset
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.learner import LearningTask

# Zero pixels around the random crop, and whether to mirror: what the field uses for each dataset.
AUGMENTATION = {
    "digits": (1, False),
    "mnist": (2, False),
    "cifar10": (4, True),
    "stl10": (12, True),
}


class DatasetTaskConfig(TaskConfig):
    """A task on one of `repeatlab.data.DATASETS`, by default the embedded one, or on own data."""

    dataset: str = "digits"
    """A name, or the path of a folder of images by class or an .npz file; see `data.own_data`."""
    split: Literal["fixed", "by_seed"] = "fixed"
    """Which images validate: the same in all runs, or others for each seed, as all its arms have
    them; the test split is always the same."""

    def splits(self, seed: int, device: str | torch.device = "cpu") -> Splits:
        """Return the data set as a run with this seed of its streams sees it."""
        if self.split == "fixed":
            return load_splits(self.dataset, device=device)
        return load_splits(self.dataset, device=device, split_seed=derive(seed, "split"))

    def prepare(self) -> None:
        self.check_sizes(load_splits(self.dataset))

    def check_sizes(self, data: Splits) -> None:
        """See whether the sizes fit the dataset, which is `data`; part of `prepare`.

        Raises:
            ConfigError: one does not; the field, and what would be right.
        """
        check_batch_size("batch_size", self.batch_size, len(data.train), self.dataset)

    def refusals(self) -> dict[str, str]:
        refused = {
            "fresh_samples": "on a data set N fresh batches in place of N visits are standard "
            "training: use `{}`"
        }
        if self.split == "by_seed":
            refused["rho_loss"] = (
                "with split: by_seed its holdout models, whose seeds are others, "
                "would see the run's validation images"
            )
        return refused

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str) -> str:
        return known_dataset(value)


def known_dataset(name: str, known: Collection[str] = DATASETS) -> str:
    """Return the name of a dataset if it can be one of `known`, or a path, which `prepare` reads.

    Raises:
        ValueError: it cannot.
    """
    if name not in known and not is_path(name):
        hint = did_you_mean(name, known)
        raise ValueError(f"unknown dataset {name!r}; {hint}; own data by a path: ./{name}")
    return name


class DatasetTask(LearningTask):
    """Data and batches of a task on a data set; see `repeatlab.tasks.Task` for the methods.

    A subclass sets `stream` and what is trained.

    Attributes:
        data: The data set, on the device.
        stream: The fresh batches.
    """

    stream: TrainStream

    def __init__(self, config: Any, *, seed: int, device: str, data: Splits | None = None) -> None:
        """Make the task; `data` is its data set on the device, where others have loaded it."""
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.data = data or config.splits(seed, device)
        self.forward_samples = self.backward_samples = config.batch_size

    @property
    def batch_size(self) -> int:
        return self.stream.batch_size

    def make_batch(self, indices: Tensor, index: int, visit: int = 0) -> Any:
        """Return the samples `indices`, int64, (b,), as fresh batch `index` looks at its visit."""
        return self.stream.batch_of(indices, index, view=visit)

    def fresh_batch(self, index: int) -> Any:
        return self.make_batch(self.stream.indices(index), index)

    def refresh(self, batch: Any, visit: int) -> Any:
        return self.make_batch(batch.indices, batch.index, visit)

    def population(self, index: int) -> range:
        return range(len(self.stream.data))

    def batch_of(self, indices: Tensor, index: int) -> Any:
        return self.make_batch(indices, index)


def make_stream(
    train: ImageSet,
    data: Splits,
    *,
    batch_size: int,
    seed: int,
    augment: bool = True,
    fill: bool = False,
) -> TrainStream:
    """Return the fresh batches of `train`, normalised and augmented as the dataset usually is."""
    padding, flip = AUGMENTATION.get(data.name, (0, False)) if augment else (0, False)
    return TrainStream(
        train,
        batch_size=batch_size,
        seed=seed,
        mean=data.mean,
        std=data.std,
        crop_padding=padding,
        flip=flip,
        fill=fill,
    )


def check_batch_size(field: str, batch_size: int, samples: int, what: str) -> None:
    """See whether `what` has the samples of one batch at least.

    Raises:
        ConfigError: it has fewer.
    """
    if batch_size > samples:
        raise ConfigError(
            f"task.{field}: {batch_size} exceeds the {samples} samples that {what} trains on"
        )


def keep_labels(data: ImageSet, labels: int | None, split_seed: int) -> ImageSet:
    """Return `labelled_subset` of what a task trains on.

    Raises:
        ConfigError: `labels` is out of range; which numbers are not.
    """
    try:
        return labelled_subset(data, labels, split_seed)
    except ValueError as error:
        raise ConfigError(f"task.labels: {error}") from None
