"""Continual learning: exemplars, distillation, and what is forgotten."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional

from repeatlab.core.schema import parse
from repeatlab.core.seeding import derive
from repeatlab.data import TrainStream, load_splits
from repeatlab.tasks.continual import Continual, ContinualConfig, herding
from repeatlab.tasks.learner import encode
from repeatlab.tasks.models import small_cnn
from repeatlab.tasks.pretraining import PretrainingConfig, pretrained
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

SHORT = {"updates": 60, "lr": 0.1, "batch_size": 32}
STRATEGIES = ("plain", "replay", "lwf")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def build(seed: int = 0, **fields) -> Continual:
    config = parse(ContinualConfig, {"name": "continual", "pretraining": SHORT} | fields)
    return Continual(config, seed=seed, device="cpu")


def advance(task: Continual, updates: int, start: int = 0) -> list[float]:
    drivers: list[float] = []
    for index in range(start, start + updates):
        task.step(task.fresh_batch(index), lambda loss: drivers.append(loss.item()))
    return drivers


# --- what is known beforehand -------------------------------------------------------------------


def test_pretraining_is_a_plain_loop_on_the_first_classes():
    data = load_splits("digits")
    known = data.train.subset((data.train.labels < 5).nonzero().flatten().numpy())
    torch.manual_seed(derive(3, "weights"))
    encoder = torch.nn.Sequential(*list(small_cnn(1, 1, width=16))[:-1])
    network = torch.nn.Sequential(encoder, torch.nn.Linear(128, 10))
    weights = list(network.parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    stream = TrainStream(
        known,
        batch_size=32,
        seed=derive(3, "pretraining"),
        mean=data.mean,
        std=data.std,
        crop_padding=1,
    )
    for index in range(60):
        batch = stream.fresh_batch(index)
        loss = functional.cross_entropy(network(batch.images), batch.labels)
        with torch.no_grad():
            for w, v, g in zip(weights, velocity, torch.autograd.grad(loss, weights), strict=True):
                v.mul_(0.9).add_(g)
                w.sub_(0.1 * v)
    for found, expected in zip(build(seed=3).old.parameters(), weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("updates", "low", "high"), [(0, 0.0, 0.5), (300, 0.95, 1.0)])
def test_pretraining_learns_its_classes_by_its_updates(updates, low, high):
    data = load_splits("digits")
    chosen = data.validation.labels < 5
    network, spent = pretrained(
        ContinualConfig(), PretrainingConfig(updates=updates), range(5), seed=0, device="cpu"
    )
    guesses = encode(network, data.validation, data).argmax(1)
    accuracy = (guesses == data.validation.labels)[chosen].double().mean().item()
    assert low <= accuracy <= high
    assert spent["pretraining_updates"] == updates
    assert spent["pretraining_forward_samples"] == 64 * updates
    assert spent["pretraining_seconds"] >= 0


# --- herding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_herding_is_the_greedy_choice_of_the_paper(seed):
    features = np.random.default_rng(seed).normal(size=(12, 3)) + 1
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, chosen = unit.mean(0), []
    for _ in range(6):
        free = [i for i in range(12) if i not in chosen]
        means = [np.mean([unit[j] for j in [*chosen, i]], axis=0) for i in free]
        chosen.append(free[int(np.argmin([np.linalg.norm(mean - m) for m in means]))])
    assert herding(torch.from_numpy(features).float(), 6).tolist() == chosen


def test_all_exemplars_are_all_images_and_lengths_do_not_matter():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    assert sorted(herding(features, 9).tolist()) == list(range(9))
    lengths = torch.arange(1.0, 10.0).unsqueeze(1)
    assert torch.equal(herding(features * lengths, 9), herding(features, 9))


def test_of_two_alike_the_second_comes_last():
    """Lengths aside: (1, 0) twice and (0, 1), whose mean is (2, 1) / 3."""
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.5]])
    assert herding(features, 3).tolist() == [0, 2, 1]


# --- what is trained on -------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["plain", "lwf"])
def test_the_run_sees_the_second_half_alone(strategy):
    task = build(strategy=strategy)
    rest = task.data.train.labels >= 5
    assert len(task.population(0)) == rest.sum()
    assert set(task.stream.data.labels.tolist()) == set(range(5, 10))


def test_replay_sees_as_many_exemplars_of_every_first_class_with_it():
    task, plain = build(strategy="replay", memory=50), build()
    labels = task.stream.data.labels
    assert torch.bincount(labels)[:5].tolist() == [10] * 5
    assert len(labels) == len(plain.stream.data) + 50
    kept = task.data.train.images[task.exemplars]
    assert torch.equal(task.stream.data.images[-50:], kept)
    assert torch.equal(labels[-50:], task.data.train.labels[task.exemplars])
    assert len(set(task.exemplars.tolist())) == 50
    assert np.array_equal(task.pictures()["exemplars"], kept[:, 0].numpy())


def test_exemplars_are_chosen_by_what_the_network_has_learnt():
    task = build(strategy="replay", memory=15)
    with torch.no_grad():
        pixels = (task.data.train.images.float() / 255 - task.data.mean[0]) / task.data.std[0]
        features = task.old[0](pixels)
    for place, label in enumerate(range(5)):
        members = (task.data.train.labels == label).nonzero().flatten()
        expected = members[herding(features[members], 3)]
        assert torch.equal(task.exemplars[3 * place : 3 * place + 3], expected)


# --- one update ---------------------------------------------------------------------------------


def test_the_loss_without_forgetting_is_that_of_the_paper():
    """Probabilities raised to 1 / T and normalised again, as in Li and Hoiem."""
    task = build(strategy="lwf", temperature=3.0, distillation_weight=0.7)
    advance(task, 5)
    batch = task.fresh_batch(5)
    with torch.no_grad():
        new = task.model(batch.images).double().numpy()
        old = task.old(batch.images).double().numpy()

    def softened(logits: np.ndarray) -> np.ndarray:
        p = np.exp(logits[:, :5]) / np.exp(logits[:, :5]).sum(1, keepdims=True)
        return p ** (1 / 3) / (p ** (1 / 3)).sum(1, keepdims=True)

    entropy = -(np.log(np.exp(new) / np.exp(new).sum(1, keepdims=True)))
    entropy = entropy[np.arange(64), batch.labels.numpy()]
    distilled = -(softened(old) * np.log(softened(new))).sum(1)
    assert task.sample_losses(batch).numpy() == pytest.approx(entropy + 0.7 * distilled, rel=1e-4)
    assert task.forward_samples == task.scoring_samples == 128
    assert task.backward_samples == 64


def test_the_driver_may_be_the_cross_entropy_alone_which_changes_no_weight():
    total, new = build(strategy="lwf"), build(strategy="lwf", driver="new")
    drivers = [advance(task, 4) for task in (total, new)]
    assert digest(total.state_dict()) == digest(new.state_dict())
    assert all(a > b for a, b in zip(*drivers, strict=True))
    batch = new.fresh_batch(4)
    with torch.no_grad():
        expected = functional.cross_entropy(new.model(batch.images), batch.labels)
    assert new.sample_losses(batch).mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_its_weight_the_distillation_is_the_plain_strategy():
    plain, idle = build(), build(strategy="lwf", distillation_weight=0.0)
    advance(plain, 5)
    advance(idle, 5)
    for mine, theirs in zip(plain.model.parameters(), idle.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@every_strategy
def test_gradient_bounds_are_the_norm_of_the_gradient_at_the_logits(strategy):
    task = build(strategy=strategy, temperature=1.5, distillation_weight=2.0)
    advance(task, 10)
    batch = task.fresh_batch(10)
    seen = []
    task.model.register_forward_hook(lambda module, images, logits: seen.append(logits))
    losses = task.losses(task.outputs(batch), batch)[1]
    expected = torch.autograd.grad(losses.sum(), seen[0])[0].norm(dim=1)
    assert expected.std() > 0
    torch.testing.assert_close(task.gradient_bounds(batch), expected, rtol=1e-4, atol=1e-6)


@every_strategy
def test_a_saved_state_goes_on_bit_for_bit_beside_an_old_network_that_never_moves(strategy):
    unbroken, resumed = (build(strategy=strategy, lr=0.05) for _ in range(2))
    old = digest(unbroken.old.state_dict())
    advance(unbroken, 3)
    resumed.load_state_dict(deepcopy(unbroken.state_dict()))
    advance(unbroken, 3, start=3)
    advance(resumed, 3, start=3)
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())
    assert digest(unbroken.old.state_dict()) == digest(resumed.old.state_dict()) == old
    assert digest(unbroken.model.state_dict()) != old


# --- what is forgotten --------------------------------------------------------------------------


def test_before_the_run_nothing_is_forgotten_and_the_second_half_unknown():
    found = build().evaluate("validation")
    assert found["forgetting"] == found["forgetting_known"] == 0
    assert found["first_accuracy"] > 0.9
    assert found["second_accuracy"] == 0


def test_forgetting_is_the_accuracy_before_minus_that_after():
    task = build(lr=0.01)
    first = load_splits("digits").validation.labels < 5

    def guesses() -> torch.Tensor:
        pixels = (task.data.validation.images.float() / 255 - task.data.mean[0]) / task.data.std[0]
        with torch.no_grad():
            return task.model(pixels)

    labels, before = task.data.validation.labels, guesses()
    advance(task, 40)
    after, found = guesses(), task.evaluate("validation")

    def right(logits: torch.Tensor, among: torch.Tensor) -> float:
        return (logits.argmax(1) == labels)[among].double().mean().item()

    assert 0 < found["forgetting_known"] < found["forgetting"]
    assert found["forgetting"] == right(before, first) - right(after, first)
    assert found["forgetting_known"] == right(before[:, :5], first) - right(after[:, :5], first)
    assert found["second_accuracy"] == right(after, ~first) > 0.2
    share = first.double().mean().item()
    parts = share * found["first_accuracy"] + (1 - share) * found["second_accuracy"]
    assert found["accuracy"] == pytest.approx(parts)


def test_each_remedy_forgets_less_than_none():
    lost = {}
    for strategy in STRATEGIES:
        task = build(strategy=strategy, lr=0.02, pretraining={"updates": 200})
        advance(task, 150)
        lost[strategy] = task.evaluate("validation")
    assert lost["plain"]["forgetting"] > lost["replay"]["forgetting"] + 0.2
    assert lost["plain"]["forgetting_known"] > lost["lwf"]["forgetting_known"] + 0.1


def test_the_ledger_has_both_halves_and_the_choice_of_exemplars(tmp_path):
    def ledger(strategy: str) -> dict:
        task = {"name": "continual", "strategy": strategy, "pretraining": SHORT}
        fields = {"task": task, "max_updates": 3, "evaluation": {"every": 3}}
        return train(parse(RunConfig, fields), tmp_path).summary["ledger"]

    spent = {strategy: ledger(strategy) for strategy in STRATEGIES}
    first = int((load_splits("digits").train.labels < 5).sum())
    assert spent["plain"]["pretraining_forward_samples"] == 60 * 32
    assert spent["replay"]["pretraining_forward_samples"] == 60 * 32 + first
    assert all(s["pretraining_backward_samples"] == 60 * 32 for s in spent.values())
    assert [s["forward_samples"] for s in spent.values()] == [3 * 64, 3 * 64, 3 * 128]
    assert [s["backward_samples"] for s in spent.values()] == [3 * 64] * 3


def counts() -> np.ndarray:
    """Return how many training images of digits each class has."""
    return np.bincount(load_splits("digits").train.labels)


FIRST, SECOND = (int(half.sum()) for half in np.split(counts(), 2))
LEAST = int(counts()[:5].min())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"first_classes": 10},
            "task.first_classes: must leave one of the 10 classes of digits to the second half; "
            "not 10",
        ),
        (
            {"strategy": "replay", "memory": 4},
            f"task.memory: must be from 5, one exemplar of every first class, to {5 * LEAST}; "
            "not 4",
        ),
        ({"strategy": "replay", "memory": 5 * LEAST + 5}, f"to {5 * LEAST}; not {5 * LEAST + 5}"),
        (
            {"batch_size": SECOND + 1},
            f"task.batch_size: {SECOND + 1} exceeds the {SECOND} samples that the run trains on",
        ),
        (
            {"strategy": "replay", "memory": 12, "batch_size": SECOND + 11},
            f"task.batch_size: {SECOND + 11} exceeds the {SECOND + 10} samples that the run",
        ),
        (
            {"pretraining": {"batch_size": FIRST + 1}},
            f"task.pretraining.batch_size: {FIRST + 1} exceeds the {FIRST} samples that the pre",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_trained(
    fields, message, monkeypatch, refused
):
    trained = "repeatlab.tasks.continual.pretrained"
    monkeypatch.setattr(trained, lambda *_, **__: pytest.fail("a network was trained"))
    refused(parse(ContinualConfig, {"name": "continual"} | fields), Continual, message)


@pytest.mark.parametrize(
    "fields",
    [
        {"first_classes": 9},
        {"strategy": "replay", "memory": 5},
        {"strategy": "replay", "memory": 5 * LEAST},
        {"memory": 4},  # of which only `replay` makes anything
        {"batch_size": SECOND},
        {"strategy": "replay", "memory": 12, "batch_size": SECOND + 10},
        {"pretraining": {"updates": 1, "batch_size": FIRST}},
    ],
)
def test_the_largest_and_the_smallest_that_fit_are_trained(fields):
    config = parse(ContinualConfig, {"name": "continual", "pretraining": SHORT} | fields)
    config.prepare()
    advance(Continual(config, seed=0, device="cpu"), 1)
