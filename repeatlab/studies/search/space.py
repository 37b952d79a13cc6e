"""Where a search looks: ranges of numbers and choices among values."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, exp, floor, log
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, PlainValidator, SerializeAsAny, model_validator

from repeatlab.core.schema import Model

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Share of a range, of its logarithm on a log scale, that counts as its boundary.
BOUNDARY = 0.02

Scalar = bool | int | float | str | None
Point = dict[str, Scalar]


class Range(Model):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    """Whether equal factors, in place of equal differences, are equally likely."""
    kind: Literal["int", "float"] = "float"
    points: Annotated[int, Field(ge=2)] | None = None
    """How many values a grid takes from the range, its ends included."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, but {self.low:g} >= {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 on a log scale, not {self.low:g}")
        if self.kind == "int" and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(
                f"low and high must be whole where kind is int, not {self.low:g} and {self.high:g}"
            )
        if self.points is not None and len(set(self.grid())) < self.points:
            raise ValueError(f"points: {self.points} whole numbers of this range are not different")
        return self

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The values to check a configuration with."""
        return self._number(self.low), self._number(self.high)

    def grid(self) -> list[Scalar]:
        """Return `points` values at equal distances, or at equal factors on a log scale."""
        spread = np.geomspace if self.log else np.linspace
        # Without the last digits, which only rounding makes differ from 0.1.
        return [self._number(float(f"{x:.12g}")) for x in spread(self.low, self.high, self.points)]

    def draw(self, draws: np.random.Generator) -> Scalar:
        """Return a value drawn uniformly, on the logarithm on a log scale."""
        # Every whole number is the middle of an interval of length 1.
        margin = 0.5 if self.kind == "int" else 0.0
        low, high = self.low - margin, self.high + margin
        x = exp(draws.uniform(log(low), log(high))) if self.log else draws.uniform(low, high)
        return self._number(x)

    def around(self, value: float, factor: float) -> Range:
        """Return the part of the range near `value`.

        On a log scale value / factor to value x factor; else 1 / factor of the range's length, with
        `value` in the middle. Both end where the range ends.
        """
        if self.log:
            low, high = value / factor, value * factor
        else:
            half = (self.high - self.low) / (2 * factor)
            low, high = value - half, value + half
        low, high = max(self.low, low), min(self.high, high)
        if self.kind == "int":
            low, high = float(ceil(low)), float(floor(high))
        return self.model_copy(update={"low": low, "high": high})

    def boundary(self, value: Scalar) -> str | None:
        """Return "lower" or "upper" where `value` lies within 2 % of that end, else None."""
        low, high, x = (log(v) if self.log else v for v in (self.low, self.high, value))
        place = (x - low) / (high - low)
        return "lower" if place <= BOUNDARY else "upper" if place >= 1 - BOUNDARY else None

    def distribution(self) -> BaseDistribution:
        """Return the range in Optuna's terms."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.kind == "int":
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def _number(self, value: float) -> int | float:
        value = min(max(round(value) if self.kind == "int" else value, self.low), self.high)
        return int(value) if self.kind == "int" else float(value)


class Choices(Model):
    """One of several values."""

    choices: Annotated[tuple[Scalar, ...], Field(strict=False, min_length=2)]

    @model_validator(mode="after")
    def _check(self) -> Choices:
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices must be different, not {list(self.choices)!r}")
        return self

    def __str__(self) -> str:
        return ", ".join(map(str, self.choices))

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The values to check a configuration with."""
        return self.choices

    def grid(self) -> list[Scalar]:
        """Return all of them."""
        return list(self.choices)

    def draw(self, draws: np.random.Generator) -> Scalar:
        """Return one of them, each as likely."""
        return self.choices[int(draws.integers(len(self.choices)))]

    def boundary(self, value: Scalar) -> str | None:
        """Return "lower" or "upper" for the least and the largest of numbers, else None."""
        numeric = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in self.choices)
        if not numeric:
            return None
        return {min(self.choices): "lower", max(self.choices): "upper"}.get(value)

    def distribution(self) -> BaseDistribution:
        """Return the choices in Optuna's terms."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)


def _dimension(value: Any) -> Range | Choices:
    if isinstance(value, (Range, Choices)):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"must be {{low: ..., high: ...}} or {{choices: [...]}}, not {value!r}")
    return (Choices if "choices" in value else Range).model_validate(value)


Dimension = Annotated[SerializeAsAny[Model], PlainValidator(_dimension)]
Space = Mapping[str, Range | Choices]
