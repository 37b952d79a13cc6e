"""Rates that grow with the batch and rise at first: against torch's schedulers and by hand."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR

from repeatlab.core.schema import ConfigError, parse
from repeatlab.methods.schedules import WarmUp
from repeatlab.tasks.supervised import Supervised, SupervisedConfig
from repeatlab.training.config import RunConfig
from repeatlab.training.loop import train
from repeatlab.training.one_run import Training

T, BATCH, LR = 24, 32, 0.02


def run_config(method: dict[str, Any], task: str = "supervised", **fields: Any) -> RunConfig:
    data = {
        "task": {"name": task, "lr": LR, "batch_size": BATCH},
        "method": method,
        "max_updates": T,
        "evaluation": {"splits": [], "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


def reference_rates(base: float, make_scheduler, updates: int = T) -> list[float]:
    """Return the rate at each update of a real optimizer under a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = make_scheduler(optimizer)
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


# --- the factor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 7, 40])
@pytest.mark.parametrize("start", [0.01, 0.3, 1.0])
def test_torch_s_linear_scheduler_gives_the_same_rates(updates, start):
    expected = reference_rates(
        0.3, lambda o: LinearLR(o, start_factor=start, total_iters=updates), 60
    )
    found = [0.3 * WarmUp(updates, start)(update) for update in range(60)]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"updates": 0}, "method.warm_up.updates: Input should be greater than or equal to 1"),
        ({"updates": 5, "start": 1.1}, "method.warm_up.start: Input should be less than or equal"),
        ({"updates": 5, "start": -0.1}, "method.warm_up.start: Input should be greater than"),
        ({"updates": T + 1}, f"method.warm_up.updates: {T + 1} exceeds max_updates: {T}"),
    ],
)
def test_a_bad_warm_up_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        run_config({"warm_up": fields})


def test_a_base_batch_size_is_at_least_one():
    with pytest.raises(ConfigError, match=r"method.base_batch_size: Input should be greater"):
        run_config({"base_batch_size": 0})


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "make_scheduler", "scale"),
    [
        ({"warm_up": {"updates": 8, "start": 0.25}}, lambda o: LinearLR(o, 0.25, 1.0, 8), 1.0),
        (
            {"warm_up": {"updates": 8}, "schedule": {"name": "cosine"}, "base_batch_size": 8},
            lambda o: ChainedScheduler([LinearLR(o, 0.1, 1.0, 8), CosineAnnealingLR(o, T)]),
            4.0,
        ),
        ({"base_batch_size": 64}, lambda o: LinearLR(o, 1.0, 1.0), 0.5),
    ],
    ids=["warm-up", "all", "batch"],
)
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_record_and_the_optimizer_follow_torch_s_scheduler(
    method, make_scheduler, scale, repeats, tmp_path, monkeypatch
):
    seen = []
    step = Supervised.step

    def watched(self, *given, **named):
        seen.append([group["lr"] for o in self.optimizers for group in o.param_groups])
        step(self, *given, **named)

    monkeypatch.setattr(Supervised, "step", watched)
    mapping = {"mapping": {"name": "constant", "repeats": repeats}}
    run = train(run_config(method | mapping), tmp_path)
    expected = reference_rates(scale * LR, make_scheduler)
    assert run.updates["lr"].tolist() == pytest.approx(expected, rel=1e-9)
    assert seen == [[pytest.approx(rate, rel=1e-9)] for rate in expected]


def test_a_scaled_batch_is_a_run_at_that_rate_by_hand(tmp_path):
    scaled = train(run_config({"base_batch_size": 8}), tmp_path)
    task = Supervised(
        SupervisedConfig(lr=LR, batch_size=BATCH), seed=0, device="cpu"
    )  # a bare loop of torch, with the rate of Goyal et al. set by hand
    rate = LR * BATCH / 8
    optimizer = torch.optim.SGD(task.model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for update in range(T):
        batch = task.fresh_batch(update)
        loss = torch.nn.functional.cross_entropy(task.model(batch.images), batch.labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert scaled.updates["loss"].tolist() == pytest.approx(losses, rel=1e-4)


def test_every_optimizer_of_a_task_is_scaled_and_warmed_alike(tmp_path, monkeypatch):
    from repeatlab.tasks.generative import Generative

    seen = []
    step = Generative.step

    def watched(self, *given, **named):
        seen.append([group["lr"] for o in self.optimizers for group in o.param_groups])
        step(self, *given, **named)

    monkeypatch.setattr(Generative, "step", watched)
    method = {"base_batch_size": 16, "warm_up": {"updates": 2, "start": 0.5}}
    train(run_config(method, "generative", max_updates=3), tmp_path)
    assert [len(rates) for rates in seen] == [2, 2, 2]
    expected = [2 * LR * factor for factor in (0.5, 0.75, 1.0)]
    assert [rates[0] for rates in seen] == pytest.approx(expected)
    first = [rate / expected[0] for rate in seen[0]]
    for rates, rate in zip(seen, expected, strict=True):
        assert [r / rate for r in rates] == pytest.approx(first)


def test_n_as_a_step_size_multiplies_what_the_warm_up_gives(tmp_path):
    method = {
        "apply": "step_size",
        "mapping": {"name": "constant", "repeats": 3},
        "warm_up": {"updates": 4, "start": 0.2},
    }
    run = train(run_config(method), tmp_path)
    factors = [0.2, 0.4, 0.6, 0.8] + [1.0] * (T - 4)
    assert run.updates["lr"].tolist() == pytest.approx([3 * LR * factor for factor in factors])


@pytest.mark.parametrize(
    "method",
    [
        {"base_batch_size": 8},
        {"base_batch_size": 8, "warm_up": {"updates": 10}},
        {"warm_up": {"updates": 10}, "schedule": {"name": "cosine"}},
    ],
    ids=["batch", "batch and warm-up", "warm-up and cosine"],
)
def test_the_rate_is_restored_on_resume(method, tmp_path, monkeypatch):
    run = run_config(method | {"mapping": {"name": "constant", "repeats": 2}})
    unbroken = train(run, tmp_path / "unbroken")
    original = Training.visit

    def visit(self):
        make = original(self)

        def stopped(batch):
            make(batch)
            if self.repeater.updates == 7:
                signal.raise_signal(signal.SIGINT)

        return stopped

    monkeypatch.setattr(Training, "visit", visit)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "stopped")
    resumed = train(run, tmp_path / "stopped")
    assert resumed.updates["lr"].equals(unbroken.updates["lr"])
    assert resumed.updates["loss"].equals(unbroken.updates["loss"])
    assert resumed.summary["state_sha256"] == unbroken.summary["state_sha256"]
