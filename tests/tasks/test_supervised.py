"""The supervised task: its networks, its one update, its metrics."""

from __future__ import annotations

import os
from copy import deepcopy
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from repeatlab.core.schema import parse
from repeatlab.data import DATASETS, Batch
from repeatlab.data.sources import DIRECTORY_VARIABLE
from repeatlab.tasks import learner
from repeatlab.tasks.dataset import AUGMENTATION
from repeatlab.tasks.models import resnet18, small_cnn
from repeatlab.tasks.optimization import chosen
from repeatlab.tasks.supervised import Supervised, SupervisedConfig, build_model
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed: int = 0, **fields) -> Supervised:
    return Supervised(SupervisedConfig(**fields), seed=seed, device="cpu")


def weights(task: Supervised) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def ignore(loss: torch.Tensor) -> None:
    """Take a report and do nothing with it."""


# --- networks -----------------------------------------------------------------------------------


def test_resnet18_has_the_parameters_of_the_paper_with_a_stem_for_small_images():
    def batch_norm(channels: int) -> int:
        return 2 * channels

    def block(before: int, after: int) -> int:
        convolutions = 9 * before * after + 9 * after * after + 2 * batch_norm(after)
        shortcut = before * after + batch_norm(after) if before != after else 0
        return convolutions + shortcut

    stem = 9 * 3 * 64 + batch_norm(64)
    stages = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    total = stem + sum(block(*stage) for stage in [*stages, (512, 512)]) + 512 * 10 + 10
    assert total == 11_173_962
    assert sum(p.numel() for p in resnet18(3, 10).parameters()) == total
    assert sum(p.numel() for p in resnet18(1, 7).parameters()) == total - 9 * 2 * 64 - 3 * 513


def test_resnet18_keeps_small_images_large():
    """Strides 1, 2, 2, 2 behind a stem that does not shrink: 32 pixels end as 4."""
    sizes = []
    model = resnet18(3, 10)
    for layer in (model.conv1, model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda module, images, result: sizes.append(result.shape[-1]))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [32, 32, 16, 8, 4]


@pytest.mark.parametrize(("side", "sizes"), [(63, [63, 63]), (64, [32, 16]), (96, [48, 24])])
def test_from_64_pixels_on_resnet18_has_its_original_stem(side, sizes):
    """Of stride 2, with a pooling behind it: He et al. 2016, table 1."""
    model = build_model(SupervisedConfig(model="resnet18"), (3, side, side), 10)
    found = []
    for layer in (model.conv1, model.layer1):
        layer.register_forward_hook(lambda module, images, result: found.append(result.shape[-1]))
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 10)
    assert found == sizes
    assert model.conv1.kernel_size == ((3, 3) if side < 64 else (7, 7))


def test_resnet9_is_the_network_of_the_speed_runs():
    """Page 2018: 64, 128, 256 and 512 channels, a residual block behind the second and the last."""
    pairs = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512)]
    pairs += [(512, 512), (512, 512)]
    model = build_model(SupervisedConfig(model="resnet9"), (3, 32, 32), 10)
    weights = sum(9 * before * after + 2 * after for before, after in pairs) + 512 * 10
    assert weights == 6_573_120
    assert sum(p.numel() for p in model.parameters()) == weights
    with FlopCounterMode(display=False) as counted:
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    sides = [32, 32, 16, 16, 16, 8, 8 // 2, 8 // 2]
    multiplied = [9 * a * b * side**2 for (a, b), side in zip(pairs, sides, strict=True)]
    assert counted.get_total_flops() == 2 * (sum(multiplied) + 512 * 10) == 2 * 379_261_952
    with FlopCounterMode(display=False) as counted:
        resnet18(3, 10)(torch.zeros(1, 3, 32, 32))
    assert counted.get_total_flops() == 2 * 555_422_720  # what the docstring sets beside it


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("model", ["cnn", "resnet18"])
def test_small_images_get_the_networks_of_one_random_stream(model, shape):
    torch.manual_seed(11)
    found = build_model(SupervisedConfig(model=model, width=8), shape, 10)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    plain = resnet18(shape[0], 10) if model == "resnet18" else small_cnn(shape[0], 10, width=8)
    assert same(found.state_dict(), plain.state_dict())
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize(("channels", "width", "size"), [(1, 16, 8), (1, 8, 28), (3, 32, 32)])
def test_the_small_cnn_has_the_parameters_of_its_layers(channels, width, size):
    model = small_cnn(channels, 10, width=width)
    expected = (9 * channels + 1) * width + (9 * width + 1) * 2 * width + (8 * width + 1) * 10
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.zeros(5, channels, size, size)).shape == (5, 10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", ["cnn", "resnet9", "resnet18"])
def test_the_loss_before_training_is_that_of_a_guess(model, seed):
    """Ten classes: ln 10. With a good initialisation nothing is known, and nothing believed."""
    task = build(seed=seed, model=model)
    assert task.evaluate("validation")["loss"] == pytest.approx(log(10), rel=0.05)
    if model == "cnn":  # BatchNorm with a batch's own statistics spreads ResNet's first logits
        losses = []
        for index in range(8):
            task.step(task.fresh_batch(index), lambda loss: losses.append(loss.item()))
        assert np.mean(losses) == pytest.approx(log(10), rel=0.05)


@pytest.mark.parametrize("model", ["cnn", "resnet9", "resnet18"])
def test_the_loss_of_noise_before_training_is_that_of_a_guess(model):
    task = build(model=model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(256, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (256,), generator=generator)
    losses = task.sample_losses(Batch(images, labels, labels, 0))
    assert losses.mean().item() == pytest.approx(log(10), rel=0.05)


def test_initial_weights_are_the_seed_s_whatever_was_drawn_before():
    first = weights(build(seed=3))
    torch.rand(5)
    state = torch.get_rng_state()
    assert same(first, weights(build(seed=3)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, weights(build(seed=4)))


# --- one update ---------------------------------------------------------------------------------


def test_an_update_is_momentum_on_the_gradient_of_the_mean_cross_entropy():
    """Two updates in float64 by the formulas, against the task's in float32."""
    task = build(lr=0.3, optimizer=chosen("momentum", momentum=0.8, weight_decay=0.01))
    reference = small_cnn(1, 10, width=16).double()
    reference.load_state_dict(task.model.state_dict())
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    losses = []
    for index in range(2):
        batch = task.fresh_batch(index)
        task.step(batch, losses.append)
        logits = reference(batch.images.double())
        loss = -logits.log_softmax(1)[range(64), batch.labels].mean()
        assert losses[-1].item() == pytest.approx(loss.item(), rel=1e-5)
        assert losses[-1].ndim == 0
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for p, v, gradient in zip(reference.parameters(), velocity, gradients, strict=True):
                v.mul_(0.8).add_(gradient + 0.01 * p)
                p.sub_(0.3 * v)
    for found, expected in zip(task.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_sample_losses_are_those_whose_mean_drives_and_leave_no_trace():
    for model in ("cnn", "resnet18"):
        task = build(model=model, batch_size=8)
        before, batch = weights(task), task.fresh_batch(0)
        losses = task.sample_losses(batch)
        assert losses.shape == (8,)
        assert not losses.requires_grad
        assert task.model.training
        assert same(before, weights(task))
        if model == "cnn":
            reported = []
            task.step(batch, reported.append)
            assert losses.mean().item() == pytest.approx(reported[0].item(), rel=1e-6)


def test_weights_act_on_the_gradient_and_not_on_the_driver_loss():
    batch = build().fresh_batch(0)
    chosen = torch.zeros(64)
    chosen[:16] = 4.0  # the mean over 64 of these is the plain mean over the first 16
    part = Batch(batch.images[:16], batch.labels[:16], batch.indices[:16], 0)
    reports, ends = [], []
    for step_batch, sample_weights in ((batch, None), (batch, chosen), (part, None)):
        task = build(lr=0.1)
        task.step(step_batch, lambda loss, *_: reports.append(loss), sample_weights)
        ends.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))
    assert reports[1].item() == pytest.approx(reports[0].item(), rel=1e-6)
    assert not reports[1].requires_grad
    torch.testing.assert_close(ends[1], ends[2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-4, atol=1e-6)


def test_a_refreshed_batch_is_another_view_of_the_same_samples():
    task = build()
    batch = task.fresh_batch(5)
    views = [batch, *(task.refresh(batch, visit) for visit in (1, 2, 1))]
    for view in views[1:]:
        assert torch.equal(view.indices, batch.indices)
        assert torch.equal(view.labels, batch.labels)
    assert torch.equal(views[1].images, views[3].images)
    assert not torch.equal(views[1].images, views[2].images)
    assert not torch.equal(views[1].images, batch.images)
    plain = build(augment=False)
    assert torch.equal(plain.refresh(plain.fresh_batch(5), 1).images, plain.fresh_batch(5).images)


def test_a_restored_task_goes_on_as_if_nothing_had_happened():
    task, other = build(lr=0.1), build(seed=9, lr=0.1)
    for index in range(3):
        task.step(task.fresh_batch(index), ignore)
    # A copy, as a file would be: torch's optimizers take over the tensors they are given.
    other.load_state_dict(deepcopy(task.state_dict()))
    batch = task.fresh_batch(3)
    for each in (task, other):
        each.step(batch, ignore)
    assert same(weights(task), weights(other))


# --- BatchNorm ----------------------------------------------------------------------------------


def test_batchnorm_s_running_statistics_see_a_batch_once_a_visit():
    """After n visits at momentum 0.1 a batch weighs 1 - 0.9^n."""
    task = build(model="resnet18", batch_size=16, lr=1e-30)
    batch = task.fresh_batch(0)
    with torch.no_grad():
        inputs = task.model.conv1(batch.images)
    mean, var = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3))
    layer = task.model.bn1
    assert layer.momentum == 0.1
    for weight in (0.1, 0.19, 0.271, 0.3439, 0.40951):
        task.step(batch, ignore)
        torch.testing.assert_close(layer.running_mean, weight * mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.running_var, 1 + weight * (var - 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_evaluation_leaves_the_model_as_it_was(split):
    task = build(model="resnet18", batch_size=8)
    task.step(task.fresh_batch(0), ignore)
    before, state = weights(task), torch.get_rng_state()
    gradients = [p.grad.clone() for p in task.model.parameters()]
    found = task.evaluate(split)
    assert task.evaluate(split) == found
    assert all(module.training for module in task.model.modules())
    assert same(before, weights(task))
    assert all(
        torch.equal(p.grad, g) for p, g in zip(task.model.parameters(), gradients, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_uses_the_running_statistics():
    """A sample's logits do not depend on its neighbours."""
    task = build(model="resnet18", batch_size=16)
    for index in range(3):
        task.step(task.fresh_batch(index), ignore)
    batch = task.fresh_batch(3)
    alone = [
        task.sample_losses(Batch(batch.images[k : k + 1], batch.labels[k : k + 1], None, 3))
        for k in range(4)
    ]
    torch.testing.assert_close(
        task.sample_losses(batch)[:4], torch.cat(alone), rtol=1e-4, atol=1e-5
    )


# --- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [0, 40])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_metrics_are_those_of_scikit_learn(monkeypatch, split, updates):
    monkeypatch.setattr(learner, "EVALUATION_BATCH", 100)  # several batches, the last one short
    task = build(lr=0.1)
    for index in range(updates):
        task.step(task.fresh_batch(index), ignore)
    found = task.evaluate(split)

    data = getattr(task.data, split)
    images = (data.images.double() / 255 - task.data.mean[0]) / task.data.std[0]
    with torch.no_grad():
        chances = task.model(images.float()).double().softmax(1).numpy()
    labels, guesses = data.labels.numpy(), chances.argmax(1)
    assert found == pytest.approx(
        {
            "loss": log_loss(labels, chances, labels=range(10)),
            "accuracy": accuracy_score(labels, guesses),
            "macro_f1": f1_score(labels, guesses, average="macro", zero_division=0),
        },
        rel=1e-5,
    )
    if updates:
        assert found["accuracy"] > 0.3  # it has learnt something, so the metrics differ


def test_macro_f1_counts_a_class_that_is_never_guessed_as_zero():
    task = build()
    with torch.no_grad():
        for p in task.model.parameters():
            p.zero_()
        task.model[-1].bias[4] = 1.0
    found = task.evaluate("test")
    labels = task.data.test.labels
    share = (labels == 4).double().mean().item()
    assert found["accuracy"] == pytest.approx(share)
    # Precision is the share, recall 1; the other nine classes have an F1 of 0.
    assert found["macro_f1"] == pytest.approx(2 * share / (1 + share) / 10)
    logits = nn.functional.one_hot(torch.tensor(4), 10).double().expand(len(labels), 10)
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item())


def test_the_training_metrics_are_of_one_fixed_subset_without_augmentation(monkeypatch):
    seen = []
    original = learner.iter_batches

    def spy(data, *rest):
        seen.append(data)
        return original(data, *rest)

    monkeypatch.setattr(learner, "iter_batches", spy)
    for task in (build(seed=0), build(seed=1), build(augment=False)):
        task.evaluate("train")
    first = seen[0]
    assert len(first) == len(task.data.validation)
    for other in seen[1:]:
        assert torch.equal(other.images, first.images)
        assert torch.equal(other.labels, first.labels)
    train_images = {image.tobytes() for image in task.data.train.images.numpy()}
    assert all(image.tobytes() in train_images for image in first.images.numpy())
    assert len({image.tobytes() for image in first.images.numpy()}) > 0.95 * len(first)


# --- settings -----------------------------------------------------------------------------------


def test_the_defaults_are_the_plan_s():
    config = SupervisedConfig()
    assert (config.lr, config.batch_size) == (1e-3, 64)
    assert config.optimizer == chosen("momentum", momentum=0.9, weight_decay=0.0)
    assert config.dataset == "digits"


# --- real data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "marker", "model"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", "cnn"),
        ("cifar10", "cifar-10-batches-py/data_batch_1", "resnet18"),
    ],
)
def test_a_few_updates_on_real_data(tmp_path, dataset, marker, model):
    root = os.environ.get(DIRECTORY_VARIABLE)
    if not root or not (Path(root) / marker).exists():
        pytest.skip(f"{dataset}: set {DIRECTORY_VARIABLE} to a directory that holds {marker}")
    config = parse(
        RunConfig,
        {
            "task": {"name": "supervised", "dataset": dataset, "model": model},
            "method": {"mapping": {"name": "constant", "repeats": 2}},
            "max_updates": 3,
            "evaluation": {"splits": [], "test": False},
            "device": "cpu",
        },
    )
    run = train(config, tmp_path)
    assert run.status == {"status": "complete"}
    losses = run.updates["loss"]
    assert losses[0] == pytest.approx(log(10), rel=0.15)
    assert losses[1] < losses[0]  # the same batch again, after one update on it
    assert len(losses) == 3
    ledger = run.summary["ledger"]
    assert (ledger["forward_samples"], ledger["distinct_samples"]) == (3 * 64, 2 * 64)


def test_every_dataset_has_its_augmentation():
    assert AUGMENTATION.keys() == DATASETS.keys()
