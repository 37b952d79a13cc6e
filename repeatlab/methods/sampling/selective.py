"""Selective backprop: fresh samples pass a forward, and are kept by their loss's percentile."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from repeatlab.methods.sampling.running import RunningSampler, Selection
from repeatlab.methods.selection import selective_backprop

if TYPE_CHECKING:
    from repeatlab.methods.sampling import SelectiveBackprop


class RunningSelective(RunningSampler):
    """See `repeatlab.methods.sampling.SelectiveBackprop`.

    Attributes:
        block: Blocks of b samples scored so far.
        waiting: (fresh batch, block, rows kept) of the samples that have filled no batch yet.
    """

    settings: SelectiveBackprop

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.block = 0
        self.losses: deque[float] = deque(maxlen=self.settings.history)
        self.waiting: list[tuple[int, int, list[int]]] = []
        self._blocks: dict[int, Any] = {}

    def fresh_batch(self, index: int) -> Selection:
        count = self.task.batch_size
        while sum(len(rows) for *_, rows in self.waiting) < count:
            self._score_block(index)
        blocks, picks = [], []
        while len(picks) < count:
            made, block, rows = self.waiting.pop(0)
            taken = rows[: count - len(picks)]
            picks += [len(blocks) * count + row for row in taken]
            blocks.append(self._block(made, block))
            if len(taken) < len(rows):
                self.waiting.insert(0, (made, block, rows[len(taken) :]))
        still = {block for _, block, _ in self.waiting}
        self._blocks = {block: batch for block, batch in self._blocks.items() if block in still}
        picked = torch.tensor(picks, device=self.task.device)
        return self.unweighted(self.task.pick(blocks, picked, index))

    def _score_block(self, index: int) -> None:
        """Forward one more block and keep its samples by chance."""
        block = self._block(index, self.block)
        losses, draws = self.score([block], "loss"), self.draws(self.block)
        kept, _ = selective_backprop(losses, self.losses, draws, beta=self.settings.beta)
        self.host_reads += 1
        self.waiting.append((index, self.block, kept.tolist()))
        self.block += 1

    def _block(self, index: int, block: int) -> Any:
        if block not in self._blocks:
            self._blocks[block] = self.task.candidates(index, block)
        return self._blocks[block]

    def drawn(self, fresh_batches: int) -> int:
        return self.block

    def state_dict(self) -> dict[str, Any]:
        own = {"block": self.block, "losses": list(self.losses)}
        return super().state_dict() | own | {"waiting": [list(item) for item in self.waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.block, self.waiting = state["block"], [tuple(item) for item in state["waiting"]]
        self.losses = deque(state["losses"], maxlen=self.settings.history)
        self._blocks = {}
