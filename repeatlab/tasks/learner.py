"""One classifier in training: its optimizer, its number format, the average of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repeatlab.data import ImageSet, Splits, iter_batches
from repeatlab.tasks.optimization import Descent, OptimizationConfig, averaged, move_average
from repeatlab.tasks.precision import Precision, place

EVALUATION_BATCH = 500


class Learner:
    """An encoder with a linear head, as `OptimizationConfig` says that it is trained.

    Args:
        network: Encoder and head; it is moved to `device`.
        config: An `OptimizationConfig` with an `lr`.
        device: Where it is trained.
        head_only: Whether the encoder is left as it is, in evaluation mode.

    Attributes:
        network: Encoder and head.
        average: The average of their weights that is evaluated; None where they are themselves.
        descent: Moves the weights.
    """

    def __init__(
        self,
        network: nn.Sequential,
        config: OptimizationConfig,
        *,
        device: str,
        head_only: bool = False,
    ) -> None:
        self._precision = Precision.of(config, device)
        self._decay, self._head_only = config.ema_decay, head_only
        self.network: Any = place(network, config, device)
        self.average = averaged(network, config.ema_decay)
        if head_only:
            network[0].requires_grad_(False)
        self._train(True)
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        self.descent = Descent(weights, config, self._precision, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of normalised images, float32."""
        return self._precision(self.network, images)

    def step(self, loss: Tensor) -> None:
        """Make one update along the gradient of a 0-d loss."""
        self.descent(loss)
        move_average(self.average, self.network, self._decay)

    def _train(self, mode: bool) -> None:
        self.network.train(mode)
        if self._head_only:
            self.network[0].eval()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the network in evaluation mode for a while."""
        self._train(False)
        yield
        self._train(True)

    def features(self, data: ImageSet, splits: Splits) -> Tensor:
        """Return what the evaluated encoder makes of images as they are: float32, (n, features)."""
        with self.evaluating():
            encoder, _ = self.average or self.network
            return encode(encoder, data, splits, precision=self._precision)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits that the evaluated head gives to features."""
        _, head = self.average or self.network
        return head(features)

    def state_dict(self) -> dict[str, Any]:
        """Return all that later updates depend on."""
        state = {"network": self.network.state_dict(), "optimizer": self.descent.state_dict()}
        return state if self.average is None else state | {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.network.load_state_dict(state["network"])
        self.descent.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


@torch.no_grad()
def encode(
    network: nn.Module,
    data: ImageSet,
    splits: Splits,
    *,
    precision: Precision | None = None,
) -> Tensor:
    """Return what a network in evaluation mode gives for all of `data`: float32, (n, ...)."""
    precision = precision or Precision()
    batches = iter_batches(data, EVALUATION_BATCH, splits.mean, splits.std)
    return torch.cat([precision(network, batch.images) for batch in batches])
