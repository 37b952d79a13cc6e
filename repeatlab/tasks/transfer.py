"""Transfer: a network that knows some classes learns others, by its head alone or as a whole.

Before the run, a classifier is trained on the first classes of the dataset, or on all of another
one (`source`), as `tasks/pretraining.py` says; what that cost stands in the ledger. The run then
puts a new linear head on its encoder and trains on the remaining classes, or on the new dataset:
the head alone, with the encoder fixed in evaluation mode, or everything. One update is one SGD step
on the mean cross-entropy of a minibatch, which is also the driver loss.

Under repetition: all arms of a seed start from the same encoder and head, so that a difference is
made by the run's own updates. With `tune: head` nothing but a linear layer sees a batch again, and
its loss is convex in the weights; a repeat then costs a forward through the encoder that would give
the same features, and the ledger counts it. With `tune: all` BatchNorm's running statistics see a
batch once per visit. A repeat sees the same augmented view unless the method asks for
`fresh_views`.

Embeddings, the encoder's features, are also judged by retrieval within the evaluated split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.schema import ConfigError
from repeatlab.data import Batch, ImageSet, Splits, load_splits
from repeatlab.data.datasets import fixed_order
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.classification import (
    ClassifierConfig,
    ClassifierTask,
    metrics_of,
    of_classes,
)
from repeatlab.tasks.dataset import check_batch_size, keep_labels, known_dataset, make_stream
from repeatlab.tasks.learner import Learner
from repeatlab.tasks.models import drawn_from
from repeatlab.tasks.pretraining import PretrainingConfig, pretrained
from repeatlab.tasks.retrieval import retrieval

SPLIT_SEED = 0  # which images keep their label; never the run's seed


class TransferConfig(ClassifierConfig):
    """Settings of the transfer task; the defaults are for the embedded data."""

    name: Literal["transfer"] = "transfer"
    source: str | None = None
    """Dataset that is learnt beforehand, with as many channels; null: the first classes of
    `dataset` itself."""
    source_classes: Annotated[int, Field(ge=2)] = 5
    """How many classes are learnt beforehand where `source` is null; the run learns the others."""
    labels: Annotated[int, Field(ge=1)] | None = None
    """Training images of the run, each class in proportion; null takes all."""
    tune: Literal["head", "all"] = "all"
    pretraining: PretrainingConfig = PretrainingConfig()

    def check_sizes(self, data: Splits) -> None:
        _shared_out(self, data, load_splits(self.source) if self.source else data)

    def refusals(self) -> dict[str, str]:
        return super().refusals() | {
            "rho_loss": "its holdout models would each need a pretraining of their own"
        }

    @field_validator("source")
    @classmethod
    def _source_known(cls, value: str | None) -> str | None:
        return value if value is None else known_dataset(value)


class Transfer(ClassifierTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        classes: Of the dataset's, those that the run learns.
        pretraining: What was spent before the run, by the names of `Ledger`.
    """

    Config: ClassVar[type[TaskConfig]] = TransferConfig
    saved: ClassVar[Mapping[str, str]] = {
        name: f"learner.{path}" for name, path in Learner.saved.items()
    }

    def __init__(self, config: TransferConfig, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        source = self.data if config.source is None else load_splits(config.source, device=device)
        known, self.classes, train = _shared_out(config, self.data, source)
        self.stream = make_stream(
            train, self.data, batch_size=config.batch_size, seed=seed, augment=config.augment
        )
        network, self.pretraining = pretrained(
            config.model_copy(update={"dataset": config.source or config.dataset}),
            config.pretraining,
            known,
            len(known),
            seed=seed,
            device=device,
        )
        encoder, old_head = network
        with drawn_from(seed, "head"):
            head = nn.Linear(old_head.in_features, len(self.classes))
        frozen = encoder if config.tune == "head" else None
        self.train_with(Learner(nn.Sequential(encoder, head), config, device=device, frozen=frozen))
        self.encoder, self.head = self.model

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return every sample's cross-entropy, (b,), which drives and is descended."""
        losses = functional.cross_entropy(logits, batch.labels, reduction="none")
        return losses, losses

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return loss, accuracy and macro-F1 on the run's classes, and retrieval by features.

        "train" means images that the run trains on, at most as many as there are to validate.
        """
        data = self._evaluated(split)
        features = self.learner.features(data, self.data)
        logits = self.learner.classify(features)
        return metrics_of(logits, data.labels) | retrieval(features, data.labels)

    def _evaluated(self, split: str) -> ImageSet:
        if split != "train":
            return _of_run(getattr(self.data, split), self.classes)
        train, most = self.stream.data, len(self._evaluated("validation"))
        return train.subset(fixed_order(train)[:most].numpy())


def _shared_out(
    config: TransferConfig, data: Splits, source: Splits
) -> tuple[range, range, ImageSet]:
    """Return the source's classes that are known beforehand, the run's, and what it trains on.

    Raises:
        ConfigError: the settings ask for what the data have not.
    """
    if source.train.images.shape[1] != data.train.images.shape[1]:
        raise ConfigError(f"task.source: {source.name} has not the channels of {config.dataset}")
    known, own = range(source.classes), range(data.classes)
    if config.source is None:
        if config.source_classes > data.classes - 2:
            raise ConfigError(
                f"task.source_classes: must leave two of the {data.classes} classes of"
                f" {config.dataset} to the run; not {config.source_classes}"
            )
        known, own = own[: config.source_classes], own[config.source_classes :]
    train = keep_labels(_of_run(data.train, own), config.labels, SPLIT_SEED)
    check_batch_size("batch_size", config.batch_size, len(train), "the run")
    beforehand = int((source.train.labels < known.stop).sum())
    check_batch_size(
        "pretraining.batch_size", config.pretraining.batch_size, beforehand, "the pretraining"
    )
    return known, own, train


def _of_run(data: ImageSet, classes: range) -> ImageSet:
    """Return the samples of the run's classes, which are counted from 0."""
    chosen = of_classes(data, classes)
    return ImageSet(chosen.images, chosen.labels - classes[0])
