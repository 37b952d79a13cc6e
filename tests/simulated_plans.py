"""Plans whose truth is known, drawn as arrays, and the same written as a store of runs.

An arm's metric at update u of a run is v + s log(u / T): v is the run's own, with spread 1 over
seeds, and s, the slope, is what e times the updates bring. An arm that gains s log r ends like the
standard arm at r T, and reaches the target r times sooner. What the arrays become evidence by is
written here once more, apart from the package: ranks, crossings and what a diverged run is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from repeatlab.analysis.declaration import Declaration, Goal
from repeatlab.analysis.evidence import Dose, Evidence
from repeatlab.analysis.updates_saved import Paired
from repeatlab.cost import Ledger
from repeatlab.store.records import Store

T = 20
RATIOS = np.array([0.5, 0.7, 1.0, 1.4, 2.0])
ARMS = ("linear", "quantile")
CONTROLS = ("windowed", "spaced", "step_size")
EVERY_ARM = ("standard", *ARMS, *CONTROLS)
SOMETIMES = np.array([1, 2, 3, 1, 2, 3, 1, 2, 3, 2])  # N of the arms by fresh batch: 2 on average

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
DRAWS: dict[str, Draw] = {
    "normal": lambda random, shape: random.normal(size=shape),
    "lognormal": lambda random, shape: (random.lognormal(size=shape) - np.exp(0.5)) / 2.16,
    "heavy-tailed": lambda random, shape: random.standard_t(3, size=shape) / np.sqrt(3),
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is true of a plan.

    Attributes:
        tasks: How many.
        seeds: Of every arm.
        margin: Of the plan.
        slope: s, in spreads over seeds.
        data: A key of `DRAWS`.
        gains: Arm -> what it adds to v.
        spreads: Arm -> its spread over seeds, 1 by default.
        correlation: Of v between tasks, of one arm and seed.
        diverging: Share of runs that diverge.
        rounded: To multiples of so much, which makes ties.
        ceiling: Highest value of the metric.
        equal: Whether all arms are the standard arm, bit for bit.
        evaluations: Of a run, after the one before it.
        hard: What a batch's N adds to its first loss, which varies by 1.
    """

    tasks: int = 6
    seeds: int = 8
    margin: float = 0.1
    slope: float = 3.0
    data: str = "normal"
    gains: Mapping[str, float] = field(default_factory=dict)
    spreads: Mapping[str, float] = field(default_factory=dict)
    correlation: float = 0.0
    diverging: float = 0.0
    rounded: float = 0.0
    ceiling: float = np.inf
    equal: bool = False
    evaluations: int = 20
    hard: float = 1.0


@dataclass(frozen=True)
class Simulated:
    """A plan's runs.

    Attributes:
        declared: The plan.
        values: (Arm, ratio) -> the metric at the end, (tasks, seeds); NaN where a run diverged.
        start: Every run's metric before its first update: less than any other, (tasks,).
        losses: Of the real arm's fresh batches, (tasks, seeds, batches).
        truth: What they were drawn from.
    """

    declared: Declaration
    values: dict[tuple[str, float], np.ndarray]
    start: np.ndarray
    losses: np.ndarray
    truth: Truth

    @property
    def updates(self) -> np.ndarray:
        """At which the arms are evaluated, 0 and T among them."""
        return np.linspace(0, T, self.truth.evaluations + 1).round().astype(int)

    def curve(self, arm: str, ratio: float, updates: np.ndarray) -> np.ndarray:
        """Return the metric (tasks, seeds, updates) of runs of `ratio` T updates."""
        with np.errstate(divide="ignore"):
            rise = self.truth.slope * np.log(updates / (ratio * T))
        found = self.values[arm, ratio][..., None] + rise
        return np.where(updates == 0, self.start[:, None, None], found)


def draw(truth: Truth, random: np.random.Generator) -> Simulated:
    """Return runs of a plan with this truth."""
    shape, make = (truth.tasks, truth.seeds), DRAWS[truth.data]

    def runs(arm: str, ratio: float) -> np.ndarray:
        common, own = make(random, shape[1:]), make(random, shape)
        noise = np.sqrt(truth.correlation) * common + np.sqrt(1 - truth.correlation) * own
        value = truth.slope * np.log(ratio) + truth.gains.get(arm, 0.0)
        value = np.minimum(value + truth.spreads.get(arm, 1.0) * noise, truth.ceiling)
        if truth.rounded:
            value = truth.rounded * np.round(value / truth.rounded)
        return np.where(random.random(shape) < truth.diverging, np.nan, value)

    keys = [(arm, 1.0) for arm in EVERY_ARM] + [("standard", float(r)) for r in RATIOS if r != 1]
    values = {key: runs(*key) for key in keys}
    if truth.equal:
        values |= {(arm, 1.0): values["standard", 1.0] for arm in EVERY_ARM}
    lowest = np.nanmin(np.stack(list(values.values())), axis=(0, 2))
    names = [f"task{i}" for i in range(truth.tasks)]
    goals = {name: Goal("accuracy", truth.slope * np.log(0.7), T) for name in names}
    declared = Declaration(
        goals=goals,
        seeds=truth.seeds,
        margin=truth.margin,
        arms=ARMS,
        real="linear",
        controls=CONTROLS,
        variants=ARMS,
        budgets=tuple(RATIOS.tolist()),
    )
    losses = truth.hard * SOMETIMES + random.normal(size=(*shape, len(SOMETIMES)))
    start = lowest - truth.slope * np.log(2 * T) - 1
    return Simulated(declared, values, start, losses, truth)


def evidence(runs: Simulated) -> Evidence:
    """Return what the verdicts rest on, made here from the arrays."""
    seeds, names = np.arange(runs.truth.seeds), list(runs.declared.goals)
    budgets = np.stack([runs.values["standard", float(r)] for r in RATIOS], axis=-1)
    times = {arm: _times(runs, arm) for arm in ("standard", *ARMS)}
    tied = _rank_correlation(runs.losses, np.broadcast_to(SOMETIMES, runs.losses.shape))

    def compare(arm: str, other: str) -> dict[str, Paired]:
        found = {}
        for i, name in enumerate(names):
            ours, theirs = runs.values[arm, 1.0][i], runs.values[other, 1.0][i]
            worst = np.nanmin(np.column_stack([ours, theirs, budgets[i]]))
            ends = (np.where(np.isnan(v), worst, v) for v in (ours, theirs, budgets[i]))
            found[name] = Paired(*ends, RATIOS, seeds)
        return found

    return Evidence(
        at_end={arm: compare(arm, "standard") for arm in ARMS},
        until={
            arm: {n: (seeds, times[arm][i], times["standard"][i]) for i, n in enumerate(names)}
            for arm in ARMS
        },
        controls={control: compare("linear", control) for control in CONTROLS},
        variants={ARMS: compare(*ARMS)},
        hardness={name: (seeds, tied[i]) for i, name in enumerate(names)},
        dose={arm: {name: Dose(2.0, 0.7) for name in names} for arm in ARMS},
        seeds=dict.fromkeys(names, runs.truth.seeds),
        coarse=_coarse(runs),
    )


def _coarse(runs: Simulated) -> dict[str, float]:
    """Return of each task how much of the way to the target lies between two evaluations."""
    at, found = runs.updates, {}
    goal = next(iter(runs.declared.goals.values()))
    for i, name in enumerate(runs.declared.goals):
        over = [runs.curve(arm, 1.0, at)[i] >= goal.target for arm in ("standard", *ARMS)]
        firsts = [int(np.argmax(run)) for arm in over for run in arm if run.any()]
        if firsts:
            found[name] = float(np.median([(at[k] - at[k - 1]) / at[k] for k in firsts]))
    return found


def _times(runs: Simulated, arm: str) -> np.ndarray:
    """Return the updates until the target (tasks, seeds), on a line between evaluations."""
    goal, at = next(iter(runs.declared.goals.values())), runs.updates
    over = runs.curve(arm, 1.0, at) - goal.target
    first = np.argmax(over >= 0, axis=-1)
    never = np.isnan(over[..., -1]) | ~(over >= 0).any(axis=-1)
    low, high = (np.take_along_axis(over, i[..., None], -1)[..., 0] for i in (first - 1, first))
    with np.errstate(invalid="ignore", divide="ignore"):
        crossing = at[first - 1] + (at[first] - at[first - 1]) * low / (low - high)
    return np.where(never, T, crossing)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (rankdata(x, axis=-1) - (x.shape[-1] + 1) / 2 for x in (a, b))
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


# --- as a store -------------------------------------------------------------------------------


def write(runs: Simulated, root: Path, *, charge: float = 0.0, name: str = "simulated") -> None:
    """Write the runs as those of a registered plan; arms are charged `charge` T of calibration."""
    store = Store(root)
    plan = {"digest": "0", "changes": [], "rates": {}, "declaration": asdict(runs.declared)}
    store.write_plan(name, plan)
    for task, label in enumerate(runs.declared.goals):
        stages: dict[str, list] = {}
        for (arm, ratio), values in runs.values.items():
            stage = "own" if ratio == 1.0 else f"budget-{ratio:g}"
            for seed in range(values.shape[1]):
                run = ("simulated", f"{name}-{task}-{arm}-{ratio:g}-{seed}")
                row = {"task": label, "method": arm, "seed": seed, "run": run}
                stages.setdefault(stage, []).append(row)
                _write_run(runs, store, run, (arm, ratio, task, seed), charge)
        for stage, rows in stages.items():
            ratio = 1.0 if stage == "own" else float(stage.removeprefix("budget-"))
            study = {"runs": rows, "max_updates": round(ratio * T), "study": {}}
            store.write_study(f"{name}-{label}-{stage}", study)


def _write_run(
    runs: Simulated, store: Store, run: tuple[str, str], which: tuple, charge: float
) -> None:
    arm, ratio, task, seed = which
    total = round(ratio * T)
    value = runs.values[arm, ratio][task, seed]
    repeats = np.ones(total, int) if arm == "standard" else SOMETIMES
    batches = np.repeat(np.arange(len(repeats)), repeats)
    losses = runs.losses[task, seed] if arm == "linear" else np.zeros(len(repeats))
    writer = store.begin(store.run(*run), {"seed": seed}, {})
    writer.updates(
        {
            "update": np.arange(total),
            "fresh_batch": batches,
            "repeat": np.concatenate([np.arange(n) for n in repeats]),
            "repeats": repeats[batches],
            "loss": losses[batches],
            "lr": np.ones(total),
            "seconds": np.arange(total, dtype=float),
        }
    )
    calibration = 0 if arm == "standard" else charge * T
    ledger = Ledger(
        updates=total,
        fresh_batches=len(repeats),
        seconds=float(total),
        calibration_updates=calibration,
        calibration_fresh_batches=calibration,
        calibration_forward_samples=calibration,
        calibration_seconds=calibration,
    ).to_json()
    at = runs.updates if ratio == 1.0 else np.array([0, total])
    curve = runs.curve(arm, ratio, at)[task, seed]
    for update, metric in zip(at, curve, strict=True):
        if np.isfinite(metric):
            metrics = {"validation": {"accuracy": float(metric)}}
            writer.evals(int(update), metrics, ledger | {"updates": int(update)})
    final = {"validation.accuracy": value, "test.accuracy": value}
    lost = np.isnan(value)
    summary = {"ledger": ledger, "final": {} if lost else final}
    writer.finish("diverged" if lost else "complete", summary)
