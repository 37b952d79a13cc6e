"""Which runs of a study go in lock-step: those that can, where it pays."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from math import ceil
from typing import Any

from pydantic import BaseModel

from repeatlab.core.environment import pick_device
from repeatlab.training.config import RunConfig
from repeatlab.training.prerequisites import prerequisites

# Fewer share too little to be worth that they can only fail together with their process.
FEWEST_ARMS = 4
# So that a group's records and evaluations are no burst, and a kill takes little with it.
MOST_ARMS = 64
# Multiplications of an update's forward pass up to which an arm takes some half of a run's time
# (tests/benchmarks/test_lockstep.py). With more, arithmetic is all that takes time.
MOST_WORK = 2_000_000

# Of the CNN, of images of at most so many pixels, the channels times the samples of a batch up to
# which an arm takes 0.58 of a run's time, 0.44 with half of them (24 arms, in the same place).
# Larger images have not been measured on a CPU.
MOST_PIXELS, MOST_CHANNELS = 64, 512

# What lock-step deals with; whatever else a configuration says must be its default.
_RUN = "task method max_updates seed evaluation calibration device threads"
_METHOD = "mapping schedule rate apply fresh_views"
_EVALUATION = "every splits test early_stopping"
_DATA = "name dataset lr batch_size width optimizer"
_TASKS = {
    "supervised": f"{_DATA} split model augment label_noise",
    "unsupervised": f"{_DATA} split latent driver binarize redraw_epsilon extractor fid_samples",
    "language": (
        f"{_DATA} layers heads tied context numbers base samples repeated_set repeated_share"
    ),
    "reinforcement": (
        "name lr optimizer batch_size hidden gamma n_steps learning_starts train_frequency "
        "capacity target_every target_clock epsilon_start epsilon_end epsilon_steps epsilon_clock "
        "driver sutton_barto_reward observation_scale evaluation_episodes"
    ),
    "single_index": "name inputs width lr optimizer batch_size blank",
}
_OPTIMIZERS = {"sgd", "momentum", "nesterov", "adam", "adamw"}


def groups(configs: Iterable[RunConfig], *, workers: int = 1) -> list[list[list[RunConfig]]]:
    """Return the groups of runs to train in lock-step, in rounds: one needs only earlier rounds.

    Runs go together that are equal but for method, seed, learning rate and length; as many as there
    are, where each worker gets a group. What no other run needs waits for the last round, so
    that there is one long one. Runs that are in no group are left to be made one by one.

    Args:
        configs: The runs that are to be made, with those that they need.
        workers: Over how many processes the groups of a round are spread.
    """
    kinds: dict[str, list[RunConfig]] = {}
    for config in configs:
        if can_go_in_step(config) and pays(config):
            kinds.setdefault(_kind(config), []).append(config)
    rounds: dict[int, list[list[RunConfig]]] = {}
    for runs in kinds.values():
        needed = {before.run_id for run in runs for before in prerequisites(run)}
        last = max(map(_depth, runs))
        together: dict[int, list[RunConfig]] = {}
        for run in runs:
            number = _depth(run) if run.run_id in needed else last
            together.setdefault(number, []).append(run)
        for number, of_round in together.items():
            rounds.setdefault(number, []).extend(_deal(of_round, workers))
    return [rounds[number] for number in sorted(rounds) if rounds[number]]


def can_go_in_step(config: RunConfig) -> bool:
    """Whether lock-step deals with everything that the run asks for."""
    task = config.task
    return (
        task.name in _TASKS
        and _is_default(config, but=_RUN)
        and _is_default(config.method, but=_METHOD)
        and config.method.way == config.method.apply  # has no settings
        and _is_default(config.evaluation, but=_EVALUATION)
        and _is_default(task, but=_TASKS[task.name])
        and getattr(task, "model", "mlp") in ("mlp", "cnn")
        and task.optimizer.name in _OPTIMIZERS
    )


def pays(config: RunConfig) -> bool:
    """Whether the network is so small that its calls cost more than its arithmetic.

    On CUDA any is held to be: a round of all arms is a few CUDA graphs.
    """
    task = config.task
    on_cuda = config.device in ("auto", "cuda") and pick_device("auto") == "cuda"
    if task.name in ("unsupervised", "language") or (on_cuda and task.name == "supervised"):
        return on_cuda
    if getattr(task, "model", "mlp") == "cnn":
        small = task.width * task.batch_size <= MOST_CHANNELS
        return small and _sizes(task.dataset)[0] <= MOST_PIXELS
    weights = sum(a * b for a, b in pairwise(_widths(task)))
    return task.batch_size * weights <= MOST_WORK


def _deal(runs: list[RunConfig], workers: int) -> list[list[RunConfig]]:
    """Deal runs into groups, whole seeds together as far as possible: they share their batches."""
    if len(runs) < FEWEST_ARMS:
        return []
    runs = sorted(runs, key=lambda run: run.seed)
    count = max(min(workers, len(runs) // FEWEST_ARMS), ceil(len(runs) / MOST_ARMS))
    bounds = [len(runs) * i // count for i in range(count + 1)]
    return [runs[low:high] for low, high in pairwise(bounds)]


def _kind(config: RunConfig) -> str:
    """Return what the runs of a group have in common."""
    task = config.task.model_dump(mode="json", exclude={"lr"})
    return json.dumps([task, config.device, config.threads], sort_keys=True)


def _depth(config: RunConfig) -> int:
    """Return the length of the longest chain of runs that this one needs."""
    return max((1 + _depth(needed) for needed in prerequisites(config)), default=0)


def _is_default(model: BaseModel, *, but: str) -> bool:
    fields = type(model).model_fields
    return all(
        getattr(model, name) == field.get_default(call_default_factory=True)
        for name, field in fields.items()
        if name not in but.split()
    )


@cache
def _sizes(dataset: str) -> tuple[int, int]:
    """Return the numbers of an image of a data set, and its classes."""
    from repeatlab.data import load_splits

    splits = load_splits(dataset)
    return splits.train.images[0].numel(), splits.classes


def _widths(task: Any) -> list[int]:
    """Return the widths of the layers of a task's MLP, inputs and outputs included."""
    if task.name == "reinforcement":
        return [4, *task.hidden, 2]
    if task.name == "single_index":
        return [task.inputs, task.width, 1]
    pixels, classes = _sizes(task.dataset)
    return [pixels, task.width, task.width, classes]
