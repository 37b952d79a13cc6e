"""What N does: visits to one batch, to fresh views of it, to other samples, or one long step."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from repeatlab.core.seeding import derive
from repeatlab.methods import controls
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import Constant, Mapping, Trace
from repeatlab.repetition.repeater import BatchRepeater
from repeatlab.tasks import Task
from repeatlab.training.config import RunConfig, TraceConfig
from repeatlab.training.fresh_batches import FreshBatches
from repeatlab.training.rates_and_budget import Rates


class Source(NamedTuple):
    """What a control takes from the run that it replays.

    Attributes:
        counts: int64, (fresh batches,): N.
        losses: float64, (fresh batches,): the losses that decided.
    """

    counts: np.ndarray
    losses: np.ndarray


def is_spaced(config: RunConfig) -> bool:
    """Whether the run's repeats come later than right after each other."""
    return getattr(config.method.mapping, "control", None) == "spaced"


def build_mapping(
    config: RunConfig, *, t: float | None = None, source: Source | None = None
) -> Mapping:
    """Return the run's mapping, with its calibrated t, its seed, or its source's changed counts.

    Of `spaced`, whose visits are no property of a batch, it is 1: its loader yields visits.
    """
    choice = config.method.mapping
    if choice is None or is_spaced(config):
        return Constant(1)
    if isinstance(choice, TraceConfig):
        if choice.counts is not None:
            return choice.build()
        counts = _controlled(choice, source, derive(config.stream_seed, "control"))
        return Trace(tuple(counts.tolist()))
    overrides: dict[str, Any] = {}
    if config.method.calibrated:
        overrides[type(choice).target.calibrated] = t
    if "seed" in type(choice).target.__dataclass_fields__:
        overrides["seed"] = derive(config.stream_seed, "mapping")
    return choice.build(**overrides)


def _controlled(choice: TraceConfig, source: Source, draws: int) -> np.ndarray:
    counts, window = source.counts, choice.window
    return {
        "replay": lambda: counts,
        "permuted": lambda: controls.permuted(counts, seed=draws),
        "windowed": lambda: controls.windowed(counts, window=window, seed=draws),
        "time_only": lambda: controls.time_only(counts, window=window),
        "anti_hard": lambda: controls.anti_hard(counts, source.losses, window=window),
        "falling_linear": lambda: controls.falling(counts, shape="linear"),
        "falling_cosine": lambda: controls.falling(counts, shape="cosine"),
    }[choice.control]()


class Visits:
    """N visits to each fresh batch, right after each other, on one view of it.

    Args:
        mapping: N of a loss.
        task: Where batches come from.
        batches: Those of the run.

    Attributes:
        repeats: What the run's `BatchRepeater` goes by.
        again: From a fresh batch and the number of a visit, from 1, to the batch of that visit;
            None where it is the same one.
    """

    again: Callable[[Any, int], Any] | None = None

    def __init__(self, mapping: Mapping, task: Task, batches: FreshBatches) -> None:
        self.repeats, self.task, self.batches = mapping, task, batches

    def reporter(self, repeater: BatchRepeater, rates: Rates) -> Callable[[Tensor | float], None]:
        """Return what is called with the loss of every update, before its step."""
        return repeater.report

    def state_dict(self) -> dict[str, Any]:
        """Return what later visits depend on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""


class FreshViews(Visits):
    """N visits, each under an augmentation of its own."""

    def again(self, batch: Any, visit: int) -> Any:
        """See `Visits`."""
        return self.task.refresh(batch, visit)


class FreshSamples(Visits):
    """N updates, all but the first on other samples that were there when the batch was made."""

    def again(self, batch: Any, visit: int) -> Any:
        """See `Visits`."""
        batch = self.task.resample(batch, visit)
        self.batches.resampled(batch.indices)
        return batch


class LongSteps(Visits):
    """N as a factor on the learning rate of the only update on each batch.

    One step at N times the rate goes where N steps go to first order, without the gradients in
    between: the control for "repetition is only a larger learning rate". The host waits for every
    loss before the optimizer's step.
    """

    def __init__(self, mapping: Mapping, task: Task, batches: FreshBatches) -> None:
        super().__init__(Constant(1), task, batches)
        self._mapping = mapping
        self.stats = LossStats(mapping.window)

    def reporter(self, repeater: BatchRepeater, rates: Rates) -> Callable[[Tensor | float], None]:
        """See `Visits`."""

        def report(loss: Tensor | float) -> None:
            repeater.report(loss)
            value = float(loss.detach() if isinstance(loss, Tensor) else loss)
            rates.scale(self.factor(value, repeater.stats))

        return report

    def factor(self, loss: float, of_run: LossStats) -> int:
        """Return N for the batch's loss, 1 if that is not finite; `of_run` knows the index."""
        if not isfinite(loss):
            return 1
        self.stats.index, self.stats.progress = of_run.index, of_run.progress
        repeats = self._mapping(loss, self.stats)
        self.stats.observe(loss)
        return repeats

    def state_dict(self) -> dict[str, Any]:
        """Return the losses that the mapping looks back on."""
        return self.stats.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.stats.load_state_dict(state)


# By a method's `apply`.
KINDS = {"repeat": Visits, "step_size": LongSteps, "fresh_samples": FreshSamples}
