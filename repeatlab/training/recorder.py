"""What a run's record says of its updates, and what its ledger counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from repeatlab.cost import Ledger
from repeatlab.store.records import RunWriter
from repeatlab.tasks import Task
from repeatlab.training.label_noise import NoiseLog

if TYPE_CHECKING:
    from repeatlab.training.updates import Updates


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
        ledger.skipped_steps = getattr(task, "skipped_steps", 0)

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
