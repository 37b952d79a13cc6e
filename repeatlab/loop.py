"""One run: `train(config)` makes exactly T updates and leaves its record in the store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from repeatlab.calibration import calibrate, calibration_run
from repeatlab.config import RunConfig
from repeatlab.cost import Ledger
from repeatlab.environment import describe
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
    calibration = _calibrate(config, store)
    device = pick_device(config.device)
    writer = store.begin(run, config.to_json(), describe(device))
    try:
        with _torch_settings(config):
            task = load_task(TASKS[config.task.name])(config.task, seed=config.seed, device=device)
            Training(config, task, writer, calibration).run()
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
    if not config.method.needs_calibration:
        return {}
    source = train(calibration_run(config), store)
    if source.summary["status"] != "complete":
        raise RuntimeError(
            f"the calibration run {source.path.name} {source.summary['status']}: `t: auto` needs a "
            "standard run with finite losses (lower the learning rate, or give t)"
        )
    ledger = source.summary["ledger"]
    return {
        "t": calibrate(config, source.updates["loss"].to_numpy()),
        "run": source.path.name,
        "calibration_updates": ledger["updates"],
        "calibration_samples": ledger["forward_samples"],
        "calibration_seconds": ledger["seconds"],
    }


class FreshBatches:
    """The task's fresh batches as a loader without end, counting the samples it has handed out."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._indices: list[torch.Tensor] = []
        self._seen = torch.zeros(0, dtype=torch.bool)

    def __iter__(self) -> Iterator[Any]:
        return self.iter_from(0)

    def iter_from(self, position: int) -> Iterator[Any]:
        while True:
            batch = self._task.fresh_batch(position)
            self._indices.append(batch.indices)
            yield batch
            position += 1

    def distinct(self) -> int:
        """Return how many different training samples have been handed out so far."""
        if self._indices:
            indices = torch.cat(self._indices).cpu()
            self._indices.clear()
            missing = int(indices.max()) + 1 - len(self._seen)
            if missing > 0:
                self._seen = torch.cat([self._seen, torch.zeros(missing, dtype=torch.bool)])
            self._seen[indices] = True
        return int(self._seen.sum())


class Training:
    """The loop of one run; separate from `train` so that its parts can be looked at."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        writer: RunWriter,
        calibration: dict[str, Any],
    ) -> None:
        self.config, self.task, self.writer = config, task, writer
        self.calibration = calibration
        self.batches = FreshBatches(task)
        self.repeater = BatchRepeater(
            self.batches,
            build_mapping(config, calibration),
            max_updates=config.max_updates,
            refresh=self._refresh if config.method.fresh_views else None,
        )
        schedule = config.method.schedule
        self.schedule = schedule.build() if schedule else None
        # (group, base rate) of every optimizer; a schedule scales them all alike.
        self.rates = [(g, g["lr"]) for o in task.optimizers for g in o.param_groups]
        self.ledger = Ledger(
            environment_steps=task.environment_steps,
            **{k: v for k, v in calibration.items() if k.startswith("calib")},
        )
        self.seconds: list[float] = []
        self.elapsed = 0.0
        self.last_evaluation: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        """Make all updates and finish the record."""
        self._evaluate()
        try:
            self._updates()
        except NonFiniteLoss as error:
            self._flush()
            self._finish("diverged", update=error.update, reason=str(error))
        else:
            self._finish("complete")

    def _updates(self) -> None:
        step, report, total = self.task.step, self.repeater.report, self.config.max_updates
        every, clock, seconds = self.config.evaluation.every, perf_counter, self.seconds
        stop = min(every, FLUSH_UPDATES, total)
        start = clock() - self.elapsed
        for batch in self.repeater:
            if self.schedule is not None:
                self._set_rates(self.repeater.updates)
            step(batch, report)
            seconds.append(clock() - start)
            if len(seconds) == stop:
                self._synchronize()
                self.elapsed = seconds[-1] = clock() - start
                self._pause()
                done = self.repeater.updates
                seconds = self.seconds
                stop = min(FLUSH_UPDATES, every - done % every, max(1, total - done))
                start = clock() - self.elapsed

    def _pause(self) -> None:
        """Outside the clock: write what was recorded, and evaluate where it is due."""
        self._flush()
        done = self.repeater.updates
        if done % self.config.evaluation.every == 0 or done == self.config.max_updates:
            self._evaluate()

    def _factor(self, update: int) -> float:
        return self.schedule(update, self.config.max_updates) if self.schedule else 1.0

    def _set_rates(self, update: int) -> None:
        factor = self._factor(update)
        for group, base in self.rates:
            group["lr"] = base * factor

    def _refresh(self, batch: Any) -> Any:
        return self.task.refresh(batch, self.repeater.repeat)

    def _synchronize(self) -> None:
        if torch.cuda.is_available() and self.config.device != "cpu":
            torch.cuda.synchronize()

    def _flush(self) -> None:
        """Move the visits since the last flush into the record."""
        rows = self.repeater.drain()
        updates, seconds = rows["update"], self.seconds
        self.seconds = []
        if len(updates):
            # A loss that was not finite has no update after it, and so no time of its own.
            seconds += seconds[-1:] or [self.elapsed]
            self.elapsed = seconds[len(updates) - 1]
            rows["seconds"] = np.array(seconds[: len(updates)])
            rows["lr"] = self.rates[0][1] * np.array([self._factor(int(u)) for u in updates])
            self.writer.updates(rows)
        # The loss that ends a diverged run went forward, but drove no update.
        self._update_ledger(len(updates), int(np.isfinite(rows["loss"]).sum()))

    def _update_ledger(self, forwards: int, updates: int) -> None:
        ledger, repeater = self.ledger, self.repeater
        ledger.updates += updates
        ledger.forward_samples += forwards * self.task.forward_samples
        ledger.backward_samples += updates * self.task.backward_samples
        ledger.fresh_batches = repeater.fresh_batch + 1
        ledger.distinct_samples = self.batches.distinct()
        ledger.environment_steps = self.task.environment_steps
        ledger.seconds = self.elapsed
        ledger.host_reads = repeater.host_reads

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
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
                "state_sha256": digest(self.task.state_dict()),
                **details,
            },
            **details,
        )


def build_mapping(config: RunConfig, calibration: dict[str, Any]) -> Any:
    """Return the run's mapping, with its calibrated t and its seed; an int where there is none."""
    choice = config.method.mapping
    if choice is None:
        return 1
    overrides: dict[str, Any] = {}
    if config.method.needs_calibration:
        overrides[type(choice).target.calibrated] = calibration["t"]
    if "seed" in type(choice).target.__dataclass_fields__:
        overrides["seed"] = derive(config.seed, "mapping")
    return choice.build(**overrides)


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
