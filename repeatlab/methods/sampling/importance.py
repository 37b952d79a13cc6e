"""Importance sampling with a switch: presample, score, resample with unbiased weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from repeatlab.cost import tau_threshold
from repeatlab.methods.sampling.running import RunningSampler, Selection
from repeatlab.methods.selection import ImportanceSwitch, importance_sampling

if TYPE_CHECKING:
    from repeatlab.methods.sampling import Importance


class RunningImportance(RunningSampler):
    """See `repeatlab.methods.sampling.Importance`.

    Attributes:
        switch: Whether sampling is on, with the moving average of tau.
        uniform: Whether the latest fresh batch was drawn uniformly.
        block: Blocks of b samples taken so far: while sampling is uniform the k-th fresh batch is
            that of the standard arm.
    """

    settings: Importance

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        threshold = tau_threshold(self.settings.presample, self.settings.k)
        self.switch = ImportanceSwitch(threshold, self.settings.ema)
        self.count, self.block, self.uniform = 0, 0, True
        self._rows: list[tuple[int, float, float, bool]] = []

    def fresh_batch(self, index: int) -> Selection:
        self.uniform = not self.switch.on
        if self.uniform:
            return self.unweighted(self._next_block(index)._replace(index=index))
        blocks = [self._next_block(index) for _ in range(self.settings.presample)]
        scores = self.score(blocks, self.settings.score)
        picks, weights = importance_sampling(scores, self.task.batch_size, self.draws(index))
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
        """Move the average of tau."""
        self.host_reads += 1
        now = self.switch.update(scores)
        self.count = index + 1
        self._rows.append((index, now, self.switch.tau, not self.uniform))

    def drain(self) -> dict[str, np.ndarray]:
        rows, self._rows = self._rows, []
        names = ("fresh_batch", "tau", "tau_average", "presampled")
        columns = zip(*rows, strict=True) if rows else ((),) * len(names)
        return {name: np.array(column) for name, column in zip(names, columns, strict=True)}

    def drawn(self, fresh_batches: int) -> int:
        return self.block

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("count", "block", "uniform")}
        return super().state_dict() | {"tau": self.switch.tau} | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.switch.tau = state["tau"]
        for name in ("count", "block", "uniform"):
            setattr(self, name, state[name])
