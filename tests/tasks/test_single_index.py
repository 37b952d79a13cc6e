"""The single-index target: against a loop written by hand, and what is known of its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import nn

from repeatlab.core.seeding import derive, generator
from repeatlab.methods.sampling.running import Selection
from repeatlab.store.records import Store
from repeatlab.studies.lockstep import train_group
from repeatlab.tasks.single_index import SingleIndex, SingleIndexConfig, hermite, is_blank
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

SMALL = {"name": "single_index", "inputs": 12, "width": 8, "batch_size": 16, "lr": 0.02}


def build(seed: int = 0, **fields) -> SingleIndex:
    return SingleIndex(SingleIndexConfig(**SMALL | fields), seed=seed, device="cpu")


def run(**fields) -> RunConfig:
    shared = {"max_updates": 30, "seed": 3, "evaluation": {"every": 15}, "device": "cpu"}
    return RunConfig.model_validate({"task": SMALL} | shared | fields)


def test_the_target_has_mean_0_and_mean_square_6():
    z, weights = hermegauss(20)  # exact for polynomials up to degree 39
    weights /= weights.sum()
    values = hermite(torch.from_numpy(z)).numpy()
    assert weights @ values == pytest.approx(0, abs=1e-12)
    assert weights @ values**2 == pytest.approx(6)
    # What makes it hard: no correlation with z or z^2 - 1, so that no gradient sees w* at first.
    assert weights @ (values * z) == pytest.approx(0, abs=1e-12)
    assert weights @ (values * (z**2 - 1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_run_is_a_loop_written_by_hand_to_the_bit(tmp_path, repeats):
    done = train(run(method={"mapping": {"name": "constant", "repeats": repeats}}), tmp_path)
    seed = derive(3, "task single_index")
    direction = torch.randn(12, generator=generator(seed, "direction"))
    direction = direction / direction.norm()
    torch.manual_seed(derive(seed, "weights"))
    hidden, out = nn.Linear(12, 8), nn.Linear(8, 1)
    # Its own step, which multiplies and adds in one rounding.
    optimizer = torch.optim.SGD([*hidden.parameters(), *out.parameters()], lr=0.02, fused=True)
    losses = []
    for update in range(30):
        draws = generator(seed, "samples", update // repeats)
        x = torch.randn(16, 12, generator=draws)
        z = x @ direction
        errors = out(torch.relu(hidden(x))).squeeze(1) - (z**3 - 3 * z)
        loss = (errors**2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert done.updates["loss"].tolist() == losses
    x = torch.randn(4_000, 12, generator=generator(seed, "evaluated/validation"))
    y = (x @ direction) ** 3 - 3 * (x @ direction)
    with torch.no_grad():
        errors = out(torch.relu(hidden(x))).squeeze(1) - y
    final = done.summary["final"]
    assert final["validation.loss"] == pytest.approx((errors**2).mean().item(), rel=1e-5)
    explained = 1 - (errors**2).mean().item() / y.numpy().var()
    assert final["validation.explained"] == pytest.approx(explained, abs=1e-5)


def test_the_gradient_is_that_of_the_formulas():
    task = build(width=5)
    batch = task.fresh_batch(0)
    first, second, third, _ = (p.detach().double().numpy() for p in task.model.parameters())
    x, y = batch.inputs.double().numpy(), batch.targets.double().numpy()
    h = np.maximum(x @ first.T + second, 0)
    errors = h @ third[0] + task.model[2].bias.item() - y
    task.learner.descend(task.losses(task.outputs(batch), batch)[0], lambda loss: None)
    of_output = 2 / 16 * errors
    wanted = [((of_output[:, None] * third) * (h > 0)).T @ x, None, (of_output @ h)[None]]
    for place in (0, 2):
        found = list(task.model.parameters())[place].grad.numpy()
        assert found == pytest.approx(wanted[place], rel=1e-4, abs=1e-5)


def test_a_network_that_says_nothing_explains_nothing_and_the_right_one_everything():
    task = build(width=400)
    with torch.no_grad():
        for weight in task.model.parameters():
            weight.zero_()
        assert task.evaluate("test")["explained"] == pytest.approx(0, abs=0.01)
        assert task.evaluate("test")["loss"] == pytest.approx(6, rel=0.3)
        # He3 between -6 and 6 in straight pieces: each ReLU of z turns where the next one begins.
        knots = torch.linspace(-6, 6, 400)
        slopes = (hermite(knots[1:]) - hermite(knots[:-1])) / (knots[1:] - knots[:-1])
        task.model[0].weight[:] = task.direction
        task.model[0].bias[:] = -knots
        task.model[2].weight[0, 0] = slopes[0]
        task.model[2].weight[0, 1:399] = slopes[1:] - slopes[:-1]
        task.model[2].bias[:] = hermite(knots[0])
    assert task.evaluate("test")["explained"] > 0.999


def test_no_sample_is_seen_twice_and_splits_are_samples_of_their_own():
    task = build()
    inputs = [task.fresh_batch(index).inputs for index in range(20)]
    inputs += [task.samples(50, generator(0, f"evaluated/{s}"))[0] for s in ("train", "test")]
    rows = torch.cat(inputs)
    assert len(rows.unique(dim=0)) == len(rows)
    numbers = torch.cat([task.fresh_batch(index).indices for index in range(20)])
    assert numbers.tolist() == list(range(20 * 16))
    assert [index in task.population(3) for index in (47, 48, 63, 64)] == [False, True, True, False]
    chosen = task.batch_of(torch.tensor([50, 50, 63]), 3)
    assert torch.equal(chosen.inputs, task.fresh_batch(3).inputs[[2, 2, 15]])
    assert isinstance(Selection(chosen, torch.ones(3)).batch.index, int)


def test_blank_batches_are_as_many_as_asked_for_and_show_the_target_at_0():
    task, full = build(blank=0.75), build()
    blank = [not task.fresh_batch(index).inputs.any() for index in range(400)]
    assert blank == [is_blank(0, index, 0.75) for index in range(400)]
    assert np.mean(blank) == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 400) ** 0.5)
    for index in (blank.index(True), blank.index(False)):
        batch, same = task.fresh_batch(index), full.fresh_batch(index)
        assert torch.equal(batch.targets, hermite(batch.inputs @ task.direction))
        assert blank[index] or torch.equal(batch.inputs, same.inputs)


def test_in_lock_step_it_is_what_it_is_alone(tmp_path):
    methods = [
        {},
        {"rate": 2.0},
        {"mapping": {"name": "threshold", "t": 0.5, "repeats": 3}},
        {"mapping": {"name": "quantile", "window": 4}, "schedule": {"name": "cosine"}},
    ]
    configs = [run(method=method, task=SMALL | {"blank": 0.3}) for method in methods]
    assert train_group(configs, tmp_path / "together") == {c.run_id: None for c in configs}
    for config in configs:
        alone = train(config, tmp_path / "alone")
        together = Store(tmp_path / "together").run("single_index", config.run_id)
        counts = ["fresh_batch", "repeat", "repeats", "lr"]
        assert together.updates[counts].equals(alone.updates[counts])
        assert together.updates["loss"].to_numpy() == pytest.approx(
            alone.updates["loss"].to_numpy(), rel=1e-4, abs=1e-6
        )
        assert together.summary["final"] == pytest.approx(
            alone.summary["final"], rel=1e-4, abs=1e-5
        )
