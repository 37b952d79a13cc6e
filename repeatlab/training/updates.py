"""What the updates of a run are: on which batch each is made, at what rate, until when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from repeatlab.cost import Ledger
from repeatlab.methods.sampling.running import Selection
from repeatlab.repetition.repeater import BatchRepeater
from repeatlab.tasks import Task
from repeatlab.training.config import RunConfig
from repeatlab.training.data_parallel import Alone, Team
from repeatlab.training.fresh_batches import (
    AsTheyCome,
    FreshBatches,
    SpacedBatches,
    is_spaced,
    start_sampler,
)
from repeatlab.training.rates_and_budget import Budget, Rates
from repeatlab.training.stand_ins import SlowTask
from repeatlab.training.visits import Source, build_mapping, kind_of_visits


class Updates:
    """The updates of one run.

    Args:
        config: The run.
        task: What is trained.
        through: The task, or what stands for it, for batches and steps.
        ledger: Where what was spent before the first update stands.
        t: The mapping's, where it was calibrated.
        source: What the method replays, if anything.
        seen: Called with the indices of every fresh batch.
        team: The processes that share every batch.
        clock: What seconds are read from.

    Attributes:
        sampler: What chooses the samples of fresh batches.
        batches: The fresh batches.
        repeater: Which update comes next.
        report: What is called with the loss of every update, before its step.
        rates: The learning rates.
        budget: What may be spent.
        seconds: Of training up to the end of each update since the last `drain`.
        elapsed: Seconds of training at the last pause.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        *,
        through: Task,
        ledger: Ledger,
        t: float | None,
        source: Source | None,
        seen: Callable[[torch.Tensor], None],
        team: Team | Alone,
        clock: Callable[[], float] | None,
    ) -> None:
        self.config, self._ledger, self._clock = config, ledger, clock or perf_counter
        method, loader = config.method, config.loader
        self._task, joined = team.sharing(through)
        slow = SlowTask(self._task, loader.delay_ms / 1000) if loader.delay_ms else self._task
        self.sampler = start_sampler(config, slow, kind=type(task), progress=self.share)
        options = {"prefetch": loader.prefetch, "seen": seen}
        if is_spaced(config):
            self.batches: FreshBatches = SpacedBatches(
                slow, source.counts, gap=method.mapping.gap, **options
            )
        else:
            self.batches = FreshBatches(slow, self.sampler, **options)
        mapping = build_mapping(config, t=t, source=source)
        self.visits = kind_of_visits(method)(mapping, self._task, self.batches)
        # Under a budget a source may have made fewer updates: its trace ends there.
        most = config.max_updates if source is None else int(source.counts.sum())
        self.repeater = BatchRepeater(
            self.batches,
            self.visits.repeats,
            max_updates=min(config.max_updates, most),
            refresh=self._again if self.visits.again else None,
            progress=self.share if config.budget else None,
            **joined,
        )
        self.rates, self.budget = Rates(config, task.optimizers), Budget(config, task)
        self.report = self.visits.reporter(self.repeater, self.rates)
        self.seconds: list[float] = []
        self.elapsed = 0.0

    def coming(
        self,
        *,
        until_pause: Callable[[], int],
        stop: Callable[[], bool],
        pause: Callable[[], None],
    ) -> Iterator[Any]:
        """Yield the batch of every update that is left, to be made before the next is asked for.

        Args:
            until_pause: Returns how many updates there are until the next pause.
            stop: Asked after every update; True brings the pause forward.
            pause: Called between two updates, outside the clock.

        Raises:
            NonFiniteLoss: a loss on CUDA, when it is read.
        """
        clock, rates, seconds, limit = self._clock, self.rates, self.seconds, self.budget.limit
        moving, limited = rates.moving, self.config.budget is not None
        left, start = until_pause(), clock() - self.elapsed
        for batch in self.repeater:
            if moving:
                rates.set(self._position(clock() - start))
            yield batch
            seconds.append(clock() - start)
            left -= 1
            if limited and self.spent(seconds[-1]) >= limit:
                self.repeater.stop()
                left = 0
            if not left or stop():
                if torch.cuda.is_available() and self.config.device != "cpu":
                    torch.cuda.synchronize()
                self.elapsed = seconds[-1] = clock() - start
                pause()
                left, start = until_pause(), clock() - self.elapsed

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

    def _position(self, seconds: float) -> int:
        """Return where the learning-rate schedule is: the update, or the spent share of T."""
        if self.config.budget is None:
            return self.repeater.updates
        return int(self.share(seconds) * self.config.max_updates)

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
        return rows | self.batches.rows(updates)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on; only right after `drain`."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"seconds": list(self.seconds), "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, after the task's."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.rates.rebind(self._task.optimizers)
        self.seconds[:], self.elapsed = state["seconds"], state["elapsed"]

    def _parts(self) -> dict[str, Any]:
        names = ("repeater", "batches", "rates", "sampler", "visits")
        return {name: getattr(self, name) for name in names}
