"""SimCLR on CIFAR-10: kNN accuracy of its features, of the untrained encoder's, of raw pixels.

Scaled down to two CPU cores: a CNN of 93k parameters (32, 64 and 128 channels) in bfloat16 in
place of ResNet-18's 11.2 M, 2,000 updates at the plan's batch of 64 and temperature of 0.5, lr 0.1
to 0 by a cosine, crops of at least a fifth of the area. One thread. k = 200 neighbours among the
same 20,000 training images for all three, cosine similarity, on the test split; the linear probe
learns on all 45,000.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean

import pytest
from benchmarks.tables import record, row

from repeatlab.core.schema import parse
from repeatlab.data.sources import DIRECTORY_VARIABLE
from repeatlab.tasks.selfsupervised import SelfSupervised, knn_accuracy
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

SEEDS = 3
UPDATES = 2000
SCALE = "CNN 32-64-128 bf16, B 64"
RESULTS = Path(__file__).parent / "results" / "selfsupervised.csv"


def config(seed: int) -> RunConfig:
    return parse(
        RunConfig,
        {
            "task": {
                "name": "selfsupervised",
                "dataset": "cifar10",
                "model": "norm_cnn",
                "width": 32,
                "precision": "bfloat16",
                "channels_last": True,
                "batch_size": 64,
                "min_area": 0.2,
                "lr": 0.1,
                "neighbors": 200,
                "bank": 20_000,
            },
            "method": {"schedule": {"name": "cosine"}},
            "max_updates": UPDATES,
            "evaluation": {"every": UPDATES, "splits": []},
            "seed": seed,
            "device": "cpu",
        },
    )


def _row(values: list[float], arm: str, metric: str, updates: int = 0, seconds: float = 0) -> dict:
    labels = {"task": "selfsupervised", "data": "CIFAR-10", "scale": SCALE, "arm": arm}
    counts = {"updates": updates, "seconds": seconds}
    return row(values, **labels, metric=f"test {metric}", **counts, digits=4)


def test_features_are_better_than_untrained_ones_and_raw_pixels(store, capsys):
    root = os.environ.get(DIRECTORY_VARIABLE)
    if not root or not (Path(root) / "cifar-10-batches-py/test_batch").exists():
        pytest.skip(f"cifar10: set {DIRECTORY_VARIABLE} to the directory that holds it")
    untrained, trained = [], []
    for seed in range(SEEDS):
        task = SelfSupervised(config(seed).task, seed=seed, device="cpu")
        untrained.append(task.evaluate("test"))
        trained.append(train(config(seed), store).summary)
    bank, test = task._bank(), task.data.test
    mean_pixel = bank.images.float().flatten(1).mean(0)
    raw = knn_accuracy(
        bank.images.float().flatten(1) - mean_pixel,
        bank.labels,
        test.images.float().flatten(1) - mean_pixel,
        test.labels,
        200,
    )
    seconds = mean(summary["ledger"]["seconds"] for summary in trained)
    rows = [_row([raw], "raw pixels", "knn_accuracy")]
    for metric in ("knn_accuracy", "linear_accuracy", "feature_std"):
        before = [found[metric] for found in untrained]
        after = [summary["final"][f"test.{metric}"] for summary in trained]
        rows.append(_row(before, "untrained encoder", metric))
        rows.append(_row(after, "SimCLR", metric, updates=UPDATES, seconds=seconds))
    with capsys.disabled():
        print()
        for found in rows:
            print("  ".join(str(value) for value in found.values()))
    record(RESULTS, rows)
    knn = {r["arm"]: r["mean"] for r in rows if r["metric"] == "test knn_accuracy"}
    assert knn["SimCLR"] > knn["untrained encoder"] + 0.05
    assert knn["SimCLR"] > knn["raw pixels"] + 0.05
