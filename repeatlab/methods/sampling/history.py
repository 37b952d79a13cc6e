"""Samplers that remember the last score of every sample: hard mining, online batch selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repeatlab.methods.sampling.running import RunningSampler, Selection, draw, draw_distinct

if TYPE_CHECKING:
    from repeatlab.methods.sampling import HardMining, OnlineBatchSelection, Progress
    from repeatlab.tasks import Task


class RunningHistory(RunningSampler):
    """The last score of every sample; NaN while it has none.

    Attributes:
        scores: float64, (samples so far,), by sample number.
        largest: The largest score so far.
        progress: Returns which share of the run is over.
    """

    kind = "loss"

    def __init__(self, task: Task, seed: int, progress: Progress) -> None:
        super().__init__(task, seed)
        self.progress = progress
        self.scores = torch.zeros(0, dtype=torch.float64)
        self.largest = 0.0

    def observe(self, batch: Any, losses: Tensor, bounds: Tensor | None) -> None:
        seen = losses if self.kind == "loss" else bounds
        self.scores = self.scores.to(seen.device)
        self.scores[batch.indices.to(seen.device)] = seen.double()

    def known(self, numbers: range) -> Tensor:
        """Return the scores of the samples `numbers`; those never seen have the largest so far."""
        missing = numbers.stop - len(self.scores)
        if missing > 0:
            unseen = self.scores.new_full((missing,), float("nan"))
            self.scores = torch.cat([self.scores, unseen])
        scores = self.scores[numbers.start : numbers.stop]
        seen = scores[~scores.isnan()]
        self.host_reads += 1
        if len(seen):
            self.largest = max(self.largest, float(seen.max()))
        return scores.nan_to_num(self.largest or 1.0)

    def state_dict(self) -> dict[str, Any]:
        own = {"scores": self.scores.cpu(), "largest": self.largest}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scores, self.largest = state["scores"], state["largest"]


class RunningHardMining(RunningHistory):
    """See `repeatlab.methods.sampling.HardMining`."""

    def __init__(self, settings: HardMining, task: Task, seed: int, progress: Progress) -> None:
        super().__init__(task, seed, progress)
        self.settings, self.kind = settings, settings.score

    def fresh_batch(self, index: int) -> Selection:
        numbers, count = self.task.population(index), self.task.batch_size
        scores = self.known(numbers)
        # Where every score is 0 the floor is too, and all are equally likely.
        floor = self.settings.floor * float(scores.mean()) or 1.0
        priorities = scores.clamp(min=floor) ** self.settings.alpha
        beta = self._beta()
        if beta:
            places = draw(priorities, count, self.draws(index))
            weights = (priorities[places] * len(numbers) / priorities.sum()) ** -beta
            weights = (weights / weights.max()).float()
        else:
            places = draw_distinct(priorities, count, self.draws(index))
            weights = torch.ones(count, device=places.device)
        batch = self.task.batch_of(places + numbers.start, index)
        return Selection(batch, weights.to(self.task.device))

    def _beta(self) -> float:
        start, end = self.settings.beta, self.settings.beta_end
        return start if end is None else start + self.progress() * (end - start)


class RunningOnlineSelection(RunningHistory):
    """See `repeatlab.methods.sampling.OnlineBatchSelection`."""

    def __init__(
        self, settings: OnlineBatchSelection, task: Task, seed: int, progress: Progress
    ) -> None:
        super().__init__(task, seed, progress)
        self.settings = settings
        self.order = torch.zeros(0, dtype=torch.int64)  # sample numbers, largest loss first

    def fresh_batch(self, index: int) -> Selection:
        numbers, count = self.task.population(index), self.task.batch_size
        if index % self.settings.sort_every == 0 or not len(self.order):
            order = self.known(numbers).argsort(descending=True, stable=True)
            self.order = order + numbers.start
        ranks = torch.arange(len(self.order), dtype=torch.float64, device=self.order.device)
        priorities = self._pressure() ** (-ranks / len(self.order))
        places = draw_distinct(priorities, count, self.draws(index))
        weights = torch.ones(count, device=self.task.device)
        return Selection(self.task.batch_of(self.order[places], index), weights)

    def _pressure(self) -> float:
        start, end = self.settings.pressure, self.settings.pressure_end
        return start if end is None else start * (end / start) ** self.progress()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"order": self.order.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.order = state["order"]
