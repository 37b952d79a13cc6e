"""One run from its first update to its last: where it pauses, what it saves, how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from repeatlab.core.environment import pick_device
from repeatlab.core.signals import Interrupted, Stop
from repeatlab.repetition.repeater import NonFiniteLoss
from repeatlab.store.records import RunWriter
from repeatlab.tasks import Task
from repeatlab.training import checkpoint
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.evaluator import Evaluator
from repeatlab.training.recorder import Recorder
from repeatlab.training.stand_ins import StandIn
from repeatlab.training.updates import Updates
from repeatlab.training.visits import Source

FLUSH_UPDATES = 500
# What has a state of its own; the task's is loaded first, for the others' sake.
PARTS = ("task", "updates", "recorder", "evaluator")


@dataclass(frozen=True)
class CheckpointPlan:
    """When a run writes checkpoints; no part of its identity.

    Attributes:
        seconds: Least time between two; they are written where records are, every 500 updates and
            at evaluations.
        updates: Additionally after so many updates, whatever the time.
    """

    seconds: float = 120.0
    updates: int | None = None


class Training:
    """One run: its updates, its record and its evaluations.

    Args:
        config: The run.
        task: What is trained, as it is before the first update.
        writer: Of its record.
        calibration: t and what it cost, where the method asks for it.
        source: What the method replays, if anything.
        plan: When checkpoints are written.
        stop: Asks it to stop.
        clock: What its seconds are read from.
        through: What is asked for batches, steps and evaluations in the task's place: one of its
            `stand_ins`, such as an `ObservedTask`.

    Attributes:
        updates: What they are, and which comes next.
        recorder: What the record says of them.
        evaluator: How good they make the task.
        repeater: Of the updates; its `updates` are how many have been made.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        writer: RunWriter,
        *,
        calibration: dict[str, Any],
        source: Source | None = None,
        plan: CheckpointPlan | None = None,
        stop: Stop | None = None,
        clock: Callable[[], float] | None = None,
        through: Task | StandIn | None = None,
    ) -> None:
        self.config, self.task, self.writer = config, task, writer
        self.calibration = calibration
        self.plan, self.stop = plan or CheckpointPlan(), stop or Stop()
        self.clock, through = clock or perf_counter, through or task
        self.recorder = Recorder(task, writer, calibration)
        self.updates = Updates(
            config, self.recorder, through, t=calibration.get("t"), source=source
        )
        self.evaluator = Evaluator(config.evaluation, self.recorder, through)
        self.repeater = self.updates.repeater
        self._saved_at = perf_counter()
        self._cuda = pick_device(config.device) == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def run(self, state: dict[str, Any] | None = None) -> None:
        """Make all updates, or those that are left after `state`, and finish the record.

        Raises:
            Interrupted: `stop` was set; a checkpoint is left.
        """
        self.begin(state)
        visit = self.visit()
        try:
            for batch in self.visits():
                visit(batch)
        except NonFiniteLoss as error:
            self.end(error)
        else:
            self.end()

    def begin(self, state: dict[str, Any] | None = None) -> None:
        """Get ready for the first update, or for those that are left after `state`."""
        if state is not None:
            self.load_state_dict(state)
        else:
            self.recorder.ledger.charge(self.updates.sampler.prepare())
            self.evaluator.evaluate()

    def visit(self) -> Callable[[Any], None]:
        """Return what makes one update on a batch."""
        return self.updates.visit()

    def visits(self) -> Iterator[Any]:
        """Yield the batch of every update that is left, to be made before the next is asked for.

        Raises:
            NonFiniteLoss: a loss on CUDA, when it is read.
            Interrupted: `stop` was set; a checkpoint is left.
        """
        clock, updates, moving = self.clock, self.updates, self.updates.rates.moving
        left, start = self._until_pause(), clock() - updates.elapsed
        for batch in self.repeater:
            if moving:
                updates.set_rates(clock() - start)
            yield batch
            left -= 1
            if updates.ended(clock() - start) or not left or self.stop.is_set():
                if self._cuda:
                    torch.cuda.synchronize()
                updates.elapsed = updates.seconds[-1] = clock() - start
                self.pause()
                left, start = self._until_pause(), clock() - updates.elapsed

    def _until_pause(self) -> int:
        done, every, saves = self.repeater.updates, self.config.evaluation.every, self.plan.updates
        left = [FLUSH_UPDATES, every - done % every, max(1, self.repeater.max_updates - done)]
        return min(left if saves is None else [*left, saves - done % saves])

    def pause(self) -> None:
        """Outside the clock: write what was made, evaluate and save where it is due.

        Raises:
            Interrupted: `stop` was set; a checkpoint is left.
        """
        self.recorder.updates(self.updates)
        done, plan = self.repeater.updates, self.plan
        if done % self.config.evaluation.every == 0 or done == self.repeater.max_updates:
            self.evaluator.evaluate()
            if self.evaluator.exhausted:
                self.repeater.stop()
                self.recorder.updates(self.updates)
        waited = perf_counter() - self._saved_at >= plan.seconds
        stop = self.stop.is_set()
        if waited or stop or (plan.updates and done % plan.updates == 0):
            checkpoint.save(self.writer.path, self.state_dict())
            self._saved_at = perf_counter()
        if stop and done < self.repeater.max_updates:
            raise Interrupted(f"stopped after update {done}; the run goes on from there")

    def end(self, error: NonFiniteLoss | None = None) -> None:
        """Finish the record: complete, or diverged by `error`."""
        status, details, final = "complete", {}, {}
        if error is not None:
            self.recorder.updates(self.updates)
            status, details = "diverged", {"update": error.update, "reason": str(error)}
        else:
            final = self.evaluator.final()
            self.writer.pictures(self.task.pictures())
        ledger, updates = self.recorder.ledger, self.updates
        stopping = self.evaluator.early_stopping(complete=error is None)
        if stopping is not None:
            stopping |= updates.budget.unused(ledger.updates, updates.spent())
        summary = {
            "final": {f"{s}.{m}": v for s, values in final.items() for m, v in values.items()},
            "ledger": ledger.to_json(),
            "calibration": self.calibration or None,
            "label_noise": self.recorder.noise.summary(),
            "early_stopping": stopping,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if self._cuda else None,
            "state_sha256": digest(self.task.state_dict()),
        }
        self.writer.finish(status, summary | details, **details)
        checkpoint.remove(self.writer.path)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on; only right after a flush."""
        return {
            **{name: getattr(self, name).state_dict() for name in PARTS},
            "rows": self.writer.synced(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` of a run with this configuration."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        if self.evaluator.exhausted or self.updates.spent() >= self.updates.budget.limit:
            self.repeater.stop()
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_random"])
