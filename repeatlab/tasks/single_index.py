"""A single-index target, generated and seen once: the laboratory's own control.

Inputs x are N(0, I_d), new for every batch. The target is y = He3(<w*, x>) with the third Hermite
polynomial He3(z) = z^3 - 3 z, not normalised (E y = 0, E y^2 = 6), and a unit vector w* drawn from
the seed. The student is a hidden layer of ReLUs at torch's own first weights, trained by SGD on the
mean squared error, which is also the driver loss.

Why it is a control: at first no step of one visit has a component along w* that stands out of the
noise (the information exponent of He3 is 3), and a run that has not found w* explains nothing. A
second step on the *same* batch does have one: gradient descent that reuses batches learns such
targets in time linear in d, where that on fresh batches needs far more samples (Dandi et al. 2024,
arXiv 2402.03220; Lee et al. 2024, arXiv 2406.01581). So repetition has to win at equal fresh data.
At equal updates, once every arm has its own learning rate and T is so long that all have found w*,
nothing is left of that, though repetition still finds it in fewer updates; at a T that is too short
for one visit a batch, or at a rate that is too low for it, repetition seems to win.

With `blank` that share of the batches shows x = 0, whose target is 0: they are soon learnt and hold
nothing of w*, so that their losses say which batches teach. Extra visits that go to high losses
then help, and the same number of them dealt out anyhow do not: the planted effect of hardness.

No sample is seen in two batches: "train" is evaluated on samples that are none of training's.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from repeatlab.core.seeding import generator
from repeatlab.data.batches import gather
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.learner import Learner, LearningTask
from repeatlab.tasks.models import drawn_from
from repeatlab.tasks.optimization import OptimizationConfig, OptimizerChoice, chosen

EVALUATED = 4_000  # samples of each split
ONCE = "samples are generated and seen in one batch alone"


class SingleIndexConfig(TaskConfig, OptimizationConfig):
    """Settings of the single-index task."""

    most: ClassVar = TaskConfig.most | {"inputs": 10_000}
    name: Literal["single_index"] = "single_index"
    inputs: Annotated[int, Field(ge=1)] = 128
    """d, the numbers of an input."""
    width: Annotated[int, Field(ge=1)] = 64
    """ReLUs of the student."""
    lr: Annotated[float, Field(gt=0)] = 0.02
    optimizer: OptimizerChoice = chosen("sgd")
    batch_size: Annotated[int, Field(ge=1)] = 256
    blank: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the fresh batches that show nothing."""

    def refusals(self) -> dict[str, str]:
        return {
            "hard_mining": f"{ONCE}: there is none whose last loss is known",
            "online": f"{ONCE}: there is none whose last loss is known",
            "rho_loss": f"{ONCE}: a model on the other half has nothing to say of them",
            "fresh_views": "inputs are not augmented",
            "fresh_samples": "N batches of new samples in place of N visits are standard training: "
            "use `{}`",
        }


class SingleIndexBatch(NamedTuple):
    """Samples: inputs (b, d) and targets (b,), float32; indices (b,); which fresh batch it is."""

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    index: int


class SingleIndex(LearningTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        direction: w*, (d,), of length 1, on the CPU.
    """

    Config: ClassVar[type[TaskConfig]] = SingleIndexConfig

    def __init__(self, config: SingleIndexConfig, *, seed: int, device: str) -> None:
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.batch_size = self.forward_samples = self.backward_samples = config.batch_size
        direction = torch.randn(config.inputs, generator=generator(seed, "direction"))
        self.direction = direction / direction.norm()
        with drawn_from(seed):
            student = nn.Sequential(
                nn.Linear(config.inputs, config.width), nn.ReLU(), nn.Linear(config.width, 1)
            )
        self.train_with(Learner(student, config, device=device))

    def samples(self, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return new inputs, (count, d), and their targets, (count,), on the device."""
        inputs = torch.randn(count, self.config.inputs, generator=draws)
        return self._on_device(inputs, hermite(inputs @ self.direction))

    def _on_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def fresh_batch(self, index: int) -> SingleIndexBatch:
        inputs, targets = self.samples(self.batch_size, generator(self.seed, "samples", index))
        if is_blank(self.seed, index, self.config.blank):
            inputs, targets = torch.zeros_like(inputs), torch.zeros_like(targets)
        numbers = torch.arange(index * self.batch_size, (index + 1) * self.batch_size)
        return SingleIndexBatch(inputs, targets, *self._on_device(numbers), index)

    def population(self, index: int) -> range:
        return range(index * self.batch_size, (index + 1) * self.batch_size)

    def batch_of(self, indices: Tensor, index: int) -> SingleIndexBatch:
        return gather([self.fresh_batch(index)], indices - index * self.batch_size, index)

    def outputs(self, batch: SingleIndexBatch) -> Tensor:
        """Return what the student says of every sample, (b,)."""
        return self.learner(batch.inputs).squeeze(1)

    def losses(self, outputs: Tensor, batch: SingleIndexBatch) -> tuple[Tensor, Tensor]:
        """Return every sample's squared error, (b,), which drives and is descended."""
        losses = (outputs - batch.targets).square()
        return losses, losses

    def bounds(self, outputs: Tensor, batch: SingleIndexBatch) -> Tensor:
        """Return the size of the loss's derivative at every sample's output, (b,)."""
        return 2 * (outputs - batch.targets).abs()

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, Any]:
        """Return the mean squared error, and the share of the targets' variance explained."""
        inputs, targets = self.samples(EVALUATED, generator(self.seed, f"evaluated/{split}"))
        with self.evaluating():
            outputs = self.learner.precision(self.learner.evaluated, inputs).squeeze(1)
        loss = (outputs - targets).square().mean()
        explained = 1 - loss / targets.var(correction=0)
        return {"loss": loss.item(), "explained": explained.item()}


def hermite(z: Tensor) -> Tensor:
    """Return He3(z) = z^3 - 3 z."""
    return z**3 - 3 * z


def is_blank(seed: int, index: int, share: float) -> bool:
    """Whether fresh batch `index` shows nothing, as a share of them does."""
    return share > 0 and torch.rand((), generator=generator(seed, "blank", index)).item() < share
