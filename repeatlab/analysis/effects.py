"""What pairs of runs show, and what it is worth among other comparisons. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.paired_differences import APART, DIVERGED
from repeatlab.analysis.statistics import (
    ALPHA,
    Effect,
    holm,
    paired_effect,
    signed_ranks,
    unit,
)

DUST = 1e-9  # of the largest value: a smaller sd is that of rounding
RANKED = "by signed ranks, as it has no sd"


@dataclass(frozen=True)
class Finding:
    """What the pairs of a method show, on one task or over several.

    Attributes:
        effect: Its paired effect.
        tasks: Tasks with pairs.
        gaps: Pairs that are missing or cannot be compared.
        diverged: Pairs of which a run diverged.
        note: What is missing or was done about it, "" if nothing.
    """

    effect: Effect
    tasks: int
    gaps: int
    diverged: int
    note: str

    @property
    def p(self) -> float:
        """The sign-flip p; NaN where a pair is missing, since nothing is decided then."""
        return np.nan if self.gaps else self.effect.p

    def direction(self, p: float) -> int:
        """Return 1, -1 or 0: better, worse or undecided at the adjusted `p`."""
        return 0 if self.gaps else self.effect.direction(p)


def finding(of_method: pd.DataFrame, *, seed: int = 0) -> Finding:
    """Return what the rows of `pairs` of one method show, all tasks pooled.

    One task is judged in the metric's unit. Several are `standardised`, and weigh alike.
    """
    # As arrays: simulations call this by the ten thousand.
    places, tasks = pd.factorize(of_method["task"].to_numpy(), use_na_sentinel=False)
    names = ("difference", "value", "other")
    columns = np.array([of_method[name].to_numpy(float) for name in names])
    missing = np.isnan(columns[0])
    strata, notes = [], []
    for place, task in enumerate(tasks):
        values = columns[:, (places == place) & ~missing]
        pooled = len(tasks) > 1 and values.size > 0
        stratum, by_ranks = standardised(*values) if pooled else (values[0], False)
        strata.append(stratum)
        notes += [f"{task}: {RANKED}"] * by_ranks
    gaps = int(missing.sum())
    diverged = int((of_method["status"].to_numpy() == DIVERGED).sum())
    effect = paired_effect(strata, seed=seed)
    with_pairs = sum(len(stratum) > 0 for stratum in strata)
    note = "; ".join([*_notes(of_method, effect, gaps, diverged), *notes])
    return Finding(effect, with_pairs, gaps, diverged, note)


def standardised(
    differences: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Return the differences of a task's pairs in units of `spread`, and whether by ranks instead.

    Where there is no such unit, since a run diverged or no seed differs from another, signed ranks
    of the root mean square 1 stand for them; equal pairs are 0 in any unit.
    """
    scale = spread(ours, theirs)
    if np.isnan(scale) and np.any(differences):
        return unit(signed_ranks(differences)), True
    return np.asarray(differences) / (1.0 if np.isnan(scale) else scale), False


def spread(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the sd of runs within two arms that are paired, (n,) each; NaN where there is none.

    The variance of the pairs' means and a quarter of that of their absolute differences: the
    pooled variance within the arms, with the better runs taken to be all of one arm. So no effect
    is part of it, however large, and exchanging the two runs of a pair leaves it as it is, which
    keeps a sign flip of differences in this unit exact. What rounding leaves of values that are
    equal is no spread.
    """
    values = np.array([ours, theirs], dtype=float)
    if values.shape[1] < 2 or not np.isfinite(values).all():
        return np.nan
    means, differences = values.mean(axis=0), np.abs(values[0] - values[1])
    scale = float(np.sqrt(means.var(ddof=1) + differences.var(ddof=1) / 4))
    return scale if scale > DUST * np.abs(values).max() else np.nan


def _notes(of_method: pd.DataFrame, effect: Effect, gaps: int, diverged: int) -> list[str]:
    if not len(of_method):
        return ["no run is planned"]
    said = []
    if gaps:
        lost = of_method[of_method["difference"].isna()]
        why = "without a range in common" if (lost["status"] == APART).all() else "missing"
        which = [
            f"{task} seed {', '.join(map(str, group['seed']))}"
            if group["seed"].notna().all()
            else task
            for task, group in lost.groupby("task", sort=False)
        ]
        said.append(f"{gaps} of {len(of_method)} pairs {why} ({'; '.join(which)})")
    if diverged:
        worst = ", counted as worst by rank" * bool(np.isinf(of_method["difference"]).any())
        said.append(f"{diverged} diverged{worst}")
    if effect.equal:
        said.append(f"all {effect.n} pairs are equal")
    elif effect.n and effect.smallest_p > ALPHA:
        ties = effect.n - effect.unequal
        tied = f", {ties} of them ties" if ties else ""
        said.append(f"n = {effect.n}{tied}: p cannot fall below {effect.smallest_p:.4g}")
    return said


# --- among other comparisons ------------------------------------------------------------------


@dataclass(frozen=True)
class AdjustedFinding:
    """A finding with its adjusted p, the least that p could have been, and the family's size."""

    finding: Finding
    p: float
    least_p: float
    family: int

    @property
    def direction(self) -> int:
        return self.finding.direction(self.p)

    @property
    def missing(self) -> bool:
        return self.finding.gaps > 0 or not self.finding.effect.n

    def numbers(self) -> dict[str, Any]:
        effect = self.finding.effect
        return {
            "estimate": effect.estimate,
            "low": effect.interval.low,
            "high": effect.interval.high,
            "interval": effect.interval.kind,
            "p": effect.p,
            "p_adjusted": self.p,
            "least_p_adjusted": self.least_p,
            "comparisons": self.family,
            "n": effect.n,
            "tasks": self.finding.tasks,
            "missing": self.finding.gaps,
            "diverged": self.finding.diverged,
            "note": self.finding.note,
        }

    def __str__(self) -> str:
        effect = self.finding.effect
        limits = "no interval"
        if effect.interval.kind != "none":
            limits = f"[{effect.interval.low:.3g}, {effect.interval.high:.3g}]"
        unit = " sd" if self.finding.tasks > 1 else ""
        text = f"{effect.estimate:+.3g}{unit} {limits}, p = {self.p:.3g}, n = {effect.n}"
        if effect.equal:
            text += " (equal in all pairs)"
        elif self.least_p >= ALPHA:
            text += f" (too few: p cannot fall below {self.least_p:.3g})"
        if self.finding.diverged:
            text += f" ({self.finding.diverged} diverged)"
        return text


def holm_adjusted(
    findings: Iterable[Finding], others: Iterable[float] = ()
) -> list[AdjustedFinding]:
    """Return the findings adjusted by Holm, in one family with the p-values `others`."""
    findings = list(findings)
    p = np.array([*(f.p for f in findings), *others])
    values, rows = holm(p), []
    for place, one in enumerate(findings):
        best = p.copy()
        best[place] = one.effect.smallest_p
        rows.append(AdjustedFinding(one, values[place], holm(best)[place], len(p)))
    return rows


def alone(findings: Iterable[Finding]) -> list[AdjustedFinding]:
    """Return the findings as they are: parts of a claim that needs all of them."""
    return [AdjustedFinding(one, one.p, one.effect.smallest_p, 1) for one in findings]


def all_parts_p(parts: Iterable[Finding], needed: Iterable[Finding] = ()) -> tuple[float, int]:
    """Return p and direction of a claim with parts: 1 if all of them hold, -1 if one is reversed.

    To hold, each part must be significant by itself, so the largest p decides; that one of them is
    reversed is the smallest p among those, times the number of parts (Bonferroni). Under the null
    either happens with half its p, hence p is valid for both.

    Args:
        parts: What the claim consists of.
        needed: What has to hold besides, and says nothing where it is reversed.
    """
    parts = list(parts)
    every = [*parts, *needed]
    if not parts or any(np.isnan(part.p) for part in every):
        return np.nan, 0
    if all(part.effect.estimate > 0 for part in every):
        return max(p.p for p in every), int(all(p.effect.interval.low > 0 for p in every))
    worst = min((p for p in parts if p.effect.estimate < 0), key=lambda p: p.p, default=None)
    if worst is None:
        return 1.0, 0
    return min(1.0, worst.p * len(parts)), -int(worst.effect.interval.high < 0)
