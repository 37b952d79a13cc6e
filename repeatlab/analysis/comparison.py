"""What pairs of runs show, a row for each task and method. Never imports torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.paired_differences import APART, DIVERGED
from repeatlab.analysis.statistics import ALPHA, Effect, holm, paired_effect

# fmt: off
TABLE = [
    "task", "method", "against", "n", "n_missing", "n_diverged", "difference", "low", "high",
    "interval", "median", "p", "p_adjusted", "least_p_adjusted", "decision", "note",
]
# fmt: on
WORDS = {1: "better", -1: "worse", 0: "undecided"}


def comparison_table(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return one row per task and method: what its pairs show, in the metric's unit.

    Args:
        frame: What `pairs` returns, one or several tasks and methods. They are one family: Holm
            adjusts over all of them, with a row that cannot be decided keeping its place. With n
            seeds, no row of a family of 0.05 * 2^(n - 1) or more can be decided: 7 with 8 seeds.
        seed: Of random sign flips.

    Returns:
        Columns task, method, against; n, n_missing, n_diverged (pairs); difference with low, high
        and `interval` (what they invert: "sign flip", or "signed ranks" where a run diverged, of
        the median, with no more than a side; infinite below six pairs); median of differences; p,
        p_adjusted (Holm), least_p_adjusted (what it could have been at best, given the other
        comparisons); decision ("equal" where no pair differs; "better" or "worse" where p_adjusted
        < 0.05; "undecided"; where a pair is missing nothing is decided); note.
    """
    groups = dict(list(frame.groupby(["task", "method", "against"], sort=False)))
    effects = [
        paired_effect(group["difference"].dropna().to_numpy(float), seed=seed)
        for group in groups.values()
    ]
    gaps = [int(group["difference"].isna().sum()) for group in groups.values()]
    p = np.array([np.nan if gap else one.p for gap, one in zip(gaps, effects, strict=True)])
    adjusted, rows = holm(p), []
    for place, (key, group) in enumerate(groups.items()):
        best = p.copy()
        best[place] = effects[place].smallest_p
        family = {"p_adjusted": adjusted[place], "least_p_adjusted": holm(best)[place]}
        keys = dict(zip(["task", "method", "against"], key, strict=True))
        rows.append(keys | family | _row(group, effects[place], gaps[place], adjusted[place]))
    return pd.DataFrame(rows, columns=TABLE)


def _row(group: pd.DataFrame, effect: Effect, gaps: int, p: float) -> dict[str, Any]:
    low, high, kind = effect.interval
    diverged = int((group["status"] == DIVERGED).sum())
    direction = 0 if gaps else effect.direction(p)
    return {
        "n": effect.n,
        "n_missing": gaps,
        "n_diverged": diverged,
        "difference": effect.estimate,
        "low": low,
        "high": high,
        "interval": kind,
        "median": group["difference"].dropna().median(),
        "p": np.nan if gaps else effect.p,
        "decision": "equal" if effect.equal and not gaps else WORDS[direction],
        "note": "; ".join(_notes(group, effect, gaps, diverged)),
    }


def _notes(group: pd.DataFrame, effect: Effect, gaps: int, diverged: int) -> list[str]:
    said = []
    if gaps:
        lost = group[group["difference"].isna()]
        why = "without a range in common" if (lost["status"] == APART).all() else "missing"
        known = lost["seed"].notna().all()
        seeds = f" seed {', '.join(map(str, lost['seed']))}" if known else ""
        said.append(f"{gaps} of {len(group)} pairs {why} ({lost['task'].iloc[0]}{seeds})")
    if diverged:
        worst = ", counted as worst by rank" * bool(np.isinf(group["difference"]).any())
        said.append(f"{diverged} diverged{worst}")
    if effect.equal:
        said.append(f"all {effect.n} pairs are equal")
    elif effect.n and effect.smallest_p > ALPHA:
        ties = effect.n - effect.unequal
        tied = f", {ties} of them ties" if ties else ""
        said.append(f"n = {effect.n}{tied}: p cannot fall below {effect.smallest_p:.4g}")
    return said
