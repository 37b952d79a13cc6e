"""Image classifiers: what the tasks that train them share, from their data to their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.seeding import generator
from repeatlab.data import Batch, ImageSet, Splits
from repeatlab.tasks.dataset import DatasetTask, DatasetTaskConfig, make_stream
from repeatlab.tasks.models import build_encoder, drawn_from
from repeatlab.tasks.optimization import OptimizationConfig, OptimizerChoice, chosen


class ImageModelConfig(DatasetTaskConfig, OptimizationConfig):
    """Settings of a task that trains a convolutional network by SGD."""

    model: Literal["cnn", "norm_cnn", "resnet18"] = "cnn"
    width: Annotated[int, Field(ge=1)] = 16
    """Channels of the CNNs' first layer; without effect on ResNet-18."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    optimizer: OptimizerChoice = chosen("momentum")
    batch_size: Annotated[int, Field(ge=1)] = 64


class ClassifierConfig(ImageModelConfig):
    """Settings of a task that trains one or several classifiers; defaults for the embedded data."""

    augment: bool = True

    def refusals(self) -> dict[str, str]:
        one = "augment: false leaves one view of each image"
        return super().refusals() | ({} if self.augment else {"fresh_views": one})


class ClassifierTask(DatasetTask):
    """A task whose batches are images with labels, by default with one network.

    What the network makes of a batch are its logits, (b, classes).
    """

    def learn_noisy(self) -> None:
        """Have the train split for batches, with label noise as configured; see `corrupt`."""
        config, data = self.config, self.data
        train, self.corrupted = corrupt(
            data.train, config.label_noise, data.classes, seed=self.seed
        )
        self.stream = make_stream(
            train, data, batch_size=config.batch_size, seed=self.seed, augment=config.augment
        )

    def outputs(self, batch: Batch) -> Tensor:
        """Return the logits, (b, classes)."""
        return self.learner(batch.images)

    def bounds(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the norm of the cross-entropy's gradient at every sample's logits, (b,)."""
        return cross_entropy_bounds(logits, batch.labels)


def make_classifier(config: ClassifierConfig, data: Splits, *, seed: int) -> nn.Sequential:
    """Return an encoder and a linear head behind it, with an output for every class."""
    _, channels, side, _ = data.train.images.shape
    with drawn_from(seed):
        encoder, features = build_encoder(config.model, channels, side=side, width=config.width)
        return nn.Sequential(encoder, nn.Linear(features, data.classes))


def corrupt(
    data: ImageSet, share: float, classes: int, *, seed: int
) -> tuple[ImageSet, Tensor | None]:
    """Return the data with symmetric label noise, and which samples have it: bool, (n,).

    round(share n) samples, chosen at random, get one of the other classes; None without noise.
    """
    if not share:
        return data, None
    draws = generator(seed, "label noise")
    chosen = torch.randperm(len(data), generator=draws)[: round(share * len(data))]
    shift = torch.randint(1, classes, (len(chosen),), generator=draws)
    labels = data.labels.cpu().clone()
    labels[chosen] = (labels[chosen] + shift) % classes
    corrupted = torch.zeros(len(data), dtype=torch.bool)
    corrupted[chosen] = True
    device = data.labels.device
    return ImageSet(data.images, labels.to(device)), corrupted.to(device)


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
    # First to the CPU: not every device has float64.
    logits, truth = logits.cpu().double(), labels.cpu()
    guesses = logits.argmax(1)
    return {
        "loss": functional.cross_entropy(logits, truth).item(),
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
    logits, given, corrupted = logits.cpu().double(), given.cpu(), corrupted.cpu()
    losses = functional.cross_entropy(logits, given, reduction="none")
    repeated = (logits.argmax(1) == given)[corrupted]
    return {
        "memorized": repeated.double().mean().item(),
        "noise_auc": float(roc_auc_score(corrupted, losses)),
    }


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
