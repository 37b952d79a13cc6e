"""What the tasks beyond the six share: image classifiers, their data and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.seeding import derive, generator
from repeatlab.data import Batch, ImageSet, Splits, TrainStream, load_splits
from repeatlab.tasks.dataset import DatasetTask, DatasetTaskConfig
from repeatlab.tasks.models import build_encoder
from repeatlab.tasks.optimization import OptimizationConfig, OptimizerChoice, chosen
from repeatlab.tasks.supervised import AUGMENTATION


class ClassifierConfig(DatasetTaskConfig, OptimizationConfig):
    """Settings of a task that trains one or several classifiers; defaults for the embedded data."""

    model: Literal["cnn", "norm_cnn", "strided_cnn", "resnet18"] = "cnn"
    width: Annotated[int, Field(ge=1)] = 16
    """Channels of the CNNs' first layer; without effect on ResNet-18."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    optimizer: OptimizerChoice = chosen("momentum")
    batch_size: Annotated[int, Field(ge=1)] = 64
    augment: bool = True

    def refusals(self) -> dict[str, str]:
        one = "augment: false leaves one view of each image"
        return super().refusals() | ({} if self.augment else {"fresh_views": one})


class ClassifierTask(DatasetTask):
    """Data and batches of classifiers; see `repeatlab.tasks.Task` for the methods.

    A subclass sets `stream`, its networks, `descents` and `optimizers`.
    """

    forward_samples: int
    backward_samples: int

    def __init__(self, config: ClassifierConfig, *, seed: int, device: str) -> None:
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.data = load_splits(config.dataset, device=device)
        self.forward_samples = self.backward_samples = config.batch_size

    def fresh_batch(self, index: int) -> Batch:
        return self.stream.fresh_batch(index)

    def refresh(self, batch: Batch, visit: int) -> Batch:
        return self.stream.batch_of(batch.indices, batch.index, view=visit)

    def pictures(self) -> dict[str, np.ndarray]:
        return {}


def make_stream(
    train: ImageSet, data: Splits, *, batch_size: int, seed: int, augment: bool
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
    )


def make_classifier(
    config: ClassifierConfig, data: Splits, outputs: int, *, seed: int, stream: str = "weights"
) -> nn.Sequential:
    """Return an encoder and a linear head behind it, with weights from a random stream."""
    _, channels, side, _ = data.train.images.shape
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(derive(seed, stream))
        encoder, features = build_encoder(config.model, channels, side=side, width=config.width)
        return nn.Sequential(encoder, nn.Linear(features, outputs))


def of_classes(data: ImageSet, classes: Sequence[int]) -> ImageSet:
    """Return the samples whose label is one of `classes`, in their order."""
    wanted = torch.tensor(list(classes), device=data.labels.device)
    return data.subset(torch.isin(data.labels, wanted).nonzero().flatten().cpu().numpy())


def metrics_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return mean cross-entropy (nats), accuracy and macro-averaged F1.

    Args:
        logits: (n, classes).
        labels: int64, (n,).
    """
    truth, guesses = labels.cpu(), logits.argmax(1).cpu()
    return {
        "loss": functional.cross_entropy(logits.double(), labels).item(),
        "accuracy": (guesses == truth).double().mean().item(),
        "macro_f1": float(f1_score(truth, guesses, average="macro", zero_division=0.0)),
    }


def noise_metrics(logits: Tensor, given: Tensor, corrupted: Tensor) -> dict[str, float]:
    """Return `memorized` and `noise_auc` of training samples, some of which have a false label.

    `memorized` is the share of false labels that the network gives by itself. `noise_auc` is the
    probability that a false label has a higher loss than a true one: 0.5 where losses tell nothing.

    Args:
        logits: (n, classes).
        given: int64, (n,): the labels that are trained on.
        corrupted: bool, (n,): which are false, some of them but not all.
    """
    losses = functional.cross_entropy(logits.double(), given, reduction="none")
    repeated = (logits.argmax(1) == given)[corrupted]
    return {
        "memorized": repeated.double().mean().item(),
        "noise_auc": float(roc_auc_score(corrupted.cpu(), losses.cpu())),
    }


def train_subset(splits: Splits) -> Tensor:
    """Return the numbers of the training samples that `Splits.evaluated("train")` holds: int64."""
    order = torch.randperm(len(splits.train), generator=generator(0, "train subset"))
    return order[: len(splits.validation)]
