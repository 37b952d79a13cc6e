"""What an update costs on this machine, part by part: `measure(task_config)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import ceil, inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from repeatlab.core.environment import describe, pick_device
from repeatlab.core.stopwatch import Stopwatch
from repeatlab.store.records import Run, RunWriter
from repeatlab.studies.diagnostics.interleaving import Turns, in_turns, train_in_turns
from repeatlab.studies.diagnostics.prediction import BRIEF_DELAY, PRESAMPLE, REPEATS, Measurement
from repeatlab.studies.diagnostics.profiler import watched
from repeatlab.tasks import TASKS, Task, TaskConfig, load_task
from repeatlab.training.config import EvaluationConfig, LoaderConfig, MethodConfig, RunConfig
from repeatlab.training.training import Training

MOST_UPDATES = 2000  # in a block
# What the slow loader sleeps, in seconds: long beside `BRIEF_DELAY`, and with prefetch it has to be
# slower than an update to be waited for at all; beside a very long sleep its waking is nothing.
SHORTEST_DELAY, LONGEST_DELAY = 0.012, 0.050
# A loop runs so long, in seconds, before it is timed: it is slower at first, and blocks are too
# short for that to even out.
START_UP = 0.05
# A processor can be twice as fast in one second as in the next (its clock, the neighbour on its
# core), so that the blocks of a round are made in so many turns, a few updates of each in a turn; a
# turn is no shorter than so many seconds, or its first update, which finds other caches, weighs too
# much.
TURNS = 8
SHORTEST_TURN = 0.030
# Before its turn other updates run so long, in seconds: the first ones of a turn find the caches
# full of another network.
LEAD_IN = 0.01
# So many updates, or seconds, are made with the task's learning rate before anything is timed. What
# an update takes depends on the weights: max-pooling picks among more zeros the more ReLUs are at
# rest.
MOST_LEARNT, LEARNING = 200, 1.0


def measure(
    task_config: TaskConfig,
    *,
    device: str = "auto",
    threads: int = 1,
    seed: int = 0,
    first_batch: int = 0,
    blocks: int = 9,
    block_seconds: float = 0.25,
    clock: Callable[[], float] = perf_counter,
) -> Measurement:
    """Return the times of a task's parts, as they are in the loop that trains it.

    Args:
        task_config: The task.
        device: As in a run's configuration.
        threads: CPU threads of torch.
        seed: Of the task.
        first_batch: The fresh batch after which every block begins. In reinforcement the cost of
            acting depends on epsilon, and so on how many steps were made: half of a run's batches
            are its mean. On those before it the task learns for a little.
        blocks: Blocks of each kind, over which medians are taken.
        block_seconds: How long a block shall take at N = 1; it has at least four updates.
        clock: What to read the time from.
    """
    options = {"device": device, "threads": threads, "seed": seed, "first_batch": first_batch}
    bench = Bench(task_config, **options, clock=clock)
    bench.warm_up(block_seconds)
    for _ in range(blocks):
        bench.round()
    return bench.measurement()


class Bench:
    """The loop that trains a task, in blocks of several kinds.

    They take turns, so that a slow moment of the machine meets all of them, and each begins where
    the others do. On a GPU, whose queue would have to be empty between two turns, a block is a
    turn, and so is one whose batches are made meanwhile. The learning rate is 0 once the task has
    learnt a little: no block depends on what another has learnt. Arguments are those of `measure`.

    Attributes:
        updates: Updates in a block.
        started: Updates before them, to which the clock pays no attention.
        lead: Updates on a task of their own before each turn.
        turns: In how many of them a block is made.
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
        clock: Callable[[], float] = perf_counter,
        turns: int = TURNS,
    ) -> None:
        self.config, self.threads, self.seed = task_config, threads, seed
        self.device, self._clock, self.turns = pick_device(device), clock, turns
        self._first = first_batch + 1
        self.task = self._learnt()
        self._start = deepcopy(self.task.state_dict())
        self._tasks: dict[str, _Later] = {}
        self._leading, self._led = self.task, 0
        self._least = 1  # updates in a turn
        self.updates = self.waits = REPEATS
        self.started = self.lead = 0
        self.delay = SHORTEST_DELAY
        self.rounds: list[dict[str, dict[str, float]]] = []
        refused = task_config.refusals()
        self._weighs = "importance" not in refused
        self._resamples = "fresh_samples" not in refused
        self._prefetches = "prefetch" not in refused

    def warm_up(self, block_seconds: float) -> None:
        """Run once, and give the blocks the size that takes so long."""
        with self._settings():
            seconds = [in_turns({"once": self._loop("once", REPEATS)}, _nothing) for _ in range(2)]
        update = seconds[1]["once"]
        self._least = ceil(SHORTEST_TURN / update)
        self.started = REPEATS * int(START_UP / update / REPEATS)
        if self.device == "cpu":
            self.lead = round(LEAD_IN / update)
            self._leading = self._build()
        self.delay = min(LONGEST_DELAY, max(SHORTEST_DELAY, 2 * update))
        self.updates = _block(block_seconds / update)
        self.waits = _block(block_seconds / (update + self.delay))

    def round(self, **others: Turns[Any]) -> dict[str, Any]:
        """Run one block of each kind; every other round runs them backwards.

        Args:
            **others: Loops that take their turns among the blocks.

        Returns:
            What they return.
        """
        loops = self._loops()
        kinds = loops | self._singles()
        order = [*others, *kinds][:: -1 if len(self.rounds) % 2 else 1]
        with self._settings():
            done = in_turns({kind: (others | kinds)[kind] for kind in order}, self.lead_in)
        parts = done["parts"] | {kind: done[kind] for kind in kinds if kind not in loops}
        times = {kind: done[kind] for kind in loops if kind != "parts"}
        self.rounds.append({"loops": times, "parts": parts})
        return {name: done[name] for name in others}

    def lead_in(self) -> None:
        """Make some updates that are not timed."""
        for _ in range(self.lead):
            self._leading.step(self._leading.fresh_batch(self._led), _ignore)
            self._led += 1

    def turn(self, updates: int) -> int:
        """Return how many of a loop's updates are made in a turn."""
        if self.device != "cpu":
            return updates
        return max(ceil(updates / self.turns), self._least)

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

    def _loops(self) -> dict[str, Turns[Any]]:
        """Return the loops of a round, by kind."""
        kinds = {
            "once": self._loop("once"),
            "repeated": self._loop("repeated", repeats=REPEATS),
            "parts": self._parts(),
            "delayed": self._delayed("delayed"),
            "delayed_briefly": self._delayed("delayed_briefly", BRIEF_DELAY),
        }
        if self._weighs:
            kinds["uniform"] = self._loop("uniform", threshold=inf)
            kinds["chosen"] = self._loop("chosen", threshold=-inf)
        if self._prefetches:
            kinds["prefetched"] = self._delayed("prefetched", prefetch=True)
        return kinds

    def _delayed(
        self, kind: str, delay: float | None = None, *, prefetch: bool = False
    ) -> Turns[float]:
        """Return the seconds of an update with a slow loader, by default that of `delay`."""
        loader = LoaderConfig(delay_ms=1000 * (delay or self.delay), prefetch=prefetch)
        return self._loop(kind, self.waits, loader=loader)

    def _loop(
        self,
        kind: str,
        updates: int | None = None,
        *,
        repeats: int = 1,
        threshold: float | None = None,
        loader: LoaderConfig | None = None,
        task: _Later | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> Turns[float]:
        """Return the seconds of an update in a loop as `training.loop` runs it once it is going.

        Args:
            kind: Its task is that of this kind.
            updates: How many are timed; by default those of a block.
            repeats: N, the same for every batch.
            threshold: tau_th of importance sampling; by default there is none.
            loader: How slow it is; by default not at all.
            task: One to use instead, as it is.
            stopwatch: What times it; by default one of its own.
        """
        method: dict[str, Any] = {"mapping": {"name": "constant", "repeats": repeats}}
        if threshold is not None:
            method["sampler"] = {"name": "importance", "presample": PRESAMPLE}
        # A slow loader changes the task that it is given.
        task = task or self._task(kind).again()
        loader = loader or LoaderConfig()
        updates = updates or self.updates
        total = self.started + updates
        config = RunConfig(
            task=self.config,
            method=MethodConfig.model_validate(method),
            max_updates=total,
            evaluation=EvaluationConfig(every=total, splits=(), test=False),
            loader=loader,
            device=self.device,
            threads=self.threads,
        )
        turn = total if loader.prefetch else self.turn(total)
        with TemporaryDirectory() as directory:
            training = Training(config, task, RunWriter(Path(directory)), calibration={})
            if threshold is not None:
                training.sampler.threshold = threshold
            yield from train_in_turns(training, stopwatch or Stopwatch(self._clock), turn=turn)
            seconds = Run(Path(directory)).updates["seconds"].to_numpy()
        begin = seconds[self.started - 1] if self.started else 0.0
        return float(seconds[-1] - begin) / updates

    def _parts(self) -> Turns[dict[str, float]]:
        """Return the seconds of each part of an update, in a loop with a watch."""
        task, stopwatch = self._task("parts"), Stopwatch(self._now)
        with watched(task, stopwatch) as watch:
            yield from self._loop("parts", task=task, stopwatch=stopwatch)
        updates = self.started + self.updates
        return {part: total / updates for part, total in watch.totals.items()}

    def _singles(self) -> dict[str, Turns[float]]:
        """Return what is done with a batch outside of an update, by name: the seconds of each."""
        task = self._task("singles")
        work = {"scoring": task.sample_losses, "refresh": lambda batch: task.refresh(batch, 1)}
        if self._weighs:
            work["bounds"] = task.gradient_bounds
        if self._resamples:
            work["resample"] = lambda batch: task.resample(batch, 1)
        batch = task.fresh_batch(0)
        return {name: self._single(single, batch) for name, single in work.items()}

    def _single(self, work: Callable[[Any], Any], batch: Any) -> Turns[float]:
        count, seconds = self.updates // REPEATS, 0.0
        turn = self.turn(count)
        for made in range(0, count, turn):
            start = self._now()
            for _ in range(made, min(count, made + turn)):
                work(batch)
            seconds += self._now() - start
            yield
        return seconds / count

    def _build(self, *, learns: bool = False) -> _Later:
        kind = load_task(TASKS[self.config.name])
        task = kind(self.config, seed=self.seed, device=self.device)
        if not learns:
            _freeze(task)
        return _Later(task, self._first)

    def _learnt(self) -> _Later:
        """Return the task after some updates on earlier batches, or as it begins if it diverges."""
        task, losses = self._build(learns=True), []

        def report(loss: Any, *_: Any) -> None:
            losses.append(torch.as_tensor(loss).item())

        with self._settings():
            end = perf_counter() + LEARNING
            for index in range(-min(self._first, MOST_LEARNT), -1):
                task.step(task.fresh_batch(index), report)
                if perf_counter() > end or not isfinite(losses[-1]):
                    break
            _freeze(task)
            # Optimizers have their moments from the first step on.
            task.step(task.fresh_batch(-1), report)
            if not np.isfinite(losses).all():
                task = self._build()
                task.step(task.fresh_batch(-1), _ignore)
        return task

    def _task(self, kind: str) -> _Later:
        """Return the task of a kind of block, as it is where every block begins.

        Where there are no turns all kinds have the same. In reinforcement, steps are unmade.
        """
        if self.device != "cpu":
            kind = "every"
        if kind not in self._tasks:
            self._tasks[kind] = self._build() if self._tasks else self.task
        self._tasks[kind].load_state_dict(deepcopy(self._start))
        return self._tasks[kind]

    def _flops(self) -> dict[str, int]:
        """Return the floating-point operations of one update, forward and backward."""
        self.task.load_state_dict(deepcopy(self._start))
        batch = self.task.fresh_batch(0)
        with (
            FlopCounterMode(display=False) as counter,
            watched(self.task, counter.get_total_flops) as watch,
        ):
            self.task.step(batch, _ignore)
        return {part: int(watch.totals[part]) for part in ("forward", "backward")}

    def _now(self) -> float:
        """Return the time when the device has done what it was told to."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif self.device == "mps":
            torch.mps.synchronize()
        return self._clock()


def _freeze(task: Any) -> None:
    for optimizer in task.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0


def _ignore(*reported: Any) -> None:
    """Stand for a loop's `report`."""


def _nothing() -> None:
    """Lead nothing in."""


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
