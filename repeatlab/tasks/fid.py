"""Fréchet distance between generated and real images, in the features of a named network.

FID (Heusel et al. 2017, arXiv 1706.08500) fits a Gaussian to the features of each set:

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

Its value depends on extractor, resolution and sample count, so none of them is left open:

- the extractor is part of the run's configuration and of the metric's name. `fid_classifier` takes
  the 64 pooled features of a small CNN trained here on the dataset's own labels, and needs nothing
  that is not there. Its values compare runs that share one trained classifier (one data directory),
  never papers. `fid_inception` takes the 2,048 pooled features of torchvision's Inception v3
  (ImageNet weights, fetched on first use); the literature's FID uses another set of weights, so
  its numbers are near these, not equal to them;
- images are uint8 at the dataset's own resolution (8, 28 or 32 pixels); Inception sees them scaled
  to 299;
- the real side is the whole split: 359 and 360 images of digits, 5,000 and 10,000 of MNIST and
  CIFAR-10 (validation, test). How many are generated is the task's `fid_samples`. FID falls as
  either number grows: compare at equal numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.files import StoreError, replacing
from repeatlab.core.tensor_files import read_tensors, write_tensors
from repeatlab.data import DataError, Splits, TrainStream, load_splits
from repeatlab.data.augment import normalize
from repeatlab.data.sources import data_directory
from repeatlab.tasks.models import drawn_from, norm_cnn

Extractor = Literal["classifier", "inception"]
CLASSIFIER_UPDATES, CLASSIFIER_EPOCHS = 1000, 40  # whichever is less
CLASSIFIER_WIDTH = 16  # a quarter of its features
# Part of the file's name: raise it when network or training change.
CLASSIFIER_VERSION = 1
BATCH = {"classifier": 500, "inception": 50}


# --- the distance -----------------------------------------------------------------------------


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean (d,) and covariance (d, d) (divisor n - 1) in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def gaussian_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """Return the squared Fréchet distance of two Gaussians, from their moments.

    The trace of (S1 S2)^(1/2) is the sum of the roots of the product's eigenvalues. With a
    symmetric root R of S1 these are also the eigenvalues of R S2 R, a symmetric matrix: half the
    work, and no complex numbers from rounding where a covariance is singular.

    >>> gaussian_distance(np.zeros(1), np.eye(1), np.full(1, 3.0), 4 * np.eye(1))
    10.0
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)
    shift = mean - other_mean
    spread = np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(shared).sum()
    # Rounding may leave the distance of equal Gaussians a little below zero.
    return max(0.0, float(shift @ shift + spread))


# --- generated against real images ------------------------------------------------------------


class Fid:
    """FID of generated images against the splits of one dataset; real features are kept.

    Args:
        data: The dataset.
        extractor: "classifier" or "inception".

    Attributes:
        name: The metric's name: "fid_classifier" or "fid_inception".
    """

    def __init__(self, data: Splits, extractor: Extractor) -> None:
        self.data, self.extractor = data, extractor
        self.name = f"fid_{extractor}"
        self._real: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, images: Tensor, split: str) -> float:
        """Return the FID of `images` (uint8, (n, channels, height, width)) against a split.

        Args:
            images: What was generated, at the dataset's resolution.
            split: "validation" or "test": all of its images are compared with.

        Raises:
            DataError: the extractor's weights cannot be loaded.
        """
        if split not in self._real:
            self._real[split] = moments(self.features(getattr(self.data, split).images))
        return gaussian_distance(*moments(self.features(images)), *self._real[split])

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """Return the features of uint8 images (n, channels, height, width): float64, (n, d)."""
        network = load_extractor(self.extractor, self.data, images.device)
        pieces = images.split(BATCH[self.extractor])
        return torch.cat([network(piece) for piece in pieces]).cpu().double().numpy()


def prepare(extractor: Extractor, dataset: str) -> None:
    """Make the extractor's weights ready on disk, once, before workers ask for them.

    Raises:
        DataError: the dataset or the weights cannot be loaded.
    """
    load_extractor(extractor, load_splits(dataset), torch.device("cpu"))


# --- extractors -------------------------------------------------------------------------------

_loaded: dict[tuple[str, ...], Callable[[Tensor], Tensor]] = {}


def load_extractor(
    extractor: Extractor, data: Splits, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return the network, uint8 images (n, ...) to features (n, d), kept for this process.

    Raises:
        DataError: the weights of Inception cannot be loaded.
    """
    key = (extractor, str(device))
    if extractor == "classifier":
        key += (str(classifier_path(data)),)
    if key not in _loaded:
        network = _inception() if extractor == "inception" else ClassifierFeatures(data)
        _loaded[key] = network.to(device).eval().requires_grad_(False)
    return _loaded[key]


class ClassifierFeatures(nn.Module):
    """The pooled features of the classifier trained on the dataset of `data`."""

    def __init__(self, data: Splits) -> None:
        super().__init__()
        self.body = load_classifier(data)[:-1]
        self.mean, self.std = data.mean, data.std

    def forward(self, images: Tensor) -> Tensor:
        return self.body(normalize(images, self.mean, self.std))


def load_classifier(data: Splits) -> nn.Sequential:
    """Return the classifier, from disk where it lies there, else trained and put there."""
    path = classifier_path(data)
    # A file that is damaged, or holds something else, is made anew.
    with suppress(StoreError, RuntimeError, TypeError):
        model = _initial_classifier(data)
        model.load_state_dict(read_tensors(path))
        return model.eval()
    model = train_classifier(data)
    # A directory that cannot be written: each process trains its own, equal one.
    with suppress(OSError, StoreError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_tensors(temporary, model.state_dict())
    return model


def classifier_path(data: Splits) -> Path:
    """Return where the classifier's weights lie, below the data directory."""
    name = f"fid-classifier-{data.name}-{len(data.train)}-v{CLASSIFIER_VERSION}.pt"
    return data_directory() / "extractors" / name


def _initial_classifier(data: Splits) -> nn.Sequential:
    with drawn_from(0, "fid classifier"):
        return norm_cnn(data.train.images.shape[1], data.classes, width=CLASSIFIER_WIDTH)


def train_classifier(data: Splits) -> nn.Sequential:
    """Train on the train split: 1,000 updates at most; Adam, batch 128, one-cycle to 1e-2.

    On the CPU with one thread and a seed of its own, so that every process of a machine gets the
    same weights, whatever the runs' seeds, devices and threads are.
    """
    model = _initial_classifier(data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            _fit(model, data)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _fit(model: nn.Sequential, data: Splits) -> None:
    train = data.train.to("cpu")
    size = min(128, len(train))
    stream = TrainStream(train, batch_size=size, seed=0, mean=data.mean, std=data.std)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    updates = min(CLASSIFIER_UPDATES, CLASSIFIER_EPOCHS * stream.batches_per_epoch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=updates)
    for index in range(updates):
        batch = stream.fresh_batch(index)
        loss = functional.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class InceptionFeatures(nn.Module):
    """The 2,048 pooled features of torchvision's Inception v3 for uint8 images of any size."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        from torchvision.models import inception_v3

        self.network = inception_v3(weights=None, init_weights=False, transform_input=False)
        self.network.load_state_dict(state)
        self.network.fc = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        colours = images.expand(-1, 3, -1, -1)  # grey: the same value three times
        large = functional.interpolate(
            colours.float(), (299, 299), mode="bilinear", antialias=True, align_corners=False
        )
        # These weights take pixels in [-1, 1]: torchvision's `transform_input`, which is on with
        # them and off here, brings images of ImageNet's mean and deviation back to that.
        return self.network(large / 127.5 - 1)


def _inception() -> InceptionFeatures:
    from torchvision.models import Inception_V3_Weights

    weights = Inception_V3_Weights.IMAGENET1K_V1
    try:
        return InceptionFeatures(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, HTTPException, RuntimeError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise DataError(
            f"the weights of Inception v3 cannot be loaded ({type(error).__name__}: {error})."
            f" Put {weights.url} at {file}, or set `extractor: classifier`."
        ) from None
