"""What an update costs on this machine, part by part: `measure(task_config)`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import ceil, isfinite, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch

from repeatlab.core.environment import describe, pick_device
from repeatlab.store.measurements import (
    REPEATS,
    Measurement,
    measurement_key,
    read_measurements,
    write_measurement,
)
from repeatlab.store.records import Run, RunWriter, Store
from repeatlab.studies.study import Study
from repeatlab.tasks import TASKS, Task, TaskConfig, load_task
from repeatlab.training.config import EvaluationConfig, MethodConfig, RunConfig
from repeatlab.training.making import torch_settings
from repeatlab.training.one_run import Training
from repeatlab.training.stand_ins import ObservedTask, StandIn

# A loop runs so long, in seconds, before it is timed: it is slower at first.
LEAD_IN = 0.02
PARTS = ("forward", "backward", "optimizer", "recording", "data")
MOST_UPDATES = 2000  # in a block
# So many updates, or seconds, are made with the task's learning rate before anything is timed. What
# an update takes depends on the weights: max-pooling picks among more zeros the more ReLUs are at
# rest.
MOST_LEARNT, LEARNING = 200, 1.0
METHODS = {"once": {}, "repeated": {"mapping": {"name": "constant", "repeats": REPEATS}}}


def measure(task_config: TaskConfig, *, blocks: int = 15, **options: Any) -> Measurement:
    """Return the times of a task's parts, as they are in the loop that trains it.

    Args:
        task_config: The task.
        blocks: Blocks of each kind, over which medians are taken.
        **options: As of `Bench`.
    """
    bench = Bench(task_config, **options)
    for _ in range(blocks):
        bench.round()
    return bench.measurement()


def time_on(device: str, clock: Callable[[], float] = perf_counter) -> float:
    """Return the time when the device has done what it was told to."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
    return clock()


class Watch:
    """How much of a clock each part takes.

    Attributes:
        totals: Sums by part.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last = clock, nan
        self.totals: Counter[str] = Counter()

    def lap(self, part: str) -> None:
        """Count what has passed since the last lap for `part`; the first one only starts."""
        now = self._clock()
        if self._last == self._last:
            self.totals[part] += now - self._last
        self._last = now


class Bench:
    """The loop that trains a task, in short blocks of several kinds.

    They take turns, so that a slow moment of the machine meets all of them, and each begins where
    the others do. The learning rate is 0 once the task has learnt a little: no block depends on
    what another has learnt.

    Args:
        task_config: The task.
        device: As in a run's configuration.
        threads: CPU threads of torch.
        seed: Of the task.
        first_batch: The fresh batch after which every block begins. In reinforcement the cost of
            acting depends on epsilon, and so on how many steps were made: half of a run's batches
            are its mean. On those before it the task learns for a little.
        block_seconds: How long a block shall take at N = 1; it has at least four updates.
        clock: What to read the time from.

    Attributes:
        updates: Updates in a block.
        lead: Updates before them, which are not timed.
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
        block_seconds: float = 0.1,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.config, self.threads, self.seed = task_config, threads, seed
        self.device, self._clock, self._first = pick_device(device), clock, first_batch + 1
        self._now = partial(time_on, self.device, clock)
        self.rounds: list[dict[str, dict[str, float]]] = []
        self.updates, self.lead = REPEATS, 0
        with torch_settings(self.threads, self.seed):
            self.task = self._learnt()
            self._start = deepcopy(self.task.state_dict())
            self._observed = _freeze(self._build())  # it goes on telling what it does
            update = [self._loop("once") for _ in range(2)][1]
        self.updates = min(MOST_UPDATES, REPEATS * ceil(block_seconds / update / REPEATS))
        self.lead = REPEATS * ceil(LEAD_IN / update / REPEATS)

    def round(self) -> None:
        """Run one block of each kind; every other round runs them backwards."""
        work = {"scoring": self.task.sample_losses, "refresh": lambda b: self.task.refresh(b, 1)}
        if "fresh_samples" not in self.config.refusals():
            work["resample"] = lambda batch: self.task.resample(batch, 1)
        loops, parts = {}, {}
        with torch_settings(self.threads, self.seed):
            for kind in list(METHODS)[:: -1 if len(self.rounds) % 2 else 1]:
                loops[kind] = self._loop(kind)
            parts |= self._parts()
            batch = self._reset(self.task).fresh_batch(0)
            for name, single in work.items():
                parts[name] = self._single(single, batch)
        self.rounds.append({"loops": loops, "parts": parts})

    def measurement(self) -> Measurement:
        """Return the medians over the rounds made so far."""
        task, environment = self.task, describe(self.device)
        medians, spread = {}, {}
        for group in ("loops", "parts"):
            times = {name: [r[group][name] for r in self.rounds] for name in self.rounds[0][group]}
            medians[group] = {name: float(np.median(values)) for name, values in times.items()}
            quarters = {name: np.percentile(values, [25, 75]) for name, values in times.items()}
            spread |= {name: float(high - low) for name, (low, high) in quarters.items()}
        return Measurement(
            task=self.config.model_dump(mode="json"),
            device=environment["device"],
            threads=self.threads,
            batch_size=task.batch_size,
            forward_samples=task.forward_samples,
            backward_samples=task.backward_samples,
            spread=spread,
            environment=environment,
            **medians,
        )

    def _loop(self, kind: str, watch: Watch | None = None) -> float:
        """Return the seconds of an update in a loop as a run's is once it is going.

        Args:
            kind: Of `METHODS`.
            watch: What is told of the parts of its updates.
        """
        total = self.lead + self.updates
        config = RunConfig(
            task=self.config,
            method=MethodConfig.model_validate(METHODS[kind]),
            max_updates=total,
            evaluation=EvaluationConfig(every=total, splits=(), test=False),
            device=self.device,
            threads=self.threads,
        )
        task = self._reset(self._observed if watch else self.task)
        through = ObservedTask(task, watch.lap) if watch else task
        with TemporaryDirectory() as directory:
            writer, options = RunWriter(Path(directory)), {"calibration": {}, "clock": self._clock}
            training = Training(config, task, writer, through=through, **options)
            training.run()
            seconds = Run(Path(directory)).updates["seconds"].to_numpy()
        begin = seconds[self.lead - 1] if self.lead else 0.0
        return float(seconds[-1] - begin) / self.updates

    def _parts(self) -> dict[str, float]:
        """Return the seconds of each part of an update."""
        watch = Watch(self._now)
        self._loop("once", watch)
        return {part: watch.totals[part] / (self.lead + self.updates) for part in PARTS}

    def _single(self, work: Callable[[Any], Any], batch: Any) -> float:
        """Return the seconds of what is done with a batch outside of an update."""
        count = self.updates // REPEATS
        work(batch)
        start = self._now()
        for _ in range(count):
            work(batch)
        return (self._now() - start) / count

    def _build(self) -> Task:
        kind = load_task(TASKS[self.config.name])
        return _Later(kind(self.config, seed=self.seed, device=self.device), self._first)

    def _learnt(self) -> Task:
        """Return the task after some updates on earlier batches, or as it begins if it diverges."""
        task, losses, end = self._build(), [], perf_counter() + LEARNING

        def report(loss: Any, *_: Any) -> None:
            losses.append(torch.as_tensor(loss).item())

        for index in range(-min(self._first, MOST_LEARNT), -1):
            task.step(task.fresh_batch(index), report)
            if perf_counter() > end or not isfinite(losses[-1]):
                break
        # Optimizers have their moments from the first step on.
        _freeze(task).step(task.fresh_batch(-1), report)
        if not np.isfinite(losses).all():
            task = _freeze(self._build())
            task.step(task.fresh_batch(-1), report)
        return task

    def _reset(self, task: Task) -> Task:
        """Return the task as it is where every block begins. In reinforcement, steps are unmade."""
        task.load_state_dict(deepcopy(self._start))
        return task


def _freeze(task: Task) -> Task:
    for optimizer in task.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    return task


class _Later(StandIn):
    """A task whose fresh batches are counted from a later one, `first`."""

    def __init__(self, task: Task, first: int) -> None:
        super().__init__(task)
        self._first = first

    def fresh_batch(self, index: int) -> Any:
        """See `Task`."""
        return self.task.fresh_batch(self._first + index)


def measured(
    study: Study | dict[str, Any],
    runs: str | Path = "runs",
    *,
    blocks: int = 15,
    anew: bool = False,
) -> dict[str, Measurement]:
    """Return the measurement of every task of a study, by what the study calls the task.

    One that the store has for this processor, device and number of threads is not made again. The
    machine should have nothing else to do meanwhile.

    Args:
        study: The study, or its fields.
        runs: The run store.
        blocks: As in `measure`.
        anew: Whether to measure again what the store has.

    Raises:
        ConfigError: the fields are not valid.
        StoreError: the store cannot be written, or holds a measurement of another version.
        DataError: a task lacks its data.
    """
    study, store = study if isinstance(study, Study) else Study.of(**study), Store(runs)
    # Half of its batches are the mean of what acting costs.
    first = study.max_updates // 2
    settings = {"device": study.device, "threads": study.threads, "blocks": blocks}
    here, found = describe(pick_device(study.device)), {}
    store.check_writable()
    known = {} if anew else read_measurements(store)
    for name, task in study.tasks.items():
        key = measurement_key(task.model_dump(mode="json"), here["device"], study.threads)
        old = known.get(key)
        if old is None or old.environment["processor"] != here["processor"]:
            task.prepare()
            old = measure(task, first_batch=first, **settings)
            write_measurement(store, old)
        found[name] = old
    return found
