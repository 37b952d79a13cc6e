"""What the statistics are worth with few seeds, by simulation: coverage, false verdicts, power.

A simulated run is its seed's share plus its own, half the variance each, so that arms paired by
seed correlate by 0.5 and a paired difference has the sd of one arm: the unit of every effect here.
The arms are the eight of `Plan` besides the standard one; the association of N with the loss, which
is no effect of an arm, is there in every study. The results are `results/decisions.csv`: shares of
studies, with their exact 95 % binomial limits.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from repeatlab.analysis.hypotheses import judge
from repeatlab.analysis.planned_comparisons import Evidence, Plan
from scipy import stats

from repeatlab.analysis.effects import AdjustedFinding, finding, holm_adjusted
from repeatlab.analysis.paired_differences import DIVERGED, PAIRED
from repeatlab.analysis.statistics import flip_interval
from repeatlab.core.environment import processor

RESULTS = Path(__file__).parent / "results" / "decisions.csv"
PLAN = Plan()
ARMS = [*PLAN.variants, *PLAN.controls]
SEEDS = 8
STUDIES, MORE_STUDIES = 500, 2000

DRAWS = {
    "normal": lambda random, shape: random.normal(size=shape),
    "skewed (exponential)": lambda random, shape: random.exponential(size=shape) - 1,
    "heavy-tailed (t, 3 df)": lambda random, shape: random.standard_t(3, size=shape) / np.sqrt(3),
}


def share(data: str, scale: str, arm: str, metric: str, hits: int, studies: int) -> dict:
    low, high = stats.binomtest(hits, studies).proportion_ci(0.95)
    return {
        "task": "inference",
        "data": data,
        "scale": scale,
        "arm": arm,
        "metric": metric,
        "n": studies,
        "mean": round(hits / studies, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "processor": processor(),
    }


def report(capsys, table: list[dict]) -> None:
    with capsys.disabled():
        print(f"\n{pd.DataFrame(table).drop(columns='processor').to_string()}")


# --- coverage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DRAWS)
def test_how_often_the_limits_hold_the_mean(data, capsys, record):
    random, hits, studies = np.random.default_rng(1), Counter(), MORE_STUDIES
    for _ in range(studies):
        differences = DRAWS[data](random, SEEDS)
        interval = flip_interval(differences)
        hits[interval.kind] += interval.low <= 0 <= interval.high
    scale = f"95 % limits of the mean of {SEEDS} paired differences"
    table = [share(data, scale, kind, "coverage", hits[kind], studies) for kind in hits]
    record(RESULTS, table)
    report(capsys, table)
    if data == "normal":
        assert hits["sign flip"] / studies == pytest.approx(0.95, abs=0.02)


# --- decisions --------------------------------------------------------------------------------


def pair_rows(runs: dict[str, np.ndarray], method: str, against: str) -> pd.DataFrame:
    """Return the pairs of two arms; a run of -inf has diverged."""
    ours, theirs = runs[method], runs[against]
    tasks, seeds = ours.shape
    with np.errstate(invalid="ignore"):
        difference = np.where(ours == theirs, 0.0, ours - theirs)
    diverged = np.isinf(ours) | np.isinf(theirs)
    return pd.DataFrame(
        {
            "task": np.repeat([f"task {i}" for i in range(tasks)], seeds),
            "method": method,
            "seed": np.tile(np.arange(seeds), tasks),
            "against": against,
            "status": np.where(diverged, DIVERGED, PAIRED).ravel(),
            "x": 1.0,
            "sign": 1,
            "value": ours.ravel(),
            "other": theirs.ravel(),
            "difference": difference.ravel(),
        }
    )


def simulate(
    random, tasks: int, seeds: int, *, data="normal", standard=None, gain=None, diverging=0.0
) -> tuple[Evidence, pd.DataFrame]:
    """Return the evidence of a study, and every arm against the standard one at equal cost."""
    shared = DRAWS[data](random, (tasks, seeds))

    def runs() -> dict[str, np.ndarray]:
        found = {}
        for arm in ("standard", *ARMS):
            own = DRAWS[(arm == "standard" and standard) or data](random, shared.shape)
            value = (shared + own) / np.sqrt(2) + (gain or {}).get(arm, 0.0)
            found[arm] = np.where(random.random(shared.shape) < diverging, -np.inf, value)
        return found

    end, speed = runs(), runs()
    every = pd.concat(pair_rows(end, arm, "standard") for arm in ARMS)
    tied = {
        "chance": np.zeros_like(shared),
        PLAN.real: 0.8 + 0.05 * random.normal(size=(tasks, seeds)),
    }
    among = combinations(PLAN.variants, 2)
    evidence = Evidence(
        speed=pd.concat(pair_rows(speed, arm, "standard") for arm in PLAN.arms),
        cost=every[every["method"].isin(PLAN.variants)],
        controls=pd.concat(pair_rows(end, PLAN.real, control) for control in PLAN.controls),
        variants=pd.concat(pair_rows(end, a, b) for a, b in among),
        hardness=pair_rows(tied, PLAN.real, "chance"),
    )
    return evidence, every


def in_cells(every: pd.DataFrame) -> dict[tuple[str, str], AdjustedFinding]:
    """Return the decision of each task and arm, as `comparison.comparison_table` makes it."""
    groups = list(every.groupby(["task", "method"], sort=False))
    judged = holm_adjusted(finding(group) for _, group in groups)
    return {key: one for (key, _), one in zip(groups, judged, strict=True)}


@pytest.mark.parametrize(("tasks", "seeds"), [(6, 8), (1, 16)])
def test_arms_of_equal_mean_that_are_not_exchangeable(tasks, seeds, capsys, record):
    """Skewed arms against a normal one: differences are not symmetric, no level is promised."""
    random, hits, studies = np.random.default_rng(4), Counter(), STUDIES
    for _ in range(studies):
        evidence, _ = simulate(random, tasks, seeds, data="skewed (exponential)", standard="normal")
        verdicts = {v.verdict for v in judge(evidence, PLAN)}
        hits["any of H1 to H5 supported"] += "supported" in verdicts
        hits["any of H1 to H5 refuted"] += "refuted" in verdicts
    scale = f"no effect: {tasks} tasks x {len(ARMS)} arms, {seeds} seeds"
    words = "skewed arms, normal standard arm, equal means"
    table = [share(words, scale, "complete decision", name, hits[name], studies) for name in hits]
    record(RESULTS, table)
    report(capsys, table)


@pytest.mark.parametrize(
    ("tasks", "seeds", "data", "diverging", "studies"),
    [
        (6, 8, "normal", 0.0, MORE_STUDIES),
        (6, 3, "normal", 0.0, STUDIES),
        (6, 12, "normal", 0.0, STUDIES),
        (1, 8, "normal", 0.0, STUDIES),
        (1, 16, "normal", 0.0, STUDIES),
        (6, 8, "skewed (exponential)", 0.0, STUDIES),
        (6, 8, "heavy-tailed (t, 3 df)", 0.0, STUDIES),
        (6, 8, "normal", 0.1, STUDIES),
        (1, 12, "normal", 0.1, STUDIES),
    ],
)
def test_how_often_no_effect_is_called_one(tasks, seeds, data, diverging, studies, capsys, record):
    random, hits = np.random.default_rng(2), Counter()
    for _ in range(studies):
        evidence, every = simulate(random, tasks, seeds, data=data, diverging=diverging)
        verdicts = {v.hypothesis: v.verdict for v in judge(evidence, PLAN)}
        cells = {cell.direction for cell in in_cells(every).values()}
        hits["any of H1 to H5 supported"] += "supported" in verdicts.values()
        hits["any of H1 to H5 refuted"] += "refuted" in verdicts.values()
        hits["any of tasks x arms better"] += 1 in cells
        hits["any of tasks x arms better or worse"] += bool(cells - {0})
        for name, verdict in verdicts.items():
            hits[f"{name} supported"] += verdict == "supported"
    words = f"{data}, {diverging:.0%} of runs diverge" if diverging else data
    scale = f"no effect: {tasks} tasks x {len(ARMS)} arms, {seeds} seeds"
    table = [share(words, scale, "complete decision", name, hits[name], studies) for name in hits]
    record(RESULTS, table)
    report(capsys, table)
    most = stats.binom.ppf(0.999, studies, 0.05)
    for name in ("any of H1 to H5 supported", "any of tasks x arms better or worse"):
        assert hits[name] <= most


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 8), (1, 12), (1, 16), (6, 3), (6, 8), (6, 12)])
def test_how_often_an_effect_of_one_sd_is_found(tasks, seeds, capsys, record):
    """All three mappings gain one sd, on every task; the controls gain nothing."""
    random, hits, studies = np.random.default_rng(3), Counter(), STUDIES
    gain = dict.fromkeys(PLAN.variants, 1.0)
    for _ in range(studies):
        evidence, every = simulate(random, tasks, seeds, gain=gain)
        for verdict in judge(evidence, PLAN)[1:]:  # in H1's runs there is nothing to find
            hits[f"{verdict.hypothesis} supported"] += verdict.verdict == "supported"
        mine = in_cells(every)["task 0", PLAN.real]
        hits["one cell of tasks x arms better"] += mine.direction == 1
        hits["one cell, as if it were the only comparison"] += (
            mine.finding.direction(mine.finding.p) == 1
        )
    scale = f"three arms gain 1 sd: {tasks} tasks x {len(ARMS)} arms, {seeds} seeds"
    found = [
        share("normal", scale, "complete decision", name, hits[name], studies) for name in hits
    ]
    record(RESULTS, found)
    report(capsys, found)
    if tasks * seeds >= 48:
        assert hits["H2 supported"] > 0.95 * studies
