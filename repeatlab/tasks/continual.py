"""Continual learning: two halves of the classes one after the other, and what is forgotten.

Before the run, a classifier of all classes is trained on the first half of them, as
`tasks/pretraining.py` says (its cost stands in the ledger). The run's updates then belong to the
second half, under one of three strategies:

- `plain`: the mean cross-entropy of images of the second half, and nothing else;
- `replay`: `memory` images of the first half, the same number of each class, are trained on
  together with the second half, as in iCaRL (Rebuffi et al. 2017, arXiv 1611.07725). They are
  chosen by herding: each next exemplar brings the mean feature of those chosen closest to the
  class's mean, features having length 1 (algorithm 4). iCaRL's distillation and its classification
  by nearest means are not part of it;
- `lwf`: learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282): cross-entropy plus
  `distillation_weight` times the cross-entropy between the old network's answers and the new
  one's on the first half's outputs, both at `temperature` (2 in the paper), on images of the
  second half. The old network goes forward in every update: 2 b samples.

All losses are in nats. There is one head for all classes, and the evaluation is not told to which
half an image belongs; metrics that end in `_known` are, and choose among the first half's classes
alone. Forgetting is accuracy on the first half before the run minus that now (Chaudhry et al. 2018,
arXiv 1801.10112); the second half is what is gained for it.

The driver loss is the total or, without the distillation, the `new` cross-entropy. With replay it
holds both halves as they fall into the batch.

Under repetition: the first half is learnt by standard training in every arm, so that all arms of a
seed have the same to forget. A batch repeated moves the network further towards the second half at
each visit; whether that costs the first half more than it gains is what `forgetting` beside
`second_accuracy` tells. The old network never changes, and so neither do its answers to a repeated
view. BatchNorm's running statistics see a batch at every visit.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from repeatlab.core.schema import ConfigError
from repeatlab.data import Batch, ImageSet, Splits
from repeatlab.data.augment import as_pictures
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.classification import (
    ClassifierConfig,
    ClassifierTask,
    metrics_of,
    of_classes,
)
from repeatlab.tasks.dataset import check_batch_size, make_stream
from repeatlab.tasks.learner import Learner, encode
from repeatlab.tasks.pretraining import PretrainingConfig, pretrained
from repeatlab.tasks.retrieval import retrieval


class ContinualConfig(ClassifierConfig):
    """Settings of the continual task; the defaults are for the embedded data."""

    name: Literal["continual"] = "continual"
    strategy: Literal["plain", "replay", "lwf"] = "plain"
    driver: Literal["total", "new"] = "total"
    first_classes: Annotated[int, Field(ge=1)] = 5
    """Classes of the first half."""
    memory: Annotated[int, Field(ge=1)] = 50
    """Exemplars for `replay`, of all first classes together."""
    distillation_weight: Annotated[float, Field(ge=0)] = 1.0
    """lambda of `lwf`."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of `lwf`."""
    pretraining: PretrainingConfig = PretrainingConfig()

    def check_sizes(self, data: Splits) -> None:
        first = self.first_classes
        if first >= data.classes:
            raise ConfigError(
                f"task.first_classes: must leave one of the {data.classes} classes of"
                f" {self.dataset} to the second half; not {first}"
            )
        counts = data.train.labels.cpu().bincount(minlength=data.classes).tolist()
        samples = sum(counts[first:])
        if self.strategy == "replay":
            share = self.memory // first
            if not 1 <= share <= min(counts[:first]):
                raise ConfigError(
                    f"task.memory: must be from {first}, one exemplar of every first class, to"
                    f" {first * min(counts[:first])}; not {self.memory}"
                )
            samples += first * share
        check_batch_size("batch_size", self.batch_size, samples, "the run")
        check_batch_size(
            "pretraining.batch_size",
            self.pretraining.batch_size,
            sum(counts[:first]),
            "the pretraining",
        )

    def refusals(self) -> dict[str, str]:
        return super().refusals() | {
            "rho_loss": "its holdout models would each need a first half of their own"
        }


class Continual(ClassifierTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        model: Encoder and head of all classes.
        old: The same network as it was before the run.
        exemplars: int64, (memory,): training images of the first half that `replay` keeps.
        pretraining: What was spent before the run, by the names of `Ledger`.
    """

    Config: ClassVar[type[TaskConfig]] = ContinualConfig
    saved: ClassVar[Mapping[str, str]] = {
        name: f"learner.{path}" for name, path in Learner.saved.items()
    }

    def __init__(self, config: ContinualConfig, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        config.check_sizes(self.data)  # before anything is trained
        self.first = range(config.first_classes)
        # What does not matter beforehand must not keep two strategies from sharing the network.
        shared = config.model_dump(include={"dataset", "split", "model", "width", "augment"})
        own = ClassifierConfig(name="pretraining", **shared)
        known = pretrained(own, config.pretraining, self.first, seed=seed, device=device)
        network, self.pretraining = deepcopy(known)
        self.old = deepcopy(network).requires_grad_(False).eval()
        train = of_classes(self.data.train, range(config.first_classes, self.data.classes))
        if config.strategy == "replay":
            self.exemplars = self._choose_exemplars()
            kept = self.data.train.subset(self.exemplars.numpy())
            train = ImageSet(
                torch.cat([train.images, kept.images]), torch.cat([train.labels, kept.labels])
            )
        self.stream = make_stream(
            train, self.data, batch_size=config.batch_size, seed=seed, augment=config.augment
        )
        if config.strategy == "lwf":
            self.forward_samples = 2 * config.batch_size
        self.train_with(Learner(network, config, device=device))

    def _choose_exemplars(self) -> Tensor:
        """Return which training images of the first half are kept, and charge for the choice."""
        share = self.config.memory // len(self.first)
        labels = self.data.train.labels.cpu()
        chosen = []
        for label in self.first:
            members = (labels == label).nonzero().flatten()
            features = encode(self.old[0], self.data.train.subset(members.numpy()), self.data)
            chosen.append(members[herding(features, share)])
            self.pretraining["pretraining_forward_samples"] += len(members)
        return torch.cat(chosen)

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the logits, and what the old network says: (b, first classes) at temperature."""
        if self.config.strategy != "lwf":
            return self.learner(batch.images), None
        with torch.no_grad():
            old = self.old(batch.images)[:, : len(self.first)]
        return self.learner(batch.images), (old / self.config.temperature).softmax(1)

    def losses(self, outputs: tuple[Tensor, Tensor | None], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the driver loss of every sample, and the loss that is descended: (b,) each."""
        logits, answers = outputs
        new = total = functional.cross_entropy(logits, batch.labels, reduction="none")
        if answers is not None:
            scaled = logits[:, : len(self.first)] / self.config.temperature
            distilled = functional.cross_entropy(scaled, answers, reduction="none")
            total = new + self.config.distillation_weight * distilled
        return total if self.config.driver == "total" else new, total

    def bounds(self, outputs: tuple[Tensor, Tensor | None], batch: Batch) -> Tensor:
        """Return the norm of the gradient of every sample's loss at its logits, (b,)."""
        logits, answers = outputs
        gradient = logits.softmax(1) - functional.one_hot(batch.labels, logits.shape[1])
        if answers is not None:
            temperature, first = self.config.temperature, len(self.first)
            excess = (logits[:, :first] / temperature).softmax(1) - answers
            gradient[:, :first] += self.config.distillation_weight / temperature * excess
        return gradient.norm(dim=1)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return loss, accuracy, macro-F1 and retrieval on all classes, and both halves' shares.

        `forgetting` and `forgetting_known` may be negative: the first half then has gained.
        """
        data = self.data.evaluated(split)
        features = self.learner.features(data, self.data)
        logits = self.learner.classify(features)
        now = self._by_half(logits, data.labels)
        before = self._by_half(encode(self.old, data, self.data), data.labels)
        lost = {
            name.replace("first_accuracy", "forgetting"): before[name] - now[name]
            for name in ("first_accuracy", "first_accuracy_known")
        }
        return metrics_of(logits, data.labels) | now | lost | retrieval(features, data.labels)

    def _by_half(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        logits, labels = logits.cpu(), labels.cpu()
        first = labels < len(self.first)
        right = (logits.argmax(1) == labels).double()
        known = (logits[:, : len(self.first)].argmax(1) == labels).double()
        return {
            "first_accuracy": right[first].mean().item(),
            "second_accuracy": right[~first].mean().item(),
            "first_accuracy_known": known[first].mean().item(),
        }

    def pictures(self) -> dict[str, np.ndarray]:
        """Return the exemplars that `replay` keeps, class by class, uint8."""
        if self.config.strategy != "replay":
            return {}
        return {"exemplars": as_pictures(self.data.train.images[self.exemplars.to(self.device)])}


def herding(features: Tensor, count: int) -> Tensor:
    """Return the first `count` exemplars of a class, in the order of their choice: int64, (count,).

    Exemplar k is the one that brings the mean of the first k closest to the mean of all, with every
    feature scaled to length 1 (Rebuffi et al. 2017, algorithm 4); none is chosen twice.

    Args:
        features: float, (n, d), of all images of the class.
        count: At most n.
    """
    unit = functional.normalize(features.cpu().double(), dim=1)
    mean, total = unit.mean(0), torch.zeros_like(unit[0])
    free = torch.ones(len(unit), dtype=torch.bool)
    chosen = []
    for k in range(1, count + 1):
        distances = (mean - (total + unit) / k).norm(dim=1)
        best = int(distances.where(free, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        total += unit[best]
    return torch.tensor(chosen)
