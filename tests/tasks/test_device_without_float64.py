"""Every task where the device has no float64, as on Apple's GPUs; simulated."""

from __future__ import annotations

import pytest
import torch
from device_without_float64 import OnDevice, device
from every_method import METHODS, REFUSED, config

from repeatlab.tasks import TASKS, load_task

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLED = [
    (name, method)
    for name in ("supervised", "semisupervised", "reinforcement")
    for method, choices in METHODS.items()
    if "sampler" in choices and (name, method) not in REFUSED
]


def build(name: str, method: str = "standard", *, where: str):
    fields = config(name, method).task
    if hasattr(fields, "pretraining"):
        few = fields.pretraining.model_copy(update={"updates": 3})
        fields = fields.model_copy(update={"pretraining": few})
    return load_task(TASKS[name])(fields, seed=0, device=where)


def test_the_device_is_one_that_refuses_float64_and_what_lies_on_the_cpu():
    with device() as name:
        numbers = torch.ones(3).to(name)
        assert isinstance(numbers, OnDevice)
        assert (numbers + 1).cpu().tolist() == [2.0, 2.0, 2.0]
        with pytest.raises(TypeError, match="no float64"):
            numbers.double()
        with pytest.raises(RuntimeError, match="on the CPU among those of the device"):
            numbers + torch.ones(3)


@pytest.mark.parametrize("name", TASKS)
def test_it_is_trained_and_evaluated_as_on_the_cpu(name):
    with device() as where:
        found = metrics(build(name, where=where))
    expected = metrics(build(name, where="cpu"))
    # One sample that is seen otherwise, for the last digits of a weight, moves a share by 1 / 359.
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-2)


def metrics(task) -> dict[str, float]:
    seen = {}
    for index in range(2):
        task.step(task.fresh_batch(index), lambda loss: None)
    for split in ("train", "validation", "test"):
        seen |= {f"{split} {name}": value for name, value in task.evaluate(split).items()}
    task.pictures()
    return seen


@pytest.mark.parametrize(("name", "method"), SAMPLED)
def test_samplers_choose_as_on_the_cpu(name, method):
    with device() as where:
        found = chosen(name, method, where)
    assert found == chosen(name, method, "cpu")


def chosen(name: str, method: str, where: str) -> list[list[int]]:
    """Return the samples of three fresh batches."""
    run = config(name, method)

    def rebuild(stream: str):
        return build(name, method, where=where)

    task = build(name, method, where=where)
    sampler = run.method.sampler.build().start(task, seed=0, progress=lambda: 0.5, rebuild=rebuild)
    sampler.prepare()
    indices = []
    for index in range(3):
        selection = sampler.fresh_batch(index)

        def seen(driver, losses, bounds=None, batch=selection.batch):
            sampler.observe(batch, losses, bounds)

        task.step(selection.batch, seen, selection.weights)
        indices.append(selection.indices.cpu().tolist())
    return indices
