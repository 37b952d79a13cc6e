"""What pairs of runs show, as tables: task x method, and over tasks. Never imports torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.effects import (
    RANKED,
    AdjustedFinding,
    finding,
    holm_adjusted,
    spread,
    standardised,
)
from repeatlab.analysis.statistics import (
    iqm,
    probability_of_improvement,
    stratified_interval,
)

# fmt: off
TABLE = [
    "task", "method", "against", "n", "n_missing", "n_diverged", "difference", "low", "high",
    "interval", "median", "standardised", "standardised_low", "standardised_high", "probability",
    "p", "p_adjusted", "least_p_adjusted", "decision", "note",
]
OVER_TASKS = [
    "method", "against", "tasks", "n", "iqm", "low", "high", "mean", "probability", "note",
]
# fmt: on
WORDS = {1: "better", -1: "worse", 0: "undecided"}


def comparison_table(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return one row per task and method: what its pairs show.

    Args:
        frame: What `pairs` returns, one or several tasks and methods. They are one family: Holm
            adjusts over all of them, with a row that cannot be decided keeping its place. With n
            seeds, no row of a family of 0.05 * 2^(n - 1) or more can be decided: 7 with 8 seeds.
        seed: Of random sign flips.

    Returns:
        Columns task, method, against; n, n_missing, n_diverged (pairs); difference with low, high
        and `interval` (what they invert: "sign flip", or "signed ranks" where a run diverged, of
        the pairwise means' median; infinite below six pairs); median of the differences;
        standardised, standardised_low and standardised_high (in units of `effects.spread`, taken as
        known; NaN if undefined); probability that a run of the method is the better one; p,
        p_adjusted (Holm), least_p_adjusted (what it could have been at best, given the other
        comparisons); decision ("equal" where no pair differs; "better" or "worse" where p_adjusted
        < 0.05; "undecided"; where a pair is missing nothing is decided); note.
    """
    groups = dict(list(frame.groupby(["task", "method", "against"], sort=False)))
    findings = holm_adjusted(finding(group, seed=seed) for group in groups.values())
    rows = [
        dict(zip(["task", "method", "against"], key, strict=True)) | _row(groups[key], one)
        for key, one in zip(groups, findings, strict=True)
    ]
    return pd.DataFrame(rows, columns=TABLE)


def _row(group: pd.DataFrame, adjusted: AdjustedFinding) -> dict[str, Any]:
    one, effect = adjusted.finding, adjusted.finding.effect
    known = group.dropna(subset="difference")
    scale = spread(known["value"], known["other"])
    low, high, kind = effect.interval
    return {
        "n": effect.n,
        "n_missing": one.gaps,
        "n_diverged": one.diverged,
        "difference": effect.estimate,
        "low": low,
        "high": high,
        "interval": kind,
        "median": known["difference"].median(),
        "standardised": effect.estimate / scale,
        "standardised_low": low / scale,
        "standardised_high": high / scale,
        "probability": _probability(known),
        "p": effect.p,
        "p_adjusted": adjusted.p,
        "least_p_adjusted": adjusted.least_p,
        "decision": "equal" if effect.equal and not one.gaps else WORDS[adjusted.direction],
        "note": one.note,
    }


def over_tasks(frame: pd.DataFrame, *, seed: int = 0, resamples: int = 9999) -> pd.DataFrame:
    """Return one row per method: its standardised improvement over all tasks together.

    Every run's difference is `effects.standardised`; a task of which only ranks could be taken, or
    that has no pair, is named.

    Args:
        frame: What `pairs` returns, of several tasks.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        Columns method, against, tasks, n, iqm with low and high (bootstrap stratified by task),
        mean, probability (that a run of the method is the better one, mean over tasks), note.
    """
    rows = []
    for (method, against), of_method in frame.groupby(["method", "against"], sort=False):
        strata, odds, said = [], [], []
        for task, group in of_method.groupby("task", sort=False):
            known = group.dropna(subset="difference")
            if gaps := len(group) - len(known):
                said.append(f"{task}: {gaps} of {len(group)} pairs missing")
            if len(known):
                columns = known[["difference", "value", "other"]].to_numpy(float)
                values, by_ranks = standardised(*columns.T)
                strata.append(values)
                odds.append(_probability(known))
                said += [f"{task}: {RANKED}"] * by_ranks
        values = np.concatenate([np.empty(0), *strata])
        interval = stratified_interval(strata, seed=seed, resamples=resamples)
        rows.append(
            {
                "method": method,
                "against": against,
                "tasks": len(strata),
                "n": len(values),
                "iqm": float(iqm(values)) if len(values) else np.nan,
                "low": interval.low,
                "high": interval.high,
                "mean": values.mean() if len(values) else np.nan,
                "probability": np.mean(odds) if odds else np.nan,
                "note": "; ".join(said),
            }
        )
    return pd.DataFrame(rows, columns=OVER_TASKS)


def _probability(known: pd.DataFrame) -> float:
    return probability_of_improvement(*(known["sign"] * known[side] for side in ("value", "other")))
