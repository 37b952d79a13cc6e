"""Where a run's updates went: to samples with a true label, or to corrupted ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class NoiseLog:
    """Counts visits to corrupted samples.

    Args:
        corrupted: bool, (samples,): which training samples have a wrong label; None counts nothing.
    """

    def __init__(self, corrupted: Tensor | None) -> None:
        self.corrupted = corrupted
        self._shares: list[Tensor] = []
        self._visits = np.zeros(0, dtype=np.int64)

    def fresh_batch(self, indices: Tensor) -> None:
        """See the samples of the next fresh batch."""
        if self.corrupted is not None:
            self._shares.append(self.corrupted[indices].float().mean())

    def visits(self, fresh_batches: np.ndarray) -> None:
        """See which fresh batch each of some updates was made on."""
        if self.corrupted is not None and len(fresh_batches):
            counts = np.bincount(fresh_batches, minlength=len(self._visits))
            counts[: len(self._visits)] += self._visits
            self._visits = counts

    def summary(self) -> dict[str, float | None] | None:
        """Return the share of corrupted samples in the data, in all visits and in extra ones.

        An extra visit is one that standard training would not make: the second and later ones of a
        fresh batch. None where there were none.
        """
        if self.corrupted is None:
            return None
        shares = torch.stack(self._shares).cpu().double().numpy()[: len(self._visits)]
        extra = np.maximum(self._visits - 1, 0)
        return {
            "corrupted": float(self.corrupted.cpu().double().mean()),
            "corrupted_visits": float(np.average(shares, weights=self._visits)),
            "corrupted_extra_visits": float(np.average(shares, weights=extra))
            if extra.any()
            else None,
            "extra_visits": int(extra.sum()),
        }

    def state_dict(self) -> dict[str, list]:
        """Return what was counted."""
        return {"shares": [float(s) for s in self._shares], "visits": self._visits.tolist()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Restore `state_dict()`."""
        self._shares = [torch.tensor(share) for share in state["shares"]]
        self._visits = np.array(state["visits"], dtype=np.int64)
