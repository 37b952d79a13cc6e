"""What the configurations, and the batches, of all tasks on a data set share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import field_validator
from torch import Tensor
from torch.nn import functional

from repeatlab.core.schema import ConfigError, did_you_mean
from repeatlab.data import DATASETS, ImageSet, Splits, TrainStream, gather, load_splits
from repeatlab.data.unlabelled import labelled_subset
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.optimization import Descent


class DatasetTaskConfig(TaskConfig):
    """A task on one of `repeatlab.data.DATASETS`; by default the embedded one."""

    dataset: str = "digits"

    def prepare(self) -> None:
        self.check_sizes(load_splits(self.dataset))

    def check_sizes(self, data: Splits) -> None:
        """See whether the sizes fit the dataset, which is `data`; part of `prepare`.

        Raises:
            ConfigError: one does not; the field, and what would be right.
        """
        check_batch_size("batch_size", self.batch_size, len(data.train), self.dataset)

    def refusals(self) -> dict[str, str]:
        return {
            "fresh_samples": "on a data set N fresh batches in place of N visits are standard "
            "training: use `{}`"
        }

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DATASETS:
            raise ValueError(f"unknown dataset {value!r}; {did_you_mean(value, DATASETS)}")
        return value


class DatasetTask:
    """How samplers draw from a data set; see `repeatlab.tasks.Task` for the methods."""

    stream: TrainStream
    forward_samples: int
    environment_steps = 0
    share: slice | None = None  # this process's samples of every batch, in data-parallel training
    descents: Sequence[Descent] = ()

    @property
    def skipped_steps(self) -> int:
        return sum(descent.skipped for descent in self.descents)

    @property
    def batch_size(self) -> int:
        return self.stream.batch_size

    @property
    def scoring_samples(self) -> int:
        return self.forward_samples

    @property
    def bound_samples(self) -> int:
        return self.forward_samples

    def population(self, index: int) -> range:
        return range(len(self.stream.data))

    def candidates(self, index: int, block: int) -> Any:
        return self.fresh_batch(block)

    def batch_of(self, indices: Tensor, index: int) -> Any:
        return self.stream.batch_of(indices, index)

    def pick(self, blocks: Sequence[Any], picks: Tensor, index: int) -> Any:
        return gather(blocks, picks, index)


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


def cross_entropy_bounds(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return ||softmax - target||_2 of every sample, (b,): 0.948683 for ten equal classes.

    The norm of the cross-entropy's gradient at the last pre-activation, which bounds that at the
    weights up to a factor (Katharopoulos and Fleuret 2018, arXiv 1803.00942, eq. 16).

    Args:
        logits: (b, classes).
        labels: int64, (b,).
        smoothing: Share of the target that all classes get alike, as in torch's cross-entropy.
    """
    classes = logits.shape[1]
    target = (1 - smoothing) * functional.one_hot(labels, classes) + smoothing / classes
    return (logits.softmax(1) - target).norm(dim=1)
