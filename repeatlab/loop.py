"""One run: `train(config)` makes exactly T updates and leaves its record in the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from repeatlab.calibration import calibrate, calibration_run
from repeatlab.config import RunConfig
from repeatlab.cost import Ledger
from repeatlab.environment import describe
from repeatlab.label_noise import NoiseLog
from repeatlab.mappings import Constant, Mapping
from repeatlab.method import (
    FreshBatches,
    Source,
    SpacedBatches,
    build_mapping,
    is_spaced,
    start_sampler,
)
from repeatlab.pacing import Budget, Rates, StepSize
from repeatlab.prerequisites import source_run
from repeatlab.records import Run, RunWriter, Store
from repeatlab.repeater import BatchRepeater, NonFiniteLoss
from repeatlab.seeding import derive
from repeatlab.tasks import TASKS, Task, load_task

FLUSH_UPDATES = 500


def train(config: RunConfig, runs: str | Path | Store = "runs") -> Run:
    """Make the run that `config` describes, unless the store has it, and return its record.

    A non-finite loss ends the run as `diverged` with its data kept. Any other error marks it
    `failed` and is raised.

    Args:
        config: The run.
        runs: The run store, or its directory.

    Raises:
        StoreError: the store cannot be written.
    """
    store = runs if isinstance(runs, Store) else Store(runs)
    run = store.run(config.task.name, config.run_id)
    if run.done:
        return run
    store.check_writable()
    calibration, source = _calibrate(config, store), _trace(config, store)
    device = pick_device(config.device)
    writer = store.begin(run, config.to_json(), describe(device))
    try:
        with _torch_settings(config):
            task = load_task(TASKS[config.task.name])(config.task, seed=config.seed, device=device)
            Training(config, task, writer, calibration=calibration, source=source).run()
    except BaseException as error:
        writer.fail(error)
        raise
    return run


def pick_device(name: str) -> str:
    """Return "cuda", "mps" or "cpu"; "auto" is the first of these that is there.

    Raises:
        ValueError: the device asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"device: '{name}' is not available here; use 'auto' or 'cpu'")
    return name


@contextmanager
def _torch_settings(config: RunConfig) -> Iterator[None]:
    """Thread count and global random state of this run, and afterwards those from before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(derive(config.seed, "global"))
            yield
    finally:
        torch.set_num_threads(threads)


def _calibrate(config: RunConfig, store: Store) -> dict[str, Any]:
    """Return t and what it cost where the method asks for it, else nothing."""
    if not config.method.calibrated:
        return {}
    source = _completed(calibration_run(config), store, "`t: auto` needs a standard run")
    ledger = source.summary["ledger"]
    return {
        "t": calibrate(config, source.updates["loss"].to_numpy()),
        "run": source.path.name,
        "calibration_updates": ledger["updates"],
        "calibration_samples": ledger["forward_samples"],
        "calibration_seconds": ledger["seconds"],
    }


def _trace(config: RunConfig, store: Store) -> Source | None:
    """Return the recorded counts that the method replays, if any; making them is not charged."""
    needed = source_run(config)
    if needed is None:
        return None
    updates = _completed(needed, store, "a control needs its source").updates
    first = updates[updates["repeat"] == 0]
    return Source(first["repeats"].to_numpy(), first["loss"].to_numpy())


def _completed(config: RunConfig, store: Store, why: str) -> Run:
    """Return a run that another one needs, made now if the store lacks it."""
    run = train(config, store)
    if run.summary["status"] != "complete":
        raise RuntimeError(
            f"the run {run.path.name} {run.summary['status']}: {why} with finite losses"
        )
    return run


class Training:
    """The loop of one run; separate from `train` so that its parts can be looked at."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        writer: RunWriter,
        *,
        calibration: dict[str, Any],
        source: Source | None = None,
    ) -> None:
        self.config, self.task, self.writer = config, task, writer
        self.calibration = calibration
        method = config.method
        self.sampler = start_sampler(config, task)
        self.noise = NoiseLog(getattr(task, "corrupted", None))
        loader = {"settings": config.loader, "seen": self.noise.fresh_batch}
        mapping: Mapping = Constant(1)
        if is_spaced(config):
            gap = method.mapping.gap
            self.batches = SpacedBatches(task, source.counts, gap=gap, **loader)
        else:
            mapping = build_mapping(config, t=calibration.get("t"), source=source)
            self.batches = FreshBatches(task, self.sampler, **loader)
        # N scales the rate of a single visit, or it is the number of visits.
        self.step_size = StepSize(mapping) if method.apply == "step_size" else None
        self.repeater = BatchRepeater(
            self.batches,
            1 if self.step_size else mapping,
            max_updates=config.max_updates,
            refresh=self._refresh if method.fresh_views or method.apply != "repeat" else None,
        )
        self.rates = Rates(config, task.optimizers)
        self.ledger = Ledger(
            environment_steps=task.environment_steps,
            **{k: v for k, v in calibration.items() if k.startswith("calib")},
        )
        self.budget = Budget(config, task)
        self.seconds: list[float] = []
        self.elapsed, self.recorded = 0.0, 0
        self.last_evaluation: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        """Make all updates and finish the record."""
        if self.sampler is not None:
            self.ledger.charge(self.sampler.prepare())
        self._evaluate()
        try:
            self._updates()
        except NonFiniteLoss as error:
            self._flush()
            self._finish("diverged", update=error.update, reason=str(error))
        else:
            self._finish("complete")

    def _updates(self) -> None:
        visit, repeater, total = self._visit(), self.repeater, self.config.max_updates
        every, clock, seconds = self.config.evaluation.every, perf_counter, self.seconds
        moving, budget, rates = self.rates.moving, self.config.budget, self.rates
        left = min(every, FLUSH_UPDATES, total)
        start = clock() - self.elapsed
        for batch in repeater:
            if moving:
                rates.set(self._position(clock() - start))
            visit(batch)
            seconds.append(clock() - start)
            left -= 1
            if budget and self._spent(seconds[-1]) >= self.budget.limit:
                repeater.stop()
                left = 0
            if not left:
                self._synchronize()
                self.elapsed = seconds[-1] = clock() - start
                self._pause()
                seconds, done = self.seconds, repeater.updates
                left = min(FLUSH_UPDATES, every - done % every, max(1, total - done))
                start = clock() - self.elapsed

    def _visit(self) -> Callable[[Any], None]:
        """Return what makes one update on a batch, as lean as the method allows."""
        step, report, sampler, scaling = (
            self.task.step,
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
        share = self._spent(seconds) / self.budget.limit
        return int(min(1.0, share) * self.config.max_updates)

    def _pause(self) -> None:
        """Outside the clock: write what was recorded, and evaluate where it is due."""
        self._flush()
        done = self.repeater.updates
        if done % self.config.evaluation.every == 0 or done == self.repeater.max_updates:
            self._evaluate()

    def _refresh(self, item: Any) -> Any:
        batch = item if self.sampler is None else item.batch
        draw = self.task.refresh if self.config.method.fresh_views else self.task.resample
        batch = draw(batch, self.repeater.repeat)
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
        if self.sampler is not None:
            ledger.scoring_samples = self.sampler.scored
            ledger.host_reads += self.sampler.host_reads

    def _evaluate(self) -> None:
        splits = self.config.evaluation.splits
        self.last_evaluation = {split: self.task.evaluate(split) for split in splits}
        if splits:
            self.writer.evals(self.ledger.updates, self.last_evaluation, self.ledger.to_json())

    def _finish(self, status: str, **details: Any) -> None:
        final = dict(self.last_evaluation) if status == "complete" else {}
        if status == "complete" and self.config.evaluation.test:
            final["test"] = self.task.evaluate("test")
            self.writer.evals(self.ledger.updates, {"test": final["test"]}, self.ledger.to_json())
        if status == "complete":
            self.writer.pictures(self.task.pictures())
        cuda = pick_device(self.config.device) == "cuda"
        self.writer.finish(
            status,
            {
                "final": {f"{s}.{m}": v for s, values in final.items() for m, v in values.items()},
                "ledger": self.ledger.to_json(),
                "calibration": self.calibration or None,
                "label_noise": self.noise.summary(),
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
                "state_sha256": digest(self.task.state_dict()),
                **details,
            },
            **details,
        )


def digest(state: Any) -> str:
    """Return a SHA-256 over every tensor and number of a state dict, in order."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(str(key).encode())
                feed(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        else:
            sha.update(repr(value).encode())

    feed(state)
    return sha.hexdigest()
