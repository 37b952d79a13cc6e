"""Tasks that stand before another one: what they change, and that the task itself is left alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from repeatlab.core.schema import parse
from repeatlab.store.records import Store
from repeatlab.tasks import TASKS, Task, load_task
from repeatlab.training import stand_ins
from repeatlab.training.config import RunConfig
from repeatlab.training.making import build_task, train
from repeatlab.training.one_run import Training
from repeatlab.training.stand_ins import ObservedTask, SlowTask

T = 6


def run_config(task: str, method: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
    data = {
        "task": {"name": task, "batch_size": 8} | fields,
        "method": method or {},
        "max_updates": T,
        "evaluation": {"every": 3, "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data)


def build(task: str, **fields: Any) -> Task:
    config = run_config(task, **fields).task
    return load_task(TASKS[task])(config, seed=0, device="cpu")


class Laps:
    """Sums of what a counter has gone on by, part by part, and how often each part came."""

    def __init__(self, count: Any) -> None:
        self._count, self.last = count, count()
        self.first = self.last
        self.totals: Counter[str] = Counter()
        self.parts: list[str] = []

    def __call__(self, part: str) -> None:
        now = self._count()
        self.totals[part] += now - self.last
        self.last = now
        self.parts.append(part)


def test_an_update_s_operations_are_counted_where_they_are_made():
    """Of an MLP: 2 b n m for each layer forward, twice that backward but for the first inputs."""
    task = build("supervised", model="mlp", width=16, augment=False)
    pixels, classes = 64, 10
    layers = [pixels * 16, 16 * 16, 16 * classes]
    forward = 2 * 8 * sum(layers)
    with FlopCounterMode(display=False) as counter:
        laps = Laps(counter.get_total_flops)
        observed = ObservedTask(task, laps)
        observed.step(observed.fresh_batch(0), lambda *losses: None)
    assert laps.totals["forward"] == forward
    assert laps.totals["backward"] == 2 * forward - 2 * 8 * layers[0]
    assert laps.totals["optimizer"] == laps.totals["data"] == laps.totals["recording"] == 0


@pytest.mark.parametrize("name", TASKS)
def test_every_optimizer_of_every_task_tells_of_its_backward_and_its_step(name):
    task, laps = build(name), Laps(int)
    observed = ObservedTask(task, laps)
    batch = observed.fresh_batch(0)
    observed.step(batch, lambda *losses: None)
    times = Counter(laps.parts)
    assert times["data"] == 1
    assert times["backward"] == len(task.optimizers)
    assert times["optimizer"] == 2 * len(task.optimizers) + 1
    assert laps.parts[:2] == ["recording", "data"]
    assert laps.parts.index("forward") < laps.parts.index("backward")
    assert laps.parts[-1] == "optimizer"


def test_a_run_that_is_observed_is_the_same_and_all_its_time_has_a_name(tmp_path):
    """The clock goes on by 1 whenever it is read, by either of those who read it."""
    ticks = iter(range(10**6))

    def clock() -> float:
        return float(next(ticks))

    method = {"sampler": {"name": "selective"}, "fresh_views": True}
    method["mapping"] = {"name": "constant", "repeats": 2}
    config = run_config("supervised", method)
    plain = train(config, tmp_path / "plain")
    store = Store(tmp_path / "observed")
    run = store.run("supervised", config.run_id)
    task = build_task(config, "cpu")
    laps = Laps(clock)
    through = ObservedTask(task, laps)
    writer = store.begin(run, config.to_json(), {})
    Training(config, task, writer, calibration={}, clock=clock, through=through).run()
    assert run.summary["state_sha256"] == plain.summary["state_sha256"]
    assert run.updates["loss"].tolist() == plain.updates["loss"].tolist()
    assert laps.totals.total() == laps.last - laps.first
    times = Counter(laps.parts)
    assert times["evaluation"] == 3 * 2  # at 0, 3 and 6, of two splits
    assert times["scoring"] > 0
    assert times["backward"] == T
    assert set(times) == {
        "data", "scoring", "forward", "backward", "optimizer", "evaluation", "recording"
    }  # fmt: skip


def test_a_slow_task_waits_once_for_each_batch_and_for_nothing_else(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(stand_ins, "sleep", slept.append)
    task = build("supervised")
    slow = SlowTask(task, 0.5)
    batch = slow.fresh_batch(3)
    assert torch.equal(batch.images, task.fresh_batch(3).images)
    slow.candidates(0, 1)
    slow.batch_of(torch.arange(8), 0)
    assert slept == [0.5] * 3
    slow.refresh(batch, 1)
    slow.sample_losses(batch)
    slow.step(batch, lambda loss: None)
    assert len(slept) == 3


@pytest.mark.parametrize("name", ["supervised", "reinforcement"])
def test_nothing_of_a_task_is_replaced(name):
    """No attribute of the object stands before a method of its class, before a run or after it."""
    task = build(name)
    SlowTask(task, 0.1).fresh_batch(0)
    ObservedTask(task, lambda part: None).step(task.fresh_batch(1), lambda *losses: None)
    assert not [key for key in vars(task) if callable(getattr(type(task), key, None))]
