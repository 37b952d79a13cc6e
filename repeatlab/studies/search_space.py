"""Where a search looks, ranges and choices, and the samplers that say what it tries there.

What is tried next is a function of the search and of the trials made so far, so that a search makes
the same trials in any number of processes, and again after a kill. To add a sampler: write the
class and name it in `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil, floor, inf, log
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PlainValidator, SerializeAsAny, model_validator

from repeatlab.core.schema import Model
from repeatlab.core.seeding import derive

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

    from repeatlab.studies.search import Search

# Share of a range, of its logarithm on a log scale, that counts as its end.
END = 0.02

Scalar = bool | int | float | str | None
Point = dict[str, Scalar]


class Range(Model):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    """Whether equal factors, in place of equal differences, are equally likely."""
    kind: Literal["int", "float"] = "float"

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low must be below high; not {self.low:g}, {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 on a log scale; not {self.low:g}")
        if self.kind == "int" and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"low and high must be whole; not {self.low:g}, {self.high:g}")
        return self

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The values to check a configuration with."""
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)

    def around(self, value: float, factor: float) -> Range:
        """Return the part of the range near `value`.

        On a log scale value / factor to value x factor; else 1 / factor of the range's length, with
        `value` in the middle. Both end where the range ends.
        """
        half = (self.high - self.low) / (2 * factor)
        low, high = (value / factor, value * factor) if self.log else (value - half, value + half)
        low, high = max(self.low, low), min(self.high, high)
        if self.kind == "int":
            low, high = float(ceil(low)), float(floor(high))
        return self.model_copy(update={"low": low, "high": high})

    def end_at(self, value: Scalar) -> str | None:
        """Return "lower" or "upper" where `value` lies within 2 % of that end, else None."""
        low, high, x = (log(v) if self.log else v for v in (self.low, self.high, value))
        place = (x - low) / (high - low)
        return "lower" if place <= END else "upper" if place >= 1 - END else None

    def distribution(self) -> BaseDistribution:
        """Return the range in Optuna's terms."""
        from optuna.distributions import FloatDistribution, IntDistribution

        kind = IntDistribution if self.kind == "int" else FloatDistribution
        return kind(*self.ends, log=self.log)


class Choices(Model):
    """One of several values."""

    choices: Annotated[tuple[Scalar, ...], Field(strict=False, min_length=2)]

    @model_validator(mode="after")
    def _check(self) -> Choices:
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices must be different; not {list(self.choices)!r}")
        return self

    def __str__(self) -> str:
        return ", ".join(map(str, self.choices))

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The values to check a configuration with."""
        return self.choices

    def end_at(self, value: Scalar) -> str | None:
        """Return "lower" or "upper" for the least and the largest of numbers, else None."""
        if any(isinstance(c, bool) or not isinstance(c, (int, float)) for c in self.choices):
            return None
        return {min(self.choices): "lower", max(self.choices): "upper"}.get(value)

    def widened(self, value: Scalar) -> Choices:
        """Return the choices with one more beyond `value` where that is an end of positive numbers.

        The new one is as many times that end as the end is its neighbour: 1, 2, 5 go on with 12.5.
        """
        end = self.end_at(value)
        if end is None or min(self.choices) <= 0:
            return self
        neighbour, last = sorted(self.choices, reverse=end == "lower")[-2:]
        further = float(f"{last * last / neighbour:.6g}")
        if all(isinstance(choice, int) for choice in self.choices):
            further = max(1, round(further))
        return Choices(choices=tuple(dict.fromkeys([*self.choices, further])))

    def distribution(self) -> BaseDistribution:
        """Return the choices in Optuna's terms."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)


def _dimension(value: Any) -> Range | Choices:
    if isinstance(value, (Range, Choices)):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"must be {{low: ..., high: ...}} or {{choices: [...]}}; not {value!r}")
    return (Choices if "choices" in value else Range).model_validate(value)


Dimension = Annotated[SerializeAsAny[Model], PlainValidator(_dimension)]
Space = Mapping[str, Range | Choices]


# --- samplers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One trial and what became of it.

    Attributes:
        params: Dotted paths and the values tried.
        status: "complete", "diverged" or "failed"; "refused" where a grid that was widened has come
            to a value that no run can have.
        value: Mean of the metric over seeds; None unless complete.
        reason: Why it is not complete, such as "diverged at update 7 (seed 0)".
        runs: Ids of its runs, seed by seed.
    """

    params: Point
    status: str
    value: float | None = None
    reason: str = ""
    runs: tuple[str, ...] = field(default=())


def best_of(trials: Sequence[Trial], *, lower_is_better: bool) -> Trial | None:
    """Return the trial with the best value, the first of equals; None where none has a value."""
    complete = [trial for trial in trials if trial.status == "complete"]
    return (min if lower_is_better else max)(complete, key=lambda t: t.value, default=None)


@dataclass(frozen=True)
class Grid:
    """Every combination of the choices; the last path moves fastest.

    Attributes:
        widen: How many times the grid grows: where the best value lies at an end of positive
            numbers, by one value beyond it.
    """

    widen: int = 2

    def propose(self, search: Search, trials: Sequence[Trial]) -> list[Point]:
        """Return the points that are tried together after `trials`; none where all is tried."""
        space = search.space
        for _ in range(1 + self.widen):
            combinations = product(*(dimension.choices for dimension in space.values()))
            points = [dict(zip(space, values, strict=True)) for values in combinations]
            made = [trial for trial in trials if trial.params in points]
            best = best_of(made, lower_is_better=search.lower_is_better)
            if len(made) < len(points) or best is None:
                known = [trial.params for trial in made]
                return [point for point in points if point not in known]
            space = {path: choices.widened(best.params[path]) for path, choices in space.items()}
        return []


@dataclass(frozen=True)
class Random:
    """Independent draws, uniform on each range's scale.

    Attributes:
        trials: How many.
    """

    trials: int

    def propose(self, search: Search, trials: Sequence[Trial]) -> list[Point]:
        """Return the points that are tried together after `trials`; none where all is tried."""
        return _drawn(search.space, self.trials, seed=search.seed)[len(trials) :]


@dataclass(frozen=True)
class CoarseToFine:
    """First random draws from the whole space, then random draws around the best of them.

    The second stage looks at value / factor to value x factor of a range on a log scale, at
    1 / factor of the length of another, never beyond the range, and keeps the best choices. Where
    no trial of the first stage was complete, it draws from the whole space again.

    Attributes:
        trials: How many in all.
        coarse: How many of them belong to the first stage.
        factor: How far the second stage looks.
    """

    trials: int
    coarse: int = 8
    factor: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.coarse <= self.trials:
            raise ValueError(f"coarse must lie between 1 and trials; not {self.coarse!r}")
        if not 1 < self.factor < inf:
            raise ValueError(f"factor must be a finite number above 1; not {self.factor!r}")

    def propose(self, search: Search, trials: Sequence[Trial]) -> list[Point]:
        """Return the points that are tried together after `trials`; none where all is tried."""
        if len(trials) < self.coarse:
            return _drawn(search.space, self.coarse, seed=search.seed)[len(trials) :]
        best = best_of(trials[: self.coarse], lower_is_better=search.lower_is_better)
        near, kept = search.space, {}
        if best is not None:
            ranges = {p: d for p, d in search.space.items() if isinstance(d, Range)}
            kept = best.params
            near = {path: range_.around(kept[path], self.factor) for path, range_ in ranges.items()}
        fine = _drawn(near, self.trials - self.coarse, seed=derive(search.seed, "fine"))
        return [kept | point for point in fine[len(trials) - self.coarse :]]


@dataclass(frozen=True)
class TPE:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna.

    A diverged trial counts as worse than every other.

    Attributes:
        trials: How many in all.
        at_once: How many are proposed together, which know nothing of each other's values.
        startup: How many with a result there are, by random draws, before the estimator is used.
    """

    trials: int
    at_once: int = 4
    startup: int = 10

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise ValueError(f"at_once must be at least 1; not {self.at_once!r}")

    def propose(self, search: Search, trials: Sequence[Trial]) -> list[Point]:
        """Return the points that are tried together after `trials`; none where all is tried."""
        from optuna.samplers import TPESampler

        known = trials[: len(trials) - len(trials) % self.at_once]
        seed = derive(search.seed, "round", len(known)) % 2**32
        sampler = TPESampler(seed=seed, n_startup_trials=self.startup)
        count = min(self.at_once, self.trials - len(known))
        asked = _asked(sampler, search.space, count, known, lower_is_better=search.lower_is_better)
        return asked[len(trials) - len(known) :]


def _drawn(space: Space, count: int, *, seed: int) -> list[Point]:
    """Return random points; the first ones are the same, however many there are."""
    from optuna.samplers import RandomSampler

    return _asked(RandomSampler(seed % 2**32), space, count)


def _asked(
    sampler: BaseSampler,
    space: Space,
    count: int,
    trials: Sequence[Trial] = (),
    *,
    lower_is_better: bool = True,
) -> list[Point]:
    """Return what one of Optuna's samplers proposes after `trials`."""
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if lower_is_better else "maximize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    distributions = {path: dimension.distribution() for path, dimension in space.items()}
    states = {"complete": TrialState.COMPLETE, "diverged": TrialState.PRUNED}
    for trial in trials:
        state = states.get(trial.status, TrialState.FAIL)
        made = {"params": trial.params, "distributions": distributions, "value": trial.value}
        study.add_trial(create_trial(state=state, **made))
    return [study.ask(distributions).params for _ in range(count)]


SAMPLERS: dict[str, type] = {
    "grid": Grid,
    "random": Random,
    "coarse_to_fine": CoarseToFine,
    "tpe": TPE,
}
