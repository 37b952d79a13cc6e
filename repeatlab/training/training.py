"""The updates of one run: visits, clock, evaluations, records and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from repeatlab.core.environment import pick_device
from repeatlab.core.signals import Interrupted, Stop
from repeatlab.cost import Ledger
from repeatlab.repetition.mappings import Constant, Mapping
from repeatlab.repetition.repeater import BatchRepeater, NonFiniteLoss
from repeatlab.store.records import RunWriter
from repeatlab.tasks import Task
from repeatlab.training import checkpoint, weights
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.data_parallel import SharedTask, SilentWriter, Team
from repeatlab.training.early_stopping import Patience
from repeatlab.training.fresh_batches import (
    FreshBatches,
    Source,
    SpacedBatches,
    build_mapping,
    is_spaced,
    start_sampler,
)
from repeatlab.training.label_noise import NoiseLog
from repeatlab.training.rates_and_budget import Budget, Rates, StepSize

FLUSH_UPDATES = 500


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
    """The loop of one run; separate from `train` so that its parts can be looked at."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        writer: RunWriter | SilentWriter,
        *,
        calibration: dict[str, Any],
        source: Source | None = None,
        plan: CheckpointPlan | None = None,
        team: Team | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.config, self.task, self.writer = config, task, writer
        self.plan, self.stop = plan or CheckpointPlan(), stop or Stop()
        self.calibration = calibration
        method = config.method
        self.team, self.leads = team, team is None or team.leads
        self.shared = SharedTask(task, team) if team else None
        self.sampler = start_sampler(config, task, progress=self._share)
        self.noise = NoiseLog(getattr(task, "corrupted", None))
        loader = {"settings": config.loader, "seen": self.noise.fresh_batch}
        mapping: Mapping = Constant(1)
        if is_spaced(config):
            gap = method.mapping.gap
            self.batches = SpacedBatches(task, source.counts, gap=gap, **loader)
        else:
            mapping = build_mapping(config, t=calibration.get("t"), source=source)
            self.batches = FreshBatches(task, self.sampler, **loader)
        # Under a budget a source may have made fewer updates: its trace ends there.
        most = config.max_updates if source is None else int(source.counts.sum())
        # N scales the rate of a single visit, or it is the number of visits.
        self.step_size = StepSize(mapping) if method.apply == "step_size" else None
        self.repeater = BatchRepeater(
            self.batches,
            1 if self.step_size else mapping,
            max_updates=min(config.max_updates, most),
            refresh=self._refresh if method.fresh_views or method.apply != "repeat" else None,
            progress=self._share if config.budget else None,
            reduce=self.shared.losses.start if self.shared else None,
            join=self.shared.losses.join if self.shared else None,
        )
        self.rates = Rates(config, task.optimizers)
        self.ledger = Ledger(
            environment_steps=task.environment_steps,
            **{k: v for k, v in calibration.items() if k.startswith("calib")},
        )
        self.ledger.charge(getattr(task, "pretraining", {}))
        self.budget = Budget(config, task)
        rule = config.evaluation.early_stopping
        self.patience = Patience(rule) if rule else None
        # Of the best evaluation, where the run ends with it.
        self.best: dict[str, Any] = {}
        self.seconds: list[float] = []
        self.elapsed, self.recorded = 0.0, 0
        self.last_evaluation: dict[str, dict[str, float]] = {}
        self.clock: Callable[[], float] = perf_counter
        self.saved_at = perf_counter()
        if pick_device(config.device) == "cuda":
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
            if self.sampler is not None:
                self.ledger.charge(self.sampler.prepare())
            self._evaluate()

    def end(self, error: NonFiniteLoss | None = None) -> None:
        """Finish the record: complete, or diverged by `error`."""
        if error is None:
            self._finish("complete")
        else:
            self._flush()
            self._finish("diverged", update=error.update, reason=str(error))

    def visits(self) -> Iterator[Any]:
        """Yield the batch of every update that is left, to be made before the next is asked for.

        Raises:
            NonFiniteLoss: a loss on CUDA, when it is read.
            Interrupted: `stop` was set; a checkpoint is left.
        """
        repeater, clock, seconds = self.repeater, self.clock, self.seconds
        moving, budget, rates = self.rates.moving, self.config.budget, self.rates
        left, stop = self._until_pause(), self.stop.is_set
        if self.team is not None:
            stop = self.team.sometimes_any(stop)
        start = clock() - self.elapsed
        for batch in repeater:
            if moving:
                rates.set(self._position(clock() - start))
            yield batch
            seconds.append(clock() - start)
            left -= 1
            if budget and self._spent(seconds[-1]) >= self.budget.limit:
                repeater.stop()
                left = 0
            if not left or stop():
                self._synchronize()
                self.elapsed = seconds[-1] = clock() - start
                self._pause()
                seconds, left = self.seconds, self._until_pause()
                start = clock() - self.elapsed

    def _until_pause(self) -> int:
        """Return how many updates there are until the next pause."""
        done, every, saves = self.repeater.updates, self.config.evaluation.every, self.plan.updates
        left = [FLUSH_UPDATES, every - done % every, max(1, self.repeater.max_updates - done)]
        return min(left if saves is None else [*left, saves - done % saves])

    def visit(self) -> Callable[[Any], None]:
        """Return what makes one update on a batch, as lean as the method allows."""
        step, report, sampler, scaling = (
            (self.shared or self.task).step,
            self.repeater.report,
            self.sampler,
            self.step_size,
        )
        if sampler is None and scaling is None:
            return partial(step, report=report)

        def visit(item: Any) -> None:
            batch, weights = (item, None) if sampler is None else item

            def seen(driver: Any, losses: Any = None, bounds: Any = None) -> None:
                report(driver)
                if scaling is not None:
                    self.rates.scale(scaling(driver, self.repeater.stats))
                if sampler is not None:
                    sampler.observe(batch, losses, bounds)

            step(batch, seen, weights)

        return visit

    def _spent(self, seconds: float) -> float:
        """Return how much of the budget is spent after `seconds` of training."""
        scored = self.sampler.scored if self.sampler else 0
        return self.budget.spent(self.ledger, self.repeater.updates, scored, seconds)

    def _position(self, seconds: float) -> int:
        """Return where the learning-rate schedule is: the update, or the spent share of T."""
        if self.config.budget is None:
            return self.repeater.updates
        return int(self._share(seconds) * self.config.max_updates)

    def _share(self, seconds: float | None = None) -> float:
        """Return the share of the run that is over, by default after the last update.

        Of T, or of the budget.
        """
        if self.config.budget is None:
            return self.repeater.updates / self.config.max_updates
        if seconds is None:
            seconds = self.seconds[-1] if self.seconds else self.elapsed
        return min(1.0, self._spent(seconds) / self.budget.limit)

    def _pause(self) -> None:
        """Outside the clock: write what was recorded, evaluate and save where it is due."""
        self._flush()
        done, plan = self.repeater.updates, self.plan
        evaluation = self.config.evaluation
        if done % evaluation.every == 0 or done == self.repeater.max_updates:
            self._evaluate()
            if self.patience is not None and self.patience.exhausted:
                self.repeater.stop()
                self._flush()
        waited = perf_counter() - self.saved_at >= plan.seconds
        stop = self.team.any(self.stop.is_set()) if self.team else self.stop.is_set()
        if self.leads and (waited or stop or (plan.updates and done % plan.updates == 0)):
            checkpoint.save(self.writer.path, self.state_dict())
            self.saved_at = perf_counter()
        if stop and done < self.repeater.max_updates:
            raise Interrupted(f"stopped after update {done}; the run goes on from there")

    def _refresh(self, item: Any) -> Any:
        batch = item if self.sampler is None else item.batch
        draw = self.task.refresh if self.config.method.fresh_views else self.task.resample
        batch = draw(batch, self.repeater.repeat)
        if not self.config.method.fresh_views:
            self.batches.resampled(batch.indices)
        return batch if self.sampler is None else item._replace(batch=batch)

    def _synchronize(self) -> None:
        if torch.cuda.is_available() and self.config.device != "cpu":
            torch.cuda.synchronize()

    def _flush(self) -> None:
        """Move the visits since the last flush into the record."""
        rows = self.repeater.drain()
        updates = rows["update"]
        if len(updates) > len(self.seconds):
            # A loss that was not finite has no update after it, and so no time of its own.
            self.seconds += self.seconds[-1:] or [self.elapsed]
        if len(updates):
            seconds = self.seconds[: len(updates)]
            self.elapsed = max(self.elapsed, seconds[-1])
            rows["seconds"] = np.array(seconds)
            rows["lr"] = self.rates.drain(updates)
            if isinstance(self.batches, SpacedBatches):
                rows |= self.batches.rows(updates)
            self.writer.updates(rows)
        self.seconds = self.seconds[len(updates) :]
        if self.sampler is not None:
            self.writer.sampler(self.sampler.drain())
        self.recorded += len(updates)
        if len(updates):
            self.noise.visits(rows["fresh_batch"])
        # The loss that ends a diverged run went forward, but drove no update.
        lost = len(updates) - int(np.isfinite(rows["loss"]).sum())
        self._update_ledger(self.recorded + self.repeater.held, lost)

    def _update_ledger(self, forwards: int, lost: int) -> None:
        ledger, repeater, task = self.ledger, self.repeater, self.task
        ledger.updates = forwards - lost
        ledger.forward_samples = forwards * task.forward_samples
        ledger.backward_samples = ledger.updates * task.backward_samples
        ledger.fresh_batches = (
            self.batches.fresh(forwards)
            if isinstance(self.batches, SpacedBatches)
            else repeater.fresh_batch + 1
        )
        ledger.distinct_samples = self.batches.distinct()
        ledger.environment_steps = task.environment_steps
        ledger.seconds = self.elapsed
        ledger.host_reads = repeater.host_reads
        ledger.skipped_steps = getattr(task, "skipped_steps", 0)
        if self.sampler is not None:
            ledger.scoring_samples = self.sampler.scored
            drawn = self.sampler.drawn(ledger.fresh_batches)
            ledger.passed_batches = drawn - ledger.fresh_batches
            ledger.host_reads += self.sampler.host_reads

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on; only right after a flush."""
        parts = self._parts()
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "rows": self.writer.synced(),
            "ledger": self.ledger.to_json(),
            "seconds": list(self.seconds),
            "elapsed": self.elapsed,
            "recorded": self.recorded,
            "last_evaluation": self.last_evaluation,
            "best": self.best,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` of a run with this configuration."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.rates.rebind(self.task.optimizers)
        self.ledger = Ledger(**state["ledger"])
        for name in ("seconds", "elapsed", "recorded", "last_evaluation", "best"):
            setattr(self, name, state[name])
        impatient = self.patience is not None and self.patience.exhausted
        if impatient or self._spent(self.elapsed) >= self.budget.limit:
            self.repeater.stop()
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_random"])

    def _parts(self) -> dict[str, Any]:
        """Return what has a state of its own, by name."""
        parts = {
            "task": self.task,
            "repeater": self.repeater,
            "batches": self.batches,
            "noise": self.noise,
            "rates": self.rates,
            "sampler": self.sampler,
            "step_size": self.step_size,
            "patience": self.patience,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _evaluate(self) -> None:
        splits = self.config.evaluation.splits
        if self.leads:
            self.last_evaluation = {split: self.task.evaluate(split) for split in splits}
        if self.team is not None and splits:
            self.last_evaluation = self.team.broadcast(self.last_evaluation)
        if splits:
            self.writer.evals(self.ledger.updates, self.last_evaluation, self.ledger.to_json())
        if self.patience is not None:
            self.patience.see(self.ledger.updates, self.last_evaluation["validation"])
        if self.leads:
            self._keep_weights()

    def _keep_weights(self) -> None:
        """Keep the weights of this evaluation where they may be asked for."""
        done, keep = self.repeater.updates, self.config.evaluation.keep
        kept = done > 0
        if self._restores_best:
            kept = self.patience.at_best
            if kept:
                copies = weights.copied(self.task)
                self.best = {"weights": copies, "metrics": self.last_evaluation}
        if keep and kept:
            weights.keep(self.writer.path, self.task, update=done, last=keep)

    def _finish(self, status: str, **details: Any) -> None:
        if not self.leads:
            return
        final = self._completed() if status == "complete" else {}
        cuda = pick_device(self.config.device) == "cuda"
        self.writer.finish(
            status,
            {
                "final": {f"{s}.{m}": v for s, values in final.items() for m, v in values.items()},
                "ledger": self.ledger.to_json(),
                "calibration": self.calibration or None,
                "label_noise": self.noise.summary(),
                "early_stopping": self._early_stopping(status),
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
                "state_sha256": digest(self.task.state_dict()),
                **details,
            },
            **details,
        )
        checkpoint.remove(self.writer.path)

    def _completed(self) -> dict[str, dict[str, float]]:
        """Return the final metrics by split, with what the task shows at its end written."""
        final = dict(self.last_evaluation)
        if self.best:
            weights.restore(self.task, self.best["weights"])
            final = dict(self.best["metrics"])
        if self.config.evaluation.test:
            final["test"] = self.task.evaluate("test")
            self.writer.evals(self.ledger.updates, {"test": final["test"]}, self.ledger.to_json())
        self.writer.pictures(self.task.pictures())
        return final

    @property
    def _restores_best(self) -> bool:
        return self.patience is not None and self.patience.rule.restore_best

    def _early_stopping(self, status: str) -> dict[str, Any] | None:
        if self.patience is None:
            return None
        unused = self.budget.unused(self.ledger.updates, self._spent(self.elapsed))
        found = self.patience.summary() | unused
        if self._restores_best:
            restored = status == "complete" and self.best
            found["restored_update"] = self.patience.best_update if restored else None
        return found
