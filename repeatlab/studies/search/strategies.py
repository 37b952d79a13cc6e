"""How a search picks what to try.

What a trial tries is a function of (search seed, trial number, results of the rounds before), so
that a search makes the same trials in any number of processes, and again after a kill. To add a
strategy: write the class and name it in `STRATEGIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import ceil, isfinite
from typing import TYPE_CHECKING

import numpy as np

from repeatlab.core.seeding import derive
from repeatlab.studies.search.space import Point, Range, Space

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def best_trial(trials: Sequence[FrozenTrial], direction: str) -> FrozenTrial | None:
    """Return the complete trial with the best value, the first of equals; None without any."""
    sign = 1 if direction == "minimize" else -1
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return min(complete, key=lambda trial: (sign * trial.value, trial.number), default=None)


class Strategy(ABC):
    """Base of all strategies: what trial `number` tries."""

    def rounds(self, total: int) -> list[range]:
        """Return the trial numbers that are proposed together; each round knows those before."""
        return [range(total)]

    @abstractmethod
    def propose(
        self, number: int, space: Space, *, seed: int, trials: Sequence[FrozenTrial], direction: str
    ) -> Point:
        """Return the point of trial `number`.

        Args:
            number: Counts from 0.
            space: Dotted paths and where to look.
            seed: The search's seed.
            trials: All trials with a smaller number; those of the same round have no value yet.
            direction: "minimize" or "maximize".
        """


@dataclass(frozen=True)
class Grid(Strategy):
    """Every combination of the ranges' `points` and the choices; the last path moves fastest."""

    def propose(
        self, number: int, space: Space, *, seed: int, trials: Sequence[FrozenTrial], direction: str
    ) -> Point:
        combinations = product(*(dimension.grid() for dimension in space.values()))
        return dict(zip(space, next(islice(combinations, number, None)), strict=True))


@dataclass(frozen=True)
class Random(Strategy):
    """Independent draws, uniform on each range's scale."""

    def propose(
        self, number: int, space: Space, *, seed: int, trials: Sequence[FrozenTrial], direction: str
    ) -> Point:
        draws = np.random.default_rng(derive(seed, "trial", number))
        return {path: dimension.draw(draws) for path, dimension in space.items()}


@dataclass(frozen=True)
class CoarseToFine(Random):
    """First random draws from the whole space, then random draws around the best of them.

    The second stage looks at value / factor to value x factor of a range on a log scale, at
    1 / factor of the length of another, never beyond the range, and keeps the best choices. Where
    no trial of the first stage was complete, it draws from the whole space again.

    Attributes:
        coarse: Share of the trials that belongs to the first stage.
        factor: How far the second stage looks.
    """

    coarse: float = 0.5
    factor: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.coarse < 1:
            raise ValueError(f"coarse must lie between 0 and 1, not {self.coarse!r}")
        if not (self.factor > 1 and isfinite(self.factor)):
            raise ValueError(f"factor must be a finite number above 1, not {self.factor!r}")

    def rounds(self, total: int) -> list[range]:
        first = ceil(self.coarse * total)
        return [range(first), range(first, total)]

    def propose(
        self, number: int, space: Space, *, seed: int, trials: Sequence[FrozenTrial], direction: str
    ) -> Point:
        point = super().propose(number, space, seed=seed, trials=trials, direction=direction)
        best = best_trial(trials, direction)
        if best is None:
            return point
        draws = np.random.default_rng(derive(seed, "fine trial", number))
        return best.params | {
            path: dimension.around(best.params[path], self.factor).draw(draws)
            for path, dimension in space.items()
            if isinstance(dimension, Range)
        }


@dataclass(frozen=True)
class TPE(Strategy):
    """Tree-structured Parzen estimator (Bergstra et al. 2011), multivariate, by Optuna.

    The first `startup` trials are random. A diverged trial counts as worse than every other.

    Attributes:
        at_once: Trials proposed together, which know nothing of each other's values.
        startup: Trials with a result before the estimator is used.
    """

    at_once: int = 4
    startup: int = 10

    def __post_init__(self) -> None:
        for field in ("at_once", "startup"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)!r}")

    def rounds(self, total: int) -> list[range]:
        starts = range(0, total, self.at_once)
        return [range(start, min(start + self.at_once, total)) for start in starts]

    def propose(
        self, number: int, space: Space, *, seed: int, trials: Sequence[FrozenTrial], direction: str
    ) -> Point:
        import optuna

        sampler = optuna.samplers.TPESampler(
            seed=derive(seed, "trial", number) % 2**32, n_startup_trials=self.startup
        )
        study = optuna.create_study(direction=direction, sampler=sampler)
        study.add_trials(trials)
        return study.ask({path: d.distribution() for path, d in space.items()}).params


STRATEGIES: dict[str, type[Strategy]] = {
    "grid": Grid,
    "random": Random,
    "coarse_to_fine": CoarseToFine,
    "tpe": TPE,
}
