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

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.data import DATASETS, Batch, ImageSet, load_splits
from repeatlab.data.unlabelled import labelled_subset
from repeatlab.retrieval import retrieval
from repeatlab.schema import did_you_mean
from repeatlab.seeding import derive
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.classification import (
    ClassifierConfig,
    ClassifierTask,
    make_stream,
    metrics_of,
    of_classes,
)
from repeatlab.tasks.dataset import cross_entropy_bounds
from repeatlab.tasks.learner import Learner
from repeatlab.tasks.pretraining import PretrainingConfig, pretrained

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

    def prepare(self) -> None:
        super().prepare()
        load_splits(self.source or self.dataset)

    def refusals(self) -> dict[str, str]:
        return super().refusals() | {
            "rho_loss": "its holdout models would each need a pretraining of their own"
        }

    @field_validator("source")
    @classmethod
    def _source_known(cls, value: str | None) -> str | None:
        if value is not None and value not in DATASETS:
            raise ValueError(f"unknown dataset {value!r}; {did_you_mean(value, DATASETS)}")
        return value


class Transfer(ClassifierTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        classes: Of the dataset's, those that the run learns.
        pretraining: What was spent before the run, by the names of `Ledger`.
    """

    Config: ClassVar[type[TaskConfig]] = TransferConfig

    def __init__(self, config: TransferConfig, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        source = self.data if config.source is None else load_splits(config.source, device=device)
        known, self.classes = _shared_out(config, self.data.classes, source.classes)
        if source.train.images.shape[1] != self.data.train.images.shape[1]:
            raise ValueError(f"source: {source.name} has not the channels of {config.dataset}")
        train = labelled_subset(self._own(self.data.train), config.labels, SPLIT_SEED)
        self.stream = make_stream(
            train,
            self.data,
            batch_size=config.batch_size,
            seed=seed,
            augment=config.augment,
        )
        network, self.pretraining = pretrained(
            config.model_copy(update={"dataset": source.name}),
            config.pretraining,
            known,
            len(known),
            seed=seed,
            device=device,
        )
        encoder, old_head = network
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(derive(seed, "head"))
            head = nn.Linear(old_head.in_features, len(self.classes))
        self.learner = Learner(
            nn.Sequential(encoder, head), config, device=device, head_only=config.tune == "head"
        )
        self.encoder, self.head = self.learner.network
        self.ema = self.learner.average
        self.descents = [self.learner.descent]
        self.optimizers = [self.learner.descent.optimizer]

    def _own(self, data: ImageSet) -> ImageSet:
        """Return the samples of the run's classes, which are counted from 0."""
        chosen = of_classes(data, self.classes)
        return ImageSet(chosen.images, chosen.labels - self.classes[0])

    def step(
        self, batch: Batch, report: Callable[..., None], weights: Tensor | None = None
    ) -> None:
        logits = self.learner(batch.images)
        losses = functional.cross_entropy(logits, batch.labels, reduction="none")
        if weights is None:
            loss = losses.mean()
            report(loss)
        else:
            bounds = cross_entropy_bounds(logits.detach(), batch.labels)
            report(losses.detach().mean(), losses.detach(), bounds)
            loss = (weights * losses).mean()
        self.learner.step(loss)

    @torch.no_grad()
    def sample_losses(self, batch: Batch) -> Tensor:
        with self.learner.evaluating():
            logits = self.learner(batch.images)
        return functional.cross_entropy(logits, batch.labels, reduction="none")

    @torch.no_grad()
    def gradient_bounds(self, batch: Batch) -> Tensor:
        with self.learner.evaluating():
            return cross_entropy_bounds(self.learner(batch.images), batch.labels)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return loss, accuracy and macro-F1 on the run's classes, and retrieval by features."""
        data = self._own(self.data.evaluated(split))
        features = self.learner.features(data, self.data)
        logits = self.learner.classify(features)
        return metrics_of(logits, data.labels) | retrieval(features, data.labels)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)


def _shared_out(config: TransferConfig, classes: int, source: int) -> tuple[range, range]:
    """Return which classes of the source are known beforehand, and which the run learns."""
    if config.source is not None:
        return range(source), range(classes)
    if config.source_classes > classes - 2:
        raise ValueError(
            f"source_classes must leave two of the {classes} classes of {config.dataset} to the"
            f" run; not {config.source_classes}"
        )
    return range(config.source_classes), range(config.source_classes, classes)
