"""What the updates of a run are: on which batch each is made, at what rate, until when."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from repeatlab.methods.sampling.running import Selection
from repeatlab.repetition.repeater import BatchRepeater
from repeatlab.tasks import Task
from repeatlab.training.config import RunConfig
from repeatlab.training.fresh_batches import AsTheyCome, FreshBatches, SpacedBatches, start_sampler
from repeatlab.training.gradients import GradientNorms
from repeatlab.training.rates_and_budget import Budget, Rates
from repeatlab.training.recorder import Recorder
from repeatlab.training.stand_ins import SlowTask, StandIn
from repeatlab.training.visits import Source, build_mapping, is_spaced, kind_of

# Those of its parts that have a state.
PARTS = ("repeater", "batches", "rates", "sampler", "visits", "norms")


class Updates:
    """The updates of one run, and what they need.

    Args:
        config: The run.
        recorder: Of its task, with a ledger of what was spent before the first update.
        through: The task, or what stands for it, for batches and steps.
        t: The mapping's, where it was calibrated.
        source: What the method replays, if anything.

    Attributes:
        sampler: What chooses the samples of fresh batches.
        batches: The fresh batches.
        repeater: Which update comes next.
        report: What is called with the loss of every update, before its step.
        rates: The learning rates.
        norms: Of the gradients, where the method asks for them.
        budget: What may be spent.
        seconds: Of training up to the end of each update since the last `drain`.
        elapsed: Seconds of training at the last pause.
    """

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder,
        through: Task | StandIn,
        *,
        t: float | None,
        source: Source | None,
    ) -> None:
        task, method, loader = recorder.task, config.method, config.loader
        self.config, self._ledger = config, recorder.ledger
        self._task = through
        slow = SlowTask(through, loader.delay_ms / 1000) if loader.delay_ms else through
        self.sampler = start_sampler(config, slow, kind=type(task), progress=self.share)
        options = {"prefetch": loader.prefetch, "seen": recorder.noise.fresh_batch}
        self.batches = (
            SpacedBatches(slow, source.counts, gap=method.mapping.gap, **options)
            if is_spaced(config)
            else FreshBatches(slow, self.sampler, **options)
        )
        mapping = build_mapping(config, t=t, source=source)
        # Before what changes them.
        self.norms = GradientNorms(through.optimizer_steps if method.gradient_norms else ())
        self.visits = kind_of(method)(mapping, through, self.batches)
        # Under a budget a source may have made fewer updates: its trace ends there.
        most = config.max_updates if source is None else int(source.counts.sum())
        self.repeater = BatchRepeater(
            self.batches,
            self.visits.repeats,
            max_updates=min(config.max_updates, most),
            refresh=self._again if self.visits.again else None,
            progress=self.share if config.budget else None,
        )
        self.rates, self.budget = Rates(config, task.optimizers), Budget(config, task)
        self.report = self.visits.reporter(self.repeater, self.rates)
        self.seconds: list[float] = []
        self.elapsed = 0.0

    def set_rates(self, seconds: float) -> None:
        """Set the rates of the next update: by its number, or by what is spent after `seconds`."""
        total = self.config.max_updates
        by_share = self.config.budget is not None
        self.rates.set(int(self.share(seconds) * total) if by_share else self.repeater.updates)

    def ended(self, seconds: float) -> bool:
        """Take in that an update has ended after `seconds`; return whether the budget has, too."""
        self.seconds.append(seconds)
        self.norms.ended()
        spent = self.config.budget is not None and self.spent(seconds) >= self.budget.limit
        if spent:
            self.repeater.stop()
        return spent

    def visit(self) -> Callable[[Any], None]:
        """Return what makes one update on a batch, as lean as the method allows."""
        step, report, sampler = self._task.step, self.report, self.sampler
        if isinstance(sampler, AsTheyCome):
            return partial(step, report=report)

        def visit(chosen: Selection) -> None:
            def seen(driver: Any, losses: Any, bounds: Any = None) -> None:
                report(driver)
                sampler.observe(chosen.batch, losses, bounds)

            step(chosen.batch, seen, chosen.weights)

        return visit

    def _again(self, item: Any) -> Any:
        """Return what another visit to a fresh batch sees."""
        if isinstance(item, Selection):
            return item._replace(batch=self.visits.again(item.batch, self.repeater.repeat))
        return self.visits.again(item, self.repeater.repeat)

    def spent(self, seconds: float | None = None) -> float:
        """Return how much of the budget is spent after `seconds`, by default at the last pause."""
        seconds = self.elapsed if seconds is None else seconds
        return self.budget.spent(self._ledger, self.repeater.updates, self.sampler.scored, seconds)

    def share(self, seconds: float | None = None) -> float:
        """Return the share of the run that is over, by default after the last update.

        Of T, or of the budget.
        """
        if self.config.budget is None:
            return self.repeater.updates / self.config.max_updates
        if seconds is None:
            seconds = self.seconds[-1] if self.seconds else self.elapsed
        return min(1.0, self.spent(seconds) / self.budget.limit)

    def drain(self) -> dict[str, np.ndarray]:
        """Return the rows of the updates since the last call, and forget them."""
        rows = self.repeater.drain()
        updates = rows["update"]
        if len(updates) > len(self.seconds):
            # A loss that was not finite has no update after it, and so no time of its own.
            self.seconds += self.seconds[-1:] or [self.elapsed]
        rows["seconds"] = np.array(self.seconds[: len(updates)])
        self.elapsed = max([self.elapsed, *self.seconds[: len(updates)][-1:]])
        del self.seconds[: len(updates)]
        rows["lr"] = self.rates.drain(updates)
        rows |= self.norms.drain(len(updates))
        return rows | self.batches.rows(updates)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on; only right after `drain`."""
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        return parts | {"seconds": list(self.seconds), "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, after the task's."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.rates.rebind(self._task.optimizers)
        self.seconds[:], self.elapsed = state["seconds"], state["elapsed"]
