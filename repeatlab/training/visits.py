"""What N does: visits to one batch, to fresh views of it, to other samples, or one long step.

Visits may be held near the weights of the first; see `repeatlab.methods.pulling`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repeatlab.core.seeding import derive
from repeatlab.methods import controls
from repeatlab.methods.pulling import PULLS, Pull
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import Constant, Mapping, Trace
from repeatlab.repetition.repeater import BatchRepeater
from repeatlab.tasks import Task
from repeatlab.training.config import MethodConfig, RunConfig, TraceConfig
from repeatlab.training.fresh_batches import FreshBatches
from repeatlab.training.gradients import with_gradient
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


class PulledVisits(Visits):
    """N visits of which the repeats are held near the weights of the first one.

    Args:
        pull: How.
        mapping: As of `Visits`, like the others.
        task: Likewise.
        batches: Likewise.
    """

    def __init__(self, pull: Pull, mapping: Mapping, task: Task, batches: FreshBatches) -> None:
        super().__init__(mapping, task, batches)
        self._pull, self._excess = pull, torch.zeros(())
        self._first: list[list[Tensor]] = [[] for _ in task.optimizer_steps]

    def reporter(self, repeater: BatchRepeater, rates: Rates) -> Callable[[Tensor | float], None]:
        """See `Visits`."""
        upper = getattr(self.repeats, "upper", None)
        for place, step in enumerate(self.task.optimizer_steps):
            step.watch(partial(self._see, place, repeater))

        def report(loss: Tensor | float) -> None:
            repeater.report(loss)
            if upper is not None and repeater.repeat:
                # Of a repeat it takes what the batch's first loss has left in `stats`.
                self._excess = torch.as_tensor(loss).detach() - upper(0.0, repeater.stats)

        return report

    @torch.no_grad()
    def _see(self, place: int, repeater: BatchRepeater, optimizer: Any) -> None:
        """Keep the weights of a first visit, or pull to them."""
        weights = list(with_gradient(optimizer))
        if repeater.repeat == 0:
            self._first[place] = [weight.clone() for weight in weights]
            return
        count = sum(weight.numel() for weight in weights)
        for weight, first in zip(weights, self._first[place], strict=True):
            self._pull.apply(weight, first.to(weight.device), self._excess, count)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the first visit."""
        return {"first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self._first = state["first"]


KINDS = {"repeat": Visits, "step_size": LongSteps, "fresh_samples": FreshSamples}


def kind_of(method: MethodConfig) -> Callable[..., Visits]:
    """Return what makes a method's visits, of the arguments of `Visits`."""
    if method.way in PULLS:
        return partial(PulledVisits, method.apply.build())
    return FreshViews if method.fresh_views else KINDS[method.way]
