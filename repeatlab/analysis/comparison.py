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
    NO_INTERVAL,
    Interval,
    bootstrap_interval,
    iqm,
    probability_of_improvement,
    stratified_interval,
)

# fmt: off
TABLE = [
    "task", "method", "against", "n", "n_missing", "n_diverged", "difference", "low", "high",
    "interval", "bootstrap_low", "bootstrap_high", "bootstrap", "median", "standardised",
    "standardised_low", "standardised_high", "probability", "p", "p_adjusted",
    "least_p_adjusted", "decision", "note",
]
OVER_TASKS = [
    "method", "against", "tasks", "n", "iqm", "low", "high", "mean", "probability", "note",
]
# fmt: on
WORDS = {1: "better", -1: "worse", 0: "undecided"}


def comparison_table(frame: pd.DataFrame, *, seed: int = 0, resamples: int = 9999) -> pd.DataFrame:
    """Return one row per task and method: what its pairs show.

    Args:
        frame: What `pairs` returns, one or several tasks and methods. They are one family: Holm
            adjusts over all of them, with a row that cannot be decided keeping its place. With n
            seeds, no row of a family of 0.05 * 2^(n - 1) or more can be decided: 7 with 8 seeds.
        seed: Of the bootstrap and of random sign flips.
        resamples: Of the bootstrap; 0 leaves it out.

    Returns:
        Columns task, method, against; n, n_missing, n_diverged (pairs); difference with low, high
        and `interval` (what they invert: "sign flip", or "signed ranks" where a run diverged, of
        the pairwise means' median; infinite below six pairs), bootstrap_low, bootstrap_high and
        `bootstrap` (bca, percentile or none); median of the differences; standardised,
        standardised_low and standardised_high (in units of `effects.spread`, taken as known; NaN if
        undefined); probability that a run of the method is the better one; p, p_adjusted (Holm),
        least_p_adjusted (what it could have been at best, given the other comparisons); decision
        ("equal" where no pair differs; "better" or "worse" where p_adjusted < 0.05; "undecided";
        where a pair is missing nothing is decided); note.
    """
    groups = dict(list(frame.groupby(["task", "method", "against"], sort=False)))
    findings = holm_adjusted(finding(group, seed=seed) for group in groups.values())
    rows = [
        dict(zip(["task", "method", "against"], key, strict=True))
        | _row(group, one, seed=seed, resamples=resamples)
        for (key, group), one in zip(groups.items(), findings, strict=True)
    ]
    return pd.DataFrame(rows, columns=TABLE)


def _row(
    group: pd.DataFrame, adjusted: AdjustedFinding, *, seed: int, resamples: int
) -> dict[str, Any]:
    one, effect = adjusted.finding, adjusted.finding.effect
    known = group.dropna(subset="difference")
    differences = known["difference"].to_numpy(float)
    bootstrap = NO_INTERVAL
    if resamples:
        bootstrap = bootstrap_interval(differences, seed=seed, resamples=resamples)
    scale = spread(known["value"], known["other"])
    return {
        "n": effect.n,
        "n_missing": one.gaps,
        "n_diverged": one.diverged,
        "difference": effect.estimate,
        **_limits("", effect.interval, "interval"),
        **_limits("bootstrap_", bootstrap, "bootstrap"),
        "median": np.median(differences) if len(differences) else np.nan,
        "standardised": effect.estimate / scale,
        "standardised_low": effect.interval.low / scale,
        "standardised_high": effect.interval.high / scale,
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
                values, by_ranks = standardised(known)
                strata.append(values)
                odds.append(_probability(known))
                said += [f"{task}: {RANKED}"] * by_ranks
        values = np.concatenate([np.empty(0), *strata])
        rows.append(
            {
                "method": method,
                "against": against,
                "tasks": len(strata),
                "n": len(values),
                "iqm": float(iqm(values)) if len(values) else np.nan,
                **_limits("", stratified_interval(strata, seed=seed, resamples=resamples)),
                "mean": values.mean() if len(values) else np.nan,
                "probability": np.mean(odds) if odds else np.nan,
                "note": "; ".join(said),
            }
        )
    return pd.DataFrame(rows, columns=OVER_TASKS)


def _limits(prefix: str, interval: Interval, kind: str | None = None) -> dict[str, Any]:
    limits = {f"{prefix}low": interval.low, f"{prefix}high": interval.high}
    return limits | ({kind: interval.kind} if kind else {})


def _probability(known: pd.DataFrame) -> float:
    ours, theirs = (known["sign"] * known[side] for side in ("value", "other"))
    return probability_of_improvement([ours], [theirs])
