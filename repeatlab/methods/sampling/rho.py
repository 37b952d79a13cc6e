"""RHO-LOSS: of a presample, the samples whose loss can still be reduced most."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repeatlab.core.seeding import generator
from repeatlab.methods.sampling.running import RunningSampler, Selection
from repeatlab.methods.selection import rho_loss

if TYPE_CHECKING:
    from repeatlab.methods.sampling import RhoLoss


class RunningRhoLoss(RunningSampler):
    """See `repeatlab.methods.sampling.RhoLoss`.

    Attributes:
        irreducible: float32, (samples,): each sample's loss under the model that never saw it.
    """

    settings: RhoLoss
    irreducible: Tensor | None = None

    def prepare(self) -> dict[str, float]:
        start = perf_counter()
        self.irreducible = self._train_two_models()
        updates = 2 * self.settings.holdout_updates
        return {
            "holdout_updates": updates,
            "holdout_fresh_batches": updates,
            "holdout_forward_samples": updates * self.task.forward_samples,
            "holdout_backward_samples": updates * self.task.backward_samples,
            "holdout_seconds": perf_counter() - start,
        }

    def fresh_batch(self, index: int) -> Selection:
        p, count = self.settings.presample, self.task.batch_size
        blocks = [self.task.candidates(index, index * p + place) for place in range(p)]
        numbers = torch.cat([block.indices for block in blocks])
        picks, _ = rho_loss(self.score(blocks, "loss"), self.irreducible[numbers], count)
        return self.unweighted(self.task.pick(blocks, picks, index))

    def drawn(self, fresh_batches: int) -> int:
        return self.settings.presample * fresh_batches

    def _train_two_models(self) -> Tensor:
        """Return every sample's loss under a model trained on the half that it is not in."""
        # The run's own batches: a model of another seed has other label noise.
        total, batch_of = len(self.task.population(0)), self.task.batch_of
        halves = torch.randperm(total, generator=generator(self.seed, "holdout")).chunk(2)
        losses = torch.empty(total, device=self.task.device)
        for number, (seen, unseen) in enumerate((halves, halves[::-1])):
            model = self.rebuild(f"holdout/{number}")
            for update in range(self.settings.holdout_updates):
                draws = generator(self.seed, f"holdout/{number}", update)
                places = torch.randint(len(seen), (model.batch_size,), generator=draws)
                model.step(batch_of(seen[places], update), lambda loss: None)
            for indices in unseen.split(model.batch_size):
                batch = batch_of(indices, 0)
                losses[batch.indices] = model.sample_losses(batch)
            self.scored += len(unseen)
        return losses

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"irreducible": self.irreducible}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        losses = state["irreducible"]
        self.irreducible = None if losses is None else losses.to(self.task.device)
