"""What an arm in lock-step costs beside the same run alone.

A study of 8 methods with the calibrations and controls that they need, in lock-step with all its
seeds, and one by one with one of them: in turns in one process on one thread. The clock is the
processor's, over all of it: data, updates, evaluations, records, directories.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from statistics import median
from time import process_time

import pytest
from benchmarks.tables import record

from repeatlab.core.environment import processor
from repeatlab.store.records import Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.study import Study, run_studies

RESULTS = Path(__file__).parent / "results" / "lockstep.csv"
MOST = 0.25
# Of what a study chooses to train in lock-step though its arithmetic takes time: it is to pay.
PAYS = 0.75
ROUNDS = 5
METHODS = {
    "standard": {},
    "cosine": {"schedule": {"name": "cosine"}},
    "fixed2": {"mapping": {"name": "constant", "repeats": 2}},
    "random": {"mapping": {"name": "uniform", "low": 1, "high": 5}},
    "threshold": {"mapping": {"name": "threshold", "t": "auto"}},
    "linear": {"mapping": {"name": "linear", "t": "auto"}},
    "zscore": {"mapping": {"name": "zscore"}},
    "shuffled": {"mapping": {"name": "trace", "of": "linear", "control": "windowed"}},
}
MLP = {"name": "supervised", "model": "mlp", "lr": 0.02}
CNN = {"name": "supervised", "model": "cnn", "lr": 0.02}
DQN = {"name": "reinforcement"}
# Task, seeds, updates, and the most that an arm may cost.
CASES = {
    "40 arms, width 32": ({**MLP, "width": 32, "batch_size": 32}, 5, 2000, MOST),
    "40 arms, width 64": ({**MLP, "width": 64, "batch_size": 64}, 5, 1000, PAYS),
    "40 arms, width 128": ({**MLP, "width": 128, "batch_size": 64}, 5, 1000, PAYS),
    "8 arms, width 32": ({**MLP, "width": 32, "batch_size": 32}, 1, 2000, PAYS),
    "24 arms, digits CNN": ({**CNN, "width": 8, "batch_size": 32}, 4, 500, 0.5),
    "24 arms, digits CNN, width 16": ({**CNN, "width": 16, "batch_size": 32}, 4, 500, PAYS),
    "40 agents": (DQN, 5, 2000, MOST),
}


def study(task: dict, seeds: list[int], updates: int) -> Study:
    # With a CNN, of which less is gained, six of them: no run of four seeds is then left alone.
    methods = list(METHODS.items())[: 6 if task.get("model") == "cnn" else None]
    return Study.of(
        name="lockstep",
        tasks={"task": task},
        methods=dict(methods),
        seeds=seeds,
        max_updates=updates,
        evaluation={"every": 1000},
        calibration={"updates": 200},
        device="cpu",
    )


def _row(task: dict, updates: int) -> dict:
    agents = task["name"] == "reinforcement"
    size = "the plan's agent, batch 32"
    if not agents:
        cnn = "CNN, " if task["model"] == "cnn" else ""
        size = f"{cnn}width {task['width']}, batch {task['batch_size']}"
    return {
        "task": task["name"],
        "data": "CartPole-v1" if agents else "digits",
        "scale": f"{size}, T {updates}",
        "processor": f"one thread of {processor()}",
    }


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.unfreeze()


@pytest.mark.parametrize("case", CASES)
def test_an_arm_s_share_of_a_run_alone(case, tmp_path, capsys):
    task, seeds, updates, most = CASES[case]
    seconds: dict[bool, list[float]] = {True: [], False: []}  # an arm, in lock-step or not
    run_studies([study(task, [0], 20)], tmp_path / "warm", places=Places(workers=0))
    gc.freeze()  # as in a study's workers (repeatlab.studies.processes)
    for turn in range(ROUNDS):
        for lockstep in (True, False) if turn % 2 else (False, True):
            made = study(task, list(range(seeds)) if lockstep else [turn], updates)
            start = process_time()
            report = run_studies([made], tmp_path, places=Places(workers=0, lockstep=lockstep))
            seconds[lockstep].append((process_time() - start) / len(made.planned()))
            assert set(report.status.values()) == {"complete"}
            shutil.rmtree(tmp_path / task["name"])
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    row = _row(task, updates) | {
        "arm": case,
        "metric": "processor time in lock-step / one by one",
        "n": ROUNDS,
        "median": round(median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "seconds a run alone": round(median(seconds[False]), 3),
    }
    record(RESULTS, [row])
    with capsys.disabled():
        print(f"\n  {case}: {row['median']} ({row['low']} to {row['high']})", end="")
    assert row["median"] <= most


@pytest.mark.parametrize("case", ["8 arms, width 32", "40 agents"])
def test_an_arm_is_the_run_alone(case, tmp_path, capsys):
    """Every N, and the losses: a DQN's would part for good after the first other rounding."""
    task, _, updates, _ = CASES[case]
    runs = {}
    for lockstep in (True, False):
        made, root = study(task, [0], updates), tmp_path / str(lockstep)
        run_studies([made], root, places=Places(workers=0, lockstep=lockstep))
        store = Store(root)
        runs[lockstep] = [store.run(*run["run"]) for run in store.read_study(made.name)["runs"]]
    furthest, together = 0.0, 0
    for one, other in zip(runs[True], runs[False], strict=True):
        together += "lockstep" in one.environment
        assert "lockstep" not in other.environment
        assert one.updates["repeats"].equals(other.updates["repeats"])
        apart = (one.updates["loss"] - other.updates["loss"]).abs() / other.updates["loss"]
        furthest = max(furthest, apart.max())
    assert together == len(METHODS) - 1  # but for the one that waits for another's trace
    row = _row(task, updates) | {
        "arm": f"{len(METHODS)} methods, one seed",
        "metric": "largest relative difference of a loss to the run alone",
        "n": together,
        "median": furthest,
    }
    record(RESULTS, [row])
    with capsys.disabled():
        print(f"\n  {case}: losses differ by a share of {furthest} at most", end="")
    assert furthest < 1e-5
