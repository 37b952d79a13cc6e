"""Whole runs: what recording costs, and how far MNIST gets.

Everything is on one CPU thread. A ratio is that of the medians over rounds in which both sides run
in turn, in one process; the processor is printed beside it, as seconds mean nothing without it.
"""

from __future__ import annotations

import os
from math import floor
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter

import pytest
from torch.nn import functional

from repeatlab.core.environment import processor
from repeatlab.core.schema import parse
from repeatlab.data.sources import DIRECTORY_VARIABLE
from repeatlab.store.records import Store
from repeatlab.tasks.supervised import Supervised
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.one_run import Training

UPDATES = 1000
ROUNDS = 11
T = 0.8  # of the linear mapping: first losses are near 2.3


# --- a run with its record against a loop without -------------------------------------------------


def overhead_config() -> RunConfig:
    data = {
        "task": {"name": "supervised", "lr": 0.02, "batch_size": 64},
        "method": {"mapping": {"name": "linear", "t": T}},
        "max_updates": UPDATES,
        "evaluation": {"splits": [], "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data)


def by_package(config: RunConfig, store: Store) -> tuple[float, str]:
    """Return the seconds of a run, its files and its digest included, and its final state."""
    task = Supervised(config.task, seed=0, device="cpu")
    run = store.run("supervised", config.run_id)
    writer = store.begin(run, config.to_json(), {})
    training = Training(config, task, writer, calibration={})
    start = perf_counter()
    training.run()
    seconds = perf_counter() - start
    assert len(run.updates) == UPDATES
    return seconds, run.summary["state_sha256"]


def by_hand(config: RunConfig) -> tuple[float, str]:
    """Return the seconds of the leanest loop that repeats the same way, and its final state."""
    task = Supervised(config.task, seed=0, device="cpu")
    model, optimizer, stream = task.model, task.optimizer, task.stream
    start = perf_counter()
    left, index = UPDATES, 0
    while left:
        batch = stream.fresh_batch(index)
        index += 1
        visit, repeats = 0, 1
        while visit < repeats:
            loss = functional.cross_entropy(model(batch.images), batch.labels)
            if visit == 0:
                repeats = min(left, max(1, min(5, floor(loss.item() / T))))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            visit += 1
        left -= repeats
    return perf_counter() - start, digest(task.state_dict())


def test_a_recorded_run_against_a_loop_by_hand(tmp_path, benchmark, capsys):
    config, store = overhead_config(), Store(tmp_path)

    def rounds() -> tuple[list[float], list[float]]:
        ours, theirs = [], []
        for number in range(ROUNDS + 1):  # the first warms up
            sides = [lambda: by_package(config, store), lambda: by_hand(config)]
            order = (0, 1) if number % 2 else (1, 0)
            done = {which: sides[which]() for which in order}
            assert done[0][1] == done[1][1]  # bit for bit the same training
            ours.append(done[0][0])
            theirs.append(done[1][0])
        return ours[1:], theirs[1:]

    ours, theirs = benchmark.pedantic(rounds, rounds=1, iterations=1)
    ratio = median(ours) / median(theirs)
    benchmark.extra_info.update(ratio=ratio, ours=ours, theirs=theirs, processor=processor())
    with capsys.disabled():
        print(
            f"\ndigits, small CNN, {UPDATES} updates, {ROUNDS} rounds: recorded"
            f" {median(ours) / UPDATES * 1e6:.0f} us an update, by hand"
            f" {median(theirs) / UPDATES * 1e6:.0f} us, ratio {ratio:.3f} ({processor()})"
        )
    assert ratio < 1.15


# --- MNIST ----------------------------------------------------------------------------------------

SEEDS = 3
MNIST_UPDATES = 1500


def test_mnist_with_the_small_cnn(tmp_path, benchmark, capsys):
    marker = "MNIST/raw/train-images-idx3-ubyte"
    root = os.environ.get(DIRECTORY_VARIABLE)
    if not root or not (Path(root) / marker).exists():
        pytest.skip(f"mnist: set {DIRECTORY_VARIABLE} to a directory that holds {marker}")
    configs = [
        parse(
            RunConfig,
            {
                "task": {"name": "supervised", "dataset": "mnist", "lr": 0.05},
                "method": {"schedule": {"name": "cosine"}},
                "max_updates": MNIST_UPDATES,
                "evaluation": {"splits": []},
                "seed": seed,
                "device": "cpu",
            },
        )
        for seed in range(SEEDS)
    ]

    def runs() -> list[dict]:
        return [train(config, tmp_path).summary for config in configs]

    summaries = benchmark.pedantic(runs, rounds=1, iterations=1)
    accuracies = [summary["final"]["test.accuracy"] for summary in summaries]
    seconds = [summary["ledger"]["seconds"] for summary in summaries]
    benchmark.extra_info.update(accuracies=accuracies, seconds=seconds, processor=processor())
    with capsys.disabled():
        print(
            f"\nMNIST, small CNN, cosine from lr 0.05, batch 64, {MNIST_UPDATES} updates: test"
            f" accuracy {mean(accuracies):.4f} (sd {stdev(accuracies):.4f}, n = {SEEDS} seeds),"
            f" {mean(seconds):.1f} s of training a run, evaluation and loading excluded"
            f" ({processor()})"
        )
    assert mean(accuracies) >= 0.97
