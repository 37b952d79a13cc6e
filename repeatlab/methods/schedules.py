"""Learning-rate schedules: the factor on the base rate as a function of the update index.

They run on updates, never on epochs or fresh batches, so that every arm of a comparison has the
same rate at the same update and ends at the same one, however often it repeats. Apply one with
`torch.optim.lr_scheduler.LambdaLR`, or as `loop` does. `update` counts from 0 to `total - 1`. To
add one: write the class and name it in `SCHEDULES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from math import cos, exp, inf, pi


@dataclass(frozen=True)
class Schedule(ABC):
    """Base of all schedules: `factor = schedule(update, total)`, the whole rate at its highest.

    With a `warm_up`, a share of all updates, the rate first rises linearly (Goyal et al. 2017,
    arXiv 1706.02677, section 2.2); then it falls as without one, over the updates that are left, as
    language models are trained. Under a budget the share is of T.

    >>> [Constant(warm_up=0.04)(update, 100) for update in (0, 1, 3, 4, 99)]
    [0.2, 0.4, 0.8, 1.0, 1.0]
    """

    warm_up: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "k" and not 0 < value < inf:
                raise ValueError(f"k must be a positive, finite number; not {value!r}")
            for part in value if isinstance(value, tuple) else (value,):
                if name != "k" and not 0 <= part <= 1:
                    raise ValueError(f"{name} must lie between 0 and 1; not {part!r}")

    def __call__(self, update: int, total: int) -> float:
        """Return the factor at this update, 0 to `total - 1`."""
        rising = round(self.warm_up * total)
        if update < rising:
            return (update + 1) / (rising + 1)
        return self.falling(update - rising, total - rising)

    @abstractmethod
    def falling(self, update: int, total: int) -> float:
        """Return the factor at this update of those that are left after the warm-up."""


@dataclass(frozen=True)
class Constant(Schedule):
    """1; a rate that stays, after its warm-up.

    >>> Constant()(99, 100)
    1.0
    """

    def falling(self, update: int, total: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """final + (1 - final) (1 + cos(pi update / total)) / 2 (Loshchilov and Hutter 2017, eq. 5).

    >>> Cosine()(0, 100), round(Cosine()(50, 100), 9), round(Cosine(final=0.1)(99, 100), 4)
    (1.0, 0.5, 0.1002)
    """

    final: float = 0.0

    def falling(self, update: int, total: int) -> float:
        return self.final + (1 - self.final) * (1 + cos(pi * update / total)) / 2


@dataclass(frozen=True)
class LinearDecay(Schedule):
    """1 - (1 - final) update / total.

    >>> LinearDecay()(25, 100)
    0.75
    """

    final: float = 0.0

    def falling(self, update: int, total: int) -> float:
        return 1 - (1 - self.final) * update / total


@dataclass(frozen=True)
class Step(Schedule):
    """gamma to the power of how many `milestones`, as fractions of total, have been reached.

    >>> [Step()(update, 100) for update in (49, 50, 75)]
    [1.0, 0.1, 0.010000000000000002]
    """

    gamma: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)

    def falling(self, update: int, total: int) -> float:
        # Not against a product: 0.55 * 100 is a little more than 55.
        return self.gamma ** sum(update / total >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Exponential(Schedule):
    """exp(-k update / total): the rate at the end is exp(-k) of the first.

    >>> Exponential(k=2.0)(0, 100), round(Exponential(k=2.0)(50, 100), 6)
    (1.0, 0.367879)
    """

    k: float = 4.6

    def falling(self, update: int, total: int) -> float:
        return exp(-self.k * update / total)


@dataclass(frozen=True)
class InverseTime(Schedule):
    """1 / (1 + k update / total): the "1/t" schedule, at the end 1 / (1 + k) of the first rate.

    >>> InverseTime(k=1.0)(50, 100)
    0.6666666666666666
    """

    k: float = 9.0

    def falling(self, update: int, total: int) -> float:
        return 1 / (1 + self.k * update / total)


SCHEDULES: dict[str, type] = {
    "constant": Constant,
    "cosine": Cosine,
    "linear": LinearDecay,
    "step": Step,
    "exponential": Exponential,
    "inverse_time": InverseTime,
}
