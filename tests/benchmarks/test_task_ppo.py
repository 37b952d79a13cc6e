"""PPO on CartPole-v1: does it learn, with a constant K and with the KL stop.

On one CPU thread. The table `results/ppo.csv` keeps what was measured last: low and high are 95 %
t-limits of the mean.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from benchmarks.tables import counted, record, row

from repeatlab.core.schema import parse
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

RESULTS = Path(__file__).with_name("results") / "ppo.csv"
HEAD = {"task": "ppo", "data": "CartPole-v1", "scale": "the task's defaults"}
UPDATES = 2_400
SEEDS = range(1000, 1005)  # seeds on which nothing else was ever run
SOLVED = 475
ARMS = {
    "fixed10": {"mapping": {"name": "constant", "repeats": 10}},
    "kl_stop": {"mapping": {"name": "while", "t": 0.02, "max_repeats": 20}},
}


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
    labels = HEAD | {"arm": arm, "metric": "test.return"}
    seconds = mean(ledger["seconds"] for ledger in ledgers)
    reached = row(returns, updates=UPDATES, seconds=seconds, digits=1, **labels) | {
        "environment steps": round(mean(ledger["environment_steps"] for ledger in ledgers)),
        "mean N": round(UPDATES / mean(ledger["fresh_batches"] for ledger in ledgers), 2),
    }
    record(RESULTS, [reached, counted(reached, f"runs with test.return >= {SOLVED}", solved)])
    with capsys.disabled():
        print(f"\nCartPole-v1, PPO: greedy test returns {returns.tolist()}, {solved} at {SOLVED}")
        print(reached)
    assert solved >= 4
