"""SimCLR (Chen et al. 2020, arXiv 2002.05709): representations from images without any label.

Every image of a batch is seen in two random views (`data.views`). An encoder gives features h, a
two-layer projection head z; with unit vectors z_1 ... z_2B and the temperature tau, the loss of a
view i whose partner is j is NT-Xent

    l_i = -log( exp(z_i . z_j / tau) / sum over k != i of exp(z_i . z_k / tau) )    (nats)

One update is one step on the mean over all 2B views, which is also the driver loss. Were all
similarities equal it would be ln(2B - 1); it cannot fall below ln(1 + (2B - 2) exp(-2 / tau)), far
above 0, so that mappings which divide by t see a narrow range. A low loss may also mean that the
views are too alike; collapse, where all features point one way, shows in `feature_std` near 0.

Labels are read by the evaluation alone: a batch holds none, and no probe is trained along the way.

The loss of a *sample* is the mean over its two views, against the other images of its batch: the
mean over samples is the driver (with BatchNorm up to the mode of the network, which is evaluation
in `sample_losses`), but a sample's loss depends on the company it is in.

Under repetition: the same two views are seen again unless the method asks for `fresh_views`, and
nothing is redrawn; BatchNorm's running statistics see the batch at every visit. 2B views go
forward and backward in an update.

Public references, ResNet-18 on CIFAR-10: linear probe 90.74 % after 1,000 epochs; kNN (k = 200)
84.7 % after 200 epochs at batch 128.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.seeding import generator
from repeatlab.data import ImageSet
from repeatlab.data.augment import as_pictures, normalize, to_uint8
from repeatlab.data.datasets import fixed_order
from repeatlab.data.views import ContrastiveViews
from repeatlab.tasks import Report, TaskConfig
from repeatlab.tasks.classification import ImageModelConfig
from repeatlab.tasks.dataset import DatasetTask, make_stream
from repeatlab.tasks.learner import Learner
from repeatlab.tasks.models import build_encoder, drawn_from
from repeatlab.tasks.retrieval import retrieval

LOSS_BATCHES = 8  # batches of a split over which the evaluated loss is averaged
KNN_TEMPERATURE = 0.1  # Wu et al. 2018: a neighbour at similarity s has exp(s / 0.1) votes
PROBE_ITERATIONS = 200
PICTURES = 16


class SelfSupervisedConfig(ImageModelConfig):
    """Settings of the self-supervised task; the defaults are for the embedded data."""

    name: Literal["selfsupervised"] = "selfsupervised"
    model: Literal["cnn", "norm_cnn", "resnet18"] = "cnn"
    projection: Annotated[int, Field(ge=2)] = 128
    """Size of z; the head's hidden layer is as wide as the encoder's features."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau; SimCLR's best on CIFAR-10."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """B images, 2B views."""
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image that a crop covers."""
    flip: bool = True
    """Whether views are mirrored; not where that changes what is seen, as with digits."""
    strength: Annotated[float, Field(ge=0, le=1.25)] = 0.5
    """Of the colour jitter."""
    gray: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of views turned grey."""
    blur: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of views blurred; 0 on CIFAR-10, 0.5 on ImageNet."""
    neighbors: Annotated[int, Field(ge=1)] = 20
    """k of the nearest-neighbour classifier; 200 is usual for CIFAR-10."""
    bank: Annotated[int, Field(ge=1)] | None = None
    """Training images among which neighbours are looked for; null takes all."""

    def refusals(self) -> dict[str, str]:
        reason = "the loss of an image depends on the others of its batch, so that "
        return super().refusals() | {
            **dict.fromkeys(
                ("importance", "weighted"), reason + "no weights make its gradient unbiased"
            ),
            "gradient_norm": reason + "no image has a gradient of its own to bound",
            "rho_loss": reason + "it has no irreducible part",
            "multiplicity": reason + "an image's other views would be taken for other images",
        }


class ViewBatch(NamedTuple):
    """Two views of each of b images; no labels.

    Attributes:
        views: float32, (2 b, channels, height, width), normalised: i and i + b are partners.
        indices: int64, (b,), into the train split.
        index: Which fresh batch this is, from 0.
    """

    views: Tensor
    indices: Tensor
    index: int


class SelfSupervised(DatasetTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods."""

    Config: ClassVar[type[TaskConfig]] = SelfSupervisedConfig
    saved: ClassVar[Mapping[str, str]] = {
        "encoder": "encoder",
        "head": "head",
        "optimizer": "learner.optimizer_step",
        "ema": "ema",
    }

    def __init__(self, config: SelfSupervisedConfig, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        # Only its order is used: the views replace its batches.
        self.stream = make_stream(
            self.data.train, self.data, batch_size=config.batch_size, seed=seed, augment=False
        )
        fields = ("min_area", "flip", "strength", "gray", "blur")
        self.views = ContrastiveViews(**{name: getattr(config, name) for name in fields})
        _, channels, side, _ = self.data.train.images.shape
        with drawn_from(seed):
            encoder, size = build_encoder(config.model, channels, side=side, width=config.width)
            head = nn.Sequential(
                nn.Linear(size, size), nn.ReLU(), nn.Linear(size, config.projection)
            )
        networks = nn.ModuleList([encoder, head])
        self.train_with(Learner(networks, config, device=device, parts=(encoder, head)))
        self.encoder, self.head = encoder, head
        self.forward_samples = self.backward_samples = 2 * config.batch_size

    # --- batches ------------------------------------------------------------------------------

    def pick(self, blocks: Sequence[ViewBatch], picks: Tensor, index: int) -> ViewBatch:
        """Return the images `picks`, each with both its views."""
        first, second = zip(*(block.views.chunk(2) for block in blocks), strict=True)
        views = [torch.cat(side).index_select(0, picks) for side in (first, second)]
        indices = torch.cat([block.indices for block in blocks])
        return ViewBatch(torch.cat(views), indices.index_select(0, picks), index)

    def make_batch(self, indices: Tensor, index: int, visit: int = 0) -> ViewBatch:
        images = self.data.train.images.index_select(0, indices)
        views = self._two_views(images, generator(self.seed, f"views/{visit}", index))
        return ViewBatch(views, indices, index)

    def _two_views(self, images: Tensor, draws: torch.Generator) -> Tensor:
        views = self.views(torch.cat([images, images]), draws)
        return normalize(views, self.data.mean, self.data.std)

    # --- one update ---------------------------------------------------------------------------

    def step(self, batch: ViewBatch, report: Report, weights: Tensor | None = None) -> None:
        projected = self.outputs(batch)
        if weights is not None:
            self.learner.descend(self.losses(projected, batch)[0], report, weights)
            return
        loss = nt_xent(projected, self.config.temperature, reduction="mean")
        report(loss)
        self.learner.step(loss)

    def outputs(self, batch: ViewBatch) -> Tensor:
        """Return z of every view: float32, (2 b, projection)."""
        return self._project(batch.views, (self.encoder, self.head))

    def _project(self, views: Tensor, networks: Sequence[nn.Module]) -> Tensor:
        encoder, head = networks
        return self.precision(lambda views: head(encoder(views)), views)

    def losses(self, projected: Tensor, batch: ViewBatch | None = None) -> tuple[Tensor, Tensor]:
        """Return NT-Xent of every image, the mean over its two views: (b,)."""
        losses = nt_xent(projected, self.config.temperature).view(2, -1).mean(0)
        return losses, losses

    # --- evaluation ---------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return loss (nats), kNN accuracy, feature_std, retrieval; on "test" linear_accuracy too.

        The loss is that of always the same views. Neighbours and probe are learnt on train
        features; "train" is a fixed part of that split, which is then not among the neighbours.
        `feature_std` is the mean over dimensions of the standard deviation of unit features, times
        the root of their number: 0 where all are alike, 1 at most.
        """
        queries, bank = self.data.evaluated(split), self._bank()
        with self.evaluating():
            metrics = {"loss": self._evaluated_loss(queries)}
            found, known = self._features(queries), self._features(bank)
        metrics["knn_accuracy"] = knn_accuracy(
            known, bank.labels, found, queries.labels, self.config.neighbors
        )
        unit = functional.normalize(found, dim=1)
        spread = unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5
        metrics["feature_std"] = spread.item()
        metrics |= retrieval(found, queries.labels)
        if split == "test":
            metrics["linear_accuracy"] = self._linear_probe(found, queries.labels)
        return metrics

    def _bank(self) -> ImageSet:
        """Return the training images without those of `evaluate("train")`."""
        rest = fixed_order(self.data.train)[len(self.data.validation) :]
        return self.data.train.subset(rest[: self.config.bank].numpy())

    def _features(self, data: ImageSet) -> Tensor:
        """Return float32 (n, features), before the projection head, of the images as they are."""
        return self.learner.features(data, self.data)

    def _evaluated_loss(self, data: ImageSet) -> float:
        size = min(self.config.batch_size, len(data))
        losses = []
        for i, images in enumerate(data.images[: LOSS_BATCHES * size].split(size)):
            if len(images) == size:
                views = self._two_views(images, generator(0, "evaluation views", i))
                projected = self._project(views, self.learner.evaluated)
                losses.append(self.losses(projected)[0].mean())
        return torch.stack(losses).cpu().double().mean().item()

    def _linear_probe(self, features: Tensor, labels: Tensor) -> float:
        """Return the accuracy of logistic regression on the features of the train split.

        At most 200 iterations of L-BFGS on standardised features.
        """
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_ITERATIONS))
        known = self._features(self.data.train).cpu().numpy()
        with warnings.catch_warnings():  # a fixed number of iterations is the measure, not its end
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(known, self.data.train.labels.cpu())
        return float(probe.score(features.cpu().numpy(), labels.cpu()))

    def pictures(self) -> dict[str, np.ndarray]:
        """Return both views of the first images, uint8."""
        images = self.data.train.images.index_select(0, self.stream.indices(0)[:PICTURES])
        views = self.views(torch.cat([images, images]), generator(self.seed, "pictures"))
        first, second = to_uint8(views).split(len(images))
        return {"first views": as_pictures(first), "second views": as_pictures(second)}


def nt_xent(projected: Tensor, temperature: float, *, reduction: str = "none") -> Tensor:
    """Return the loss of every view (equation 1 of the paper), (2 b,), in nats.

    Args:
        projected: float, (2 b, projection): i and i + b are the views of one image.
        temperature: tau.
        reduction: "mean" returns the views' mean.
    """
    unit = functional.normalize(projected, dim=1)
    similarities = unit @ unit.T / temperature
    similarities.fill_diagonal_(float("-inf"))  # a view is not compared with itself
    partners = _partners(len(unit), unit.device)
    return functional.cross_entropy(similarities, partners, reduction=reduction)


@lru_cache(maxsize=8)
def _partners(count: int, device: torch.device) -> Tensor:
    """Return the place of every view's other one among 2 b views, int64, (2 b,)."""
    return torch.arange(count, device=device).roll(count // 2)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, neighbors: int
) -> float:
    """Return the accuracy of the weighted vote of the nearest neighbours by cosine similarity."""
    classifier = KNeighborsClassifier(
        min(neighbors, len(bank)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / KNN_TEMPERATURE),
    )
    classifier.fit(bank.cpu().numpy(), bank_labels.cpu().numpy())
    return float(classifier.score(queries.cpu().numpy(), labels.cpu().numpy()))
