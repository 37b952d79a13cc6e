"""Predicted against measured training time: the quick profile's six tasks, and two larger networks.

Rounds in which a run of each arm and blocks of each kind of measurement take turns, in one process
and on one thread. A run's prediction is made from the blocks of its round and from what that run
has counted; its error is measured / predicted - 1, and the table has the median over rounds and
their interquartile range. The clock is the processor's time, which other processes disturb less.
Slow loaders are not predicted as well: they are waited for, and a sleep of 10 ms cost 1 to 1.5 ms
more where this was measured.
"""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path
from time import process_time

import numpy as np
import pytest
from benchmarks.interleaving import Turns, in_turns, train_in_turns
from benchmarks.tables import record
from every_method import SIX

import repeatlab
from repeatlab.core.environment import processor
from repeatlab.core.schema import ConfigError, parse, read_yaml
from repeatlab.core.stopwatch import Stopwatch
from repeatlab.store.records import Store
from repeatlab.studies.diagnostics.measure import Bench
from repeatlab.studies.diagnostics.prediction import predict
from repeatlab.training.config import RunConfig
from repeatlab.training.making import build_task, open_run, train
from repeatlab.training.one_run import Training
from repeatlab.training.prerequisites import prerequisites

RESULTS = Path(__file__).parent / "results" / "cost_model.csv"
# On the 8 x 8 digits, since a run has to have many updates.
LARGER = {
    "resnet18, 8x8": {"name": "supervised", "model": "resnet18"},
    "dcgan64, 8x8": {"name": "generative", "width": 64},
}
ARMS = {
    "standard": {},
    "fixed3": {"mapping": {"name": "constant", "repeats": 3}},
    "linear": {"mapping": {"name": "linear", "t": "auto"}},
    "importance": {"sampler": {"name": "importance", "presample": 3}},
}
ROUNDS, ROUNDS_OF_LARGER = 7, 3
RUN_SECONDS = 1.0
# A run's first update takes longer, while memory is being had; nothing predicts that.
LEAST_UPDATES = 80
TURNS = 12
LONG_UPDATE = 0.010  # seconds


def quick_task(name: str) -> dict:
    """Return the configuration of a task in the quick profile."""
    profile = Path(repeatlab.__file__).parents[1] / "params" / "quick"
    (task,) = read_yaml(profile / f"{name}.yaml")["parameters"]["study"]["tasks"].values()
    return task


def configured(task: dict, method: dict, *, updates: int, seed: int) -> RunConfig:
    return parse(
        RunConfig,
        {
            "task": task,
            "method": method,
            "max_updates": updates,
            "seed": seed,
            "evaluation": {"every": updates, "splits": [], "test": False},
            "calibration": {"updates": min(100, updates)},
            "device": "cpu",
        },
    )


def a_run(config: RunConfig, store: Store) -> Turns[tuple[dict, dict]]:
    """Return a run, ready for its first turn; at its end its configuration and ledger."""
    run = store.run(config.task.name, config.run_id)
    for needed in prerequisites(config):
        train(needed, store)
    opened, stopwatch = open_run(config, store, run, device="cpu"), Stopwatch(process_time)
    how = {"calibration": opened.calibration, "source": opened.source, "clock": stopwatch}
    training = Training(config, build_task(config, "cpu"), opened.writer, **how)
    turn = ceil(config.max_updates / TURNS)
    yield from train_in_turns(training, stopwatch, turn=turn)
    return run.config, run.summary["ledger"]


def blocks(bench: Bench) -> Turns[None]:
    for _ in range(TURNS):
        bench.round()
        yield


@pytest.mark.parametrize("name", [*SIX, *LARGER])
def test_predicted_against_measured(name, tmp_path, capsys):
    task, store = LARGER.get(name) or quick_task(name), Store(tmp_path)
    arms = {}
    for arm, method in ARMS.items():
        try:
            config = configured(task, method, updates=100, seed=0).task
        except ConfigError as error:
            with capsys.disabled():
                print(f"\n  {arm} refused: {error}")
        else:
            arms[arm] = method
    update = RUN_SECONDS / Bench(config, device="cpu", block_seconds=RUN_SECONDS).updates
    updates = max(LEAST_UPDATES, ceil(RUN_SECONDS / update))
    half = updates // 2  # of its batches, as in `measured`
    bench = Bench(config, device="cpu", first_batch=half, clock=process_time)
    measurements, done = [], []
    for seed in range(1 + (ROUNDS if name in SIX else ROUNDS_OF_LARGER)):  # the first warms up
        bench.rounds.clear()
        configs = {a: configured(task, m, updates=updates, seed=seed) for a, m in arms.items()}
        runs = {arm: a_run(config, store) for arm, config in configs.items()}
        done.append(in_turns({**runs, "blocks": blocks(bench)}))
        measurements.append(bench.measurement())

    rows = []
    for arm in arms:
        made = [(m, *runs[arm]) for m, runs in zip(measurements[1:], done[1:], strict=True)]
        predicted = [predict(m, ledger, config=config) for m, config, ledger in made]
        measured = [ledger["seconds"] for *_, ledger in made]
        errors = np.array(measured) / predicted - 1
        low, high = np.percentile(errors, [25, 75])
        rows.append(
            {
                "task": config.name,
                "data": getattr(config, "dataset", "CartPole"),
                "scale": "quick" if name in SIX else name,
                "arm": arm,
                "metric": "training_seconds",
                "predicted": round(float(np.median(predicted)), 4),
                "measured": round(float(np.median(measured)), 4),
                "error": round(float(np.median(errors)), 4),
                "error_iqr": round(float(high - low), 4),
                "n": len(made),
                "updates": updates,
                "update_ms": round(1000 * measurements[-1].model.update, 3),
                "k": round(measurements[-1].backward_ratio, 2),
                "clock": "processor",
                "hardware": f"one thread of {processor()}, {os.cpu_count()} cores",
            }
        )
    record(RESULTS, rows)
    with capsys.disabled():
        print(f"\n{name}: {rows[0]['update_ms']:.2f} ms an update, k = {rows[0]['k']}")
        for row in rows:
            print(
                f"  {row['arm']:10s} predicted {row['predicted']:8.3f} s, measured"
                f" {row['measured']:8.3f} s, error {row['error']:+.1%} (iqr"
                f" {row['error_iqr']:.1%}, n = {row['n']})"
            )
    limit = 0.03 if rows[0]["update_ms"] > 1000 * LONG_UPDATE else 0.05
    assert [row for row in rows if abs(row["error"]) > limit] == []
