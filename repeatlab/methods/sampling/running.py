"""What all samplers of a run have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repeatlab.methods.selection import draws

if TYPE_CHECKING:
    from repeatlab.tasks import Task


class Selection(NamedTuple):
    """A fresh batch as a sampler chose it.

    Attributes:
        batch: The task's batch of b samples.
        weights: float, (b,): factors on the samples' losses.
    """

    batch: Any
    weights: Tensor

    @property
    def indices(self) -> Tensor:
        """Which samples these are."""
        return self.batch.indices


class RunningSampler(ABC):
    """Draws the fresh batches of one run, in the order of their index.

    Its arguments are those of `Sampler.start`, with the sampler as `settings`.

    Attributes:
        scored: Samples forwarded for scoring so far.
        host_reads: How often the host has waited for scores on the device.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        settings: Any = None,
        *,
        progress: Callable[[], float] | None = None,
        rebuild: Callable[[str], Task] | None = None,
    ) -> None:
        self.settings, self.task, self.seed = settings, task, seed
        self.progress, self.rebuild = progress, rebuild
        self.scored = self.host_reads = 0

    def prepare(self) -> dict[str, float]:
        """Do what comes before the first update; return its cost by the names of the ledger."""
        return {}

    def drawn(self, fresh_batches: int) -> int:
        """Return how many minibatches were drawn to make so many fresh batches of."""
        return fresh_batches

    @abstractmethod
    def fresh_batch(self, index: int) -> Selection:
        """Return the fresh batch number `index`."""

    def observe(self, batch: Any, losses: Tensor, bounds: Tensor | None) -> None:  # noqa: B027
        """See what an update computed on its way.

        Args:
            batch: The batch that was visited.
            losses: (b,), the samples' driver losses before the update.
            bounds: (b,), their gradient bounds, where the task has them.
        """

    def drain(self) -> dict[str, np.ndarray]:
        """Return columns for the record, a row for each fresh batch since the last call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later draws depend on."""
        return {"scored": self.scored, "host_reads": self.host_reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.scored, self.host_reads = state["scored"], state["host_reads"]

    def draws(self, index: int) -> torch.Generator:
        """Return the generator of this sampler's draw number `index`."""
        return draws(self.seed, index)

    def unweighted(self, batch: Any) -> Selection:
        """Return a batch whose samples all count alike."""
        return Selection(batch, torch.ones(self.task.batch_size, device=self.task.device))

    def score(self, blocks: list[Any], kind: str) -> Tensor:
        """Return the scores of all samples of `blocks`, end to end, and charge for them."""
        task = self.task
        by_loss = kind == "loss"
        self.scored += len(blocks) * (task.scoring_samples if by_loss else task.bound_samples)
        score = task.sample_losses if by_loss else task.gradient_bounds
        return torch.cat([score(block) for block in blocks])
