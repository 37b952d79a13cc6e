"""What others have proposed, against their algorithms written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from repeatlab.analysis.mechanism import batch_sharpness
from repeatlab.core.schema import ConfigError, parse, read_yaml
from repeatlab.methods.sampling import Multiplicity
from repeatlab.methods.sampling.views import RunningMultiplicity
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import UntilLimit
from repeatlab.store.records import Run
from repeatlab.studies.lockstep.plan import can_go_in_step
from repeatlab.studies.plan import with_fields
from repeatlab.tasks.supervised import Supervised
from repeatlab.training import weights
from repeatlab.training.config import MethodConfig, RunConfig
from repeatlab.training.making import train

ROOT = Path(__file__).parents[2]
BATCH, WIDTH = 16, 4


def config(method: dict[str, Any], updates: int, **task: Any) -> RunConfig:
    fields = {"name": "supervised", "batch_size": BATCH, "width": WIDTH, "lr": 0.1} | task
    run = {"task": fields, "method": method, "max_updates": updates, "device": "cpu"}
    run["evaluation"] = {"splits": [], "test": False, "keep": 1, "every": updates}
    return parse(RunConfig, run)


def build(run: RunConfig) -> Supervised:
    return Supervised(run.task, seed=run.stream_seed, device="cpu")


def loss_of(task: Supervised, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(task.model(batch.images), batch.labels)


def end_of(run: Run) -> list[torch.Tensor]:
    return list(weights.load(run)["model"].values())


def close(run: Run, task: Supervised) -> None:
    for found, wanted in zip(end_of(run), task.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-6)


# --- pulled to the first visit's weights ----------------------------------------------------------


def isgd(
    task: Supervised, updates: int, *, k: float, n: int, stop: int, zeta: float, epsilon: float
) -> list[int]:
    """Train as Wang et al. 2016 do, algorithms 1 and 2; return the visits of each batch.

    The forward pass that finds a batch below its limit again counts as one.
    """
    optimizer = torch.optim.SGD(task.model.parameters(), lr=task.config.lr, momentum=0.9)
    parameters = list(task.model.parameters())
    count = sum(p.numel() for p in parameters)
    queue: list[float] = []
    visits: list[int] = []
    while sum(visits) < updates:
        batch = task.fresh_batch(len(visits))
        first = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        loss = loss_of(task, batch)
        loss.backward()
        optimizer.step()
        visits.append(1)
        queue = [*queue, loss.item()][-n:]
        limit = np.mean(queue) + k * np.std(queue)
        under_trained = len(visits) > n and loss.item() > limit
        while under_trained and visits[-1] < stop and sum(visits) < updates:
            visits[-1] += 1
            loss = loss_of(task, batch)
            if loss.item() <= limit:
                break
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, gradient, before in zip(parameters, gradients, first, strict=True):
                    pull = epsilon * (p - before) / count
                    p -= zeta * ((loss.item() - limit) * gradient + pull)
    return visits


@pytest.mark.parametrize(("zeta", "epsilon"), [(0.5, 0.1), (2.0, 200.0)])
def test_isgd_is_the_published_algorithm(zeta, epsilon, tmp_path):
    updates, k, n, stop = 60, 0.4, 6, 4
    method = {
        "mapping": {"name": "until_limit", "k": k, "window": n, "repeats": stop},
        "apply": {"name": "conservative", "zeta": zeta, "epsilon": epsilon},
    }
    settings = config(method, updates)
    run, plain = train(settings, tmp_path), build(settings)
    visits = isgd(plain, updates, k=k, n=n, stop=stop, zeta=zeta, epsilon=epsilon)
    assert run.fresh_batches["visits"].tolist() == visits
    assert {1, 2, stop} <= set(visits[:-1])
    close(run, plain)


def test_a_batch_is_held_to_one_limit_with_its_own_first_loss_among_the_window():
    mapping, stats = UntilLimit(k=0.5, repeats=4, window=4), LossStats(4)
    for index, loss in enumerate([1.0, 2.0, 3.0, 4.0, 5.0]):
        stats.index = index
        stats.observe(loss)
    stats.index = 5
    limit = np.mean([3.0, 4.0, 5.0, 8.0]) + 0.5 * np.std([3.0, 4.0, 5.0, 8.0])
    assert mapping.upper(8.0, stats) == pytest.approx(limit)
    assert mapping(8.0, stats) == 2
    stats.observe(8.0)
    for later in (9.0, limit + 0.01, limit - 0.01):
        assert mapping.upper(later, stats) == pytest.approx(limit)
        assert mapping(later, stats) == (2 if later > limit else 1)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_proximal_echo_is_its_plain_loop(optimizer, tmp_path):
    strength, visits = 3.0, 4
    mapping = {"name": "constant", "repeats": visits}
    method = {"mapping": mapping, "apply": {"name": "proximal", "strength": strength}}
    settings = config(method, 22, lr=0.01, optimizer={"name": optimizer})
    run, plain = train(settings, tmp_path), build(settings)
    parameters = list(plain.model.parameters())
    kind = {"momentum": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    moving = kind(parameters, lr=0.01, **({"momentum": 0.9} if optimizer == "momentum" else {}))
    for update in range(22):
        index, visit = divmod(update, visits)
        if visit == 0:
            first = [p.detach().clone() for p in parameters]
        squares = sum((p - p0).square().sum() for p, p0 in zip(parameters, first, strict=True))
        moving.zero_grad()
        (loss_of(plain, plain.fresh_batch(index)) + strength / 2 * squares).backward()
        moving.step()
    close(run, plain)


def test_many_visits_solve_the_proximal_step(tmp_path):
    """Where grad L(w) = strength (w_0 - w)."""
    mapping = {"name": "constant", "repeats": 60}
    method = {"mapping": mapping, "apply": {"name": "proximal", "strength": 100.0}}
    settings = config(method, 60, lr=0.005, optimizer={"name": "sgd"})
    task = build(settings)
    first = [p.detach().clone() for p in task.model.parameters()]
    end = end_of(train(settings, tmp_path))
    task.model.load_state_dict(dict(zip(task.model.state_dict(), end, strict=True)))
    gradients = torch.autograd.grad(
        loss_of(task, task.fresh_batch(0)), list(task.model.parameters())
    )
    for gradient, w, w_0 in zip(gradients, end, first, strict=True):
        torch.testing.assert_close(gradient, 100.0 * (w_0 - w), rtol=0, atol=1e-5)


PULL = {"name": "proximal"}
TWO = {"mapping": {"name": "constant", "repeats": 2}}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"apply": PULL}, "apply: proximal needs a mapping"),
        (TWO | {"apply": "proximal"}, "unknown apply 'proximal'; did you mean '{name: proximal}'?"),
        (TWO | {"apply": {"name": "prox"}}, "unknown apply 'prox'; did you mean 'proximal'?"),
        (TWO | {"apply": PULL | {"strength": 0.0}}, "strength must be a positive, finite number"),
        (TWO | {"apply": PULL, "fresh_views": True}, "pulls on one view of a batch"),
        (TWO | {"apply": {"name": "conservative"}}, "needs the mapping until_limit"),
        ({"mapping": {"name": "until_limit"}, "apply": "step_size"}, "has no visits for"),
        (TWO | {"weight_decay": -1.0}, "weight_decay"),
        ({"sampler": {"name": "multiplicity", "views": 1}}, "views must be an integer of at least"),
        ({"sampler": {"name": "multiplicity", "views": 3}}, "it must divide task.batch_size"),
    ],
)
def test_what_is_refused_says_why(method, message):
    with pytest.raises(ConfigError, match="method") as error:
        config(method, 3)
    assert message in str(error.value)


def test_a_driver_that_comes_after_the_first_step_cannot_scale_it():
    mapping = {"name": "until_limit"}
    method = {"mapping": mapping, "apply": {"name": "conservative"}}
    task = {"name": "generative", "driver": "sum"}
    with pytest.raises(ConfigError, match="known only after"):
        parse(RunConfig, {"task": task, "method": method, "max_updates": 3})


# --- views, weight decay --------------------------------------------------------------------------


def test_a_batch_of_several_views_holds_a_part_of_a_fresh_batch_under_views_of_their_own():
    views = 4
    task = build(config({}, 1))
    sampler = RunningMultiplicity(task, 0, Multiplicity(views=views))
    for block in range(2):
        seen = []
        for part in range(views):
            index = block * views + part
            batch, factors = sampler.fresh_batch(index)
            assert torch.equal(factors, torch.ones(BATCH))
            assert (batch.index, len(batch.indices)) == (index, BATCH)
            sides = batch.images.view(views, BATCH // views, *batch.images.shape[1:])
            assert torch.equal(batch.indices.view(views, -1)[0], batch.indices.view(views, -1)[-1])
            assert not torch.equal(sides[0], sides[1])
            seen += batch.indices[: BATCH // views].tolist()
        assert seen == task.fresh_batch(block).indices.tolist()


def test_an_arm_s_weight_decay_is_that_of_the_task_s_optimizer(tmp_path):
    twice = {"mapping": {"name": "constant", "repeats": 2}}
    decayed = MethodConfig.model_validate(twice)
    arm = with_fields(decayed, 1.0, {"weight_decay": 0.3})  # as a plan's grid sets it
    mine = train(config(arm.model_dump(mode="json"), 9), tmp_path)
    optimizer = {"name": "momentum", "weight_decay": 0.3}
    theirs = train(config(twice, 9, optimizer=optimizer), tmp_path)
    without = train(config(twice, 9), tmp_path)
    digests = [run.summary["state_sha256"] for run in (mine, theirs, without)]
    assert digests[0] == digests[1] != digests[2]


# --- |g|^2 ----------------------------------------------------------------------------------------


def test_norms_are_those_of_each_visit_s_gradient_and_change_nothing_else(tmp_path):
    sgd = {"optimizer": {"name": "sgd", "weight_decay": 0.01}, "clip_norm": 0.1}
    twice = {"mapping": {"name": "until", "t": 0.1, "max_repeats": 3}}
    settings = config(twice | {"gradient_norms": True}, 20, **sgd)
    run, without = train(settings, tmp_path), train(config(twice, 20, **sgd), tmp_path)
    assert run.summary["state_sha256"] == without.summary["state_sha256"]
    assert "squared_gradient" not in without.updates
    plain = build(settings)
    parameters = list(plain.model.parameters())
    for row in run.updates.itertuples():
        batch = plain.fresh_batch(row.fresh_batch)
        gradients = torch.autograd.grad(loss_of(plain, batch), parameters)
        norm = sum(g.square().sum().item() for g in gradients)
        assert row.squared_gradient == pytest.approx(norm, rel=1e-3)
        plain.step(batch, lambda loss: None)


def test_the_sharpness_of_a_run_is_that_of_its_batches_hessians(tmp_path):
    settings = config(
        {"mapping": {"name": "constant", "repeats": 2}, "gradient_norms": True},
        4,
        lr=0.003,
        optimizer={"name": "sgd"},
    )
    found = batch_sharpness(train(settings, tmp_path).updates, bins=2)
    task = build(settings)
    for index in range(2):
        batch = task.fresh_batch(index)
        parameters = list(task.model.parameters())
        gradient = torch.autograd.grad(loss_of(task, batch), parameters, create_graph=True)
        square = sum((g * g.detach()).sum() for g in gradient)
        product = torch.autograd.grad(square, parameters)  # H g
        bent = sum((h * g.detach()).sum() for h, g in zip(product, gradient, strict=True))
        assert found["sharpness"][index] == pytest.approx(
            0.003 * (bent / square).item(), rel=0.2, abs=0.003
        )
        assert found["lowered"][index] == 1.0
        for _ in range(2):
            task.step(batch, lambda loss: None)


# --- arms -----------------------------------------------------------------------------------------


def test_the_arms_of_the_parameter_file_are_methods_of_the_supervised_task():
    arms = read_yaml(ROOT / "params" / "opponents.yaml")
    assert {"isgd", "proximal", "multiplicity", "decayed2"} == set(arms)
    for method in arms.values():
        assert config(method, 3).method.model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    "extra", [{"apply": PULL}, {"weight_decay": 0.1}, {"gradient_norms": True}]
)
def test_lock_step_leaves_what_it_does_not_know(extra):
    fields = {"model": "mlp", "width": 8}
    plain = parse(RunConfig, config(TWO, 3, **fields).to_json() | {"evaluation": {}})
    assert can_go_in_step(plain)
    method = {"method": TWO | extra}
    assert not can_go_in_step(parse(RunConfig, plain.to_json() | method))


def test_what_is_not_set_is_no_part_of_a_run_s_identity():
    settings = config(TWO, 3)
    assert settings.to_json()["method"] == {
        "sampler": None,
        "mapping": {"name": "constant", "repeats": 2},
        "schedule": None,
        "rate": 1.0,
        "apply": "repeat",
        "fresh_views": False,
    }
    for extra in ({"weight_decay": 0.0}, {"gradient_norms": True}, {"apply": PULL}):
        other = config(TWO | extra, 3)
        assert other.run_id != settings.run_id
        assert RunConfig.from_json(other.to_json()) == other
