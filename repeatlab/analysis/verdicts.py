"""The hypotheses, declared before the runs are made, and how the comparisons decide them.

An effect is a ratio of budgets (`updates_saved`), all tasks pooled where a hypothesis speaks of
all. Each comparison is *better* or *worse* (its 95 % interval excludes no effect, which is the same
as a sign-flip p below 0.05, and Holm's adjusted p is below 0.05 too), *equivalent* (its 90 %
interval lies within the margin of the plan: two one-sided tests of 5 %) or undecided. Times to a
target are read between two evaluations: where these are as far apart as the margin, only times that
are equal are equivalent. One-off charges (calibration, holdout models) are in no comparison: they
are told beside it, with the number of runs that pay them back.

An arm is compared on the tasks on which it repeats: where its mean N is below 1.1 it is nearly the
standard arm, and says nothing of repetition. Tasks that differ are not equivalent on average: where
one of them lies beyond the margin with all of its 90 % interval, the arm is not called equivalent.

A verdict is *supported*, *refuted*, *equivalent*, *inconclusive*, *not tested* where no arm in
question repeats on any task, or *interim* until every planned seed is there.

H1 and H2 say that there is an arm which is better: one that is better supports them, and only that
every arm is worse, or no better than by the margin, refutes them. H3 and H4 say something of every
control and of every task: one that fails refutes them. H5 says that settings do not differ, which
equivalence alone can support.

Levels hold given the rates that tuning chose, and the standard arm at other budgets has the rate
that was chosen for it at T: what tuning missed is in no p.

What keeps false verdicts rare. H1, H2 and H3 are one Holm family: an entry for each arm of H1 and
of H2, and one for H3, two-sided. H4 and H5 are supported or refuted only where H2 is supported. So
where no arm differs from another, the table says supported or refuted anywhere in at most 5 % of
studies, whatever the number of tasks, arms and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from repeatlab.analysis.declaration import LARGER_STEP, LEAST_DOSE, Declaration
from repeatlab.analysis.evidence import Dose, Evidence, repeating
from repeatlab.analysis.statistics import ALPHA, holm, sign_flips
from repeatlab.analysis.updates_saved import Saved, by_seed, saved, saved_until, share_saved
from repeatlab.core.schema import read_yaml

SUPPORTED, REFUTED, EQUIVALENT = "supported", "refuted", "equivalent"
INCONCLUSIVE, NOT_TESTED, INTERIM = "inconclusive", "not tested", "interim"
BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"


@dataclass(frozen=True)
class Comparison:
    """One comparison and what it decides.

    Attributes:
        effect: Updates saved.
        p: The adjusted p that decides.
        state: "better", "worse", "equivalent" or "undecided".
        dose: Mean N of the arm over its tasks, NaN where it is none of repetition.
        planned: Tasks that there are; its effect may rest on fewer.
        note: Why it is undecided though its interval lies within the margin.
    """

    effect: Saved
    p: float
    state: str
    dose: float = np.nan
    planned: int = 0
    note: str = ""

    def numbers(self) -> dict[str, Any]:
        """Return what it rests on, as plain numbers."""
        effect, names = self.effect, ("saved", "low", "high", "low_90", "high_90")
        ratios = (effect.ratio, *effect.interval[:2], *effect.within[:2])
        return {
            **dict(zip(names, map(share_saved, ratios), strict=True)),
            "p": effect.p,
            "p_adjusted": self.p,
            "seeds": effect.seeds,
            "tasks": effect.tasks,
            "equal_pairs": effect.equal,
            "mean_n": self.dose,
            "state": self.state,
            "note": self.note,
        }

    def __str__(self) -> str:
        found, planned = self.effect.tasks, self.planned
        where = f" on {found} of {planned} tasks" if found < planned else ""
        why = f", since {self.note}" if self.note else ""
        return f"{percent_saved(self.effect)}{where}, p = {self.p:.2g}: {self.state}{why}"


def percent_saved(effect: Saved) -> str:
    """Return an effect in words: "+4 % of updates saved [-3, +10]"; beyond the budgets "open"."""
    beyond = {np.inf: "better than at every budget", 0.0: "worse than at every budget"}
    said = beyond.get(effect.ratio, f"{_percent(effect.ratio)} % of updates saved")
    return f"{said} [{', '.join(map(_percent, effect.interval[:2]))}]"


def _percent(ratio: float) -> str:
    if ratio == 0 or not isfinite(ratio):
        return "open"
    rounded = round(100 * share_saved(ratio))
    return f"{rounded:+d}" if rounded else "0"


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a hypothesis.

    Attributes:
        hypothesis: H1 to H5.
        claim: What it says.
        criterion: What decides it.
        verdict: See the module.
        sentence: The verdict with its numbers, for people.
        comparisons: What it rests on, by name.
    """

    hypothesis: str
    claim: str
    criterion: str
    verdict: str
    sentence: str
    comparisons: dict[str, Comparison]


@dataclass(frozen=True)
class _Case:
    """The comparisons that share one 5 %, and what the rules need beside them."""

    evidence: Evidence
    declared: Declaration
    speed: dict[str, Comparison]
    end: dict[str, Comparison]
    mechanism: dict[str, Comparison]
    mechanism_p: float


Ruling = tuple[str, str, dict[str, Comparison]]  # verdict, what is said first, what it rests on


def state_of(effect: Saved, p: float, margin: float, by_task: Iterable[Saved] | None = None) -> str:
    """Return what an effect decides by its adjusted `p`; `by_task` are those that it pools.

    Opposite effects cancel: tasks are not equivalent together where one of them lies beyond the
    margin with all of its 90 % interval.
    """
    direction = effect.direction(p)
    if direction:
        return BETTER if direction > 0 else WORSE
    beyond = any(
        one.within.low >= 1 / (1 - margin) or one.within.high <= 1 - margin for one in by_task or ()
    )
    return EQUIVALENT if effect.equivalent(margin) and not beyond else UNDECIDED


def _mean_dose(doses: Mapping[str, Dose]) -> float:
    """Return the mean over tasks of E[N], tasks alike."""
    return float(np.mean([dose.mean for dose in doses.values()])) if doses else np.nan


def _case(evidence: Evidence, declared: Declaration) -> _Case:
    limits = {task: float(goal.updates) for task, goal in declared.goals.items()}
    until = {a: repeating(evidence.until[a], evidence.dose.get(a, {})) for a in declared.arms}
    at_end = {a: repeating(evidence.at_end[a], evidence.dose.get(a, {})) for a in declared.arms}
    time_saved = partial(saved_until, limits=limits)
    speed = {a: time_saved(tasks) for a, tasks in until.items() if tasks}
    end = {a: saved(tasks) for a, tasks in at_end.items() if tasks}
    evidence = replace(evidence, **_of_real(evidence, declared))
    parts = {c: saved(found) for c, found in evidence.controls.items() if found}
    # What was declared keeps its place in the family, whether it was tested or not.
    family = [found[a].p if a in found else np.nan for found in (speed, end) for a in declared.arms]
    *adjusted, mechanism_p = holm([*family, _mechanism_p(evidence, parts)])
    arms = len(declared.arms)
    p_speed = dict(zip(declared.arms, adjusted[:arms], strict=True))
    p_end = dict(zip(declared.arms, adjusted[arms:], strict=True))

    def decided(
        effects: dict[str, Saved],
        p: Mapping[str, float],
        tasks: Mapping[str, Mapping[str, Any]],
        alone: Callable[[dict[str, Any]], Saved] = saved,
        coarse: Mapping[str, float] | None = None,
    ) -> dict[str, Comparison]:
        found = {}
        for name, effect in effects.items():
            by_task = [alone({task: one}) for task, one in tasks[name].items()]
            state = state_of(effect, p[name], declared.margin, by_task)
            told = state == EQUIVALENT and effect.equal < 1  # equal runs are equal at any grid
            note = _blind(tasks[name], coarse or {}, declared.margin) if told else ""
            state = UNDECIDED if note else state
            doses = evidence.dose.get(name, {})
            dose = _mean_dose({task: doses[task] for task in tasks[name] if task in doses})
            planned = len(declared.goals)
            found[name] = Comparison(effect, float(p[name]), state, dose, planned, note)
        return found

    return _Case(
        evidence,
        declared,
        decided(speed, p_speed, until, time_saved, evidence.coarse),
        decided(end, p_end, at_end),
        decided(parts, {name: e.p for name, e in parts.items()}, evidence.controls),
        float(mechanism_p),
    )


def _blind(tasks: Iterable[str], coarse: Mapping[str, float], margin: float) -> str:
    """Return on which tasks a time to the target cannot tell what is within the margin, and why.

    Two runs that cross it between the same two evaluations may be as far apart as these are.
    """
    blind = [f"{coarse[t]:.0%} on {t}" for t in tasks if coarse.get(t, 0.0) >= margin]
    if not blind:
        return ""
    shares = ", ".join(blind).replace("%", " %")
    return f"evaluations are too far apart for equivalence ({shares} of the way to the target)"


def _of_real(evidence: Evidence, declared: Declaration) -> dict[str, Any]:
    """Return what H3 rests on, of the tasks on which the real arm repeats."""
    doses = evidence.dose.get(declared.real, {})
    return {
        "controls": {c: repeating(found, doses) for c, found in evidence.controls.items()},
        "hardness": repeating(evidence.hardness, doses),
    }


def _mechanism_p(evidence: Evidence, parts: Mapping[str, Saved]) -> float:
    """Return the p of H3 as a whole, two-sided: every part holds, or one of them is reversed.

    To hold, each part must be significant by itself, so the largest p decides; that one is
    reversed is the smallest p among those times the number of parts (Bonferroni). Under the null
    either happens with at most half its p, hence p is valid for both. A larger step that does
    better, having seen more fresh data, reverses nothing.
    """
    if not parts or not evidence.hardness:
        return np.nan
    hard_p, hard = _hardness_test(evidence)
    signs = {name: effect.ratio - 1 for name, effect in parts.items()} | {"": hard}
    ps = {name: effect.p for name, effect in parts.items()} | {"": hard_p}
    if all(sign > 0 for sign in signs.values()):
        return max(ps.values())
    reversed_ = [ps[n] for n, sign in signs.items() if sign < 0 and n != LARGER_STEP]
    return min(1.0, min(reversed_) * len(ps)) if reversed_ else 1.0


def _hardness_test(evidence: Evidence) -> tuple[float, float]:
    """Return p and mean of the rank correlations between first loss and N, tasks alike."""
    parts = [(seeds, values[:, None]) for seeds, values in evidence.hardness.values()]
    rows = by_seed(parts, len(parts))
    return float(sign_flips(rows)[0]), float(rows.sum())


# --- hypotheses -------------------------------------------------------------------------------


def _there_is_an_arm(case: _Case, found: dict[str, Comparison], better: str, worse: str) -> Ruling:
    """Judge a claim that an arm is better: one supports it, and none that could be refutes it."""
    states = {comparison.state for comparison in found.values()}
    if not states:
        lead = f"No arm visits a batch {LEAST_DOSE} times on average, on any task"
        return NOT_TESTED, lead, found
    if BETTER in states:
        return SUPPORTED, f"At least one arm {better}", found
    if len(found) < len(case.declared.arms):
        return INCONCLUSIVE, f"That an arm {better} is not shown, and some were not tested", found
    if states == {EQUIVALENT}:
        return EQUIVALENT, "No arm makes a difference above the margin", found
    if states == {WORSE}:
        return REFUTED, f"Every arm {worse}", found
    if states == {EQUIVALENT, WORSE}:
        return REFUTED, f"No arm {better} by more than the margin, and some {worse}", found
    return INCONCLUSIVE, f"That an arm {better} is neither shown nor excluded", found


def _h1(case: _Case) -> Ruling:
    words = "reaches the target sooner", "reaches the target later"
    return _there_is_an_arm(case, case.speed, *words)


def _h2(case: _Case) -> Ruling:
    return _there_is_an_arm(case, case.end, "ends better", "ends worse")


def _h3(case: _Case) -> Ruling:
    parts, real = case.mechanism, case.declared.real
    doses = case.evidence.dose.get(real, {})
    if doses and max(dose.mean for dose in doses.values()) < LEAST_DOSE:
        return NOT_TESTED, f"{real} does not reach a mean N of {LEAST_DOSE}", parts
    if len(parts) < len(case.declared.controls) or not parts or not case.evidence.hardness:
        return INCONCLUSIVE, "Runs are missing", parts
    hard = _hardness_test(case.evidence)[1]
    jointly = f"jointly p = {case.mechanism_p:.2g}, rank correlation of loss and N {hard:+.2f}"
    if case.mechanism_p < ALPHA:
        if hard > 0 and all(part.effect.ratio > 1 for part in parts.values()):
            if real not in case.end or case.end[real].state != BETTER:
                against = case.declared.against
                return INCONCLUSIVE, f"{real} beats its controls, but not {against}", parts
            return SUPPORTED, f"{real} beats every control ({jointly})", parts
        return REFUTED, f"A part of the claim is reversed for {real} ({jointly})", parts
    if all(part.state == EQUIVALENT for part in parts.values()):
        return EQUIVALENT, f"{real} does as well as each of its controls ({jointly})", parts
    return INCONCLUSIVE, f"Not every part is shown for {real} ({jointly})", parts


def _h4(case: _Case) -> Ruling:
    cells: dict[str, Comparison] = {}
    by_arm: dict[str, list[Comparison]] = {}
    for arm in case.end:
        tested = repeating(case.evidence.at_end[arm], case.evidence.dose[arm])
        found = {t: saved({t: p}) for t, p in tested.items()}
        adjusted = holm([effect.p for effect in found.values()])
        for (task, effect), q in zip(found.items(), adjusted, strict=True):
            dose = case.evidence.dose[arm][task].mean
            cell = Comparison(effect, float(q), state_of(effect, q, case.declared.margin), dose)
            cells[f"{arm}, {task}"] = cell
            by_arm.setdefault(arm, []).append(cell)
    better = [arm for arm, one in case.end.items() if one.state == BETTER]
    if not cells:
        return NOT_TESTED, f"On no task an arm in question reaches a mean N of {LEAST_DOSE}", cells
    if len(case.declared.goals) < 2:
        return INCONCLUSIVE, "There is only one task", cells
    if not better:
        return INCONCLUSIVE, "H2 is not supported: there is no benefit to hold", cells
    if all(any(cell.state == WORSE for cell in by_arm[arm]) for arm in better):
        return REFUTED, "Every arm that is better over all tasks is worse on one of them", cells
    # Every task must be significant by itself, which needs no adjustment over tasks.
    p = holm([max(cell.effect.p for cell in by_arm[arm]) for arm in better])
    for arm, q in zip(better, p, strict=True):
        everywhere = len(by_arm[arm]) == len(case.declared.goals)
        if everywhere and q < ALPHA and all(c.effect.direction() > 0 for c in by_arm[arm]):
            return SUPPORTED, f"{arm} is better on every task (jointly p = {q:.2g})", cells
    return INCONCLUSIVE, "That an arm is better on every task is neither shown nor excluded", cells


def _h5(case: _Case) -> Ruling:
    dose = case.evidence.dose
    tasks = {  # on which one of the two repeats
        f"{a} - {b}": repeating(found, dose.get(b, {})) | repeating(found, dose.get(a, {}))
        for (a, b), found in case.evidence.variants.items()
    }
    effects = {name: saved(found) for name, found in tasks.items() if found}
    adjusted = holm([effect.p for effect in effects.values()]) if effects else []
    margin, found, alike = case.declared.margin, {}, []
    for (name, effect), q in zip(effects.items(), adjusted, strict=True):
        by_task = [saved({task: one}) for task, one in tasks[name].items()]
        state = state_of(effect, q, margin, by_task)
        found[name] = Comparison(effect, float(q), state, planned=len(case.declared.goals))
        alike.append(state_of(effect, 1.0, margin, by_task) == EQUIVALENT)
    if not found:
        return INCONCLUSIVE, "Runs are missing", found
    if _h2(case)[0] != SUPPORTED:
        lead = "H2 is not supported: there is no benefit whose sensitivity could be judged"
        return INCONCLUSIVE, lead, found
    if all(alike) and len(found) == len(tasks):
        return SUPPORTED, "No two settings differ by more than the margin", found
    states = zip(found.values(), alike, strict=True)
    if any(one.state in (BETTER, WORSE) and not same for one, same in states):
        return REFUTED, "Some settings differ", found
    return INCONCLUSIVE, "That settings differ is neither shown nor excluded", found


@dataclass(frozen=True)
class Hypothesis:
    """A claim, what decides it in words, and the same as a function of the comparisons."""

    name: str
    claim: str
    criterion: str
    rule: Callable[[_Case], Ruling]


RULES = {"H1": _h1, "H2": _h2, "H3": _h3, "H4": _h4, "H5": _h5}
HYPOTHESES = tuple(
    Hypothesis(name, **words, rule=RULES[name])
    for name, words in read_yaml(Path(__file__).with_name("hypotheses.yaml")).items()
)


def judge(evidence: Evidence, declared: Declaration) -> list[Verdict]:
    """Return the verdict of every hypothesis.

    Args:
        evidence: What `evidence.gather` returns.
        declared: The plan that it was gathered for.
    """
    case = _case(evidence, declared)
    verdicts = []
    for hypothesis in HYPOTHESES:
        verdict, lead, rests = hypothesis.rule(case)
        if evidence.lacking:
            verdict, lead = INTERIM, f"{_progress(evidence, declared)}; so far: {lead}"
        sentence = f"{lead}{_details(rests, 'against ' * (hypothesis.rule is _h3))}."
        texts = hypothesis.name, hypothesis.claim, hypothesis.criterion
        verdicts.append(Verdict(*texts, verdict, sentence, rests))
    return verdicts


def _progress(evidence: Evidence, declared: Declaration) -> str:
    made, n = evidence.seeds, declared.seeds_on
    complete = sum(made.get(task, 0) >= n(task) for task in declared.goals)
    fewest = min(declared.goals, key=lambda task: made.get(task, 0))
    return (
        f"{complete} of {len(declared.goals)} tasks are complete, and of {fewest} "
        f"{made.get(fewest, 0)} of {n(fewest)} seeds"
    )


def _details(rests: dict[str, Comparison], before: str) -> str:
    """Return what a verdict rests on: each comparison where they are few, else their states."""
    if not rests:
        return ""
    if len(rests) <= 4:
        return ": " + "; ".join(f"{before}{name} {one}" for name, one in rests.items())
    states = [one.state for one in rests.values()]
    counts = [f"{states.count(s)} {s}" for s in (BETTER, WORSE, EQUIVALENT, UNDECIDED)]
    last = max(rests, key=lambda name: rests[name].p)
    return f": {', '.join(counts)} of {len(rests)}; the largest p: {before}{last} {rests[last]}"
