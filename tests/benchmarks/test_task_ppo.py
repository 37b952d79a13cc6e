"""PPO on CartPole-v1: does it learn, with a constant K and with the KL stop.

On one CPU thread. The table `results/ppo.csv` keeps what was measured last: low and high are 95 %
t-limits of the mean.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from repeatlab.analysis.frames import mean_interval
from repeatlab.core.environment import processor
from repeatlab.core.schema import parse
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

RESULTS = Path(__file__).with_name("results") / "ppo.csv"
COLUMNS = ["task", "data", "arm", "metric", "n", "mean", "low", "high", "updates"]
COLUMNS += ["environment steps", "mean N", "seconds per run", "processor"]
HEAD = {"task": "ppo", "data": "CartPole-v1"}
UPDATES = 2_400
SEEDS = range(1000, 1005)  # seeds on which nothing else was ever run
SOLVED = 475
ARMS = {
    "fixed10": {"mapping": {"name": "constant", "repeats": 10}},
    "kl_stop": {"mapping": {"name": "while", "t": 0.02, "max_repeats": 20}},
}


def keep(row: dict[str, object]) -> None:
    """Enter a row in the table, in place of the one with the same arm and metric."""
    row = {key: str(value) for key, value in (HEAD | row | {"processor": processor()}).items()}
    rows = list(csv.DictReader(RESULTS.open(encoding="utf-8"))) if RESULTS.exists() else []
    rows = [old for old in rows if (old["arm"], old["metric"]) != (row["arm"], row["metric"])]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, row], key=lambda r: (r["arm"], r["metric"])))


def run_config(arm: str, seed: int) -> RunConfig:
    data = {
        "task": {"name": "ppo", "driver": "kl" if arm == "kl_stop" else "loss"},
        "method": ARMS[arm] | {"schedule": {"name": "linear"}},
        "max_updates": UPDATES,
        "seed": seed,
        "evaluation": {"every": UPDATES // 4},
        "device": "cpu",
    }
    return parse(RunConfig, data)


@pytest.mark.parametrize("arm", ARMS)
def test_solves_cartpole_in_four_of_five_seeds(arm, tmp_path, benchmark, capsys):
    def runs() -> list:
        return [train(run_config(arm, seed), tmp_path) for seed in SEEDS]

    done = benchmark.pedantic(runs, rounds=1, iterations=1)
    returns = np.array([run.summary["final"]["test.return"] for run in done])
    ledgers = [run.summary["ledger"] for run in done]
    solved = int((returns >= SOLVED).sum())
    average, low, high = mean_interval(returns)
    shared = {
        "arm": arm,
        "n": len(done),
        "updates": UPDATES,
        "environment steps": round(mean(ledger["environment_steps"] for ledger in ledgers)),
        "mean N": round(UPDATES / mean(ledger["fresh_batches"] for ledger in ledgers), 2),
        "seconds per run": round(mean(ledger["seconds"] for ledger in ledgers), 1),
    }
    values = {"mean": round(float(average), 1), "low": round(float(low), 1)}
    keep(shared | values | {"metric": "test.return", "high": round(float(high), 1)})
    keep(shared | {"metric": f"runs with test.return >= {SOLVED}", "mean": solved})
    with capsys.disabled():
        print(f"\nCartPole-v1, PPO: greedy test returns {returns.tolist()}, {solved} at {SOLVED}")
        print(shared)
    assert solved >= 4
