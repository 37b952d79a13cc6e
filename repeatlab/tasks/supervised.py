"""Image classification: ResNet-18 on CIFAR-10, a small CNN on MNIST and digits.

One update is one step of the optimizer (by default SGD with momentum) on the mean cross-entropy of
a minibatch, which is also the driver loss; before training it is ln(classes) = 2.302585 for ten
classes. BatchNorm's running statistics (ResNet only) see a batch once per visit, as in any training
loop; a repeat sees the same augmented view unless the method asks for `fresh_views`.

With `label_smoothing` s the target is (1 - s) of the label and s / classes of each class (Szegedy
et al. 2016, arXiv 1512.00567). The driver is then the smoothed loss, whose lowest value is not 0
but the target's entropy (0.5003 for s = 0.1 and ten classes): a fixed t has to lie above it.
Evaluated losses are not smoothed.

Public reference for ResNet-18 on CIFAR-10, 200 epochs: 93.02 % (github.com/kuangliu/pytorch-cifar).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.data import Batch, Splits
from repeatlab.tasks import Report, TaskConfig
from repeatlab.tasks.classification import (
    ClassifierConfig,
    ClassifierTask,
    cross_entropy_bounds,
    metrics_of,
)
from repeatlab.tasks.learner import Learner
from repeatlab.tasks.models import build_classifier, drawn_from, mlp


class SupervisedConfig(ClassifierConfig):
    """Settings of the supervised task; the defaults are the plan's, on the embedded data."""

    name: Literal["supervised"] = "supervised"
    model: Literal["cnn", "mlp", "resnet9", "resnet18"] = "cnn"
    width: Annotated[int, Field(ge=1)] = 16
    """Channels of the CNN's first layer, units of the MLP's hidden ones; none of ResNets."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of training labels replaced by another class, each as likely; drawn from the seed."""


class Supervised(ClassifierTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        corrupted: bool, (samples,): which training labels are false; None without noise.
    """

    Config: ClassVar[type[TaskConfig]] = SupervisedConfig

    def __init__(
        self, config: SupervisedConfig, *, seed: int, device: str, data: Splits | None = None
    ) -> None:
        super().__init__(config, seed=seed, device=device, data=data)
        self.learn_noisy()
        with drawn_from(seed):
            model = build_model(config, tuple(self.data.train.images.shape[1:]), self.data.classes)
        self.train_with(Learner(model, config, device=device))

    def fresh_batches(self, first: int, count: int) -> list[Batch]:
        """Return them made together."""
        return self.stream.fresh_batches(first, count)

    def step(self, batch: Batch, report: Report, weights: Tensor | None = None) -> None:
        if weights is not None:
            super().step(batch, report, weights)
            return
        logits = self.learner(batch.images)
        loss = functional.cross_entropy(
            logits, batch.labels, label_smoothing=self.config.label_smoothing
        )
        report(loss)
        self.learner.step(loss)

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return every sample's cross-entropy, (b,), which drives and is descended."""
        losses = functional.cross_entropy(
            logits,
            batch.labels,
            reduction="none",
            label_smoothing=self.config.label_smoothing,
        )
        return losses, losses

    def bounds(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the norm of the loss's gradient at every sample's logits, (b,)."""
        return cross_entropy_bounds(logits, batch.labels, smoothing=self.config.label_smoothing)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return mean cross-entropy (nats), accuracy and macro-averaged F1."""
        data = self.data.evaluated(split)
        return metrics_of(self.learner.outputs(data, self.data), data.labels)


def build_model(config: SupervisedConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return the network for images of a (channels, height, width), giving (batch, classes)."""
    channels, height, width = shape
    if config.model == "mlp":
        return mlp(channels * height * width, classes, width=config.width)
    model, _ = build_classifier(config.model, channels, classes, side=height, width=config.width)
    return model
