"""Where a search looks, ranges and choices, and the samplers that say what it tries there.

What is tried is a function of the search and of the trials of its first stage, so that a search
makes the same trials in any number of processes, and again after a kill. To add a sampler: write
the class and name it in `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, floor, inf, log
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PlainValidator, SerializeAsAny, model_validator

from repeatlab.core.schema import Model
from repeatlab.core.seeding import derive

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

    def draw(self, random: np.random.Generator) -> Scalar:
        """Return a value, uniform on the range's scale."""
        half = 0.5 if self.kind == "int" else 0.0  # of a whole number's share of the scale
        low, high, place = self.low - half, self.high + half, random.random()
        value = low * (high / low) ** place if self.log else low + (high - low) * place
        value = min(max(round(value) if half else value, self.low), self.high)
        return int(value) if half else value

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

    def draw(self, random: np.random.Generator) -> Scalar:
        """Return one of the choices."""
        return self.choices[random.integers(len(self.choices))]

    def end_at(self, value: Scalar) -> str | None:
        """Return "lower" or "upper" for the least and the largest of numbers, else None."""
        if any(isinstance(c, bool) or not isinstance(c, (int, float)) for c in self.choices):
            return None
        return {min(self.choices): "lower", max(self.choices): "upper"}.get(value)


def _dimension(value: Any) -> Range | Choices:
    chosen = isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value)
    return (Choices if chosen else Range).model_validate(value)


Dimension = Annotated[SerializeAsAny[Model], PlainValidator(_dimension)]
Space = Mapping[str, Range | Choices]


@dataclass(frozen=True)
class Grid:
    """Every combination of the choices; the last path moves fastest."""

    def first(self, space: Space, seed: int) -> list[Point]:
        """Return the points that are tried together."""
        combinations = product(*(dimension.choices for dimension in space.values()))
        return [dict(zip(space, values, strict=True)) for values in combinations]

    def then(self, space: Space, seed: int, best: Point | None) -> Sequence[Point]:
        """Return those that are tried after them, given the best of them."""
        return ()


@dataclass(frozen=True)
class Random:
    """Independent draws, uniform on each range's scale.

    Attributes:
        trials: How many.
    """

    trials: int

    def first(self, space: Space, seed: int) -> list[Point]:
        """See `Grid`; the first ones are the same, however many there are."""
        draws = (np.random.default_rng(derive(seed, "trial", i)) for i in range(self.trials))
        return [{path: where.draw(draw) for path, where in space.items()} for draw in draws]

    then = Grid.then


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

    def first(self, space: Space, seed: int) -> list[Point]:
        """See `Grid`."""
        return Random(self.coarse).first(space, seed)

    def then(self, space: Space, seed: int, best: Point | None) -> list[Point]:
        """See `Grid`."""
        if best is not None:
            space = {
                path: where.around(best[path], self.factor)
                for path, where in space.items()
                if isinstance(where, Range)
            }
        fine = Random(self.trials - self.coarse).first(space, derive(seed, "fine"))
        return [(best or {}) | point for point in fine]


SAMPLERS: dict[str, type] = {"grid": Grid, "random": Random, "coarse_to_fine": CoarseToFine}
