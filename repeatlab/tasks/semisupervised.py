"""FixMatch (Sohn et al. 2020, arXiv 2001.07685): few labelled images, many without labels.

A fresh batch holds B labelled images, weakly augmented (mirror and crop), and `mu` unlabelled ones
for each of them, each in a weak and a strong view (RandAugment and Cutout). With p = softmax of the
logits, CE the cross-entropy in nats and tau the confidence threshold, one update is one step on

    total = supervised + lambda_u * unsupervised
    supervised = mean over labelled images of CE(label, p(weak))
    unsupervised = mean over unlabelled images of [max p(weak) >= tau] CE(argmax p(weak), p(strong))

without gradient through the pseudo-label. All B (1 + 2 mu) images go forward together, so that
BatchNorm sees one batch, and all go backward. `driver` chooses which of the three losses drives the
repetition; the gradient is always the total's. The driver need not fall: the mask is nearly empty
at first, so that `unsupervised` starts at 0 and rises, and `total` starts at ln(classes).

One *sample* of the sampling methods is a labelled image with its mu unlabelled companions: its loss
is its supervised loss + lambda_u times the mean over its companions. The mean over samples is the
driver (with BatchNorm up to the mode of the network, which is evaluation in `sample_losses`).
`mu: 0` trains on the labels alone. The ledger's distinct samples are labelled ones. Labels that
are fewer than B are repeated to fill a batch, as public implementations do: 40 of them, say.

Under repetition: pseudo-labels and mask are computed anew at every visit, from weights that have
moved; the views stay the same unless the method asks for `fresh_views`; the evaluated network, an
exponential moving average (EMA) of the weights, moves once per update and so N times on a batch
repeated N times (`ema_clock: fresh_batches` moves it at the first visit alone); BatchNorm's
running statistics see the batch at every visit, and the EMA network has a copy of them.

The paper takes B = 64, mu = 7, tau = 0.95, lambda_u = 1 and an EMA of 0.999, a learning rate of
0.03 and 2^20 updates. mu = 7 makes an update 15 forwards of B images; the embedded default is 3.
Public reference, error on CIFAR-10 with 4,000 labels, WRN-28-2: 4.26 +- 0.05 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from repeatlab.core.seeding import generator
from repeatlab.data import Splits, stl10
from repeatlab.data.augment import as_pictures, normalize, random_crop_flip, to_uint8
from repeatlab.data.datasets import fixed_order
from repeatlab.data.randaugment import strong_augment
from repeatlab.data.unlabelled import EpochOrder
from repeatlab.tasks import Report, TaskConfig
from repeatlab.tasks.classification import (
    ClassifierTask,
    ImageModelConfig,
    cross_entropy_bounds,
    metrics_of,
)
from repeatlab.tasks.dataset import check_batch_size, keep_labels, make_stream
from repeatlab.tasks.learner import Learner
from repeatlab.tasks.models import build_classifier, drawn_from

PICTURES = 16


class SemiSupervisedConfig(ImageModelConfig):
    """Settings of the semi-supervised task; the defaults are for the embedded data."""

    name: Literal["semisupervised"] = "semisupervised"
    labels: Annotated[int, Field(ge=1)] | None = 100
    """Labelled images, each class in proportion; all others lose their label. Null keeps all labels
    of the train split, for `stl10`, which has unlabelled images of its own."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Which images keep their label; never the run's seed."""
    driver: Literal["total", "supervised", "unsupervised"] = "total"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the labelled images' targets; pseudo-labels stay as they are."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """B, the labelled images of a batch."""
    mu: Annotated[int, Field(ge=0)] = 3
    """Unlabelled images for each labelled one; 0 trains on the labels alone."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.95
    """tau: the confidence from which a pseudo-label counts."""
    unlabelled_weight: Annotated[float, Field(ge=0)] = 1.0
    """lambda_u."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    ema_clock: Literal["updates", "fresh_batches"] = "updates"

    def prepare(self) -> None:
        super().prepare()
        if self.dataset == "stl10" and self.mu:
            stl10.unlabelled()

    def check_sizes(self, data: Splits) -> None:
        train = keep_labels(data.train, self.labels, self.split_seed)
        if self.labels is None:
            check_batch_size("batch_size", self.batch_size, len(train), self.dataset)

    def refusals(self) -> dict[str, str]:
        refused = {
            "rho_loss": "pseudo-labels move with the network, so that no loss is irreducible",
            "multiplicity": "images without labels, most of a batch, would keep one view each",
        }
        if self.labels is not None and self.labels < self.batch_size:
            few = f"its {self.labels} labels are fewer than the different samples of a batch"
            refused |= dict.fromkeys(("unweighted", "online"), few)
        return super().refusals() | refused

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if not self.mu and self.driver == "unsupervised":
            raise ValueError("mu: 0 leaves no unsupervised loss to drive with")
        return self


class SemiBatch(NamedTuple):
    """B labelled images and their mu companions each; images are float32, normalised.

    Attributes:
        labelled: (B, channels, height, width), weakly augmented.
        labels: int64, (B,).
        weak: (B mu, channels, height, width): the companions of image i at i mu to (i + 1) mu.
        strong: The same images under strong augmentation.
        indices: int64, (B,), into the labelled images.
        unlabelled: int64, (B mu,), into the unlabelled ones.
        index: Which fresh batch this is, from 0.
    """

    labelled: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor
    indices: Tensor
    unlabelled: Tensor
    index: int


class SemiSupervised(ClassifierTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods."""

    Config: ClassVar[type[TaskConfig]] = SemiSupervisedConfig
    saved: ClassVar[Mapping[str, str]] = {
        "model": "model",
        "optimizer": "learner.optimizer_step",
        "last_index": "last_index",
        "ema": "ema",
    }

    def __init__(self, config: SemiSupervisedConfig, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        self.labelled = keep_labels(self.data.train, config.labels, config.split_seed)
        self.stream = make_stream(
            self.labelled, self.data, batch_size=config.batch_size, seed=seed, fill=True
        )
        # Images without labels: those of the train split, labelled ones included as in the paper,
        # or STL-10's own, which stay in their file.
        mapped = config.dataset == "stl10" and config.mu > 0
        self.unlabelled = stl10.unlabelled() if mapped else self.data.train.images
        self.order = EpochOrder(
            len(self.unlabelled),
            config.batch_size * config.mu,
            seed=seed,
            name="unlabelled order",
        )
        _, channels, side, _ = self.labelled.images.shape
        with drawn_from(seed):
            model, _ = build_classifier(
                config.model, channels, self.data.classes, side=side, width=config.width
            )
        self.train_with(Learner(model, config, device=device))
        self.forward_samples = self.backward_samples = config.batch_size * (1 + 2 * config.mu)
        self.last_index = -1  # of the latest fresh batch that was visited

    # --- batches ------------------------------------------------------------------------------

    def refresh(self, batch: SemiBatch, visit: int) -> SemiBatch:
        return self._batch(batch.indices, batch.unlabelled, batch.index, visit)

    def make_batch(self, indices: Tensor, index: int, visit: int = 0) -> SemiBatch:
        return self._batch(indices, self.order.piece(index), index, visit)

    def pick(self, blocks: Sequence[SemiBatch], picks: Tensor, index: int) -> SemiBatch:
        """Return the labelled images `picks`, each with its own companions."""
        mu = self.config.mu
        companions = (picks.unsqueeze(1) * mu + torch.arange(mu, device=picks.device)).flatten()
        columns = dict.fromkeys(SemiBatch._fields[:-1], picks)
        columns |= dict.fromkeys(("weak", "strong", "unlabelled"), companions)
        picked = {}
        for name, rows in columns.items():
            column = torch.cat([getattr(block, name) for block in blocks])
            picked[name] = column.index_select(0, rows.to(column.device))
        return SemiBatch(**picked, index=index)

    def _batch(self, indices: Tensor, unlabelled: Tensor, index: int, view: int) -> SemiBatch:
        labelled = self.stream.batch_of(indices, index, view)
        if isinstance(self.unlabelled, Tensor):
            images = self.unlabelled.index_select(0, unlabelled.to(self.unlabelled.device))
        else:
            images = self.unlabelled.take(unlabelled).to(self.device, non_blocking=True)
        weak, strong = (
            random_crop_flip(
                images,
                generator(self.seed, f"{name}/{view}", index),
                padding=self.stream.crop_padding,
                flip=self.stream.flip,
            )
            for name in ("weak", "strong crop")
        )
        strong = strong_augment(strong, generator(self.seed, f"strong/{view}", index))
        views = normalize(torch.cat([weak, strong]), self.data.mean, self.data.std)
        weak, strong = views.chunk(2) if len(views) else (views, views)
        return SemiBatch(labelled.images, labelled.labels, weak, strong, indices, unlabelled, index)

    # --- one update ---------------------------------------------------------------------------

    def step(self, batch: SemiBatch, report: Report, weights: Tensor | None = None) -> None:
        # Spaced visits come back to an earlier batch.
        is_fresh = batch.index > self.last_index
        follows = self.config.ema_clock == "updates" or is_fresh
        super().step(batch, report, weights, average=follows)
        self.last_index = max(self.last_index, batch.index)

    def outputs(self, batch: SemiBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of the labelled images, the weak and the strong views."""
        images = torch.cat([batch.labelled, batch.weak, batch.strong])
        logits = self.learner(images)
        return logits.split([len(batch.labelled), len(batch.weak), len(batch.strong)])

    def losses(
        self, logits: tuple[Tensor, Tensor, Tensor], batch: SemiBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the driver loss and the total of every sample, (B,) each."""
        labelled, weak, strong = logits
        supervised = functional.cross_entropy(
            labelled,
            batch.labels,
            reduction="none",
            label_smoothing=self.config.label_smoothing,
        )
        unsupervised = torch.zeros_like(supervised)
        if len(weak):
            mask, guess = self._pseudo_labels(weak)
            of_views = functional.cross_entropy(strong, guess, reduction="none") * mask
            unsupervised = of_views.view(len(supervised), -1).mean(1)
        total = supervised.add(unsupervised, alpha=self.config.unlabelled_weight)
        drivers = {"supervised": supervised, "unsupervised": unsupervised, "total": total}
        return drivers[self.config.driver], total

    def _pseudo_labels(self, weak: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether the network is sure enough of every weak view, and what it sees there."""
        confidence, guess = weak.detach().softmax(1).max(1)
        return confidence >= self.config.threshold, guess

    def bounds(self, logits: tuple[Tensor, Tensor, Tensor], batch: SemiBatch) -> Tensor:
        """Return the norm of a sample's total gradient at all its logits, (B,)."""
        labelled, weak, strong = logits
        smoothing = self.config.label_smoothing
        squares = cross_entropy_bounds(labelled, batch.labels, smoothing=smoothing).square()
        if len(weak):
            mask, guess = self._pseudo_labels(weak)
            scale = self.config.unlabelled_weight / self.config.mu
            parts = scale * mask * cross_entropy_bounds(strong, guess)
            squares = squares + parts.square().view(len(squares), -1).sum(1)
        return squares.sqrt()

    # --- evaluation ---------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return loss (nats), accuracy, macro-averaged F1 and mask rate of the evaluated network.

        The mask rate is the share of images, unaugmented, that it is sure enough of. "train" means
        the labelled images, at most as many as the validation split has.
        """
        data = self.labelled if split == "train" else getattr(self.data, split)
        if split == "train":
            data = data.subset(fixed_order(data)[: len(self.data.validation)].numpy())
        logits = self.learner.outputs(data, self.data)
        sure = logits.cpu().double().softmax(1).amax(1) >= self.config.threshold
        return metrics_of(logits, data.labels) | {"mask_rate": sure.double().mean().item()}

    def pictures(self) -> dict[str, np.ndarray]:
        """Return weak and strong views of the first unlabelled images, uint8."""
        if not self.config.mu:
            return {}
        batch = self.fresh_batch(0)
        mean, std = (
            torch.tensor(v, device=self.device).view(-1, 1, 1)
            for v in (self.data.mean, self.data.std)
        )
        views = {"weak": batch.weak[:PICTURES], "strong": batch.strong[:PICTURES]}
        return {name: as_pictures(to_uint8(images * std + mean)) for name, images in views.items()}
