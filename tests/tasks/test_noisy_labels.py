"""Learning from noisy labels: the corrections against their papers, and what is measured."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from repeatlab.core.schema import parse
from repeatlab.tasks.classification import noise_metrics
from repeatlab.tasks.noisy_labels import NoisyLabels, NoisyLabelsConfig
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

CORRECTED = [
    {"correction": "weighted"},
    {"correction": "bootstrap", "target": "soft"},
    {"correction": "bootstrap", "target": "hard"},
    {"correction": "bootstrap", "target": "soft", "beta": 0.95, "per_sample": False},
    {"correction": "bootstrap", "target": "hard", "beta": 0.8, "per_sample": False},
]
every_correction = pytest.mark.parametrize(
    "fields", CORRECTED, ids=lambda fields: " ".join(map(str, fields.values()))
)


def build(seed: int = 0, **fields) -> NoisyLabels:
    config = parse(NoisyLabelsConfig, {"name": "noisy_labels", "warm_up": 0, "lr": 0.05} | fields)
    return NoisyLabels(config, seed=seed, device="cpu")


def advance(task: NoisyLabels, updates: int, start: int = 0) -> list[float]:
    drivers: list[float] = []
    for index in range(start, start + updates):
        task.step(task.fresh_batch(index), lambda loss: drivers.append(loss.item()))
    return drivers


def warm(**fields) -> NoisyLabels:
    """Return a task at the end of its warm-up: before, a network has nothing to correct with."""
    task = build(warm_up=60, **fields)
    advance(task, 60)
    return task


def answers(task: NoisyLabels, batch) -> tuple[np.ndarray, np.ndarray]:
    """Return p of every class, float64, and the given labels as vectors."""
    with torch.no_grad():
        logits = task.model(batch.images).double().numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), np.eye(10)[batch.labels.numpy()]


# --- the losses ---------------------------------------------------------------------------------


@every_correction
def test_the_loss_of_a_sample_is_the_paper_s(fields):
    task = warm(q=0.6, **fields)
    batch = task.fresh_batch(60)
    p, given = answers(task, batch)
    own = (p * given).sum(1)
    weight = np.full(len(p), fields["beta"]) if "beta" in fields else 0.5 + 0.5 * own**0.6
    if fields["correction"] == "weighted":
        expected = (1 - own**0.6) / 0.6
    else:  # Reed et al., equations 6 and 7, with a weight for each sample
        z = p if fields["target"] == "soft" else np.eye(10)[p.argmax(1)]
        mixed = weight[:, None] * given + (1 - weight[:, None]) * z
        expected = -(mixed * np.log(p)).sum(1)
    assert expected.std() > 0.01
    assert task.sample_losses(batch).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_generalised_cross_entropy_weights_each_gradient_by_the_label_s_probability():
    """Its weight p^q grows as the sample's loss falls."""
    task = warm(correction="weighted", q=0.7)
    batch = task.fresh_batch(60)
    logits = task.model(batch.images).detach().requires_grad_()
    given = functional.cross_entropy(logits, batch.labels, reduction="none")
    corrected = task.losses(logits, batch)[1]
    (plain,) = torch.autograd.grad(given.sum(), logits, retain_graph=True)
    (weighted,) = torch.autograd.grad(corrected.sum(), logits)
    weights = (-0.7 * given.detach()).exp()
    torch.testing.assert_close(weighted, weights.unsqueeze(1) * plain, rtol=1e-4, atol=1e-6)
    order = given.argsort()
    assert (weights[order].diff() <= 0).all()
    assert weights.min() < 0.5 < weights.max()


def test_no_gradient_flows_through_a_weight_or_a_hard_target():
    task = warm(correction="bootstrap", target="hard", beta=0.3)
    batch = task.fresh_batch(60)
    p, given = answers(task, batch)
    weight = 0.3 + 0.7 * (p * given).sum(1, keepdims=True) ** 0.7
    expected = p - weight * given - (1 - weight) * np.eye(10)[p.argmax(1)]
    logits = task.model(batch.images).detach().requires_grad_()
    (found,) = torch.autograd.grad(task.losses(logits, batch)[1].sum(), logits)
    assert found.numpy() == pytest.approx(expected, abs=1e-5)


@every_correction
def test_gradient_bounds_are_the_norm_of_the_gradient_at_the_logits(fields):
    task = warm(**fields)
    batch = task.fresh_batch(60)
    logits = task.model(batch.images).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(task.losses(logits, batch)[1].sum(), logits)
    torch.testing.assert_close(
        task.gradient_bounds(batch), gradient.norm(dim=1), rtol=1e-3, atol=1e-6
    )
    task.updates = 0
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, batch.labels), logits)
    torch.testing.assert_close(
        task.gradient_bounds(batch), 64 * gradient.norm(dim=1), rtol=1e-3, atol=1e-6
    )


# --- warm-up and driver -------------------------------------------------------------------------


@every_correction
def test_the_warm_up_is_plain_training_for_exactly_its_updates(fields):
    plain, corrected = build(correction="none"), build(warm_up=5, **fields)
    assert advance(plain, 5) == advance(corrected, 5)
    assert digest(plain.state_dict()) == digest(corrected.state_dict())
    advance(plain, 1, start=5)
    advance(corrected, 1, start=5)
    assert digest(plain.state_dict()) != digest(corrected.state_dict())


def test_repeats_count_as_updates_of_the_warm_up():
    task = build(warm_up=3, correction="weighted")
    batch = task.fresh_batch(0)
    seen = []
    for _ in range(4):
        seen.append(task.correction)
        task.step(batch, lambda loss: None)
    assert seen == ["none"] * 3 + ["weighted"]


def test_the_driver_may_be_the_cross_entropy_which_changes_no_weight():
    corrected, plain = warm(), warm(driver="cross_entropy")
    drivers = [advance(task, 4, start=60) for task in (corrected, plain)]
    assert digest(corrected.state_dict()) == digest(plain.state_dict())
    assert all(a < b for a, b in zip(*drivers, strict=True))
    p, given = answers(plain, plain.fresh_batch(64))
    expected = -np.log((p * given).sum(1))
    assert plain.sample_losses(plain.fresh_batch(64)).numpy() == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )


def test_a_saved_state_knows_where_in_the_warm_up_it_was():
    unbroken, resumed = (build(warm_up=4, ema_decay=0.9) for _ in range(2))
    advance(unbroken, 3)
    resumed.load_state_dict(deepcopy(unbroken.state_dict()))
    advance(unbroken, 3, start=3)
    advance(resumed, 3, start=3)
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())
    assert resumed.updates == 6


# --- what is measured ---------------------------------------------------------------------------


def test_memorised_labels_and_the_order_of_losses_by_counting_pairs():
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, generator=draws)
    given = torch.randint(3, (40,), generator=draws)
    false = torch.rand(40, generator=draws) < 0.4
    losses = -logits.log_softmax(1)[range(40), given]
    pairs = list(product(losses[false], losses[~false]))
    found = noise_metrics(logits, given, false)
    assert found["noise_auc"] == pytest.approx(sum(bool(a > b) for a, b in pairs) / len(pairs))
    repeated = [bool(logits[i].argmax() == given[i]) for i in range(40) if false[i]]
    assert found["memorized"] == pytest.approx(sum(repeated) / len(repeated))


def test_training_samples_are_judged_by_true_labels_and_by_the_false_ones_they_have():
    task = build(correction="none")
    true = task.data.train.labels
    assert int(task.corrupted.sum()) == round(0.4 * len(true))
    assert torch.equal(task.stream.data.labels != true, task.corrupted)
    assert set(task.evaluate("train")) - set(task.evaluate("validation")) == {
        "memorized",
        "noise_auc",
    }
    clean = build(label_noise=0.0, correction="none")
    assert set(clean.evaluate("train")) == {"loss", "accuracy", "macro_f1"}
    # A network of the true labels repeats no false one.
    advance(clean, 200)
    task.load_state_dict(deepcopy(clean.state_dict()))
    found = task.evaluate("train")
    assert found["accuracy"] > 0.95
    assert found["memorized"] < 0.05
    assert found["noise_auc"] > 0.95


def test_the_record_has_the_visits_to_false_labels(tmp_path):
    fields = {
        "task": {"name": "noisy_labels", "batch_size": 16},
        "method": {"mapping": {"name": "constant", "repeats": 2}},
        "max_updates": 6,
        "evaluation": {"every": 6},
    }
    config = parse(RunConfig, fields)
    noise = train(config, tmp_path).summary["label_noise"]
    task = build(config.stream_seed, batch_size=16)
    shares = [task.corrupted[task.fresh_batch(i).indices].double().mean().item() for i in range(3)]
    assert noise["corrupted_extra_visits"] == pytest.approx(np.mean(shares))
    assert noise["extra_visits"] == 3
