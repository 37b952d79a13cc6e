"""Every task draws its own random numbers from a seed, and all arms of a task the same."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from repeatlab.core.seeding import derive
from repeatlab.data import load_splits
from repeatlab.training import making
from repeatlab.training.config import RunConfig
from repeatlab.training.visits import build_mapping

DIGITS = ("supervised", "unsupervised", "generative", "selfsupervised")


def run_config(task: str, method: dict | None = None, *, seed: int = 0) -> RunConfig:
    content = {"name": task, "dataset": "digits", "batch_size": 16}
    return RunConfig.from_json(
        {"task": content, "method": method or {}, "max_updates": 2, "seed": seed}
    )


def indices(config: RunConfig) -> list[list[int]]:
    task = making.build_task(config, "cpu")
    return [task.stream.indices(index).tolist() for index in range(5)]


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[list[int]]]:
    return {name: indices(run_config(name)) for name in DIGITS}


@pytest.mark.parametrize(("a", "b"), list(combinations(DIGITS, 2)))
def test_tasks_on_the_same_data_draw_other_batches_from_a_seed(drawn, a, b):
    """V6: what one run's luck with its batches is says nothing of another task's."""
    assert drawn[a][0] != drawn[b][0]
    samples = len(load_splits("digits").train)
    shared = [len(set(x) & set(y)) for x, y in zip(drawn[a], drawn[b], strict=True)]
    assert sum(shared) < 16 * 5 / 2, f"of {samples} images 80 drawn twice by chance share about 1"


def test_all_arms_of_a_task_share_their_batches_and_weights():
    arms = [{}, {"mapping": {"name": "constant", "repeats": 3}}, {"rate": 2.0}]
    tasks = [making.build_task(run_config("supervised", arm), "cpu") for arm in arms]
    for other in tasks[1:]:
        assert torch.equal(tasks[0].stream.indices(3), other.stream.indices(3))
        ours, theirs = tasks[0].model.state_dict(), other.model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_random_mappings_of_two_tasks_draw_other_counts():
    method = {"mapping": {"name": "uniform", "low": 1, "high": 5}}
    seeds = [build_mapping(run_config(name, method)).seed for name in DIGITS]
    assert len(set(seeds)) == len(DIGITS)


def test_streams_follow_from_seed_and_task_alone():
    config = run_config("supervised", {"rate": 0.5}, seed=7)
    assert config.stream_seed == derive(7, "task supervised")
    assert config.stream_seed != run_config("supervised", seed=8).stream_seed
