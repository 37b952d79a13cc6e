"""Times to a target, some of them missed: survival curves. A miss is censored, never imputed."""

from __future__ import annotations

import warnings

import numpy as np


def kaplan_meier(times: np.ndarray, reached: np.ndarray, *, level: float = 0.95) -> np.ndarray:
    """Return the share of runs that have not reached the target, with log-log limits.

    Args:
        times: (n,) when a run reached it or, where it did not, was last looked at.
        reached: (n,) bool; False censors the run.

    Returns:
        Array (different times, 4): time, share after it, lower and upper limit (NaN where they are
        undefined: before the first event and where no run is left).
    """
    from scipy.stats import CensoredData, ecdf

    missed = ~np.asarray(reached, dtype=bool)
    curve = ecdf(CensoredData.right_censored(np.asarray(times, dtype=float), missed)).sf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # limits where the share is 0 or 1
        limits = curve.confidence_interval(level, method="log-log")
    columns = (curve.quantiles, curve.probabilities, limits.low.probabilities)
    return np.column_stack([*columns, limits.high.probabilities])
