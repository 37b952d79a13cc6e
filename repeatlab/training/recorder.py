"""What a run's record says of its updates, and what is counted: its costs, and where they went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from repeatlab.cost import Ledger
from repeatlab.store.records import RunWriter
from repeatlab.tasks import Task

if TYPE_CHECKING:
    from repeatlab.training.updates import Updates


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


class Recorder:
    """Writes what updates and evaluations leave, and counts what they cost.

    Args:
        task: What is trained.
        writer: Of the record.
        calibration: t and what it cost, where the method asked for it.

    Attributes:
        task: What is trained.
        directory: Where the record is.
        ledger: What was spent so far.
        noise: Where updates went, on a task with wrong labels.
        recorded: Visits written so far.
    """

    def __init__(self, task: Task, writer: RunWriter, calibration: Mapping[str, Any]) -> None:
        self.task, self.directory, self._writer = task, writer.path, writer
        costs = {k: v for k, v in calibration.items() if k.startswith("calibration_")}
        self.ledger = Ledger(environment_steps=task.environment_steps, **costs)
        self.ledger.charge(getattr(task, "pretraining", {}))
        self.noise = NoiseLog(getattr(task, "corrupted", None))
        self.recorded = 0

    def updates(self, updates: Updates) -> None:
        """Move what was made since the last call into the record, and bring the ledger up."""
        rows = updates.drain()
        if len(rows["update"]):
            self._writer.updates(rows)
            self.noise.visits(rows["fresh_batch"])
        self._writer.sampler(updates.sampler.drain())
        self.recorded += len(rows["update"])
        # The loss that ends a diverged run went forward, but drove no update.
        lost = int((~np.isfinite(rows["loss"])).sum())
        forwards = self.recorded + updates.repeater.held
        ledger, task, sampler = self.ledger, self.task, updates.sampler
        ledger.updates = forwards - lost
        ledger.forward_samples = forwards * task.forward_samples
        ledger.backward_samples = ledger.updates * task.backward_samples
        ledger.scoring_samples = sampler.scored
        ledger.fresh_batches = updates.batches.handed_out
        ledger.passed_batches = sampler.drawn(ledger.fresh_batches) - ledger.fresh_batches
        ledger.distinct_samples = updates.batches.distinct()
        ledger.environment_steps = task.environment_steps
        ledger.seconds = updates.elapsed
        ledger.host_reads = updates.repeater.host_reads + sampler.host_reads

    def evaluation(self, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Write metrics by split, with the ledger as it is."""
        self._writer.evals(self.ledger.updates, metrics, self.ledger.to_json())

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted."""
        counts = {"ledger": self.ledger.to_json(), "recorded": self.recorded}
        return counts | {"noise": self.noise.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`."""
        vars(self.ledger).update(state["ledger"])
        self.recorded = state["recorded"]
        self.noise.load_state_dict(state["noise"])
