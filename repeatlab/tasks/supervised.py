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

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.seeding import derive, generator
from repeatlab.data import Batch, ImageSet, Splits, TrainStream, iter_batches, load_splits
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.dataset import DatasetTask, DatasetTaskConfig, cross_entropy_bounds
from repeatlab.tasks.models import build_classifier, mlp
from repeatlab.tasks.optimization import (
    Descent,
    OptimizationConfig,
    OptimizerChoice,
    averaged,
    chosen,
    move_average,
)
from repeatlab.tasks.precision import Precision, place

# Zero pixels around the random crop, and whether to mirror: what the field uses for each dataset.
AUGMENTATION = {
    "digits": (1, False),
    "mnist": (2, False),
    "cifar10": (4, True),
    "stl10": (12, True),
}
EVALUATION_BATCH = 500


class SupervisedConfig(DatasetTaskConfig, OptimizationConfig):
    """Settings of the supervised task; the defaults are the plan's, on the embedded data."""

    unshared: ClassVar[str | None] = None
    name: Literal["supervised"] = "supervised"
    model: Literal["cnn", "mlp", "resnet18"] = "cnn"
    width: Annotated[int, Field(ge=1)] = 16
    """Channels of the CNN's first layer, units of the MLP's hidden ones; none of ResNet-18."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    optimizer: OptimizerChoice = chosen("momentum")
    batch_size: Annotated[int, Field(ge=1)] = 64
    augment: bool = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of training labels replaced by another class, each as likely; drawn from the seed."""

    def refusals(self) -> dict[str, str]:
        one = "augment: false leaves one view of each image"
        return super().refusals() | ({} if self.augment else {"fresh_views": one})


class Supervised(DatasetTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods."""

    Config: ClassVar[type[TaskConfig]] = SupervisedConfig

    def __init__(
        self, config: SupervisedConfig, *, seed: int, device: str, data: Splits | None = None
    ) -> None:
        """Make the task; `data` is its data set on the device, where others have loaded it."""
        self.config, self.device = config, device
        self.precision = Precision.of(config, device)
        self.data = data or load_splits(config.dataset, device=device)
        train, self.corrupted = corrupt(
            self.data.train, config.label_noise, self.data.classes, seed=seed
        )
        padding, flip = (
            AUGMENTATION.get(config.dataset, (0, False)) if config.augment else (0, False)
        )
        self.stream = TrainStream(
            train,
            batch_size=config.batch_size,
            seed=seed,
            mean=self.data.mean,
            std=self.data.std,
            crop_padding=padding,
            flip=flip,
        )
        shape = tuple(self.data.train.images.shape[1:])
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(derive(seed, "weights"))
            model = build_model(config, shape, self.data.classes)
        self.model = place(model, config, device)
        self.ema = averaged(self.model, config.ema_decay)
        self.descent = Descent(self.model.parameters(), config, self.precision, device=device)
        self.descents, self.optimizer = [self.descent], self.descent.optimizer
        self.optimizers = [self.optimizer]
        self.forward_samples = self.backward_samples = config.batch_size

    def fresh_batch(self, index: int) -> Batch:
        return self.stream.fresh_batch(index)

    def refresh(self, batch: Batch, visit: int) -> Batch:
        return self.stream.batch_of(batch.indices, batch.index, view=visit)

    def step(
        self, batch: Batch, report: Callable[..., None], weights: Tensor | None = None
    ) -> None:
        logits = self.precision(self.model, batch.images)
        smoothing = self.config.label_smoothing
        if weights is None:
            loss = functional.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
            report(loss)
        else:
            losses = self._losses(logits, batch.labels)
            bounds = cross_entropy_bounds(logits.detach(), batch.labels, smoothing=smoothing)
            report(losses.detach().mean(), losses.detach(), bounds)
            loss = (weights * losses).mean()
        self.descent(loss)
        move_average(self.ema, self.model, self.config.ema_decay)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    @torch.no_grad()
    def sample_losses(self, batch: Batch) -> Tensor:
        self.model.eval()
        losses = self._losses(self.precision(self.model, batch.images), batch.labels)
        self.model.train()
        return losses

    @torch.no_grad()
    def gradient_bounds(self, batch: Batch) -> Tensor:
        self.model.eval()
        logits = self.precision(self.model, batch.images)
        self.model.train()
        return cross_entropy_bounds(logits, batch.labels, smoothing=self.config.label_smoothing)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return mean cross-entropy (nats), accuracy and macro-averaged F1."""
        data = self.data.evaluated(split)
        model = self.ema or self.model
        self.model.eval()
        batches = iter_batches(data, EVALUATION_BATCH, self.data.mean, self.data.std)
        logits = torch.cat([self.precision(model, batch.images) for batch in batches])
        self.model.train()
        labels, guesses = data.labels.cpu(), logits.argmax(1).cpu()
        return {
            "loss": functional.cross_entropy(logits.double(), data.labels).item(),
            "accuracy": (guesses == labels).double().mean().item(),
            "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0.0)),
        }

    def pictures(self) -> dict[str, np.ndarray]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "optimizer": self.descent.state_dict()}
        return state if self.ema is None else state | {"ema": self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.descent.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


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


def build_model(config: SupervisedConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return the network for images of a (channels, height, width), giving (batch, classes)."""
    channels, height, width = shape
    if config.model == "mlp":
        return mlp(channels * height * width, classes, width=config.width)
    model, _ = build_classifier(config.model, channels, classes, side=height, width=config.width)
    return model
