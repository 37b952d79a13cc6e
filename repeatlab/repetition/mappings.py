"""Repeat mappings: from the loss of a fresh minibatch to how many updates are made on it.

A mapping is a frozen dataclass, a pure function of (loss, stats). Randomness is a function of
(seed, fresh-batch index), so every mapping can be resumed and replayed. To add one: write the class
and name it in `MAPPINGS`.

Losses are compared in float32, the precision in which they are computed, so that `L == t` means the
same whether the loss arrives as float32 or float64.
"""

from __future__ import annotations

import struct
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from hashlib import blake2b
from math import cos, floor, isfinite, pi
from numbers import Integral, Real
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from repeatlab.repetition.loss_stats import LossStats

_FLOAT32 = struct.Struct("f")
# Two units in the last place of a float32: 0.3 / 0.1 is 3, not 2, whatever the rounding of both.
_QUOTIENT_TOLERANCE = 1 + 2**-22


def float32(value: float) -> float:
    """Round to the nearest float32; what is beyond its range stays as it is."""
    try:
        return _FLOAT32.unpack(_FLOAT32.pack(value))[0]
    except OverflowError:
        return value


def as_count(name: str, value: int) -> int:
    """Return a number of things as an int, whatever kind of integer it came as.

    Raises:
        ValueError: if it is none, or below 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
    return int(value)


def _as_measure(name: str, value: float) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    # An integer beyond the range of floats is no usable number either.
    if not number or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be a positive, finite number, not {value!r}")
    return value if isinstance(value, int) else float(value)


class Mapping(ABC):
    """Base of all mappings: `N = mapping(loss, stats)`.

    Fields that are integers, but for a seed, must be 1 or more, and floats positive and finite.

    Class attributes:
        needs_loss: False where N does not depend on the loss; the host then never waits for it.
        asks_again: True where N is found visit by visit: each loss of a batch, until the mapping
            returns 1 for it or `most` visits are made.
        window: How many recent losses the mapping reads from its `LossStats`.
        calibrated: Name of the field that `auto` may stand for in a configuration, if any.
        limit: Name of the field that holds the largest N.
    """

    needs_loss: ClassVar[bool] = True
    asks_again: ClassVar[bool] = False
    calibrated: ClassVar[str | None] = None
    limit: ClassVar[str] = "repeats"
    window = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and field.name != "seed":
                value = as_count(field.name, value)
            elif field.type in (float, "float"):
                value = _as_measure(field.name, value)
            object.__setattr__(self, field.name, value)  # numpy's numbers are Python's now

    def __call__(self, loss: float, stats: LossStats) -> int:
        """Return N >= 1, the number of updates to make on the fresh batch `stats.index`.

        Args:
            loss: Loss of the batch before its first update, in the units of the driver loss.
            stats: What was seen before this batch.

        Raises:
            ValueError: if `loss` is NaN or infinite. (`min(5, nan)` is 5 in Python, so a NaN that
                slipped through would ask for the most repeats.)
        """
        if not isfinite(loss):
            raise ValueError(f"a repeat mapping needs a finite loss, not {loss}")
        return self.repeats_for(float32(loss), stats)

    @property
    def most(self) -> int:
        """The largest N that the mapping can return."""
        return getattr(self, self.limit)

    @abstractmethod
    def repeats_for(self, loss: float, stats: LossStats) -> int:
        """Return N for a finite loss that is already rounded to float32."""


@dataclass(frozen=True)
class Constant(Mapping):
    """N = repeats on every batch; 1 is standard training.

    Minibatch persistency: Fischetti, Mandatelli and Salvagnin 2018, arXiv 1806.07353.
    """

    repeats: int = 1

    needs_loss: ClassVar[bool] = False

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        return self.repeats


def _check_order(mapping: Uniform | Falling) -> None:
    if mapping.low > mapping.high:
        raise ValueError(f"low must not exceed high, but {mapping.low} > {mapping.high}")


@dataclass(frozen=True)
class Uniform(Mapping):
    """N drawn uniformly from low..high: repetition that knows nothing of the loss.

    The draw is a function of (seed, fresh-batch index).
    """

    low: int = 1
    high: int = 5
    seed: int = 0

    needs_loss: ClassVar[bool] = False
    limit: ClassVar[str] = "high"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(self)
        object.__setattr__(self, "seed", int(self.seed))

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        digest = blake2b(f"{self.seed}/repeats/{stats.index}".encode(), digest_size=8).digest()
        span = self.high - self.low + 1
        return self.low + (int.from_bytes(digest, "big") * span >> 64)


@dataclass(frozen=True)
class Threshold(Mapping):
    """N = repeats if L > t, else 1. Strict: L == t gives 1.

    For losses distributed as Exp(mu) and repeats = 2, E[N] = 1 + exp(-t / mu).

    >>> from repeatlab.repetition.loss_stats import LossStats
    >>> [Threshold(t=1.0)(loss, LossStats()) for loss in (0.5, 1.0, 1.5)]
    [1, 1, 2]
    """

    t: float
    repeats: int = 2

    calibrated: ClassVar[str | None] = "t"

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        return self.repeats if loss > float32(self.t) else 1


@dataclass(frozen=True)
class Linear(Mapping):
    """N = max(1, min(max_repeats, floor(L / t))).

    A quotient within two float32 units of an integer counts as that integer. For losses distributed
    as Exp(mu), q = exp(-t / mu) and max_repeats = 5, E[N] = 1 + q^2 + q^3 + q^4 + q^5.

    >>> from repeatlab.repetition.loss_stats import LossStats
    >>> [Linear(t=0.1)(loss, LossStats()) for loss in (0.05, 0.19, 0.2, 0.3, 9.0)]
    [1, 1, 2, 3, 5]
    """

    t: float
    max_repeats: int = 5

    calibrated: ClassVar[str | None] = "t"
    limit: ClassVar[str] = "max_repeats"

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        # Limited before it is floored: a huge quotient may be infinite.
        quotient = min(self.max_repeats, loss / self.t * _QUOTIENT_TOLERANCE)
        return floor(max(1, quotient))


@dataclass(frozen=True)
class Until(Mapping):
    """Visit the batch again until its loss is not above t, `max_repeats` times at most.

    Every visit's loss is asked for, before its update: 2 means one more visit, 1 that this was the
    last. On CUDA the host waits once for each visit that may be followed by another.

    >>> from repeatlab.repetition.loss_stats import LossStats
    >>> [Until(t=1.0)(loss, LossStats()) for loss in (1.5, 1.0)]
    [2, 1]
    """

    t: float
    max_repeats: int = 5

    asks_again: ClassVar[bool] = True
    calibrated: ClassVar[str | None] = "t"
    limit: ClassVar[str] = "max_repeats"

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        return 2 if loss > float32(self.t) and self.max_repeats > 1 else 1


@dataclass(frozen=True)
class While(Until):
    """Visit the batch again while its loss is below t, `max_repeats` times at most.

    For a driver that says how far visits have gone, as PPO's KL divergence from the policy that
    lived through the batch (the `target_kl` of its implementations), or a sharpness that is to stay
    below 2. The visit whose loss is not below t is still made, and is the last.

    >>> from repeatlab.repetition.loss_stats import LossStats
    >>> [While(t=1.0)(loss, LossStats()) for loss in (0.5, 1.0)]
    [2, 1]
    """

    calibrated: ClassVar[str | None] = None

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        return 2 if loss < float32(self.t) and self.max_repeats > 1 else 1


@dataclass(frozen=True)
class Falling(Mapping):
    """Base of N that falls from `high` to `low` over the run, whatever the losses are."""

    high: int = 5
    low: int = 1

    needs_loss: ClassVar[bool] = False
    limit: ClassVar[str] = "high"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(self)

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return how much of the way from `low` to `high` is left, from 1 to 0."""

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        return floor(self.low + (self.high - self.low) * self.share(stats.progress) + 0.5)


@dataclass(frozen=True)
class CosineRepeats(Falling):
    """N = round(low + (high - low) (1 + cos(pi u / T)) / 2) at update u: repetition by the clock.

    >>> from repeatlab.repetition.loss_stats import LossStats
    >>> CosineRepeats()(9.9, LossStats())
    5
    """

    def share(self, progress: float) -> float:
        return (1 + cos(pi * progress)) / 2


@dataclass(frozen=True)
class LinearRepeats(Falling):
    """N = round(high - (high - low) u / T) at update u: repetition by the clock."""

    def share(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True)
class ControlLimit(Mapping):
    """N = repeats if L > mean + k * std of the last `window` fresh-batch losses, else 1.

    The upper control limit of ISGD (Wang et al. 2016, arXiv 1603.05544), whose window is one epoch
    and whose extra updates may end early (`UntilLimit`); here the first loss alone decides. N = 1
    until the window is full.
    """

    k: float = 3.0
    repeats: int = 5
    window: int = 100

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        if not stats.full:
            return 1
        return self.repeats if loss > stats.mean + self.k * stats.std else 1


@dataclass(frozen=True)
class UntilLimit(ControlLimit):
    """Visit a batch above the control limit again until it is not, `repeats` times at most.

    ISGD's own rule (Wang et al. 2016, arXiv 1603.05544, algorithms 1 and 2). The batch's first loss
    is among the `window` whose mean and deviation make its limit, which all its visits are held to.
    """

    asks_again: ClassVar[bool] = True

    def upper(self, loss: float, stats: LossStats) -> float:
        """Return the limit of the batch `stats.index`; of its visits `loss` is the last one's."""
        recent = stats.recent
        if stats.count == stats.index:  # its first visit, whose loss takes the oldest one's place
            recent = recent.copy()
            recent[stats.count % self.window] = loss
        return float(recent.mean() + self.k * recent.std())

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        again = self.repeats > 1 and stats.full and loss > self.upper(loss, stats)
        return 2 if again else 1


@dataclass(frozen=True)
class Quantile(Mapping):
    """N = 1 + how many `levels` of the recent losses' quantiles L exceeds.

    Free of the loss's scale, so it needs no t; on exchangeable losses E[N] = 1 + sum(1 - level).
    N = 1 until the window is full.
    """

    levels: tuple[float, ...] = (0.8,)
    window: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(map(float, self.levels)))  # hashable
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"levels must be numbers between 0 and 1, not {self.levels!r}")
        super().__post_init__()

    @property
    def most(self) -> int:
        return 1 + len(self.levels)

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        if not stats.full:
            return 1
        return 1 + sum(loss > stats.quantile(level) for level in self.levels)


@dataclass(frozen=True)
class ZScore(Mapping):
    """N = max(1, min(max_repeats, 1 + floor(z / step))), z = (L - mean) / std of recent losses.

    N = 1 until the window is full, and where the recent losses do not vary.
    """

    step: float = 1.0
    max_repeats: int = 5
    window: int = 100

    limit: ClassVar[str] = "max_repeats"

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        std = stats.std
        if not stats.full or std == 0:
            return 1
        steps = min(self.max_repeats - 1, (loss - stats.mean) / std / self.step)
        return 1 + floor(max(0, steps))


@dataclass(frozen=True)
class Trace(Mapping):
    """N = counts[fresh-batch index]: replays recorded counts, whatever the loss is now."""

    counts: tuple[int, ...]

    needs_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        counts = tuple(as_count(f"counts[{i}]", count) for i, count in enumerate(self.counts))
        object.__setattr__(self, "counts", counts)  # hashable, whatever it came as
        if not counts:
            raise ValueError("counts must hold at least one count")

    @property
    def most(self) -> int:
        return max(self.counts)

    def repeats_for(self, loss: float, stats: LossStats) -> int:
        if stats.index >= len(self.counts):
            raise ValueError(
                f"the trace holds {len(self.counts)} counts, but fresh batch {stats.index} was "
                "asked for: record the trace with the same max_updates"
            )
        return self.counts[stats.index]


# `repeatlab new mapping` writes a class here.

MAPPINGS: dict[str, type[Mapping]] = {
    "constant": Constant,
    "uniform": Uniform,
    "threshold": Threshold,
    "linear": Linear,
    "until": Until,
    "while": While,
    "cosine": CosineRepeats,
    "ramp": LinearRepeats,
    "control_limit": ControlLimit,
    "until_limit": UntilLimit,
    "quantile": Quantile,
    "zscore": ZScore,
    "trace": Trace,
    # `repeatlab new mapping` writes a line here.
}
