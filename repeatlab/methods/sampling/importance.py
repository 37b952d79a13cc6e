"""Importance sampling with a switch: presample, score, resample with unbiased weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from repeatlab.cost import tau_threshold
from repeatlab.methods.sampling.running import RunningSampler, Selection, draw

if TYPE_CHECKING:
    from repeatlab.methods.sampling import Importance
    from repeatlab.tasks import Task


class RunningImportance(RunningSampler):
    """See `repeatlab.methods.sampling.Importance`.

    Attributes:
        tau: Its moving average; 0 before the first batch.
        threshold: tau_th.
        block: Blocks of b samples taken so far: while sampling is uniform the k-th fresh batch is
            that of the standard arm.
    """

    def __init__(self, settings: Importance, task: Task, seed: int) -> None:
        super().__init__(task, seed)
        self.settings = settings
        self.threshold = tau_threshold(settings.presample, settings.k)
        self.tau, self.count, self.block = 0.0, 0, 0
        self.uniform = True
        self._rows: list[tuple[int, float, float, bool]] = []

    def fresh_batch(self, index: int) -> Selection:
        self.uniform = self.tau <= self.threshold
        if self.uniform:
            batch = self._next_block(index)._replace(index=index)
            return Selection(batch, torch.ones(self.task.batch_size, device=self.task.device))
        blocks = [self._next_block(index) for _ in range(self.settings.presample)]
        scores = self.score(blocks, self.settings.score)
        picks, weights = resample(scores, self.task.batch_size, self.draws(index))
        self._move(index, scores)
        return Selection(self.task.pick(blocks, picks, index), weights)

    def _next_block(self, index: int) -> Any:
        self.block += 1
        return self.task.candidates(index, self.block - 1)

    def observe(self, batch: Any, losses: Tensor, bounds: Tensor | None) -> None:
        # A repeat, or a batch that was resampled, says nothing of a uniform one.
        if self.uniform and batch.index >= self.count:
            self._move(batch.index, losses if self.settings.score == "loss" else bounds)

    def _move(self, index: int, scores: Tensor) -> None:
        """Move the average of tau; tau is never corrected for its start, as in the paper."""
        self.host_reads += 1
        now = tau(scores)
        self.tau = self.settings.ema * self.tau + (1 - self.settings.ema) * now
        self.count = index + 1
        self._rows.append((index, now, self.tau, not self.uniform))

    def drain(self) -> dict[str, np.ndarray]:
        rows, self._rows = self._rows, []
        names = ("fresh_batch", "tau", "tau_average", "presampled")
        columns = zip(*rows, strict=True) if rows else ((),) * len(names)
        return {name: np.array(column) for name, column in zip(names, columns, strict=True)}

    def drawn(self, fresh_batches: int) -> int:
        return self.block

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("tau", "count", "block", "uniform")}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in ("tau", "count", "block", "uniform"):
            setattr(self, name, state[name])


def tau(scores: Tensor) -> float:
    """Return sqrt(B) ||g||_2 of the normalised scores, in [1, sqrt(B)]; 1 where all are 0."""
    total = float(scores.double().sum())
    if total == 0:
        return 1.0
    return len(scores) ** 0.5 * float((scores.double() / total).norm())


def resample(scores: Tensor, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `count` places drawn in proportion to `scores`, (B,), and their weights.

    The weight of place i is 1 / (B g_i), g the normalised scores: sum g_i w_i f_i = mean f for
    every f that is 0 where the score is. Where all scores are 0, all places are equally likely.
    """
    scores = scores.double()
    if not bool(scores.any()):
        scores = torch.ones_like(scores)
    places = draw(scores, count, draws)
    return places, (scores.mean() / scores[places]).float()
