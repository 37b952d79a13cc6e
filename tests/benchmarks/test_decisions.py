"""What the verdicts are worth, by simulation: false verdicts, false equivalence, power.

Studies are drawn by `simulated_plans`, 6 tasks x 8 seeds with two arms, three controls and the
standard arm at five budgets where nothing else is said; their unit is the spread over seeds within
an arm. A share of them goes through stores, written by the package's own writer and read by
`load_plan`, and must be judged as the arrays are. The results are `results/decisions.csv`: shares
of studies with their exact 95 % binomial limits.

The reference study's spread. `REFERENCE` was measured with

    python tests/benchmarks/test_decisions.py RUNS

which trains the standard arm of the quick profile's digits CNN (T 400, rate 0.02, batch 32) with 8
seeds at five budgets, and prints the means over seeds of a metric at each budget, the spread
within budgets, and s, the slope against the logarithm of the budget in spreads. By accuracy s is
1.3, by the loss 2.0: an arm that saves 10 % of the updates moves it by 0.14 and 0.21 of what two
seeds differ by.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmarks.tables import record
from scipy import stats
from simulated_plans import DRAWS, RATIOS, Truth, draw, evidence, write

from repeatlab.analysis.frames import Records, load
from repeatlab.analysis.plans import load_plan
from repeatlab.analysis.power import Pilot, pilot_of, power_table
from repeatlab.analysis.statistics import flip_interval, sign_flip
from repeatlab.analysis.updates_saved import Paired
from repeatlab.analysis.verdicts import Verdict, judge
from repeatlab.core.environment import processor
from repeatlab.studies.plan import Plan, choose

RESULTS = Path(__file__).parent / "results" / "decisions.csv"
STUDIES = 250
DECIDED = ("supported", "refuted")
REFERENCE = {  # metric -> means at 0.5, 0.7, 1, 1.4 and 2 T, spread within budgets
    "accuracy": ([0.9345, 0.9575, 0.9582, 0.9610, 0.9638], 0.0136),
    "loss": ([-0.2081, -0.1445, -0.1257, -0.1137, -0.1050], 0.0347),
}

NO_EFFECT = {
    "normal": Truth(),
    "lognormal": Truth(data="lognormal"),
    "heavy-tailed (t, 3 df)": Truth(data="heavy-tailed"),
    "unequal variances": Truth(spreads={"standard": 0.5, "linear": 2.0, "windowed": 3.0}),
    "ties": Truth(rounded=1.0),
    "ceiling": Truth(ceiling=0.3),
    "10 % diverge": Truth(diverging=0.1),
    "two evaluations": Truth(evaluations=2),
    "bit-equal arms": Truth(equal=True),
    "3 seeds": Truth(seeds=3),
    "5 seeds": Truth(seeds=5),
    "12 seeds": Truth(seeds=12),
    "1 task": Truth(tasks=1),
    "1 task, 12 seeds": Truth(tasks=1, seeds=12),
}


def row(data: str, scale: str, metric: str, hits: int, studies: int) -> dict:
    low, high = stats.binomtest(hits, studies).proportion_ci(0.95)
    found = {"mean": hits / studies, "low": low, "high": high}
    labels = {"task": "inference", "data": data, "scale": scale, "arm": "verdict", "metric": metric}
    rounded = {name: round(float(value), 4) for name, value in found.items()}
    return labels | {"n": studies} | rounded | {"processor": processor()}


def keep(capsys, table: list[dict]) -> None:
    record(RESULTS, table)
    with capsys.disabled():
        print(f"\n{pd.DataFrame(table).drop(columns=['task', 'arm', 'processor']).to_string()}")


def most(studies: int, share: float) -> float:
    """Return how many hits a share that holds gives in all but one of a thousand benchmarks."""
    return stats.binom.ppf(0.999, studies, share)


def judged(truth: Truth, studies: int, seed: int) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(studies):
        runs = draw(truth, random)
        found.append({v.hypothesis: v.verdict for v in judge(evidence(runs), runs.declared)})
    return found


def shares(found: list[dict[str, str]], *wanted: str) -> Counter:
    """Count the studies that say `supported` or `refuted` anywhere, and what is `wanted`."""
    hits = Counter(dict.fromkeys(["any supported", "any refuted", "any of both", *wanted], 0))
    for verdicts in found:
        said = set(verdicts.values())
        hits["any supported"] += "supported" in said
        hits["any refuted"] += "refuted" in said
        hits["any of both"] += bool(said & set(DECIDED))
        for name in wanted:
            hypothesis, verdict = name.split(" ", 1)
            hits[name] += verdicts[hypothesis] == verdict
    return hits


# --- no effect --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NO_EFFECT)
def test_no_effect_is_called_one_in_at_most_5_percent(name, capsys):
    truth = NO_EFFECT[name]
    studies = STUDIES if truth.seeds < 12 else STUDIES // 2
    hits = shares(judged(truth, studies, 1), "H1 refuted", "H1 equivalent", "H2 equivalent")
    scale = f"no effect: {truth.tasks} tasks, {truth.seeds} seeds"
    keep(capsys, [row(name, scale, key, hits[key], studies) for key in hits])
    assert hits["any of both"] <= most(studies, 0.05)
    if truth.equal:
        assert (hits["any of both"], hits["H2 equivalent"]) == (0, studies)


@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.4])
def test_tasks_that_correlate_make_no_more_false_verdicts(correlation, capsys):
    truth = Truth(correlation=correlation)
    hits = shares(judged(truth, STUDIES, 2))
    data = f"normal, correlation {correlation:g} between tasks"
    scale = "no effect: 6 tasks, 8 seeds"
    keep(capsys, [row(data, scale, key, hits[key], STUDIES) for key in hits])
    assert hits["any of both"] <= most(STUDIES, 0.06)


# --- tuning -----------------------------------------------------------------------------------

TUNED_ARMS = [f"arm{i}" for i in range(10)]


def tuning_plan(seeds: int, tie: float) -> Plan:
    arms = {name: {} for name in ("standard", *TUNED_ARMS[1:])}
    task = {"task": {"name": "supervised"}, "max_updates": 10, "metric": "accuracy", "target": 0.9}
    return Plan.model_validate(
        {
            "name": "tuning",
            "seeds": 8,
            "tuning": {"seeds": seeds, "tie": tie},
            "methods": arms,
            "tasks": {"task": task},
            "judged": {"arms": ["arm1"], "real": "arm1"},
        }
    )


def false_direction(plan: Plan, random: np.random.Generator) -> bool:
    """Return whether two of ten equal arms differ by p < 0.05 over 8 seeds at the rates chosen.

    The metric falls by one spread over seeds at half and at twice the best rate, which lies within
    a factor of two of the task's; the arms' runs are independent.
    """
    best = random.uniform(-1, 1)

    def metric(rate: float, n: int) -> np.ndarray:
        return -((np.log2(rate) - best) ** 2) + random.normal(size=n)

    arms, seeds = list(plan.arms("task")), plan.tuning.seeds
    values = {(a, r): metric(r, seeds) for a in arms for r in plan.tuning.rates}
    columns = [
        (f"{a} rate={r:g}", 1000 + s, v) for (a, r), of in values.items() for s, v in enumerate(of)
    ]
    runs = pd.DataFrame(columns, columns=["method", "seed", "validation.accuracy"])
    records = Records(runs.assign(task="task", status="complete"))
    choices = choose(plan, "task", dict.fromkeys(arms, plan.tuning.rates), records)
    ends = [metric(choices[arm].rate, 8) for arm in ("arm1", "standard")]
    return sign_flip(ends[0] - ends[1]) < 0.05


@pytest.mark.parametrize("tie", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_how_often_tuning_makes_equal_arms_differ(seeds, tie, capsys):
    studies, random, plan = 600, np.random.default_rng(8), tuning_plan(seeds, tie)
    hits = sum(false_direction(plan, random) for _ in range(studies))
    data = f"{seeds} tuning seeds, ties within {tie:g} standard errors"
    scale = "ten equal arms at chosen rates, 8 seeds"
    keep(capsys, [row(data, scale, "better or worse", hits, studies)])
    if tie and seeds > 1:
        assert hits <= most(studies, 0.065)


# --- through the store ------------------------------------------------------------------------

STORED = {
    "no effect, 2 % charged": (Truth(tasks=2), 0.02),
    "no effect, 10 % charged": (Truth(tasks=2), 0.1),
    "bit-equal arms, 2 % charged": (Truth(tasks=2, equal=True), 0.02),
    "bit-equal arms, 10 % charged": (Truth(tasks=2, equal=True), 0.1),
    "10 % diverge": (Truth(tasks=2, diverging=0.1), 0.0),
    "two arms gain 2 sd": (Truth(tasks=2, gains={"linear": 2.0, "quantile": 2.0}), 0.1),
}


@pytest.mark.parametrize("name", STORED)
def test_a_store_is_judged_as_its_arrays_are(name, tmp_path, capsys):
    truth, charge = STORED[name]
    random, stores, found = np.random.default_rng(3), 4, []
    for index in range(stores):
        runs = draw(truth, random)
        write(runs, tmp_path / str(index), charge=charge)
        plan = load_plan(tmp_path / str(index), "simulated")
        expected = judge(evidence(runs), runs.declared)
        for view in ("own rates, validation", "own rates, test"):
            _, verdicts = plan.views[view]
            assert list(map(told, verdicts)) == list(map(told, expected))
        found.append({v.hypothesis: v.verdict for v in verdicts})
    hits = shares(found, "H1 refuted", "H1 equivalent", "H2 supported")
    scale = f"stores: {truth.tasks} tasks, {truth.seeds} seeds"
    keep(capsys, [row(name, scale, key, hits[key], stores) for key in hits])
    if truth.equal:
        assert (hits["any of both"], hits["H1 equivalent"]) == (0, stores)


def told(verdict: Verdict) -> tuple[str, str, str]:
    return verdict.hypothesis, verdict.verdict, verdict.sentence


# --- equivalence ------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.9, 1 / 0.9])
def test_an_effect_at_the_margin_is_called_equivalent_in_at_most_5_percent(ratio, capsys):
    """With so steep a curve that its size is known to a third of the margin."""
    slope = 12.0
    gains = dict.fromkeys(("linear", "quantile"), slope * np.log(ratio))
    found = judged(Truth(slope=slope, gains=gains), STUDIES, 4)
    hits = shares(found, "H1 equivalent", "H2 equivalent")
    data, scale = f"both arms like the standard one at {ratio:.3f} T", "margin 10 %, s = 12"
    keep(capsys, [row(data, scale, key, hits[key], STUDIES) for key in hits])
    assert max(hits["H1 equivalent"], hits["H2 equivalent"]) <= most(STUDIES, 0.05)


@pytest.mark.parametrize("slope", [2.0, 3.0, 6.0, 12.0])
@pytest.mark.parametrize("margin", [0.1, 0.25])
def test_no_effect_is_called_equivalent_where_the_curve_is_steep_enough(
    slope, margin, capsys, record
):
    hits = shares(
        judged(Truth(slope=slope, margin=margin), 100, 5), "H1 equivalent", "H2 equivalent"
    )
    scale = f"no effect: margin {margin:.0%}, 6 tasks, 8 seeds"
    keep(capsys, [row(f"s = {slope:g}", scale, key, hits[key], 100) for key in hits])
    if slope == 12.0:
        assert hits["H2 equivalent"] >= 80


@pytest.mark.parametrize(
    ("metric", "margin", "seeds"),
    [
        ("accuracy", 0.1, (8, 64, 128, 256)),
        ("loss", 0.1, (8, 32, 64, 128)),
        ("accuracy", 0.25, (8, 16, 32, 64)),
        ("loss", 0.25, (8, 16, 32)),
    ],
)
def test_how_many_seeds_equivalence_takes_at_the_reference_spread(
    metric, margin, seeds, capsys, record
):
    means, spread = REFERENCE[metric]
    tasks = {f"task{i}": Pilot(RATIOS, np.array(means), spread, 0.0) for i in range(6)}
    table = power_table(tasks, margin=margin, seeds=seeds, studies=50)
    scale = f"reference study by {metric}: margin {margin:.0%}, 6 tasks"
    rows = [
        row(f"{n} seeds", scale, key, round(50 * share), 50)
        for n, *both in table[["seeds", "equivalence", "power"]].itertuples(index=False)
        for key, share in zip(("one arm equivalent", "the margin found"), both, strict=True)
    ]
    keep(capsys, rows)
    assert table["equivalence"].iloc[-1] > table["equivalence"].iloc[0]


# --- power ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 6])
@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0, 4.0])
def test_how_often_an_effect_is_found(tasks, gain, capsys):
    """Both arms gain, on every task; the controls gain nothing."""
    truth = Truth(tasks=tasks, gains={"linear": gain, "quantile": gain})
    wanted = [f"H{i} supported" for i in range(1, 6)] + ["H4 refuted"]
    hits = shares(judged(truth, 100, 6), *wanted)
    scale = f"two arms gain {gain:g} sd: {tasks} tasks, 8 seeds"
    keep(capsys, [row("normal", scale, key, hits[key], 100) for key in hits])
    if tasks == 6 and gain >= 1.0:
        assert min(hits["H1 supported"], hits["H2 supported"]) >= 80
    if tasks == 6 and gain == 4.0:
        assert hits["H4 supported"] >= 80


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DRAWS)
def test_how_often_the_limits_of_a_mean_hold_it(data, capsys):
    random, studies, seeds = np.random.default_rng(7), 1000, 8
    intervals = [flip_interval(DRAWS[data](random, (seeds,))) for _ in range(studies)]
    hits = sum(low <= 0 <= high for low, high, _ in intervals)
    scale = f"95 % limits of the mean of {seeds} paired differences"
    keep(capsys, [row(data, scale, "coverage", hits, studies)])
    if data == "normal":
        assert hits / studies == pytest.approx(0.95, abs=0.02)


# --- the reference study ----------------------------------------------------------------------


def measure(root: Path) -> None:
    """Train the standard arm of `REFERENCE` and print what it says."""
    from repeatlab.studies.study import Study, run_studies

    task = {"name": "supervised", "dataset": "digits", "model": "cnn", "batch_size": 32, "lr": 0.02}
    studies = {
        r: Study(
            name=f"reference-{r:g}",
            tasks={"digits": task},
            methods={"standard": {}},
            seeds=8,
            max_updates=round(r * 400),
            evaluation={"every": round(r * 400), "test": False},
        )
        for r in RATIOS
    }
    run_studies(list(studies.values()), root)
    for metric, sign in (("accuracy", 1), ("loss", -1)):
        ends = [load(root, study.name).runs.set_index("seed") for study in studies.values()]
        values = sign * np.stack([end[f"validation.{metric}"] for end in ends], axis=1)
        pilot = pilot_of(Paired(values[:, 2], values[:, 2], values, RATIOS, np.arange(8)), 0.0)
        slope = np.polyfit(np.log(RATIOS), pilot.means, 1)[0] / pilot.spread
        print(metric, pilot.means.round(4).tolist(), round(pilot.spread, 4), round(slope, 1))


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
