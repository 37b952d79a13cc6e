"""The character transformer on the embedded text: two thousand updates on one core.

Inside the clock: the updates, with batches and records; evaluation is outside. Standard training
with a rate that falls by a cosine. The result is a row of `results/language.csv`; Python's version
is part of the data, since the text differs between them.
"""

from __future__ import annotations

import platform
from pathlib import Path
from statistics import mean

import pandas as pd
from benchmarks.tables import record, row, validation

from repeatlab.core.schema import parse
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

RESULTS = Path(__file__).parent / "results" / "language.csv"
UPDATES, SEEDS = 2000, 1
SCALE = "width 64 (117,000 parameters), 16 x 64 characters an update"


def test_the_transformer_learns_the_embedded_text(store, capsys):
    runs = []
    for seed in range(SEEDS):
        config = {
            "task": {"name": "language", "lr": 3e-3},
            "method": {"schedule": {"name": "cosine"}},
            "max_updates": UPDATES,
            "seed": seed,
            "evaluation": {"every": UPDATES // 4, "splits": ["validation"]},
            "device": "cpu",
        }
        runs.append(train(parse(RunConfig, config), store))
    seconds = mean(run.summary["ledger"]["seconds"] for run in runs)
    table = [
        row(
            [run.summary["final"][f"validation.{metric}"] for run in runs],
            task="language",
            data=f"topics of Python {platform.python_version()}, validation",
            scale=SCALE,
            arm="cosine",
            metric=metric,
            updates=UPDATES,
            seconds=seconds,
        )
        for metric in ("loss", "bits_per_character")
    ]
    record(RESULTS, table)
    traces = [validation(run) for run in runs]
    with capsys.disabled():
        print(f"\n{pd.DataFrame(table).to_string()}\nvalidation, first seed:\n{traces[0].round(3)}")
    for run, trace in zip(runs, traces, strict=True):
        assert run.summary["final"]["validation.loss"] <= 1.45
        assert trace["loss"].is_monotonic_decreasing
