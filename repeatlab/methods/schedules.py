"""Learning-rate schedules: the factor on the base rate as a function of the update index.

They run on updates, never on epochs or fresh batches, so that every arm of a comparison has the
same rate at the same update and ends at the same one, however often it repeats. Apply one with
`torch.optim.lr_scheduler.LambdaLR`, or as `loop` does. `update` counts from 0 to `total - 1`. To
add one: write the class and name it in `SCHEDULES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, exp, isfinite, pi


def _check_fraction(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{field} must lie between 0 and 1, not {value!r}")


def _check_rate(value: float) -> None:
    if not isfinite(value) or value <= 0:
        raise ValueError(f"k must be a positive, finite number, not {value!r}")


@dataclass(frozen=True)
class Cosine:
    """final + (1 - final) (1 + cos(pi update / total)) / 2 (Loshchilov and Hutter 2017, eq. 5).

    >>> Cosine()(0, 100), round(Cosine()(50, 100), 9), Cosine(final=0.1)(100, 100)
    (1.0, 0.5, 0.1)
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("final", self.final)

    def __call__(self, update: int, total: int) -> float:
        return self.final + (1 - self.final) * (1 + cos(pi * update / total)) / 2


@dataclass(frozen=True)
class LinearDecay:
    """1 - (1 - final) update / total.

    >>> LinearDecay()(25, 100)
    0.75
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("final", self.final)

    def __call__(self, update: int, total: int) -> float:
        return 1 - (1 - self.final) * update / total


@dataclass(frozen=True)
class Step:
    """gamma to the power of how many `milestones`, as fractions of total, have been reached.

    >>> [Step()(update, 100) for update in (49, 50, 75)]
    [1.0, 0.1, 0.010000000000000002]
    """

    gamma: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        _check_fraction("gamma", self.gamma)
        for milestone in self.milestones:
            _check_fraction("milestones", milestone)

    def __call__(self, update: int, total: int) -> float:
        # Not against a product: 0.55 * 100 is a little more than 55.
        return self.gamma ** sum(update / total >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Exponential:
    """exp(-k update / total): the rate at the end is exp(-k) of the first.

    >>> Exponential(k=2.0)(0, 100), round(Exponential(k=2.0)(50, 100), 6)
    (1.0, 0.367879)
    """

    k: float = 4.6

    def __post_init__(self) -> None:
        _check_rate(self.k)

    def __call__(self, update: int, total: int) -> float:
        return exp(-self.k * update / total)


@dataclass(frozen=True)
class InverseTime:
    """1 / (1 + k update / total): the "1/t" schedule, at the end 1 / (1 + k) of the first rate.

    >>> InverseTime(k=1.0)(100, 100)
    0.5
    """

    k: float = 9.0

    def __post_init__(self) -> None:
        _check_rate(self.k)

    def __call__(self, update: int, total: int) -> float:
        return 1 / (1 + self.k * update / total)


@dataclass(frozen=True)
class WarmUp:
    """start + (1 - start) update / updates, and 1 from update `updates` on.

    Gradual warm-up (Goyal et al. 2017, arXiv 1706.02677, section 2.2); it multiplies a schedule.

    >>> [WarmUp(4, start=0.5)(update) for update in (0, 2, 4, 99)]
    [0.5, 0.75, 1.0, 1.0]
    """

    updates: int
    start: float = 0.1

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, not {self.updates!r}")
        _check_fraction("start", self.start)

    def __call__(self, update: int) -> float:
        return self.start + (1 - self.start) * min(1.0, update / self.updates)


SCHEDULES: dict[str, type] = {
    "cosine": Cosine,
    "linear": LinearDecay,
    "step": Step,
    "exponential": Exponential,
    "inverse_time": InverseTime,
}
