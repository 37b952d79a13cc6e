"""One contract for every task, under every method."""

from __future__ import annotations

import io
from operator import attrgetter

import numpy as np
import pytest
import torch
from every_method import REFUSED, UPDATES, config, tried

from repeatlab.core.schema import ConfigError
from repeatlab.tasks import TASKS, load_task
from repeatlab.training.checkpoint import digest
from repeatlab.training.making import train

every_task = pytest.mark.parametrize("name", TASKS)


def build(name: str, seed: int = 0):
    """Return the task itself."""
    run = config(name, seed=seed)
    return load_task(TASKS[name])(run.task, seed=seed, device="cpu")


def same(first, second) -> bool:
    """Whether two batches, or parts of them, hold the same numbers."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return all(map(same, first, second))
    return first == second


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return a run store that all tests of this file share."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(("name", "method"), tried())
def test_every_method_makes_exactly_its_updates_on_every_task(name, method, stores):
    if (name, method) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name, method]):
            config(name, method)
        return
    run = train(config(name, method), stores)
    updates = run.updates
    assert run.status == {"status": "complete"}
    assert updates["update"].tolist() == list(range(UPDATES))
    assert np.isfinite(updates["loss"]).all()
    # N is what was really made: every fresh batch has as many rows as its N says.
    per_batch = updates.groupby("fresh_batch")
    assert per_batch.size().tolist() == per_batch["repeats"].first().tolist()
    ledger = run.summary["ledger"]
    assert ledger["updates"] == UPDATES
    assert ledger["fresh_batches"] == updates["fresh_batch"].nunique()
    assert ledger["forward_samples"] % UPDATES == ledger["backward_samples"] % UPDATES == 0
    assert ledger["calibration_updates"] == (3 if method == "threshold" else 0)


@every_task
def test_one_visit_a_batch_is_standard_training(name, stores):
    standard = train(config(name), stores).summary["state_sha256"]
    for mapping in (
        {"name": "constant", "repeats": 1},
        {"name": "uniform", "low": 1, "high": 1},
        {"name": "linear", "t": 1e9},
    ):
        run = train(config(name, {"mapping": mapping}), stores)
        assert run.summary["state_sha256"] == standard


@every_task
def test_all_arms_of_a_seed_start_equal_and_other_seeds_do_not(name):
    assert digest(build(name).state_dict()) == digest(build(name).state_dict())
    assert digest(build(name).state_dict()) != digest(build(name, seed=1).state_dict())


@every_task
def test_the_kth_fresh_batch_does_not_depend_on_what_came_before(name):
    idle, busy = build(name), build(name)
    for visit in range(3):  # another arm, that repeats its first batch
        busy.step(busy.fresh_batch(0), lambda loss: None)
        assert same(idle.fresh_batch(visit).indices, busy.fresh_batch(visit).indices)
    if not busy.environment_steps:
        assert same(idle.fresh_batch(2), busy.fresh_batch(2))


@every_task
def test_the_driver_is_reported_once_before_the_weights_move(name):
    task = build(name)
    before, seen = [digest(task.state_dict())], []

    def report(loss):
        assert loss.ndim == 0
        assert [digest(m) for m in _weights(task)] == weights
        seen.append(float(loss.detach()))

    weights = [digest(m) for m in _weights(task)]
    task.step(task.fresh_batch(0), report)
    assert len(seen) == 1
    assert [digest(task.state_dict())] != before


def _weights(task) -> list:
    return [[g["params"] for g in optimizer.param_groups] for optimizer in task.optimizers]


@every_task
def test_sample_losses_are_one_for_each_sample_and_leave_no_trace(name):
    task = build(name)
    batch = task.fresh_batch(0)
    before = digest(task.state_dict())
    losses = task.sample_losses(batch)
    assert losses.shape == batch.indices.shape == (16,)
    assert torch.isfinite(losses).all()
    assert not losses.requires_grad
    assert torch.equal(losses, task.sample_losses(batch))
    assert digest(task.state_dict()) == before


@every_task
def test_weights_of_one_change_nothing_and_weights_of_zero_stop_the_gradient(name):
    plain, ones, zeros = build(name), build(name), build(name)
    drivers = []
    for task, weights in ((plain, None), (ones, torch.ones(16)), (zeros, torch.zeros(16))):
        task.step(task.fresh_batch(0), lambda loss, *_: drivers.append(loss.item()), weights)
    # The driver is never weighted.
    assert drivers == pytest.approx([drivers[0]] * 3, rel=1e-5)
    for mine, theirs in zip(_flat(plain), _flat(ones), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    moved = [
        (a - b).abs().max().item() for a, b in zip(_flat(zeros), _flat(build(name)), strict=True)
    ]
    stayed = [(a - b).abs().max().item() for a, b in zip(_flat(plain), _flat(zeros), strict=True)]
    assert max(moved) < max(stayed)


@every_task
def test_with_weights_the_samples_losses_are_told_whose_mean_is_the_driver(name):
    task, reported = build(name), []
    weights = torch.linspace(0, 2, 16)
    task.step(task.fresh_batch(0), lambda *told: reported.append(told), weights)
    ((driver, losses, *_),) = reported
    assert losses.shape == (16,)
    assert not losses.requires_grad
    assert losses.mean().item() == pytest.approx(driver.item(), rel=1e-5)


def _flat(task) -> list[torch.Tensor]:
    return [p.detach() for groups in _weights(task) for group in groups for p in group]


@every_task
def test_evaluation_leaves_no_trace_and_repeats(name):
    task = build(name)
    task.step(task.fresh_batch(0), lambda loss: None)
    before = digest(task.state_dict())
    modes = [m.training for m in _modules(task)]
    for split in ("train", "validation"):
        metrics = task.evaluate(split)
        assert all(isinstance(value, float) for value in metrics.values())
        assert metrics == task.evaluate(split)
    assert digest(task.state_dict()) == before
    assert [m.training for m in _modules(task)] == modes


def _modules(task) -> list[torch.nn.Module]:
    return [value for value in vars(task).values() if isinstance(value, torch.nn.Module)]


@every_task
def test_a_saved_state_goes_on_bit_for_bit(name):
    unbroken = build(name)
    _advance(unbroken, range(3))
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    resumed = build(name)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())
    _advance(unbroken, range(3, 6))
    _advance(resumed, range(3, 6))
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())


def _advance(task, indices) -> None:
    """Make two updates on each fresh batch."""
    for index in indices:
        batch = task.fresh_batch(index)
        for _ in range(2):
            task.step(batch, lambda loss: None)


@every_task
def test_what_a_task_shows_are_pictures(name):
    for images in build(name).pictures().values():
        assert images.dtype == np.uint8
        assert images.ndim == 3 or images.shape[-1] == 3


# Through what a sample passes once in a forward.
NETWORKS = {
    "supervised": ["model"],
    "unsupervised": ["model.encoder"],
    "semisupervised": ["model"],
    "reinforcement": ["model", "target"],
    "selfsupervised": ["encoder"],
    "generative": ["g", "d"],
    "ppo": ["model"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_ledgers_samples_are_those_that_go_through_the_networks(name):
    task = build(name)
    batch = task.fresh_batch(0)
    passed = 0

    def count(module, inputs):
        nonlocal passed
        passed += len(inputs[0])

    for path in NETWORKS[name]:
        attrgetter(path)(task).register_forward_pre_hook(count)
    calls = {
        "forward_samples": lambda: task.step(batch, lambda *reported: None),
        "scoring_samples": lambda: task.sample_losses(batch),
        "bound_samples": lambda: task.gradient_bounds(batch),
    }
    if "gradient_norm" in config(name).task.refusals():
        del calls["bound_samples"]
    for ledger, call in calls.items():
        passed = 0
        call()
        assert passed == getattr(task, ledger), ledger
