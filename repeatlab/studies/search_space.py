"""Where a search looks, ranges and choices, and the samplers that say what it tries there.

What is tried is a function of the search alone, which so makes the same trials in any number of
processes, and again after a kill. To add a sampler: write the class and name it in `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import log
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

    def __call__(self, space: Space, seed: int) -> list[Point]:
        """Return the points that are tried."""
        combinations = product(*(dimension.choices for dimension in space.values()))
        return [dict(zip(space, values, strict=True)) for values in combinations]


@dataclass(frozen=True)
class Random:
    """Independent draws, uniform on each range's scale.

    Attributes:
        trials: How many.
    """

    trials: int

    def __call__(self, space: Space, seed: int) -> list[Point]:
        """Return the points that are tried; the first are the same, however many there are."""
        draws = (np.random.default_rng(derive(seed, "trial", i)) for i in range(self.trials))
        return [{path: where.draw(draw) for path, where in space.items()} for draw in draws]


SAMPLERS: dict[str, type] = {"grid": Grid, "random": Random}
