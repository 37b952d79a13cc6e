"""Co-teaching against a loop in the manner of the paper's own code."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional

from repeatlab.core.schema import parse
from repeatlab.core.seeding import generator
from repeatlab.tasks.co_teaching import CoTeaching, CoTeachingConfig, small_losses
from repeatlab.training.checkpoint import digest


def build(seed: int = 0, **fields) -> CoTeaching:
    config = parse(CoTeachingConfig, {"name": "co_teaching", "lr": 0.05, "ramp": 4} | fields)
    return CoTeaching(config, seed=seed, device="cpu")


def advance(task: CoTeaching, updates: int, start: int = 0) -> list[float]:
    drivers: list[float] = []
    for index in range(start, start + updates):
        task.step(task.fresh_batch(index), lambda loss: drivers.append(loss.item()))
    return drivers


def test_updates_are_those_of_a_plain_loop_with_a_rate_for_each_network():
    """Six updates over the whole ramp, each network stepping on its peer's small losses."""
    task = build(second_lr=0.02)
    networks = [deepcopy(task.first), deepcopy(task.second)]
    optimizers = [
        torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
        for network, lr in zip(networks, (0.05, 0.02), strict=True)
    ]
    drivers = []
    for update in range(6):
        batch = task.fresh_batch(update)
        remember = int((1 - 0.4 * min(1, update / 4)) * 64)
        logits = [network(batch.images) for network in networks]
        orders = [
            functional.cross_entropy(y, batch.labels, reduction="none").argsort()[:remember]
            for y in logits
        ]
        losses = [
            functional.cross_entropy(y[peer], batch.labels[peer])
            for y, peer in zip(logits, reversed(orders), strict=True)
        ]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        drivers.append(sum(loss.item() for loss in losses) / 2)
    assert advance(task, 6) == pytest.approx(drivers, rel=1e-4)
    for found, expected in zip((task.first, task.second), networks, strict=True):
        for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_the_two_begin_differently_and_schedules_scale_the_rate_of_each():
    task = build(second_lr=0.01)
    assert digest(task.first.state_dict()) != digest(task.second.state_dict())
    assert [o.param_groups[0]["lr"] for o in task.optimizers] == [0.05, 0.01]
    assert [o.param_groups[0]["lr"] for o in build().optimizers] == [0.05, 0.05]


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        ({}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        ({"forget_rate": 0.2}, [0.0, 0.05, 0.1, 0.15, 0.2, 0.2]),
        ({"ramp": 1}, [0.0, 0.4, 0.4, 0.4, 0.4, 0.4]),
        ({"label_noise": 0.0}, [0.0] * 6),
    ],
)
def test_the_forget_rate_rises_with_every_update_repeats_included(fields, rates):
    task = build(**fields)
    batch, found = task.fresh_batch(0), []
    for _ in rates:
        found.append(task.forget_rate)
        task.step(batch, lambda loss: None)
    assert found == pytest.approx(rates)


@pytest.mark.parametrize(("n", "share", "count"), [(5, 0.6, 3), (64, 0.6, 38), (3, 0.1, 1)])
def test_small_losses_are_the_least_of_each_row(n, share, count):
    losses = torch.rand(2, n, generator=torch.Generator().manual_seed(n))
    chosen = small_losses(losses, share)
    for row, mask in zip(losses.numpy(), chosen.numpy(), strict=True):
        assert sorted(row[mask]) == sorted(row)[:count]


def test_of_equal_losses_the_first_are_taken_and_a_whole_batch_is_all_of_it():
    assert small_losses(torch.zeros(1, 4), 0.5).tolist() == [[True, True, False, False]]
    assert small_losses(torch.rand(2, 7), 1.0).all()


def test_the_driver_is_the_mean_of_what_is_learnt_from_or_of_all():
    selected, everything = build(), build(driver="all")
    for task in (selected, everything):
        advance(task, 6)
    assert digest(selected.state_dict()) == digest(everything.state_dict())
    batch = selected.fresh_batch(6)
    with torch.no_grad():
        losses = [
            functional.cross_entropy(network(batch.images), batch.labels, reduction="none").numpy()
            for network in (selected.first, selected.second)
        ]
    mine, theirs = (np.argsort(row, kind="stable")[:38] for row in losses)
    expected = (losses[0][theirs].mean() + losses[1][mine].mean()) / 2
    found = selected.sample_losses(batch)
    assert found.mean().item() == pytest.approx(expected, rel=1e-5)
    assert set(found.nonzero().flatten().tolist()) == set(mine) | set(theirs)
    every = everything.sample_losses(batch).numpy()
    assert every == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    assert every.mean() > found.mean().item()


def test_metrics_are_means_of_both_networks():
    task = build()
    advance(task, 30)
    data = task.data.validation
    pixels = (data.images.float() / 255 - task.data.mean[0]) / task.data.std[0]
    with torch.no_grad():
        guesses = [network(pixels).argmax(1) for network in (task.first, task.second)]
    found = task.evaluate("validation")
    right = [(guess == data.labels).double().mean().item() for guess in guesses]
    assert found["accuracy"] == pytest.approx(sum(right) / 2)
    assert found["disagreement"] == (guesses[0] != guesses[1]).double().mean().item() > 0


def test_label_precision_is_the_share_of_true_labels_among_small_losses():
    task = build(ramp=100)
    advance(task, 120)
    found = task.evaluate("train")
    order = torch.randperm(1078, generator=generator(0, "train subset"))[:359]
    false, given = task.corrupted[order], task.stream.data.labels[order]
    pixels = task.data.train.images[order].float() / 255
    pixels = (pixels - task.data.mean[0]) / task.data.std[0]
    shares = []
    for network in (task.first, task.second):
        with torch.no_grad():
            losses = functional.cross_entropy(network(pixels), given, reduction="none")
        kept = np.argsort(losses.numpy(), kind="stable")[: int(0.6 * 359)]
        shares.append(1 - false.numpy()[kept].mean())
    # Rounding may swap two samples at the limit.
    assert found["label_precision"] == pytest.approx(np.mean(shares), abs=1 / 215)
    assert found["label_precision"] > 0.7 > 1 - false.double().mean().item()
    assert "label_precision" not in task.evaluate("validation")


def test_a_saved_state_goes_on_bit_for_bit():
    unbroken, resumed = (build(second_lr=0.01, ema_decay=0.5) for _ in range(2))
    advance(unbroken, 3)
    resumed.load_state_dict(deepcopy(unbroken.state_dict()))
    advance(unbroken, 3, start=3)
    advance(resumed, 3, start=3)
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())
    assert resumed.updates == 6
    assert unbroken.first_ema is not unbroken.second_ema is not None
