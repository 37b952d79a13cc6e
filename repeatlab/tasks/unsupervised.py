"""Density modelling: a convolutional variational autoencoder on MNIST and digits.

A VAE (Kingma and Welling 2014, arXiv 1312.6114) with a Gaussian posterior of diagonal covariance, a
standard normal prior, and one Bernoulli per pixel. One update is one step on the batch mean of
the negative ELBO, in nats per image, with one draw of epsilon:

    -ELBO(x) = -log p(x | z) + KL(q(z | x) || p(z)),    z = mean(x) + std(x) * epsilon

The update's loss is always the negative ELBO. The driver loss is `driver`: "elbo" (default, the
same), or its part "reconstruction" or "kl". A decoder that says p = 0.5 everywhere reconstructs at
pixels * ln 2: 543.4274 nats for 28 x 28, 44.3614 for 8 x 8; a fresh network starts there.

Pixels are grey levels in [0, 1], taken as the Bernoulli's target as they are (the loss then has a
floor above 0, and is no likelihood); `binarize` draws each pixel as 0 or 1 with its grey level for
every fresh batch, the field's dynamic binarisation, on which likelihoods are compared.

Under repetition: a repeat redraws epsilon, so its loss differs also where nothing was learned;
`redraw_epsilon: false` keeps one draw for all visits of a fresh batch. A repeat sees the same
binarised pixels unless the method asks for `fresh_views`. There is no BatchNorm and no dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.seeding import generator
from repeatlab.data import Batch, Splits, TrainStream, iter_batches
from repeatlab.data.augment import as_pictures, to_uint8
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.dataset import DatasetTask, DatasetTaskConfig
from repeatlab.tasks.fid import Extractor, Fid, prepare
from repeatlab.tasks.learner import EVALUATION_BATCH, Learner
from repeatlab.tasks.models import drawn_from
from repeatlab.tasks.optimization import OptimizationConfig, OptimizerChoice, chosen
from repeatlab.tasks.precision import Precision

PICTURES = 16  # of each kind


class UnsupervisedConfig(DatasetTaskConfig, OptimizationConfig):
    """Settings of the unsupervised task; the defaults are the plan's, on the embedded data."""

    name: Literal["unsupervised"] = "unsupervised"
    width: Annotated[int, Field(ge=1)] = 16
    """Channels of the first layer; 32 on MNIST is the plan's network of about 1 M parameters."""
    latent: Annotated[int, Field(ge=1)] = 20
    """Dimensions of z."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    optimizer: OptimizerChoice = chosen("adam")
    batch_size: Annotated[int, Field(ge=1)] = 128
    driver: Literal["elbo", "reconstruction", "kl"] = "elbo"
    binarize: bool = False
    redraw_epsilon: bool = True
    """Whether a repeat draws epsilon anew; otherwise it is a function of (seed, fresh batch)."""
    extractor: Extractor = "classifier"
    """Whose features FID is taken in; see `repeatlab.tasks.fid`."""
    fid_samples: Annotated[int, Field(ge=2)] = 1000
    """How many images are generated for FID."""

    def refusals(self) -> dict[str, str]:
        one = "only what `binarize` draws has another view: images are not augmented"
        return super().refusals() | ({} if self.binarize else {"fresh_views": one})

    def prepare(self) -> None:
        super().prepare()
        prepare(self.extractor, self.dataset)


class Unsupervised(DatasetTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods."""

    Config: ClassVar[type[TaskConfig]] = UnsupervisedConfig
    saved: ClassVar[Mapping[str, str]] = {
        "model": "model",
        "optimizer": "learner.optimizer_step",
        "noise": "noise",
        "ema": "ema",
    }

    def __init__(
        self, config: UnsupervisedConfig, *, seed: int, device: str, data: Splits | None = None
    ) -> None:
        super().__init__(config, seed=seed, device=device, data=data)
        channels, size = self.data.train.images.shape[1:3]
        # Pixels stay in [0, 1]: they are the Bernoulli's targets.
        self.scale = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        self.stream = TrainStream(
            self.data.train, batch_size=config.batch_size, seed=seed, **self.scale
        )
        with drawn_from(seed):
            model = VAE(channels, size, width=config.width, latent=config.latent)
        model.precision = Precision.of(config, device)
        parts = (model.encoder, model.decoder)
        self.train_with(Learner(model, config, device=device, parts=parts))
        self.noise = generator(seed, "epsilon")
        self.fid = Fid(self.data, config.extractor)

    def make_batch(self, indices: Tensor, index: int, visit: int = 0) -> Batch:
        batch = self.stream.batch_of(indices, index)
        if not self.config.binarize:
            return batch
        draws = generator(self.seed, f"binarize/{visit}" if visit else "binarize", index)
        return batch._replace(images=binarize(batch.images, draws))

    def outputs(self, batch: Batch, epsilon: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `VAE.terms` does, with the epsilon that this update draws, or has drawn.

        For a batch's `sample_losses` it is the epsilon that the next update will draw, so that
        their mean is then that update's driver loss.
        """
        if epsilon is None:
            (epsilon,) = self.draw(batch)
        return self.model.terms(batch.images, epsilon.to(self.device, non_blocking=True))

    def losses(self, terms: tuple[Tensor, Tensor, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the driver loss and the negative ELBO of every image, (b,) each."""
        _, reconstruction, divergence = terms
        total = reconstruction + divergence
        drivers = {"elbo": total, "reconstruction": reconstruction, "kl": divergence}
        return drivers[self.config.driver], total

    def bounds(self, terms: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Tensor:
        """Return the norm of the reconstruction's gradient at the decoder's logits, (b,)."""
        return bernoulli_bounds(terms[0], batch.images)

    def draw(self, batch: Batch) -> tuple[Tensor]:
        """Return epsilon, one draw for every sample, made on the CPU: (batch, latent)."""
        redrawn = self.config.redraw_epsilon
        noise = self.noise if redrawn else generator(self.seed, "epsilon", batch.index)
        return (torch.randn((len(batch.images), self.config.latent), generator=noise),)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return the driver loss, the negative ELBO and its parts (nats per image), and FID.

        One draw of epsilon per image, always the same. FID is that of the decoder's means at fixed
        z, on validation and test.
        """
        data = self.data.evaluated(split)
        draws = generator(0, "evaluation")
        pieces = []
        for batch in iter_batches(data, EVALUATION_BATCH, **self.scale):
            images = binarize(batch.images, draws) if self.config.binarize else batch.images
            epsilon = torch.randn((len(images), self.config.latent), generator=draws)
            terms = self.learner.evaluated.terms(images, epsilon.to(self.device))
            pieces.append(torch.stack(terms[1:]))
        parts = torch.cat(pieces, dim=1).cpu().double().mean(dim=1)
        driver, total = self.losses((None, *parts), None)
        metrics = {
            "loss": driver.item(),
            "negative_elbo": total.item(),
            "reconstruction": parts[0].item(),
            "kl": parts[1].item(),
        }
        if split != "train":
            metrics[self.fid.name] = self.fid(self._samples(self.config.fid_samples), split)
        return metrics

    def _samples(self, count: int) -> Tensor:
        """Return the decoder's means at fixed draws from the prior: uint8, (count, ...)."""
        latents = torch.randn((count, self.config.latent), generator=generator(0, "latents"))
        model = self.learner.evaluated
        pieces = [model.decode(z).sigmoid() for z in latents.to(self.device).split(500)]
        return to_uint8(torch.cat(pieces))

    @torch.no_grad()
    def pictures(self) -> dict[str, np.ndarray]:
        """Return validation images, their reconstructions at the posterior's mean, and samples."""
        originals, model = self.data.validation.images[:PICTURES], self.learner.evaluated
        means, _ = model.encode(originals.float() / 255)
        images = {
            "originals": originals,
            "reconstructions": to_uint8(model.decode(means).sigmoid()),
            "samples": self._samples(PICTURES),
        }
        return {name: as_pictures(value) for name, value in images.items()}


class VAE(nn.Module):
    """Two 4x4 convolutions, each halving the image, and a hidden layer; the decoder mirrors them.

    1.08 million parameters for 28 x 28 grey pixels at width 32 and 20 latent dimensions.

    Args:
        channels: Of the images.
        size: Height and width of the images, a multiple of 4.
        width: Channels of the first layer; the second has twice as many.
        latent: Dimensions of z.

    Attributes:
        precision: In which encoder and decoder run; by default that of their weights.

    Raises:
        ValueError: `size` is not a multiple of 4.
    """

    precision = Precision()

    def __init__(self, channels: int, size: int, *, width: int, latent: int) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f"images must be a multiple of 4 pixels wide; not {size}.")
        maps, hidden = (2 * width, size // 4, size // 4), 5 * width
        flat = maps[0] * maps[1] * maps[2]
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2 * latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.ReLU(),
            nn.Linear(hidden, flat),
            nn.ReLU(),
            nn.Unflatten(1, maps),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
        )
        # Every pixel starts at p = 0.5. torch's own draw for a transposed convolution onto one
        # channel is wide enough to start a tenth above that.
        nn.init.zeros_(self.decoder[-1].weight)
        nn.init.zeros_(self.decoder[-1].bias)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and log-variance, each (batch, latent)."""
        mean, log_variance = self.precision(self.encoder, images).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Return the logits of the pixels, (batch, channels, size, size)."""
        return self.precision(self.decoder, z)

    def terms(self, images: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decoder's logits, and reconstruction loss and KL divergence of every image.

        Logits are shaped as the images, the losses (batch,), in nats.

        Args:
            images: (batch, channels, size, size), in [0, 1].
            epsilon: (batch, latent), standard normal.
        """
        mean, log_variance = self.encode(images)
        logits = self.decode(mean + (0.5 * log_variance).exp() * epsilon)
        reconstruction = functional.binary_cross_entropy_with_logits(
            logits, images, reduction="none"
        )
        # Kingma and Welling 2014, appendix B.
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return logits, reconstruction.flatten(1).sum(dim=1), divergence.sum(dim=1)


def bernoulli_bounds(logits: Tensor, images: Tensor) -> Tensor:
    """Return ||sigmoid(logits) - images||_2 of every image, (batch,)."""
    return (logits.sigmoid() - images).flatten(1).norm(dim=1)


def binarize(images: Tensor, draws: torch.Generator) -> Tensor:
    """Return each pixel as 1 with the probability of its grey level in [0, 1], else 0."""
    uniform = torch.rand(images.shape, generator=draws).to(images.device, non_blocking=True)
    return (uniform < images).to(images.dtype)
