"""What a plan's verdicts say to a reader: with dose, rates, margin and digest beside each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite, isinf, isnan
from typing import Any

import pandas as pd

from repeatlab.analysis.declaration import LEAST_DOSE
from repeatlab.analysis.plans import PlanRecords
from repeatlab.analysis.statistics import ALPHA
from repeatlab.analysis.updates_saved import least_p
from repeatlab.analysis.verdicts import (
    EQUIVALENT,
    INCONCLUSIVE,
    INTERIM,
    NOT_TESTED,
    REFUTED,
    SUPPORTED,
    Comparison,
    Verdict,
)
from repeatlab.figures.look import extent

OPENINGS = {
    SUPPORTED: "The runs support this.",
    REFUTED: "The runs contradict this.",
    EQUIVALENT: "The runs show no difference that would matter (by the margin of {margin}).",
    INCONCLUSIVE: "The runs neither show nor exclude this.",
    NOT_TESTED: f"This was not tested: an arm that visits a batch fewer than {LEAST_DOSE} times on "
    "average is nearly the same as the standard one.",
    INTERIM: "This is not judged yet: runs that the plan asks for are missing.",
}
MOST_TOLD = 4  # comparisons of which a sentence tells each


def registered(plan: PlanRecords) -> dict[str, Any]:
    """Return what stands beside every verdict: the plan, its digest, n, margin and changes."""
    declared = plan.declared
    return {
        "plan": plan.name,
        "digest": plan.digest,
        "tasks": list(declared.goals),
        "seeds": extent(map(declared.seeds_on, declared.goals)),
        "margin": declared.margin,
        "changes": plan.changes,
    }


def verdict_entries(plan: PlanRecords, arms: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one entry per hypothesis: its verdict in every view, and all that it rests on.

    Args:
        plan: The plan's runs.
        arms: What `arms_table` returns at own rates.
    """
    first, *others = plan.views
    evidence, verdicts = plan.views[first]
    beside = {view: {v.hypothesis: v.verdict for v in plan.views[view][1]} for view in others}
    entries = []
    for one in verdicts:
        of_arms = _arms_of(one, plan, arms)
        entries.append(
            {
                "hypothesis": one.hypothesis,
                "claim": one.claim,
                "criterion": one.criterion,
                "verdict": one.verdict,
                "sentence": one.sentence,
                "told": for_people(one, plan, of_arms),
                "views": {first: one.verdict} | {v: beside[v][one.hypothesis] for v in others},
                "arms": of_arms,
                "comparisons": {n: c.numbers() for n, c in one.comparisons.items()},
                "lacking": evidence.lacking,
            }
            | registered(plan)
        )
    return entries


def _arms_of(verdict: Verdict, plan: PlanRecords, arms: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the arms that a hypothesis is about, each with its dose and its rates over tasks."""
    declared = plan.declared
    about = {"H3": (declared.real,), "H5": declared.variants}
    rows = []
    for arm in about.get(verdict.hypothesis, declared.arms):
        own = arms[arms["arm"] == arm]
        if len(own):
            rates = [float(own["rate"].min()), float(own["rate"].max())]
            rows.append({"arm": arm, "mean_n": float(own["mean_n"].mean()), "rates": rates})
    return rows


def for_people(verdict: Verdict, plan: PlanRecords, arms: Sequence[Mapping[str, Any]]) -> str:
    """Return a verdict in words, its numbers rounded: what was found, at which dose and rate."""
    opening = OPENINGS[verdict.verdict].format(margin=percent(plan.declared.margin))
    found, doses = verdict.comparisons, {row["arm"]: row["mean_n"] for row in arms}
    if verdict.hypothesis in ("H1", "H2") and found:
        notes = {name: f", but {one.note}" if one.note else "" for name, one in found.items()}
        told = [f"{_arm(name, doses)} {effect(one)}{notes[name]}" for name, one in found.items()]
    elif verdict.hypothesis == "H3" and found:
        told = [f"against {name} it {effect(one)}" for name, one in found.items()]
        told[0] = f"{_arm(plan.declared.real, doses)}: {told[0]}"
    elif found:
        states = [one.state for one in found.values()]
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        said = ", ".join(f"{count} {state}" for state, count in counts.items())
        return f"{opening} The comparisons it rests on: {said}."
    else:
        return f"{opening} Mean visits of a batch: {dose_words(arms)}."
    if len(told) > MOST_TOLD:
        told = [*told[:MOST_TOLD], f"and {len(told) - MOST_TOLD} more"]
    return f"{opening} {_capital('; '.join(told))}."


def effect(one: Comparison) -> str:
    """Return a comparison in words: "saved 4 % of the updates (95 %: -3 % to 10 %)"."""
    numbers = one.numbers()
    share, low, high = numbers["saved"], bound(numbers["low"]), bound(numbers["high"])
    if numbers["equal_pairs"] == 1:
        return "was equal in every pair of runs"
    if share < 0:
        low, high = -high, -low
    limits = f"(95 %: {percent(low)} to {percent(high)})"
    if one.effect.interval.low == 0 and isinf(one.effect.interval.high):
        few = least_p(one.effect.seeds) >= ALPHA
        beyond = "its limits lie beyond every budget that was tried"
        limits = f"({'with so few seeds there are no limits' if few else beyond})"
    if isinf(share):
        return f"was worse than every budget that was tried {limits}"
    if isinf(one.effect.ratio):
        return f"was better than every budget that was tried {limits}"
    if share < 0:
        return f"cost {percent(-share)} more updates {limits}"
    return f"saved {percent(share)} of the updates {limits}"


def percent(share: float) -> str:
    """Return a share in whole per cent; what has no bound is said.

    >>> [percent(x) for x in (0.047, -0.3, float("-inf"), 0.001)]
    ['5 %', '-30 %', 'no bound', '0 %']
    """
    if isnan(share):
        return "-"
    return f"{round(100 * share)} %" if isfinite(share) else "no bound"


def bound(share: float) -> float:
    """Return a limit of updates saved; where no budget would have been enough, infinity."""
    return inf if share == 1 else share


def dose_words(arms: Sequence[Mapping[str, Any]]) -> str:
    """Return the doses of arms in words: "linear 1.31, quantile 1.52"."""
    return ", ".join(f"{row['arm']} {row['mean_n']:.2f}" for row in arms) or "-"


def rate_words(arms: Sequence[Mapping[str, Any]]) -> str:
    """Return the rates of arms over tasks in words: "linear 0.5 to 2"."""
    ranges = {row["arm"]: dict.fromkeys(f"{rate:g}" for rate in row["rates"]) for row in arms}
    return ", ".join(f"{arm} {' to '.join(rates)}" for arm, rates in ranges.items()) or "-"


def what_can_be_decided(plan: PlanRecords) -> str:
    """Return what so many seeds can decide at all, whatever the runs show."""
    declared = plan.declared
    n, family, least = declared.most_seeds, declared.family, least_p(declared.most_seeds)
    start = f"With {n} seeds, flipped as wholes over all tasks, p cannot fall below {least:.2g}"
    if least >= 2 * ALPHA:
        return f"{start}: at this scale nothing can be decided, whatever the runs show."
    if declared.least_p >= ALPHA:
        return (
            f"{start}, or {declared.least_p:.2g} among the {family} comparisons of H1 to "
            "H3: equivalence can be shown at this scale, a difference cannot."
        )
    return f"{start}: at this scale a verdict can go either way."


def _arm(name: str, doses: Mapping[str, float]) -> str:
    return f"{name} ({doses[name]:.2f} visits a batch)" if name in doses else name


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
