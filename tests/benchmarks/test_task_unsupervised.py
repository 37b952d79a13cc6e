"""The VAE on real data: the plan's network on MNIST, trained for as long as one core allows.

Inside the clock: the updates, with batches and records; evaluation is outside. Standard arm, the
plan's hyperparameters, fewer updates. The result is a row of `results/unsupervised.csv`.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest
from benchmarks.tables import record, row, validation

from repeatlab.core.schema import parse
from repeatlab.data.sources import DIRECTORY_VARIABLE
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

RESULTS = Path(__file__).parent / "results" / "unsupervised.csv"
UPDATES, SEEDS = 2000, 3
SCALE = "width 32 (1.08 M parameters), 4.7 of the plan's 100 epochs"


def test_the_vae_learns_mnist(store, capsys):
    root = os.environ.get(DIRECTORY_VARIABLE)
    if not root or not (Path(root) / "MNIST").exists():
        pytest.skip(f"set {DIRECTORY_VARIABLE} to a directory that holds MNIST")
    runs = []
    for seed in range(SEEDS):
        config = {
            "task": {"name": "unsupervised", "dataset": "mnist", "width": 32},
            "max_updates": UPDATES,
            "seed": seed,
            "evaluation": {"every": UPDATES // 4, "splits": ["validation"]},
            "device": "cpu",
        }
        runs.append(train(parse(RunConfig, config), store))
    seconds = mean(run.summary["ledger"]["seconds"] for run in runs)
    table = [
        row(
            [run.summary["final"][f"test.{metric}"] for run in runs],
            task="unsupervised",
            data="MNIST test",
            scale=SCALE,
            arm="standard",
            metric=metric,
            updates=UPDATES,
            seconds=seconds,
        )
        for metric in ("negative_elbo", "reconstruction", "kl", "fid_classifier")
    ]
    record(RESULTS, table)
    traces = [validation(run) for run in runs]
    with capsys.disabled():
        print(f"\n{pd.DataFrame(table).to_string()}\nvalidation, first seed:\n{traces[0].round(2)}")
    for run, trace in zip(runs, traces, strict=True):
        # torch's example VAE, of similar size, is near 105 nats after ten epochs.
        assert run.summary["final"]["test.negative_elbo"] < 120
        assert trace["negative_elbo"].is_monotonic_decreasing
        assert trace["fid_classifier"].iloc[-1] < 0.25 * trace["fid_classifier"].iloc[0]
