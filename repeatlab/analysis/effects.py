"""What pairs of runs show, and what it is worth among other comparisons. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.paired_differences import APART, DIVERGED
from repeatlab.analysis.statistics import ALPHA, Effect, holm, paired_effect


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

    One task is judged in the metric's unit. Several are put in units of the spread over the runs
    of both arms, each task's own, and weigh alike. Exchanging the two runs of a pair leaves that
    unit as it is (the standard arm's own would change), so the sign flip stays exact.
    """
    tasks, places = np.unique(of_method["task"].to_numpy(str), return_inverse=True)
    differences = of_method["difference"].to_numpy(float)
    values = np.stack([of_method["value"].to_numpy(float), of_method["other"].to_numpy(float)])
    strata = []
    for place in range(len(tasks)):
        mine = places == place
        known = differences[mine & ~np.isnan(differences)]
        if len(tasks) > 1 and np.isfinite(known).all() and known.any():
            both = values[:, mine]
            known = known / spread(both[np.isfinite(both)])
        strata.append(known)
    gaps = int(np.isnan(differences).sum())
    diverged = int((of_method["status"].to_numpy() == DIVERGED).sum())
    effect = paired_effect(strata, seed=seed)
    found = sum(len(stratum) > 0 for stratum in strata)
    return Finding(effect, found, gaps, diverged, _note(of_method, effect, gaps, diverged))


def _note(of_method: pd.DataFrame, effect: Effect, gaps: int, diverged: int) -> str:
    if not len(of_method):
        return "no run is planned"
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
        said.append(f"{diverged} diverged, counted as worst by rank")
    if effect.n and effect.interval.kind == "none":
        said.append("no interval: a task has but one pair")
    if effect.n and effect.smallest_p > ALPHA:
        ties = int((of_method["difference"] == 0).sum())
        tied = f", {ties} of them ties" if ties else ""
        said.append(f"n = {effect.n}{tied}: p cannot fall below {effect.smallest_p:.4g}")
    return "; ".join(said)


def spread(values: np.ndarray | pd.Series) -> float:
    """Return the sd of what is known of `values`, NaN where there is none to divide by."""
    values = np.asarray(values, dtype=float)
    known = values[~np.isnan(values)]
    if len(known) < 2 or not np.isfinite(known).all():
        return np.nan
    return float(known.std(ddof=1)) or np.nan


# --- among other comparisons ------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
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
        told = f"{effect.estimate:+.3g}{unit} {limits}, p = {self.p:.3g}, n = {effect.n}"
        if self.least_p >= ALPHA:
            told += f" (too few: p cannot fall below {self.least_p:.3g})"
        if self.finding.diverged:
            told += f" ({self.finding.diverged} diverged)"
        return told


def adjusted(findings: Iterable[Finding], others: Iterable[float] = ()) -> list[Judged]:
    """Return the findings adjusted by Holm, in one family with the p-values `others`."""
    findings = list(findings)
    p = np.array([*(f.p for f in findings), *others])
    values, judged = holm(p), []
    for place, one in enumerate(findings):
        best = p.copy()
        best[place] = one.effect.smallest_p
        judged.append(Judged(one, values[place], holm(best)[place], len(p)))
    return judged


def alone(findings: Iterable[Finding]) -> list[Judged]:
    """Return the findings as they are: parts of a claim that needs all of them."""
    return [Judged(one, one.p, one.effect.smallest_p, 1) for one in findings]


def joint(parts: Iterable[Finding], needed: Iterable[Finding] = ()) -> tuple[float, int]:
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
