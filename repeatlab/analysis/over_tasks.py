"""An effect over tasks that differ: its mean, how much it varies, and what a new task would show.

The test over the tasks at hand (`updates_saved`) says whether an arm helps on *these* tasks. A
claim about tasks takes them as drawn from many: each has an effect of its own, normal around a mean
with standard deviation tau. tau^2 is Paule and Mandel's (1982), the interval of the mean Hartung
and Knapp's (2001) with Student's t, and the prediction interval of a new task Higgins, Thompson
and Spiegelhalter's (2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from repeatlab.analysis.statistics import NO_INTERVAL, Interval


@dataclass(frozen=True)
class OverTasks:
    """A random-effects estimate.

    Attributes:
        mean: Of the tasks' effects.
        interval: Its 95 % limits.
        tau: Standard deviation of the effects between tasks.
        prediction: 95 % limits of the effect on a new task of the same kind.
        tasks: How many the estimate rests on.
    """

    mean: float
    interval: Interval
    tau: float
    prediction: Interval
    tasks: int


def over_tasks(effects: np.ndarray, errors: np.ndarray, *, level: float = 0.95) -> OverTasks:
    """Return the random-effects estimate of `effects` (k,) with standard errors `errors` (k,).

    A task whose effect or error is not finite says nothing and is left out; `tasks` counts the
    others. One task has no spread between tasks, two give no prediction interval.

    Raises:
        ValueError: an error is not above 0.
    """
    effects, errors = np.asarray(effects, dtype=float), np.asarray(errors, dtype=float)
    if (errors <= 0).any():
        raise ValueError(f"errors must be above 0; not {errors.min()}")
    usable = np.isfinite(effects) & np.isfinite(errors)
    y, v = effects[usable], errors[usable] ** 2
    k = len(y)
    if not k:
        return OverTasks(np.nan, NO_INTERVAL, np.nan, NO_INTERVAL, 0)
    tau2 = _paule_mandel(y, v)
    w = 1 / (v + tau2)
    mean = float(w @ y / w.sum())
    if k == 1:
        return OverTasks(mean, NO_INTERVAL, np.nan, NO_INTERVAL, 1)
    # Hartung and Knapp's factor below 1 would make the interval narrower than the tasks' own errors
    # allow: it is not used then (Roever, Knapp and Friede 2015).
    factor = max(1.0, float(w @ (y - mean) ** 2 / (k - 1)))
    variance = factor / w.sum()
    half = stdtrit(k - 1, (1 + level) / 2) * np.sqrt(variance)
    prediction = NO_INTERVAL
    if k > 2:
        wide = stdtrit(k - 2, (1 + level) / 2) * np.sqrt(tau2 + variance)
        prediction = Interval(mean - wide, mean + wide, "prediction")
    limits = Interval(mean - half, mean + half, "Hartung-Knapp")
    return OverTasks(mean, limits, float(np.sqrt(tau2)), prediction, k)


def _paule_mandel(y: np.ndarray, v: np.ndarray) -> float:
    """Return tau^2 at which the weighted squares about the mean are what k - 1 degrees give."""

    def excess(tau2: float) -> float:
        w = 1 / (v + tau2)
        return float(w @ (y - w @ y / w.sum()) ** 2) - (len(y) - 1)

    if len(y) < 2 or excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, float(np.var(y) + v.max())
    while excess(high) > 0:
        high *= 2
    for _ in range(100):  # halved to the last digit
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high
