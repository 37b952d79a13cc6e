"""The hypotheses, declared before the runs are made, and how the comparisons decide them.

The rule. An effect is a paired difference, all tasks pooled where a hypothesis speaks of all. It is
*better* if its 95 % interval lies above 0 and its Holm-adjusted sign-flip p is below 0.05, *worse*
if the interval lies below 0 and the adjusted p is below 0.05. All else is inconclusive: also what
misses a run, and what has so few pairs that no signs could give such a p (five differences alone
give 0.0625 at best), and the verdict says so.

What keeps false verdicts rare. H1, H2 and H3 are one Holm family: an entry for each arm of H1 and
of H2, and one for H3. H4 and H5 are supported only where H2 is, by tests in which every part has to
be significant by itself, which needs no adjustment for their number. So where no arm differs from
another, the whole table says *supported* anywhere in at most 5 % of studies, whatever the number of
tasks, arms and seeds, and each hypothesis by itself *refuted* in at most 5 %. Where H2 is supported
rightly, H4 and H5 err in at most 5 % each.

Effects of several tasks together are in sd within arms (`effects.spread`), of one task in its
metric's unit. What the rule can find with eight seeds stands in
`tests/benchmarks/results/decisions.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from repeatlab.analysis.effects import (
    AdjustedFinding,
    Finding,
    all_parts_p,
    alone,
    finding,
    holm_adjusted,
)
from repeatlab.analysis.planned_comparisons import LARGER_STEP, Evidence, Plan
from repeatlab.analysis.statistics import ALPHA, holm

MOST_LISTED = 3  # comparisons that a sentence spells out
SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a hypothesis.

    Attributes:
        hypothesis: H1 to H5.
        claim: What it says.
        criterion: What decides it.
        verdict: "supported", "refuted" or "inconclusive".
        sentence: The verdict with its numbers.
        numbers: What it rests on: comparison -> estimate, low, high, p, ...
    """

    hypothesis: str
    claim: str
    criterion: str
    verdict: str
    sentence: str
    numbers: dict[str, dict[str, Any]]


# --- the basis ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """What the hypotheses are judged by: evidence, plan, and the p-values that share one 5 %.

    Attributes:
        speed: H1's entries by arm.
        cost: H2's entries by arm.
        mechanism: H3's parts.
        mechanism_p: Their joint p, adjusted.
        mechanism_least_p: What it could have been at best.
    """

    evidence: Evidence
    plan: Plan
    seed: int
    speed: dict[str, AdjustedFinding]
    cost: dict[str, AdjustedFinding]
    mechanism: dict[str, Finding]
    mechanism_p: float
    mechanism_least_p: float


def _basis(evidence: Evidence, plan: Plan, seed: int) -> Basis:
    def found(frame: pd.DataFrame, column: str, names: Iterable[str]) -> dict[str, Finding]:
        return {name: finding(frame[frame[column] == name], seed=seed) for name in names}

    speed = found(evidence.speed, "method", plan.arms)
    cost = found(evidence.cost, "method", plan.arms)
    mechanism = {
        "extra updates go to high losses": finding(evidence.hardness, seed=seed),
        **found(evidence.controls, "against", plan.controls),
    }
    together, _ = _jointly(mechanism)
    entries = [*speed.values(), *cost.values()]
    judged = holm_adjusted(entries, [together])
    least = max(part.effect.smallest_p for part in mechanism.values())
    return Basis(
        evidence,
        plan,
        seed,
        dict(zip(speed, judged, strict=False)),
        dict(zip(cost, judged[len(speed) :], strict=True)),
        mechanism,
        *(float(holm([*(f.p for f in entries), p])[-1]) for p in (together, least)),
    )


def _jointly(mechanism: dict[str, Finding]) -> tuple[float, int]:
    """Return `all_parts_p` of H3; an arm that has seen more data may well be the better one."""
    larger_step = [part for name, part in mechanism.items() if name == LARGER_STEP]
    return all_parts_p((p for name, p in mechanism.items() if name != LARGER_STEP), larger_step)


# --- hypotheses -------------------------------------------------------------------------------

Decision = tuple[
    str, str, dict[str, AdjustedFinding]
]  # verdict, what is said first, what it rests on


def _by_arm(judged: dict[str, AdjustedFinding], better: str, worse: str) -> Decision:
    """Supported if an arm is better and none worse, refuted the other way round."""
    if not judged or any(one.missing for one in judged.values()):
        return INCONCLUSIVE, "Runs are missing", judged
    directions = {one.direction for one in judged.values()}
    if {1, -1} <= directions:
        return INCONCLUSIVE, f"One arm {better}, another {worse}", judged
    if 1 in directions:
        return SUPPORTED, f"At least one arm {better}", judged
    if -1 in directions:
        return REFUTED, f"At least one arm {worse}", judged
    return INCONCLUSIVE, f"That an arm {better} or {worse} is not shown", judged


def _h1(basis: Basis) -> Decision:
    return _by_arm(basis.speed, "converges sooner", "converges later")


def _h2(basis: Basis) -> Decision:
    return _by_arm(basis.cost, "is better at equal cost", "is worse at equal cost")


def _h3(basis: Basis) -> Decision:
    parts = dict(zip(basis.mechanism, alone(basis.mechanism.values()), strict=True))
    if any(part.missing for part in parts.values()):
        return INCONCLUSIVE, "Runs are missing", parts
    direction = _jointly(basis.mechanism)[1] if basis.mechanism_p < ALPHA else 0
    text = f"jointly p = {basis.mechanism_p:.3g}"
    if basis.mechanism_least_p >= ALPHA:
        text += f" (too few: it cannot fall below {basis.mechanism_least_p:.3g})"
    if direction > 0:
        return SUPPORTED, f"{basis.plan.real} beats every control, {text}", parts
    if direction < 0:
        return REFUTED, f"A part of the claim is reversed for {basis.plan.real}, {text}", parts
    return INCONCLUSIVE, f"Not every part is shown for {basis.plan.real}, {text}", parts


def _h4(basis: Basis) -> Decision:
    cost = basis.evidence.cost
    findings = {
        (arm, task): finding(group, seed=basis.seed)
        for (arm, task), group in cost.groupby(["method", "task"], sort=False)
        if arm in basis.plan.arms
    }
    names = [f"{arm}, {task}" for arm, task in findings]
    cells = dict(zip(names, holm_adjusted(findings.values()), strict=True))
    if not cells or any(cell.missing for cell in cells.values()):
        return INCONCLUSIVE, "Runs are missing", cells
    if any(cell.direction < 0 for cell in cells.values()):
        return REFUTED, "On some task an arm is worse at equal cost", cells
    if cost["task"].nunique() < 2:
        return INCONCLUSIVE, "There is only one task", cells
    if _h2(basis)[0] != SUPPORTED:
        return INCONCLUSIVE, "H2 is not supported: there is no effect to hold", cells
    by_arm = {
        a: all_parts_p(f for (arm, _), f in findings.items() if arm == a) for a in basis.plan.arms
    }
    p = holm([p for p, _ in by_arm.values()])
    for (arm, (_, direction)), q in zip(by_arm.items(), p, strict=True):
        if direction > 0 and q < ALPHA and basis.cost[arm].direction > 0:
            return SUPPORTED, f"{arm} is better on every task (jointly p = {q:.3g})", cells
    return INCONCLUSIVE, "That an arm is better on every task is not shown", cells


def _h5(basis: Basis) -> Decision:
    cost, among = basis.evidence.cost, basis.evidence.variants
    names, seed = basis.plan.variants, basis.seed
    found = [finding(cost[cost["method"] == name], seed=seed) for name in names]
    each = dict(zip(names, alone(found), strict=True))
    groups = list(among.groupby(["method", "against"], sort=False))
    judged = holm_adjusted(finding(group, seed=seed) for _, group in groups)
    contrasts = dict(zip((f"{a} - {b}" for (a, b), _ in groups), judged, strict=True))
    rests = each | contrasts
    if len(each) < 2 or any(one.missing for one in rests.values()):
        return INCONCLUSIVE, "Runs are missing", rests
    if _h2(basis)[0] != SUPPORTED:
        return INCONCLUSIVE, "H2 is not supported: there is no effect to be insensitive", rests
    p, direction = all_parts_p(found)
    if p < ALPHA and direction > 0:
        return SUPPORTED, f"Every mapping and t is better (jointly p = {p:.3g})", rests
    if any(one.direction for one in contrasts.values()):
        return REFUTED, "Not every mapping and t is better, and some differ", rests
    return INCONCLUSIVE, "Not every mapping and t is shown to be better, none to differ", rests


@dataclass(frozen=True)
class Hypothesis:
    """A claim, what decides it in words, and the same as a function of the comparisons."""

    name: str
    claim: str
    criterion: str
    rule: Callable[[Basis], Decision]


HYPOTHESES = (
    Hypothesis(
        "H1",
        "Loss-driven repetition converges sooner.",
        "Cost until the target (a miss and a diverged run count as the largest cost that both runs "
        "of the pair cover), or the mean of the metric over the cost where a task has no target; "
        "calibration is charged. Supported if an arm is better than the standard one over all "
        "tasks and none is worse; refuted the other way round.",
        _h1,
    ),
    Hypothesis(
        "H2",
        "Loss-driven repetition is better at equal cost.",
        "The metric at the largest cost that both runs of a pair cover. Supported if an arm is "
        "better than the standard one over all tasks and none is worse; refuted the other way "
        "round.",
        _h2,
    ),
    Hypothesis(
        "H3",
        "High-loss batches get the extra updates, and this, not timing, dispersion or a larger "
        "step, makes the difference.",
        "Supported if within windows of training N goes with the first loss, and at equal updates "
        "the arm is better than each of its controls, which keep N but break its tie to the batch, "
        "to time, to dispersion, to consecutive visits, or take one larger step; each part by "
        "itself significant. Refuted if a part is reversed (Bonferroni over the parts), other than "
        "the larger step, which at equal updates has seen more fresh data.",
        _h3,
    ),
    Hypothesis(
        "H4",
        "The benefit holds across tasks.",
        "At equal cost. Supported if H2 is and one arm is better on every task, each by itself "
        "significant; refuted if an arm is worse on some task (Holm over tasks x arms).",
        _h4,
    ),
    Hypothesis(
        "H5",
        "The benefit is insensitive to the mapping and to t.",
        "At equal cost. Supported if H2 is and every mapping and t is better than the standard arm "
        "over all tasks, each by itself significant; refuted if H2 is supported, not all of them "
        "are better and some two differ (Holm over the pairs).",
        _h5,
    ),
)


def judge(evidence: Evidence, plan: Plan, *, seed: int = 0) -> list[Verdict]:
    """Return the verdict of every hypothesis.

    Args:
        evidence: What `gather` returns.
        plan: The plan that it was gathered for.
        seed: Of the random sign flips, which serve above 16 differences.
    """
    basis = _basis(evidence, plan, seed)
    verdicts = []
    for hypothesis in HYPOTHESES:
        verdict, lead, rests = hypothesis.rule(basis)
        verdicts.append(
            Verdict(
                hypothesis.name,
                hypothesis.claim,
                hypothesis.criterion,
                verdict,
                f"{lead}{_details(rests)}.",
                {name: one.numbers() for name, one in rests.items()},
            )
        )
    return verdicts


def _details(rests: dict[str, AdjustedFinding]) -> str:
    """Return what a verdict rests on: each comparison where they are few, else their count."""
    lacking = {name: one for name, one in rests.items() if one.missing}
    if lacking:
        notes = [f"{name}: {one.finding.note}" for name, one in lacking.items()]
        more = [f"{len(notes) - MOST_LISTED} more"] if len(notes) > MOST_LISTED else []
        return " - " + "; ".join(notes[:MOST_LISTED] + more)
    if len(rests) <= MOST_LISTED:
        return ": " + "; ".join(f"{name} {one}" for name, one in rests.items()) if rests else ""
    better, worse = (sum(one.direction == d for one in rests.values()) for d in (1, -1))
    weakest = max(rests, key=lambda name: rests[name].p)
    counts = f"{better} better and {worse} worse of {len(rests)} comparisons"
    return f": {counts}, the weakest {weakest} {rests[weakest]}"


def verdict_table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """Return one row per hypothesis: hypothesis, claim, criterion, verdict, sentence."""
    columns = ["hypothesis", "claim", "criterion", "verdict", "sentence"]
    return pd.DataFrame([{c: getattr(v, c) for c in columns} for v in verdicts], columns=columns)
