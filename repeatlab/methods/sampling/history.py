"""Samplers that remember the last score of every sample: hard mining, online batch selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repeatlab.methods.sampling.running import RunningSampler, Selection
from repeatlab.methods.selection import LastScores, draw_by_rank, hard_mining

if TYPE_CHECKING:
    from repeatlab.methods.sampling import HardMining, OnlineBatchSelection


class RunningHistory(RunningSampler):
    """Draws by the last score of every sample.

    Attributes:
        memory: The scores, by sample number.
    """

    kind = "loss"

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.memory = LastScores()

    def observe(self, batch: Any, losses: Tensor, bounds: Tensor | None) -> None:
        self.memory.update(batch.indices, losses if self.kind == "loss" else bounds)

    def known(self, numbers: range) -> Tensor:
        """Return the scores of the samples `numbers`; those never seen have the largest so far."""
        self.host_reads += 1
        return self.memory.known(numbers)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.memory.load_state_dict(state)


class RunningHardMining(RunningHistory):
    """See `repeatlab.methods.sampling.HardMining`."""

    settings: HardMining

    @property
    def kind(self) -> str:
        """Which of an update's scores are remembered."""
        return self.settings.score

    def fresh_batch(self, index: int) -> Selection:
        numbers, settings = self.task.population(index), self.settings
        places, weights = hard_mining(
            self.known(numbers),
            self.task.batch_size,
            self.draws(index),
            alpha=settings.alpha,
            floor=settings.floor,
            beta=self._beta(),
        )
        batch = self.task.batch_of(places + numbers.start, index)
        return Selection(batch, weights.to(self.task.device))

    def _beta(self) -> float:
        start, end = self.settings.beta, self.settings.beta_end
        return start if end is None else start + self.progress() * (end - start)


class RunningOnlineSelection(RunningHistory):
    """See `repeatlab.methods.sampling.OnlineBatchSelection`.

    Attributes:
        order: int64, (n,): sample numbers as last sorted, the largest loss first.
    """

    settings: OnlineBatchSelection

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.order = torch.zeros(0, dtype=torch.int64)

    def fresh_batch(self, index: int) -> Selection:
        numbers, count = self.task.population(index), self.task.batch_size
        if index % self.settings.sort_every == 0 or not len(self.order):
            order = self.known(numbers).argsort(descending=True, stable=True)
            self.order = order + numbers.start
        chosen = draw_by_rank(self.order, count, self.draws(index), pressure=self._pressure())
        return self.unweighted(self.task.batch_of(chosen, index))

    def _pressure(self) -> float:
        start, end = self.settings.pressure, self.settings.pressure_end
        return start if end is None else start * (end / start) ** self.progress()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"order": self.order.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.order = state["order"]
