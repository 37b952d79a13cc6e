"""DCGAN on real data: the plan's hyperparameters on CIFAR-10 at half width, few updates.

Inside the clock: the updates, with batches and records; evaluation is outside. Standard arm. FID is
in the features of a classifier trained here (its name says so), 1,000 samples against the 10,000 of
the test split at 32 pixels: not comparable with published values. The result is a row of
`results/generative.csv`.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest
import torch
from torch.nn.functional import softplus

from repeatlab.analysis import mean_interval
from repeatlab.config import RunConfig
from repeatlab.data.sources import DIRECTORY_VARIABLE
from repeatlab.environment import processor
from repeatlab.loop import train
from repeatlab.schema import parse
from repeatlab.tasks.generative import Generative, GenerativeConfig

RESULTS = Path(__file__).parent / "results" / "generative.csv"
UPDATES, SEEDS = 2000, 2
SCALE = "width 32 (0.54 M parameters), 2.8 of the plan's 100 epochs"
ROUNDS, BLOCK = 15, 20


def test_dcgan_learns_cifar_10(tmp_path, capsys, record):
    root = os.environ.get(DIRECTORY_VARIABLE)
    if not root or not (Path(root) / "cifar-10-batches-py").exists():
        pytest.skip(f"set {DIRECTORY_VARIABLE} to a directory that holds cifar-10-batches-py")
    runs = []
    for seed in range(SEEDS):
        config = {
            "task": {"name": "generative", "dataset": "cifar10", "width": 32},
            "max_updates": UPDATES,
            "seed": seed,
            "evaluation": {"every": UPDATES // 4, "splits": ["validation"]},
            "device": "cpu",
        }
        runs.append(train(parse(RunConfig, config), tmp_path))
    seconds = mean(run.summary["ledger"]["seconds"] for run in runs)
    metric = "fid_classifier"
    traces = [run.evals.pivot_table("value", "update", "metric")[metric] for run in runs]
    before = [trace.iloc[0] for trace in traces]
    after = [run.summary["final"][f"test.{metric}"] for run in runs]
    table = [
        row("CIFAR-10 validation, untrained", metric, before, 0, seconds),
        row("CIFAR-10 test", metric, after, UPDATES, seconds),
    ]
    record(RESULTS, table)
    with capsys.disabled():
        print(f"\n{pd.DataFrame(table).to_string()}\nvalidation:\n{pd.concat(traces, axis=1)}")
    for first, last in zip(before, after, strict=True):
        assert last < 0.5 * first


def row(data: str, metric: str, values: list[float], updates: int, seconds: float) -> dict:
    average, low, high = mean_interval(values)
    return {
        "task": "generative",
        "data": data,
        "scale": SCALE,
        "arm": "standard",
        "metric": metric,
        "n": len(values),
        "mean": round(float(average), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
        "updates": updates,
        "seconds per run": round(seconds if updates else 0.0, 1),
        "processor": processor(),
    }


def test_an_update_costs_what_a_loop_written_out_costs(capsys, interleaved):
    """Processor time of the smallest networks, where overhead shows most; median over rounds.

    The loop written out lets D's parameters gather gradients in G's step, as scripts do.
    """
    ours, theirs = (Generative(GenerativeConfig(width=8), seed=0, device="cpu") for _ in range(2))
    batches = [ours.fresh_batch(index) for index in range(BLOCK)]

    def package() -> None:
        for batch in batches:
            ours.step(batch, lambda loss: None)

    g, d, noise = theirs.g, theirs.d, torch.Generator().manual_seed(0)

    def by_hand() -> None:
        for batch in batches:
            fake = g(torch.randn((64, 100, 1, 1), generator=noise))
            d_loss = softplus(-d(batch.images)).mean() + softplus(d(fake.detach())).mean()
            theirs.d_optimizer.zero_grad()
            d_loss.backward()
            theirs.d_optimizer.step()
            g_loss = softplus(-d(fake)).mean()
            theirs.g_optimizer.zero_grad()
            g_loss.backward()
            theirs.g_optimizer.step()

    ratio = interleaved(package, by_hand, ROUNDS)
    with capsys.disabled():
        print(f"\nDCGAN, width 8, digits: update / loop written out = {ratio:.3f} ({processor()})")
    assert ratio < 1.05
