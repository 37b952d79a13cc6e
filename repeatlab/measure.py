"""What an update costs on this machine, part by part: `measure(task_config)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import ceil, inf
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from repeatlab.config import EvaluationConfig, LoaderConfig, MethodConfig, RunConfig
from repeatlab.environment import describe, pick_device
from repeatlab.prediction import PRESAMPLE, REPEATS, Measurement
from repeatlab.records import Run, RunWriter
from repeatlab.tasks import TASKS, Task, TaskConfig, load_task
from repeatlab.training import Training
from repeatlab.watch import watched

MOST_UPDATES = 2000  # in a block
# What the slow loader sleeps, in seconds: with prefetch it has to be slower than an update to be
# waited for at all, and beside a long sleep its waking is nothing.
SHORTEST_DELAY, LONGEST_DELAY = 0.004, 0.050
# A loop runs so long, in seconds, before it is timed: after another kind of loop, and above all
# after one that slept, it is slower at first, and blocks are too short for that to even out.
START_UP = 0.05


def measure(
    task_config: TaskConfig,
    *,
    device: str = "auto",
    threads: int = 1,
    seed: int = 0,
    first_batch: int = 0,
    blocks: int = 9,
    block_seconds: float = 0.25,
) -> Measurement:
    """Return the times of a task's parts, as they are in the loop that trains it.

    Args:
        task_config: The task.
        device: As in a run's configuration.
        threads: CPU threads of torch.
        seed: Of the task.
        first_batch: The fresh batch after which every block begins. In reinforcement the cost of
            acting depends on epsilon, and so on how many steps were made: half of a run's batches
            are its mean.
        blocks: Blocks of each kind, over which medians are taken.
        block_seconds: How long a block shall take at N = 1; it has at least four updates.
    """
    bench = Bench(task_config, device=device, threads=threads, seed=seed, first_batch=first_batch)
    bench.warm_up(block_seconds)
    for _ in range(blocks):
        bench.round()
    return bench.measurement()


class Bench:
    """The loop that trains a task, in blocks of several kinds.

    They take turns, so that a slow moment of the machine meets all of them, and each begins where
    the others do. The learning rate is 0: a measurement does not depend on whether the task learns,
    and cannot diverge. Arguments are those of `measure`.

    Attributes:
        updates: Updates in a block.
        started: Updates before them, to which the clock pays no attention.
        delay: What the slow loader sleeps for a batch, in seconds.
        waits: Updates in a block with it.
        rounds: Seconds by kind and part, one entry for each round.
    """

    def __init__(
        self,
        task_config: TaskConfig,
        *,
        device: str = "auto",
        threads: int = 1,
        seed: int = 0,
        first_batch: int = 0,
    ) -> None:
        self.config, self.threads = task_config, threads
        self.device = pick_device(device)
        task = load_task(TASKS[task_config.name])(task_config, seed=seed, device=self.device)
        for optimizer in task.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        # Optimizers have their moments from the first step on.
        task.step(task.fresh_batch(first_batch), lambda *reported: None)
        self._start = deepcopy(task.state_dict())
        self.task = _Later(task, first_batch + 1)
        self.updates = self.waits = REPEATS
        self.started = 0
        self.delay = SHORTEST_DELAY
        self.rounds: list[dict[str, dict[str, float]]] = []
        refused = task_config.refusals()
        self._weighs = "importance" not in refused
        self._resamples = "fresh_samples" not in refused
        self._prefetches = "prefetch" not in refused

    def warm_up(self, block_seconds: float) -> None:
        """Run once, and give the blocks the size that takes so long."""
        with self._settings():
            self._loop(REPEATS)
            seconds = self._loop(REPEATS)
        self.started = REPEATS * int(START_UP / seconds / REPEATS)
        self.delay = min(LONGEST_DELAY, max(SHORTEST_DELAY, 2 * seconds))
        self.updates = _block(block_seconds / seconds)
        self.waits = _block(block_seconds / (seconds + self.delay))

    def round(self) -> None:
        """Run one block of each kind; every other round runs them backwards."""
        kinds: dict[str, Callable[[], float | dict[str, float]]] = {
            "once": self._loop,
            "repeated": lambda: self._loop(repeats=REPEATS),
            "parts": self._parts,
            "singles": self._singles,
            "delayed": self._delayed,
        }
        if self._weighs:
            kinds["uniform"] = lambda: self._loop(threshold=inf)
            kinds["chosen"] = lambda: self._loop(threshold=-inf)
        if self._prefetches:
            kinds["prefetched"] = lambda: self._delayed(prefetch=True)
        order = list(kinds)[:: -1 if len(self.rounds) % 2 else 1]
        with self._settings():
            done = {kind: kinds[kind]() for kind in order}
        parts = done.pop("parts") | done.pop("singles")
        self.rounds.append({"loops": done, "parts": parts})

    def measurement(self) -> Measurement:
        """Return the medians over the rounds made so far."""
        task, environment = self.task, describe(self.device)
        medians, spread = {}, {}
        for group in ("loops", "parts"):
            times = {name: [r[group][name] for r in self.rounds] for name in self.rounds[0][group]}
            medians[group] = {name: float(np.median(values)) for name, values in times.items()}
            for name, values in times.items():
                low, high = np.percentile(values, [25, 75])
                spread[name] = float(high - low)
        with self._settings():
            flops = self._flops()
        return Measurement(
            task=self.config.model_dump(mode="json"),
            device=environment["device"],
            threads=self.threads,
            batch_size=task.batch_size,
            forward_samples=task.forward_samples,
            backward_samples=task.backward_samples,
            scoring_samples=task.scoring_samples,
            bound_samples=task.bound_samples,
            spread=spread,
            flops=flops,
            blocks=len(self.rounds),
            updates=self.updates,
            delay=self.delay,
            environment=environment,
            **medians,
        )

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Number of threads and random state of the measurement, and then those from before."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.random.fork_rng():
                yield
        finally:
            torch.set_num_threads(before)

    def _delayed(self, *, prefetch: bool = False) -> float:
        """Return the seconds of an update with the slow loader."""
        loader = LoaderConfig(delay_ms=1000 * self.delay, prefetch=prefetch)
        return self._loop(self.waits, loader=loader)

    def _loop(
        self,
        updates: int | None = None,
        *,
        repeats: int = 1,
        threshold: float | None = None,
        loader: LoaderConfig | None = None,
    ) -> float:
        """Return the seconds of an update in a loop as `repeatlab.loop` runs it once it is going.

        Args:
            updates: How many are timed; by default those of a block.
            repeats: N, the same for every batch.
            threshold: tau_th of importance sampling; by default there is none.
            loader: How slow it is; by default not at all.
        """
        method: dict[str, Any] = {"mapping": {"name": "constant", "repeats": repeats}}
        if threshold is not None:
            method["sampler"] = {"name": "importance", "presample": PRESAMPLE}
        self._restart()
        updates = updates or self.updates
        total = self.started + updates
        config = RunConfig(
            task=self.config,
            method=MethodConfig.model_validate(method),
            max_updates=total,
            evaluation=EvaluationConfig(every=total, splits=(), test=False),
            loader=loader or LoaderConfig(),
            device=self.device,
            threads=self.threads,
        )
        # A slow loader changes the task that it is given.
        task = self.task if loader is None else self.task.again()
        with TemporaryDirectory() as directory:
            training = Training(config, task, RunWriter(Path(directory)), calibration={})
            if threshold is not None:
                training.sampler.threshold = threshold
            training.run()
            seconds = Run(Path(directory)).updates["seconds"].to_numpy()
        begin = seconds[self.started - 1] if self.started else 0.0
        return float(seconds[-1] - begin) / updates

    def _parts(self) -> dict[str, float]:
        """Return the seconds of each part of an update, in a loop with a watch."""
        with watched(self.task, self._clock) as watch:
            self._loop()
        updates = self.started + self.updates
        return {part: total / updates for part, total in watch.totals.items()}

    def _singles(self) -> dict[str, float]:
        """Return the seconds of what is done with a batch outside of an update."""
        self._restart()
        task, batch = self.task, self.task.fresh_batch(0)
        work = {"scoring": task.sample_losses, "refresh": lambda batch: task.refresh(batch, 1)}
        if self._weighs:
            work["bounds"] = task.gradient_bounds
        if self._resamples:
            work["resample"] = lambda batch: task.resample(batch, 1)
        return {name: self._mean(single, batch) for name, single in work.items()}

    def _restart(self) -> None:
        """Go back to where every block begins; in reinforcement, the steps since are unmade."""
        self.task.load_state_dict(deepcopy(self._start))

    def _mean(self, work: Callable[[Any], Any], batch: Any) -> float:
        count = self.updates // REPEATS
        start = self._clock()
        for _ in range(count):
            work(batch)
        return (self._clock() - start) / count

    def _flops(self) -> dict[str, int]:
        """Return the floating-point operations of one update, forward and backward."""
        self._restart()
        batch = self.task.fresh_batch(0)
        with (
            FlopCounterMode(display=False) as counter,
            watched(self.task, counter.get_total_flops) as watch,
        ):
            self.task.step(batch, lambda *reported: None)
        return {part: int(watch.totals[part]) for part in ("forward", "backward")}

    def _clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif self.device == "mps":
            torch.mps.synchronize()
        return perf_counter()


def _block(updates: float) -> int:
    """Return how many updates a block of about so many has: whole batches at N = `REPEATS`."""
    return min(MOST_UPDATES, REPEATS * ceil(updates / REPEATS))


class _Later:
    """A task whose fresh batches are counted from a later one, `first`."""

    def __init__(self, task: Task, first: int) -> None:
        self._task, self.first = task, first
        self.step = task.step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def again(self) -> _Later:
        """Return the same task apart from what is changed on either from here on."""
        return _Later(self._task, self.first)

    def fresh_batch(self, index: int) -> Any:
        return self._task.fresh_batch(self.first + index)

    def candidates(self, index: int, block: int) -> Any:
        return self._task.candidates(self.first + index, self.first + block)
