"""SimCLR: NT-Xent, its one update against the formulas, its evaluation, and no label anywhere."""

from __future__ import annotations

import io
from copy import deepcopy
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from repeatlab.core.schema import ConfigError, parse
from repeatlab.data import ImageSet
from repeatlab.data.augment import normalize
from repeatlab.tasks import optimization, selfsupervised
from repeatlab.tasks.models import build_classifier, build_encoder
from repeatlab.tasks.selfsupervised import (
    SelfSupervised,
    SelfSupervisedConfig,
    ViewBatch,
    knn_accuracy,
    nt_xent,
)
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed: int = 0, **fields) -> SelfSupervised:
    usual = {"batch_size": 8, "width": 4, "projection": 16, "bank": 300}
    config = parse(SelfSupervisedConfig, {"name": "selfsupervised", **usual, **fields})
    return SelfSupervised(config, seed=seed, device="cpu")


def ignore(loss: torch.Tensor) -> None:
    """Take a report and do nothing with it."""


def tensors(task: SelfSupervised) -> list[torch.Tensor]:
    state = task.state_dict()
    return [t.clone() for t in (*state["encoder"].values(), *state["head"].values())]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 64, 256])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_with_equal_similarities_the_loss_is_that_of_a_guess(batch, temperature):
    projected = torch.tensor([3.0, -4.0]).expand(2 * batch, 2)
    losses = nt_xent(projected, temperature)
    assert losses.shape == (2 * batch,)
    assert losses.tolist() == pytest.approx([log(2 * batch - 1)] * 2 * batch, rel=1e-5)


def test_the_guess_at_256_images_is_the_published_number():
    assert nt_xent(torch.ones(512, 3), 0.5).mean().item() == pytest.approx(6.23637, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0])
def test_nt_xent_is_equation_1_view_by_view(temperature):
    projected = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
    z = projected / projected.norm(dim=1, keepdim=True)
    wanted = []
    for i in range(12):
        j = (i + 6) % 12
        below = sum(exp(float(z[i] @ z[k]) / temperature) for k in range(12) if k != i)
        wanted.append(-log(exp(float(z[i] @ z[j]) / temperature) / below))
    assert nt_xent(projected, temperature).tolist() == pytest.approx(wanted, rel=1e-10)


def test_nt_xent_has_the_least_value_that_the_docstring_names():
    """Partners alike, and everything else opposite: possible for two images."""
    projected = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    losses = nt_xent(projected, 0.5)
    assert losses.tolist() == pytest.approx([log(1 + 2 * exp(-2 / 0.5))] * 4, rel=1e-5)


@pytest.mark.parametrize("model", ["cnn", "norm_cnn", "resnet18"])
def test_before_training_a_head_without_information_is_a_guess(model):
    task = build(model=model, batch_size=64)
    with torch.no_grad():
        task.head[-1].weight.zero_()
    reported = []
    task.step(task.fresh_batch(0), reported.append)
    assert reported[0].item() == pytest.approx(log(127), rel=1e-5)


def test_sample_losses_average_to_the_driver_and_leave_no_trace():
    task = build(batch_size=16)
    before, batch = tensors(task), task.fresh_batch(0)
    losses = task.sample_losses(batch)
    assert losses.shape == (16,)
    assert not losses.requires_grad
    assert same(before, tensors(task))
    assert task.encoder.training
    projected = task.head(task.encoder(batch.views))
    by_view = nt_xent(projected, 0.5)
    torch.testing.assert_close(losses, (by_view[:16] + by_view[16:]) / 2)
    reported = []
    task.step(batch, reported.append)
    assert losses.mean().item() == pytest.approx(reported[0].item(), rel=1e-6)


# --- one update ---------------------------------------------------------------------------------


def plain_loop(task: SelfSupervised, visits: list[int]) -> list[torch.Tensor]:
    """SimCLR written out, over the task's batches."""
    encoder, head = deepcopy(task.encoder), deepcopy(task.head)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=task.config.lr, momentum=0.9, fused=True)
    for index in visits:
        views = task.fresh_batch(index).views
        count = len(views)
        z = functional.normalize(head(encoder(views)), dim=1)
        logits = z @ z.T / task.config.temperature
        logits = logits.masked_fill(torch.eye(count, dtype=torch.bool), -float("inf"))
        target = (torch.arange(count) + count // 2) % count
        each = functional.cross_entropy(logits, target, reduction="none")
        loss = each.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*encoder.state_dict().values(), *head.state_dict().values()]


@pytest.mark.parametrize("model", ["cnn", "norm_cnn"])
def test_updates_are_bit_equal_to_a_plain_loop(model):
    task = build(model=model, lr=0.05)
    visits = [0, 0, 1, 2, 2, 2]
    wanted = plain_loop(task, visits)
    start = tensors(task)
    for index in visits:
        task.step(task.fresh_batch(index), ignore)
    assert same(tensors(task), wanted)
    assert not same(tensors(task), start)


def test_the_loop_makes_the_same_updates(tmp_path):
    fields = {"batch_size": 8, "width": 4, "projection": 16, "bank": 300, "lr": 0.05}
    config = parse(
        RunConfig,
        {
            "task": {"name": "selfsupervised", **fields},
            "method": {"mapping": {"name": "constant", "repeats": 2}},
            "max_updates": 5,
            "device": "cpu",
        },
    )
    run = train(config, tmp_path)
    task = build(config.stream_seed, **fields)
    reported = []
    for index in (0, 0, 1, 1, 2):
        task.step(task.fresh_batch(index), reported.append)
    assert run.updates["loss"].tolist() == [loss.item() for loss in reported]
    assert run.summary["final"]["test.loss"] == task.evaluate("test")["loss"]
    assert run.summary["ledger"]["backward_samples"] == 5 * 2 * 8
    assert {name: v.shape for name, v in run.pictures.items()} == {
        "first views": (8, 8, 8),
        "second views": (8, 8, 8),
    }


def test_no_label_reaches_an_update():
    """With other labels, or none to read at all, every weight comes out the same."""
    ends = []
    for change in (lambda labels: labels, lambda labels: 9 - labels):
        task = build(lr=0.05)
        train_set = task.data.train
        task.data = replace(task.data, train=ImageSet(train_set.images, change(train_set.labels)))
        # TrainStream's own batches would hold labels: it may be asked for the order alone.
        task.stream.batch_of = None
        for index in range(3):
            batch = task.fresh_batch(index)
            assert batch._fields == ("views", "indices", "index")
            task.step(batch, ignore)
        ends.append(tensors(task))
    assert same(*ends)


def test_weights_act_on_the_gradient_and_not_on_the_driver_loss():
    reports, gradients = [], []
    chosen = torch.linspace(0, 2, 8)
    task = build(lr=0.1, optimizer=optimization.chosen("sgd"))
    batch = task.fresh_batch(0)
    by_view = nt_xent(task.head(task.encoder(batch.views)), 0.5)
    wanted = torch.autograd.grad(
        (chosen * (by_view[:8] + by_view[8:]) / 2).mean(), list(task.head.parameters())
    )
    for weights in (None, chosen):
        task = build(lr=0.1, optimizer=optimization.chosen("sgd"))
        before = [p.detach().clone() for p in task.head.parameters()]
        task.step(batch, lambda loss, *_: reports.append(loss), weights)
        moved = zip(before, task.head.parameters(), strict=True)
        gradients.append([(old - new.detach()) / 0.1 for old, new in moved])
    assert reports[1].item() == pytest.approx(reports[0].item(), rel=1e-6)
    assert not reports[1].requires_grad
    for found, expected, plain in zip(gradients[1], wanted, gradients[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-5)


def test_bfloat16_is_the_same_update_roughly():
    losses = {"float32": [], "bfloat16": []}
    for precision, reported in losses.items():
        task = build(precision=precision, model="norm_cnn", lr=0.05)
        for index in range(3):
            task.step(task.fresh_batch(index), reported.append)
    exact, rough = ([loss.item() for loss in reported] for reported in losses.values())
    assert rough == pytest.approx(exact, rel=0.03)
    assert rough != exact


# --- batches ------------------------------------------------------------------------------------


def same_batch(first: ViewBatch, second: ViewBatch) -> bool:
    return first.index == second.index and same(list(first[:2]), list(second[:2]))


def test_a_fresh_batch_is_a_function_of_seed_and_index():
    task = build(lr=0.1)
    for index in (4, 0, 2):
        task.step(task.fresh_batch(index), ignore)
    torch.rand(1)
    wanted = build(temperature=0.1).fresh_batch(3)
    assert same_batch(task.fresh_batch(3), wanted)
    assert not same_batch(build(seed=1).fresh_batch(3), wanted)


def test_views_i_and_i_plus_b_are_of_one_image():
    """Crops of the whole image and no other change: the views are the image itself."""
    task = build(min_area=1.0, flip=False, strength=0.0, gray=0.0)
    batch = task.fresh_batch(2)
    images = normalize(task.data.train.images[batch.indices], task.data.mean, task.data.std)
    whole = 0
    for i in range(8):
        for view in (batch.views[i], batch.views[i + 8]):
            whole += torch.allclose(view, images[i], atol=1e-5)
            others = [k for k in range(8) if k != i]
            assert not any(torch.allclose(view, images[k], atol=1e-5) for k in others)
    assert whole >= 4


def test_a_refreshed_batch_shows_the_same_samples_anew():
    task = build()
    batch = task.fresh_batch(5)
    first, second, again = (task.refresh(batch, visit) for visit in (1, 2, 1))
    assert same_batch(first, again)
    assert torch.equal(first.indices, batch.indices)
    assert len({b.views.numpy().tobytes() for b in (batch, first, second)}) == 3
    halves = batch.views.split(8)
    assert not torch.equal(*halves)


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "norm_cnn", "resnet18"])
def test_an_encoder_is_the_classifier_without_its_last_layer(name):
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder, size = build_encoder(name, 3, side=16, width=4)
    assert encoder(images).shape == (3, size)
    classifier, features = build_classifier(name, 3, 7, side=16, width=4)
    assert features == size
    count = [sum(p.numel() for p in m.parameters()) for m in (encoder, classifier)]
    assert count[1] - count[0] == 7 * (size + 1)


def test_at_the_plan_s_scale_the_encoder_has_the_plan_s_parameters():
    """11.17 million: torchvision's 11,689,512 without classifier, with a 3 x 3 stem."""
    encoder, size = build_encoder("resnet18", 3, side=32, width=1)
    stem = 64 * 3 * (49 - 9)
    assert sum(p.numel() for p in encoder.parameters()) == 11_689_512 - 513_000 - stem
    assert size == 512


# --- evaluation and state -----------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_evaluation_leaves_no_trace(split):
    task = build(model="norm_cnn", lr=0.05)
    task.step(task.fresh_batch(0), ignore)
    before, state = tensors(task), torch.get_rng_state()
    found = task.evaluate(split)
    assert task.evaluate(split) == found
    assert same(before, tensors(task))
    assert all(module.training for module in task.encoder.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert ("linear_accuracy" in found) == (split == "test")


def features(task: SelfSupervised, data: ImageSet) -> np.ndarray:
    task.encoder.eval()
    with torch.no_grad():
        images = (data.images.double() / 255 - task.data.mean[0]) / task.data.std[0]
        found = task.encoder(images.float()).double().numpy()
    task.encoder.train()
    return found


def test_knn_and_spread_are_those_worked_out_by_hand():
    task = build(neighbors=7, bank=250)
    found = task.evaluate("validation")
    data = task.data.validation
    order = torch.randperm(
        len(task.data.train), generator=selfsupervised.generator(0, "train subset")
    )
    bank = task.data.train.subset(order[len(data) :][:250].numpy())
    known, asked = features(task, bank), features(task, data)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    similarity = asked @ known.T
    right = 0
    for row, label in zip(similarity, data.labels.tolist(), strict=True):
        votes = np.zeros(10)
        for k in np.argsort(-row)[:7]:
            votes[bank.labels[k]] += np.exp(row[k] / 0.1)
        right += int(votes.argmax() == label)
    assert found["knn_accuracy"] == pytest.approx(right / len(data), abs=1.5 / len(data))
    spread = asked.std(0).mean() * np.sqrt(asked.shape[1])
    assert found["feature_std"] == pytest.approx(spread, rel=1e-4)


def test_the_training_images_that_are_asked_about_are_not_their_own_neighbours():
    task = build(bank=None)
    asked, bank = task.data.evaluated("train"), task._bank()
    assert len(asked) == len(task.data.validation)
    assert len(asked) + len(bank) == len(task.data.train)
    both = torch.cat([asked.images, bank.images])
    assert torch.equal(both.double().sum(0), task.data.train.images.double().sum(0))


def test_collapsed_features_have_no_spread_and_isotropic_ones_have_one():
    task = build()
    with torch.no_grad():
        for p in task.encoder.parameters():
            p.zero_()
        list(task.encoder.parameters())[-1].fill_(1.0)
    assert task.evaluate("validation")["feature_std"] == pytest.approx(0, abs=1e-5)


def test_the_evaluated_loss_of_collapsed_features_is_a_guess():
    task = build(batch_size=16)
    with torch.no_grad():
        task.head[-1].weight.zero_()
    assert task.evaluate("validation")["loss"] == pytest.approx(log(31), rel=1e-5)


def test_the_linear_probe_is_logistic_regression_on_standardised_features():
    task = build(width=2)
    found = task.evaluate("test")["linear_accuracy"]
    known, asked = features(task, task.data.train), features(task, task.data.test)
    mean, std = known.mean(0), known.std(0)
    std[std == 0] = 1
    probe = LogisticRegression(max_iter=200).fit((known - mean) / std, task.data.train.labels)
    score = probe.score((asked - mean) / std, task.data.test.labels)
    assert found == pytest.approx(score, abs=2.5 / len(asked))
    assert found > 0.5


def test_knn_takes_what_there_is_when_the_bank_is_small():
    bank = torch.eye(3)
    labels = torch.tensor([0, 1, 2])
    queries = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.9]])
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1]), 200) == 0.5


def test_a_restored_task_goes_on_as_if_nothing_had_happened():
    task, other = (build(lr=0.1, model="norm_cnn") for _ in range(2))
    for index in (0, 1, 1):
        task.step(task.fresh_batch(index), ignore)
    file = io.BytesIO()
    torch.save(task.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (task, other):
        for index in (1, 2):
            each.step(each.fresh_batch(index), ignore)
    assert same(tensors(task), tensors(other))


def test_initial_weights_are_the_seed_s():
    first = tensors(build(seed=3))
    torch.rand(5)
    assert same(first, tensors(build(seed=3)))
    assert not same(first, tensors(build(seed=4)))


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "cifar"}, "did you mean 'cifar10'"),
        ({"batch_size": 1}, "batch_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"min_area": 0.0}, "min_area"),
        ({"strength": 1.3}, "strength"),
        ({"temprature": 0.5}, "did you mean 'temperature'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse(SelfSupervisedConfig, {"name": "selfsupervised", **fields})


def test_the_defaults_are_the_plan_s():
    config = SelfSupervisedConfig()
    assert (config.lr, config.batch_size) == (1e-3, 64)
    assert config.optimizer == optimization.chosen("momentum", momentum=0.9, weight_decay=0.0)
    assert (config.temperature, config.projection) == (0.5, 128)
