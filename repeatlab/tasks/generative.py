"""Adversarial generation: DCGAN on CIFAR-10, MNIST and digits.

DCGAN (Radford et al. 2016, arXiv 1511.06434) with the non-saturating loss of Goodfellow et al. 2014
(arXiv 1406.2661). One update is one step of the discriminator D, then one of the generator G, on
the same generated images:

    loss of D = mean -log D(x) + mean -log(1 - D(G(z)))      2 ln 2 = 1.386294 where D says 1/2
    loss of G = mean -log D(G(z)), by the D just updated       ln 2 = 0.693147 where D says 1/2

The driver loss is `driver`: "discriminator" (default), "generator" or their "sum" (3 ln 2). D's is
known before any backward, G's and the sum only after D's step. At equilibrium none of them says how
good the samples are: FID does.

Convolutions and BatchNorm start from N(0, 0.02) and N(1, 0.02), as in the paper; so is Adam 2e-4
with betas (0.5, 0.999), the default. Images are scaled to [-1, 1], and those whose width is no
power of two are framed in black (MNIST: 32 pixels), the frame being cut off before FID and
pictures.

Under repetition: a repeat redraws z, so D meets the same real images beside new generated ones;
`redraw_noise: false` keeps one z for all visits of a fresh batch. BatchNorm's running statistics
move at every visit, G's once, D's once for the real images and twice for the generated ones, each
in a pass of its own. There is no augmentation: `fresh_views` is refused.

One *sample* of the sampling methods is a real image and the generated one at its place: its loss is
the driver for this pair, and the mean over samples is the driver. `weights` weigh the real images
in D's loss, and nothing else.

An update passes `batch_size` images through G once and through D three times (real, generated,
generated again after D's step), forward and backward alike: the ledger counts 4 each per image.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from repeatlab.core.seeding import generator
from repeatlab.data import Batch, TrainStream, iter_batches
from repeatlab.data.augment import as_pictures, to_uint8
from repeatlab.tasks import Report, TaskConfig
from repeatlab.tasks.dataset import DatasetTask, DatasetTaskConfig
from repeatlab.tasks.fid import Extractor, Fid, prepare
from repeatlab.tasks.learner import EVALUATION_BATCH, Learner
from repeatlab.tasks.models import drawn_from
from repeatlab.tasks.optimization import OptimizationConfig, OptimizerChoice, chosen

PICTURES = 64


class GenerativeConfig(DatasetTaskConfig, OptimizationConfig):
    """Settings of the generative task; the defaults are the plan's, on the embedded data."""

    name: Literal["generative"] = "generative"
    split: Literal["fixed"] = "fixed"
    """FID's classifier has been trained on the images of this split."""
    width: Annotated[int, Field(ge=1)] = 32
    """Channels next to the image; 64 on CIFAR-10 is the plan's pair of about 2 M parameters."""
    latent: Annotated[int, Field(ge=1)] = 100
    """Dimensions of z, standard normal."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    optimizer: OptimizerChoice = chosen("adam", betas=(0.5, 0.999))
    """Of D and of G, one each."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    driver: Literal["discriminator", "generator", "sum"] = "discriminator"
    redraw_noise: bool = True
    """Whether a repeat draws z anew; otherwise it is a function of (seed, fresh batch)."""
    extractor: Extractor = "classifier"
    """Whose features FID is taken in; see `repeatlab.tasks.fid`."""
    fid_samples: Annotated[int, Field(ge=2)] = 1000
    """How many images are generated for FID."""

    def prepare(self) -> None:
        super().prepare()
        prepare(self.extractor, self.dataset)

    def refusals(self) -> dict[str, str]:
        refused = {
            "rho_loss": "the losses move against each other, so that none is irreducible",
            "fresh_views": "images are not augmented, so that there is one view of each",
        }
        if self.driver == "generator":
            by_loss = ("hard_mining", "online", "importance", "selective")
            refused |= dict.fromkeys(by_loss, "the generator's loss belongs to no image")
        if self.driver != "discriminator":
            refused["step_size"] = "this driver is known only after the discriminator's step"
        return super().refusals() | refused


class Generative(DatasetTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods."""

    Config: ClassVar[type[TaskConfig]] = GenerativeConfig
    saved: ClassVar[Mapping[str, str]] = {
        "generator": "g",
        "discriminator": "d",
        "g_optimizer": "g_learner.optimizer_step",
        "d_optimizer": "d_learner.optimizer_step",
        "noise": "noise",
        "ema": "g_ema",
    }

    def __init__(self, config: GenerativeConfig, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        channels, pixels = self.data.train.images.shape[1:3]
        size = 1 << (pixels - 1).bit_length()  # the next power of two
        self.frame = (size - pixels) // 2
        self.scale = {"mean": (0.5,) * channels, "std": (0.5,) * channels}  # to [-1, 1]
        self.stream = TrainStream(
            self.data.train, batch_size=config.batch_size, seed=seed, **self.scale
        )
        with drawn_from(seed):
            shape = {"channels": channels, "size": size, "width": config.width}
            g = build_generator(**shape, latent=config.latent).apply(initialize)
            d = build_discriminator(**shape).apply(initialize)
        self.g_learner = Learner(g, config, device=device)
        self.d_learner = Learner(d, config, device=device, average=False)
        self.train_with(self.d_learner, self.g_learner)
        self.g, self.g_ema = self.g_learner.network, self.g_learner.average
        self.d = self.d_learner.network
        self.noise = generator(seed, "noise")
        self.fid = Fid(self.data, config.extractor)
        self.forward_samples = self.backward_samples = 4 * config.batch_size

    @property
    def scoring_samples(self) -> int:
        return 3 * self.batch_size  # G, and D on generated and on real images

    @property
    def bound_samples(self) -> int:
        return self.batch_size

    def refresh(self, batch: Batch, visit: int) -> Batch:
        return batch

    def make_batch(self, indices: Tensor, index: int, visit: int = 0) -> Batch:
        return self._framed(self.stream.batch_of(indices, index))

    def _framed(self, batch: Batch) -> Batch:
        if not self.frame:
            return batch
        return batch._replace(images=pad(batch.images, (self.frame,) * 4, value=-1.0))

    def step(self, batch: Batch, report: Report, weights: Tensor | None = None) -> None:
        driver, weighted = self.config.driver, weights is not None
        fake = self.g_learner(self._latents(batch))

        real_logits = self.d_learner(batch.images)
        real_losses, fake_losses = softplus(-real_logits), softplus(self.d_learner(fake.detach()))
        d_loss = real_losses.mean() + fake_losses.mean()
        objective = d_loss
        if weighted:
            objective = (weights * real_losses).mean() + fake_losses.mean()
            d_losses = (real_losses + fake_losses).detach()
            bounds = (-real_logits.detach()).sigmoid()
        if driver == "discriminator":
            report(d_loss, *((d_losses, bounds) if weighted else ()))
        self.d_learner.step(objective)

        self.d.requires_grad_(False)  # G's gradient passes through D, and leaves nothing there
        g_losses = softplus(-self.d_learner(fake))
        g_loss = g_losses.mean()
        if driver != "discriminator":
            of_samples = (self._driver(d_losses, g_losses.detach()), bounds) if weighted else ()
            report(self._driver(d_loss.detach(), g_loss), *of_samples)
        self.g_learner.step(g_loss)
        self.d.requires_grad_(True)

    def _latents(self, batch: Batch) -> Tensor:
        """Return one draw for every sample, made on the CPU: (batch, latent, 1, 1)."""
        redrawn = self.config.redraw_noise
        noise = self.noise if redrawn else generator(self.seed, "noise", batch.index)
        shape = (len(batch.images), self.config.latent, 1, 1)
        return torch.randn(shape, generator=noise).to(self.device, non_blocking=True)

    @torch.no_grad()
    def sample_losses(self, batch: Batch) -> Tensor:
        """Return the driver loss of every pair of a real image and an upcoming generated one.

        Their mean is not the next update's driver loss: models are in evaluation mode here, and
        train with the batch's own BatchNorm statistics. With `driver: generator` a loss depends on
        z alone, so it says nothing about the real image.
        """
        with self.evaluating():
            fake_logits = self.d_learner(self.g_learner(self._latents(batch)))
            d_losses = softplus(-self.d_learner(batch.images)) + softplus(fake_logits)
        return self._driver(d_losses, softplus(-fake_logits))

    @torch.no_grad()
    def gradient_bounds(self, batch: Batch) -> Tensor:
        """Return 1 - D(x) of every real image, its part of the gradient at D's logit."""
        with self.evaluating():
            return (-self.d_learner(batch.images)).sigmoid()

    def _driver(self, d_loss: Tensor, g_loss: Tensor) -> Tensor:
        if self.config.driver == "sum":
            return d_loss + g_loss
        return d_loss if self.config.driver == "discriminator" else g_loss

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return the driver loss, the losses of D and G (nats), and FID.

        `fid_samples` images from fixed z against the split's real ones, with BatchNorm's running
        statistics. FID on validation and test. Where G's weights are averaged, the average's images
        are evaluated.
        """
        data = self.data.evaluated(split)
        with self.evaluating():
            batches = iter_batches(data, EVALUATION_BATCH, **self.scale)
            real = [self.d_learner(self._framed(batch).images) for batch in batches]
            fakes = self._samples(self.config.fid_samples)
            fake = [self.d_learner(piece) for piece in fakes.split(EVALUATION_BATCH)]
        real_logits, logits = (torch.cat(pieces).cpu().double() for pieces in (real, fake))
        d_loss = softplus(-real_logits).mean() + softplus(logits).mean()
        g_loss = softplus(-logits).mean()
        metrics = {
            "loss": self._driver(d_loss, g_loss).item(),
            "discriminator_loss": d_loss.item(),
            "generator_loss": g_loss.item(),
        }
        if split != "train":
            metrics[self.fid.name] = self.fid(self._to_pixels(fakes), split)
        return metrics

    def _samples(self, count: int) -> Tensor:
        """Return G's images for fixed z, always the same, in [-1, 1]: (count, ...)."""
        shape = (count, self.config.latent, 1, 1)
        latents = torch.randn(shape, generator=generator(0, "latents")).to(self.device)
        g = self.g_learner.evaluated
        return torch.cat([self.precision(g, z) for z in latents.split(EVALUATION_BATCH)])

    def _to_pixels(self, images: Tensor) -> Tensor:
        """Return images in [-1, 1] as uint8 at the dataset's own resolution."""
        inside = slice(self.frame, images.shape[-1] - self.frame)
        return to_uint8((images[..., inside, inside] + 1) / 2)

    @torch.no_grad()
    def pictures(self) -> dict[str, np.ndarray]:
        """Return validation images, and G's for the z that FID begins with."""
        with self.evaluating():
            samples = self._to_pixels(self._samples(PICTURES))
        images = {"data": self.data.validation.images[:PICTURES], "samples": samples}
        return {name: as_pictures(value) for name, value in images.items()}


def stages(size: int, width: int) -> list[int]:
    """Return the channels at 4, 8, ... and size / 2 pixels; images of 8 pixels begin at 2.

    >>> stages(32, 64)
    [256, 128, 64]
    >>> stages(8, 32)
    [64, 32]

    Raises:
        ValueError: `size` is not a power of two from 8.
    """
    if size < 8 or size & (size - 1):
        raise ValueError(f"images must be 8, 16, 32, ... pixels wide; not {size}.")
    doublings = (size // (4 if size > 8 else 2)).bit_length() - 1
    return [width << place for place in reversed(range(doublings))]


def build_generator(*, channels: int, size: int, width: int, latent: int) -> nn.Sequential:
    """Return G, (batch, latent, 1, 1) to images in [-1, 1]; 1.07 M parameters at 32 px, width 64.

    From one pixel to the first stage, then transposed 4x4 convolutions that double the size.
    """
    maps = stages(size, width)
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent, maps[0], size >> len(maps), bias=False)]
    for inputs, outputs in pairwise([*maps, channels]):
        layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
        layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False))
    return nn.Sequential(*layers, nn.Tanh())


def build_discriminator(*, channels: int, size: int, width: int) -> nn.Sequential:
    """Return D, images to logits (batch,); 0.66 M parameters at 32 px, width 64.

    4x4 convolutions that halve the size, without BatchNorm at the image, then all to one logit.
    """
    maps = stages(size, width)[::-1]
    layers: list[nn.Module] = []
    for depth, (inputs, outputs) in enumerate(pairwise([channels, *maps])):
        layers.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs)] if depth else []
        layers.append(nn.LeakyReLU(0.2))
    logit = nn.Conv2d(maps[-1], 1, size >> len(maps), bias=False)
    return nn.Sequential(*layers, logit, nn.Flatten(0))


def initialize(layer: nn.Module) -> None:
    """Draw a layer's weights as the DCGAN paper does."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)
