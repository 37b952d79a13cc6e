"""Times to a target, some of them missed: survival curves, and scores over workloads.

Pure functions on arrays. A miss is censored or infinite, never imputed.
"""

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
    from scipy.stats import ecdf

    curve = ecdf(_censored(times, reached)).sf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # limits where the share is 0 or 1
        limits = curve.confidence_interval(level, method="log-log")
    columns = (curve.quantiles, curve.probabilities, limits.low.probabilities)
    return np.column_stack([*columns, limits.high.probabilities])


def _censored(times: np.ndarray, reached: np.ndarray):
    from scipy.stats import CensoredData

    missed = ~np.asarray(reached, dtype=bool)
    return CensoredData.right_censored(np.asarray(times, dtype=float), missed)


def ratios_to_best(times: np.ndarray) -> np.ndarray:
    """Return times (methods, workloads) over each workload's best; infinity where it was missed.

    Where the best time is 0, every other ratio is infinite.

    Raises:
        ValueError: a time is negative or NaN (infinity stands for a miss).
    """
    times = np.asarray(times, dtype=float)
    if times.ndim != 2 or not (times >= 0).all():
        raise ValueError("times must be an array (methods, workloads) of numbers >= 0 or inf")
    best = times.min(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = times / best
    return np.where(np.isinf(times), np.inf, np.where(times == best, 1.0, ratios))


def algoperf_scores(times: np.ndarray, *, cutoff: float = 4.0) -> np.ndarray:
    """Return each method's score, shape (methods,): mean over workloads of max(0, 4 - r) / 3.

    r is the time to target over the best method's, infinite for a miss (Dahl et al. 2023, AlgoPerf:
    the profile's area up to a ratio of 4).

    >>> algoperf_scores([[100, 200], [150, 100]]).round(4).tolist()
    [0.8333, 0.9167]
    """
    return np.maximum(0.0, cutoff - ratios_to_best(times)).mean(axis=1) / (cutoff - 1)


def performance_profile(times: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Return the share of workloads that each method solves within `ratios` of the best.

    Shape (methods, ratios); a miss is not solved within any. Source: Dolan and Moré 2002.
    """
    found = ratios_to_best(times)[:, :, None]
    within = (found <= np.asarray(ratios, dtype=float)) & np.isfinite(found)
    return within.mean(axis=1)
