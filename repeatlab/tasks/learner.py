"""A network in training: its optimizer, its number format, the average of its weights.

A task is made of one learner or several; `LearningTask` has what tasks do alike with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from repeatlab.data import ImageSet, Splits, gather, iter_batches
from repeatlab.tasks import Report
from repeatlab.tasks.optimization import (
    OptimizationConfig,
    OptimizerStep,
    averaged,
    move_average,
)
from repeatlab.tasks.precision import Precision, place

EVALUATION_BATCH = 500


class Saved:
    """Something whose state is that of its parts.

    Attributes:
        saved: By its name in the state, where each part is: modules, learners, generators, numbers,
            lists of such parts. What is None is left out.
    """

    saved: ClassVar[Mapping[str, str]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return all that later updates depend on."""
        parts = {name: attrgetter(path)(self) for name, path in self.saved.items()}
        return {name: _state_of(part) for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        for name, path in self.saved.items():
            part = attrgetter(path)(self)
            if isinstance(part, (int, float)):
                setattr(self, path, state[name])
            elif part is not None:
                _restore(part, state[name])


def _state_of(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, list):
        return [_state_of(one) for one in part]
    return part.state_dict() if hasattr(part, "state_dict") else part


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, list):
        for one, its in zip(part, state, strict=True):
            _restore(one, its)
    else:
        part.load_state_dict(state)


class Learner(Saved):
    """A network, trained as `OptimizationConfig` says.

    Args:
        network: It is moved to `device`.
        config: An `OptimizationConfig` with an `lr`.
        device: Where it is trained.
        parts: The networks that it is made of, where it is not called as a whole.
        average: Whether the average of the weights is kept, where `config` asks for it.

    Attributes:
        network: The network.
        average: The average of its weights that is evaluated; None where they are themselves.
        precision: In which it is computed.
        optimizer_step: Moves the weights.
        optimizer: Of these weights.
    """

    saved: ClassVar[Mapping[str, str]] = {
        "network": "network",
        "optimizer": "optimizer_step",
        "average": "average",
    }

    def __init__(
        self,
        network: nn.Module,
        config: OptimizationConfig,
        *,
        device: str,
        parts: Sequence[nn.Module] = (),
        average: bool = True,
    ) -> None:
        self.precision = Precision.of(config, device)
        self._decay = config.ema_decay if average else 0.0
        own = average and config.optimizer.name == "schedule_free"
        for part in parts or (network,):
            place(part, config, device)
        self.network: Any = network
        self.average: Any = averaged(network, self._decay or own)
        self.network.train()
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        self.optimizer_step = OptimizerStep(weights, config, device=device)
        self.optimizer = self.optimizer_step.optimizer

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what the network makes of its inputs: float32."""
        return self.precision(self.network, *inputs)

    @property
    def evaluated(self) -> Any:
        """The network that is evaluated."""
        return self.network if self.average is None else self.average

    def step(self, loss: Tensor, *, average: bool = True) -> None:
        """Make one update along the gradient of a 0-d loss; the average follows unless told not."""
        self.optimizer_step(loss)
        if average:
            move_average(self.average, self.network, self._decay, self.optimizer)

    def descend(
        self,
        losses: Tensor,
        report: Report,
        weights: Tensor | None = None,
        *,
        drivers: Tensor | None = None,
        bounds: Callable[[], Tensor] | None = None,
        average: bool = True,
    ) -> None:
        """Report the driver loss, and make one update along the mean of the samples' losses.

        Args:
            losses: (b,), whose mean is descended, weighted with `weights`, (b,), if given.
            report: As of `Task.step`.
            weights: As of `Task.step`.
            drivers: (b,), the samples' driver losses; by default `losses`.
            bounds: Returns the samples' gradient bounds, (b,), where the task has them.
            average: As in `step`.
        """
        told = (losses if drivers is None else drivers).detach()
        if weights is None:
            loss = losses.mean()
            report(loss if drivers is None else told.mean())
        else:
            with torch.no_grad():
                bounded = () if bounds is None else (bounds(),)
            report(told.mean(), told, *bounded)
            loss = (weights * losses).mean()
        self.step(loss, average=average)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the network in evaluation mode for a while."""
        self.network.eval()
        try:
            yield
        finally:
            self.network.train()

    def outputs(self, data: ImageSet, splits: Splits, network: Any = None) -> Tensor:
        """Return what the evaluated network makes of images as they are: float32, (n, ...).

        Args:
            data: The images.
            splits: How they are normalised.
            network: Another network, or a part of the evaluated one.
        """
        with self.evaluating():
            network = self.evaluated if network is None else network
            return encode(network, data, splits, precision=self.precision)

    def features(self, data: ImageSet, splits: Splits) -> Tensor:
        """Return the evaluated features of images, (n, features), of an encoder with a head."""
        encoder, _ = self.evaluated
        return self.outputs(data, splits, encoder)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits that the evaluated head gives to features."""
        _, head = self.evaluated
        return head(features)


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


class LearningTask(Saved):
    """What tasks do alike with their learners; see `repeatlab.tasks.Task` for the methods.

    An update is three functions of a subclass, each of the samples of one batch:

        outputs(batch)           what the networks make of it
        losses(outputs, batch)   the driver losses and the losses that are descended, (b,) each;
                                 the same tensor where they are one
        bounds(outputs, batch)   the gradient bounds, (b,), where they mean something

    Attributes:
        learners: All that is trained.
        learner: The only one, where there is one; likewise `optimizer`, `model` and `ema`.
        noise: The generator of what a visit redraws, if anything.
    """

    saved: ClassVar[Mapping[str, str]] = {
        "model": "model",
        "optimizer": "learner.optimizer_step",
        "ema": "ema",
    }
    learners: Sequence[Learner] = ()
    noise: torch.Generator | None = None
    environment_steps = 0

    def train_with(self, *learners: Learner) -> None:
        """Have these networks trained; one alone is `model`, the average of its weights `ema`."""
        self.learners = learners
        self.optimizer_steps = [learner.optimizer_step for learner in learners]
        self.optimizers = [learner.optimizer for learner in learners]
        self.learner, self.optimizer = learners[0], self.optimizers[0]
        self.precision = self.learner.precision
        if len(learners) == 1:
            self.model, self.ema = self.learner.network, self.learner.average

    @property
    def scoring_samples(self) -> int:
        return self.forward_samples

    @property
    def bound_samples(self) -> int:
        return self.forward_samples

    def fresh_batches(self, first: int, count: int) -> list[Any]:
        """Return the fresh batches from number `first` on."""
        return [self.fresh_batch(index) for index in range(first, first + count)]

    def draw(self, batch: Any) -> tuple[Tensor, ...]:
        """Return what an update on this batch draws, on the CPU; `outputs` takes it after it."""
        return ()

    def refresh(self, batch: Any, visit: int) -> Any:
        return batch  # where nothing is augmented

    def candidates(self, index: int, block: int) -> Any:
        return self.fresh_batch(block)

    def pick(self, blocks: Sequence[Any], picks: Tensor, index: int) -> Any:
        return gather(blocks, picks, index)

    def step(
        self,
        batch: Any,
        report: Report,
        weights: Tensor | None = None,
        *,
        average: bool = True,
    ) -> None:
        outputs = self.outputs(batch)
        drivers, losses = self.losses(outputs, batch)
        self.learner.descend(
            losses,
            report,
            weights,
            drivers=None if drivers is losses else drivers,
            bounds=lambda: self.bounds(outputs, batch),
            average=average,
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the networks in evaluation mode for a while, and leave the noise as it was."""
        noise = None if self.noise is None else self.noise.get_state()
        with ExitStack() as modes:
            for learner in self.learners:
                modes.enter_context(learner.evaluating())
            yield
        if noise is not None:
            self.noise.set_state(noise)

    @torch.no_grad()
    def sample_losses(self, batch: Any) -> Tensor:
        with self.evaluating():
            return self.losses(self.outputs(batch), batch)[0]

    @torch.no_grad()
    def gradient_bounds(self, batch: Any) -> Tensor:
        with self.evaluating():
            return self.bounds(self.outputs(batch), batch)

    def pictures(self) -> dict[str, np.ndarray]:
        return {}
