"""How fast a run goes and what ends it: learning rates and the budget."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from repeatlab.cost import Ledger, cost_units
from repeatlab.training.config import RunConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from repeatlab.tasks import Task


class Rates:
    """The learning rates of all optimizers, scaled alike by the arm, schedule and step size.

    Attributes:
        moving: Whether they have to be set before every update.
    """

    def __init__(self, config: RunConfig, optimizers: Iterable[Optimizer]) -> None:
        schedule = config.method.schedule
        self._schedule = schedule.build() if schedule else None
        self._total = config.max_updates
        # What was set is kept where it does not follow from the update's index.
        self._keep = config.budget is not None or config.method.apply == "step_size"
        self.moving = bool(self._schedule or self._keep)
        rate = config.method.rate
        self._groups = [(g, rate * g["lr"]) for o in optimizers for g in o.param_groups]
        for group, base in self._groups:
            group["lr"] = base
            if config.method.weight_decay is not None:
                group["weight_decay"] = config.method.weight_decay
        self._factors: list[float] = []

    def set(self, position: int) -> None:
        """Set the rates for an update, `position` of T on the schedule."""
        factor = self._factor(position)
        for group, base in self._groups:
            group["lr"] = base * factor
        if self._keep:
            self._factors.append(factor)

    def scale(self, factor: int) -> None:
        """Multiply the rates of this update."""
        for group, _ in self._groups:
            group["lr"] *= factor
        self._factors[-1] *= factor

    def drain(self, updates: np.ndarray) -> np.ndarray:
        """Return the first optimizer's rates at `updates`, (n,), and forget what was kept."""
        if self._keep:
            factors = self._factors[: len(updates)]
            self._factors = self._factors[len(updates) :]
        else:
            factors = [self._factor(int(update)) for update in updates]
        return self._groups[0][1] * np.array(factors)

    def rebind(self, optimizers: Iterable[Optimizer]) -> None:
        """Set the rates of these groups from now on: loading a state puts new ones in place."""
        groups = [g for o in optimizers for g in o.param_groups]
        self._groups = [(g, base) for g, (_, base) in zip(groups, self._groups, strict=True)]

    def state_dict(self) -> dict[str, list[float]]:
        """Return what was set and not yet drained."""
        return {"factors": list(self._factors)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore `state_dict()`."""
        self._factors = list(state["factors"])

    def _factor(self, position: int) -> float:
        return self._schedule(position, self._total) if self._schedule else 1.0


class Budget:
    """What a run may spend before it ends.

    Attributes:
        limit: In the budget's unit; infinite where only updates count.
    """

    def __init__(self, config: RunConfig, task: Task) -> None:
        self._settings, self._total, self.limit = config.budget, config.max_updates, inf
        if config.budget is None:
            return
        if config.budget.unit == "seconds":
            self.limit = config.budget.seconds
            return
        self._update = task.forward_samples + config.budget.k * task.backward_samples
        # Just below: what equals it may come out of its sum rounded down.
        self.limit = config.max_updates * self._update * (1 - 1e-12)

    def spent(self, ledger: Ledger, updates: int, scored: int, seconds: float) -> float:
        """Return what is spent after `updates`, with what was prepared (see `ledger`) before.

        Where there is no budget, nothing is.
        """
        if self._settings is None:
            return 0.0
        if self._settings.unit == "cost":
            parts = ("calibration_", "holdout_")
            prepared = cost_units(vars(ledger), self._settings.k, parts=parts)
            return updates * self._update + scored + prepared
        return seconds + ledger.calibration_seconds + ledger.holdout_seconds

    def unused(self, updates: int, spent: float) -> dict[str, float]:
        """Return what a run leaves that ends after `updates`, with `spent` of its budget.

        Of T in updates, and in the budget's unit, where there is one.
        """
        left: dict[str, float] = {"unused_updates": self._total - updates}
        if self._settings is not None:
            unit = "cost_units" if self._settings.unit == "cost" else "seconds"
            left[f"unused_{unit}"] = max(0.0, self.limit - spent)
        return left
