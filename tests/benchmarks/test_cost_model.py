"""Predicted against measured training time: the quick profile's six tasks, and two larger networks.

Rounds in which a block of each kind of measurement and a run of each arm take turns, in one process
and on one thread. A run's prediction is made from the medians over all rounds and from what that
run has counted; its error is measured / predicted - 1, and the table has the median over runs and
their interquartile range.

The clock is the processor's time, which other processes disturb less, except for the slow loaders:
they are waited for, so that theirs is the time on the wall, which says something on an otherwise
idle machine only. Beside every number stand the processor and how many processes were at work.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import pytest

import repeatlab
from repeatlab.config import RunConfig
from repeatlab.environment import processor
from repeatlab.loop import train
from repeatlab.measure import Bench
from repeatlab.prediction import LONG_UPDATE, predict
from repeatlab.records import Store
from repeatlab.schema import ConfigError, parse, read_yaml
from repeatlab.tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "cost_model.csv"
LARGER = {
    "resnet18": {"name": "supervised", "model": "resnet18"},
    "dcgan64": {"name": "generative", "width": 64},
}
ARMS = {
    "standard": {},
    "fixed3": {"method": {"mapping": {"name": "constant", "repeats": 3}}},
    "linear": {"method": {"mapping": {"name": "linear", "t": "auto"}}},
    "importance": {"method": {"sampler": {"name": "importance", "presample": 3}}},
    "slow_loader": {"loader": {"delay_ms": 5}},
    "slow_prefetch": {"loader": {"delay_ms": 5, "prefetch": True}},
}
ROUNDS, ROUNDS_OF_LARGER = 9, 5
RUN_SECONDS = 1.0
LARGEST_ERROR, LARGEST_ERROR_OF_SHORT_UPDATES = 0.03, 0.05


def quick_task(name: str) -> dict:
    """Return the configuration of a task in the quick profile."""
    profile = Path(repeatlab.__file__).parents[1] / "params" / "quick"
    (task,) = read_yaml(profile / f"{name}.yaml")["parameters"]["study"]["tasks"].values()
    return task


def use_clock(monkeypatch, clock) -> None:
    for module in ("measure", "training"):
        monkeypatch.setattr(f"repeatlab.{module}.perf_counter", clock)


def configured(task: dict, arm: dict, *, updates: int, seed: int) -> RunConfig:
    return parse(
        RunConfig,
        {
            "task": task,
            "max_updates": updates,
            "seed": seed,
            "evaluation": {"every": updates, "splits": [], "test": False},
            "calibration": {"updates": min(100, updates)},
            "device": "cpu",
        }
        | arm,
    )


@pytest.mark.parametrize("name", [*TASKS, *LARGER])
def test_predicted_against_measured(name, tmp_path, monkeypatch, capsys, record):
    task = LARGER.get(name) or quick_task(name)
    store, arms, refused = Store(tmp_path), {}, {}
    for arm, fields in ARMS.items():
        try:
            configured(task, fields, updates=1, seed=0)
        except ConfigError as error:
            refused[arm] = str(error)
        else:
            arms[arm] = fields

    use_clock(monkeypatch, process_time)
    standard = configured(task, {}, updates=1, seed=0)
    sizing = Bench(standard.task, device="cpu")
    sizing.warm_up(RUN_SECONDS)
    updates = max(12, sizing.updates)
    # Blocks are a quarter of a run, around its middle.
    bench = Bench(standard.task, device="cpu", first_batch=updates * 3 // 8)
    bench.warm_up(RUN_SECONDS / 4)
    runs: dict[str, list] = {arm: [] for arm in arms}
    rounds = ROUNDS if name in TASKS else ROUNDS_OF_LARGER
    for number in range(rounds + 1):
        use_clock(monkeypatch, process_time)
        bench.round()
        for arm in list(arms)[:: -1 if number % 2 else 1]:
            waits = arm.startswith("slow")
            use_clock(monkeypatch, perf_counter if waits else process_time)
            run = train(configured(task, arms[arm], updates=updates, seed=number), store)
            runs[arm].append((run.config, run.summary["ledger"]))
        if number == 0:  # it warms up
            bench.rounds.clear()
            for done in runs.values():
                done.clear()

    measurement = bench.measurement()
    update = measurement.model.update
    rows = []
    for arm, done in runs.items():
        predicted = [predict(measurement, ledger, config=config) for config, ledger in done]
        measured = [ledger["seconds"] for _, ledger in done]
        errors = np.array(measured) / predicted - 1
        low, high = np.percentile(errors, [25, 75])
        rows.append(
            {
                "task": standard.task.name,
                "data": getattr(standard.task, "dataset", "CartPole"),
                "scale": "quick" if name in TASKS else name,
                "arm": arm,
                "metric": "training_seconds",
                "predicted": round(float(np.median(predicted)), 4),
                "measured": round(float(np.median(measured)), 4),
                "error": round(float(np.median(errors)), 4),
                "error_iqr": round(float(high - low), 4),
                "n": len(done),
                "updates": updates,
                "update_ms": round(1000 * update, 3),
                "k": round(measurement.backward_ratio, 2),
                "clock": "wall" if arm.startswith("slow") else "processor",
                "load": round(os.getloadavg()[1], 1),
                "hardware": f"one thread of {processor()}, {os.cpu_count()} cores",
            }
        )
    record(RESULTS, rows)
    limit = LARGEST_ERROR if update > LONG_UPDATE else LARGEST_ERROR_OF_SHORT_UPDATES
    with capsys.disabled():
        print(f"\n{name}: {1000 * update:.2f} ms an update, k = {measurement.backward_ratio:.2f}")
        for row in rows:
            print(
                f"  {row['arm']:14s} predicted {row['predicted']:8.3f} s, measured"
                f" {row['measured']:8.3f} s, error {row['error']:+.1%} (iqr"
                f" {row['error_iqr']:.1%}, n = {row['n']}, load {row['load']})"
            )
        for arm, why in refused.items():
            print(f"  {arm:14s} refused: {why}")
    assert {row["arm"]: row["error"] for row in rows if abs(row["error"]) > limit} == {}
