"""The transfer task: what is known beforehand, what the run trains, what both cost."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from sklearn.metrics import accuracy_score
from torch.nn import functional

from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive
from repeatlab.data import DATASETS, ImageSet, TrainStream, load_splits
from repeatlab.tasks.learner import encode
from repeatlab.tasks.models import small_cnn
from repeatlab.tasks.pretraining import PretrainingConfig, pretrained
from repeatlab.tasks.retrieval import retrieval
from repeatlab.tasks.transfer import Transfer, TransferConfig
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

SHORT = {"updates": 30, "lr": 0.1, "batch_size": 32}


def build(seed: int = 0, **fields) -> Transfer:
    config = parse(TransferConfig, {"name": "transfer", "pretraining": SHORT} | fields)
    return Transfer(config, seed=seed, device="cpu")


def advance(task: Transfer, updates: int) -> None:
    for index in range(updates):
        task.step(task.fresh_batch(index), lambda loss: None)


def test_pretraining_is_a_plain_loop_on_the_first_classes():
    data = load_splits("digits")
    known = data.train.subset((data.train.labels < 5).nonzero().flatten().numpy())
    torch.manual_seed(derive(3, "weights"))
    encoder = torch.nn.Sequential(*list(small_cnn(1, 1, width=16))[:-1])
    head = torch.nn.Linear(128, 5)
    weights = [*encoder.parameters(), *head.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    stream = TrainStream(
        known,
        batch_size=32,
        seed=derive(3, "pretraining"),
        mean=data.mean,
        std=data.std,
        crop_padding=1,
    )
    for index in range(30):
        batch = stream.fresh_batch(index)
        loss = functional.cross_entropy(head(encoder(batch.images)), batch.labels)
        with torch.no_grad():
            for w, v, g in zip(weights, velocity, torch.autograd.grad(loss, weights), strict=True):
                v.mul_(0.9).add_(g)
                w.sub_(0.1 * v)
    task = build(seed=3)
    for found, expected in zip(task.encoder.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("updates", "low", "high"), [(0, 0.0, 0.5), (300, 0.95, 1.0)])
def test_pretraining_learns_its_classes_by_its_updates(updates, low, high):
    data = load_splits("digits")
    chosen = data.validation.labels < 5
    network, spent = pretrained(
        TransferConfig(), PretrainingConfig(updates=updates), range(5), 5, seed=0, device="cpu"
    )
    guesses = encode(network, data.validation, data).argmax(1)
    accuracy = (guesses == data.validation.labels)[chosen].double().mean().item()
    assert low <= accuracy <= high
    assert spent["pretraining_updates"] == updates
    assert spent["pretraining_forward_samples"] == 64 * updates


def test_the_run_learns_the_other_classes_from_a_new_head():
    task, other = build(), build(seed=1)
    batch = task.fresh_batch(0)
    data = load_splits("digits")
    rest = data.train.labels[data.train.labels >= 5]
    assert len(task.population(0)) == len(rest)
    assert torch.equal(task.stream.data.labels, rest - 5)
    assert set(batch.labels.tolist()) <= set(range(5))
    assert task.head.out_features == 5
    assert not torch.equal(task.head.weight, other.head.weight)


def test_a_few_labels_are_the_same_number_of_every_class_and_the_same_for_every_seed():
    tasks = [build(seed, labels=50, batch_size=10) for seed in (0, 1)]
    assert torch.equal(tasks[0].stream.data.images, tasks[1].stream.data.images)
    assert torch.bincount(tasks[0].stream.data.labels).tolist() == [10] * 5


@pytest.mark.parametrize("tune", ["head", "all"])
def test_an_update_moves_the_head_by_its_gradient_and_the_encoder_only_if_asked(tune):
    task = build(tune=tune, model="norm_cnn", lr=0.5)
    before = {name: t.clone() for name, t in task.encoder.state_dict().items()}
    weight, bias = (p.detach().double().clone() for p in task.head.parameters())
    batch, reported = task.fresh_batch(0), []
    with torch.no_grad():
        features = task.encoder(batch.images).double()
    task.encoder.load_state_dict(before)  # BatchNorm in training mode has seen the batch
    task.step(batch, reported.append)
    logits = features @ weight.T + bias
    residual = (logits.softmax(1) - functional.one_hot(batch.labels, 5)) / len(features)
    loss = -logits.log_softmax(1)[range(64), batch.labels].mean().item()
    assert reported[0].item() == pytest.approx(loss, rel=1e-5)
    after = weight - 0.5 * residual.T @ features, bias - 0.5 * residual.sum(0)
    for found, expected in zip(task.head.parameters(), after, strict=True):
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-4, atol=1e-6)
    moved = {n for n, t in task.encoder.state_dict().items() if not torch.equal(t, before[n])}
    assert bool(moved) == (tune == "all")
    task.sample_losses(batch)
    assert task.encoder.training == (tune == "all")


def test_metrics_are_those_of_the_run_s_classes():
    task = build(lr=0.05)
    advance(task, 40)
    data = load_splits("digits").validation
    chosen = data.labels >= 5
    pixels = (data.images[chosen].float() / 255 - task.data.mean[0]) / task.data.std[0]
    task.encoder.eval()
    with torch.no_grad():
        features = task.encoder(pixels)
        guesses = task.head(features).argmax(1) + 5
    found = task.evaluate("validation")
    assert found["accuracy"] == accuracy_score(data.labels[chosen], guesses) > 0.5
    nearby = retrieval(features, data.labels[chosen])
    assert {name: found[name] for name in nearby} == pytest.approx(nearby, abs=1e-6)


def test_training_metrics_are_those_of_images_that_are_trained_on():
    """Twenty images that are learnt by heart, and no other of their classes."""
    task = build(labels=20, batch_size=20, lr=0.05)
    advance(task, 100)
    data = task.stream.data
    pixels = (data.images.float() / 255 - task.data.mean[0]) / task.data.std[0]
    with torch.no_grad():
        logits = task.head(task.encoder(pixels)).double()
    found = task.evaluate("train")
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits, data.labels).item())
    assert found["accuracy"] == accuracy_score(data.labels, logits.argmax(1)) == 1
    assert found["loss"] < 0.5 * task.evaluate("validation")["loss"]


@pytest.mark.parametrize("labels", [300, None])
def test_of_many_images_a_part_is_evaluated_that_no_seed_changes(labels):
    parts = []
    for seed in (0, 1):
        task = build(seed, labels=labels)
        features = task.learner.features

        def watched(data, splits, features=features):
            parts.append(data)
            return features(data, splits)

        task.learner.features = watched
        task.evaluate("train")
    first, second = parts
    assert torch.equal(first.images, second.images)
    assert len(first) == (load_splits("digits").validation.labels >= 5).sum()
    trained = [image.tobytes() for image in task.stream.data.images.numpy()]
    seen = [image.tobytes() for image in first.images.numpy()]
    assert set(seen) <= set(trained)
    # Drawn without replacement: no image more often than among those trained on.
    assert all(seen.count(image) <= trained.count(image) for image in set(seen))


@pytest.mark.parametrize("fields", [{"tune": "head"}, {"ema_decay": 0.9}, {"model": "norm_cnn"}])
def test_a_saved_state_goes_on_bit_for_bit_and_averages_are_evaluated(fields):
    unbroken, resumed = (build(lr=0.05, **fields) for _ in range(2))
    advance(unbroken, 3)
    resumed.load_state_dict(deepcopy(unbroken.state_dict()))
    advance(unbroken, 3)
    advance(resumed, 3)
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())
    assert (unbroken.ema is not None) == ("ema_decay" in fields)
    if unbroken.ema is not None:
        before = unbroken.evaluate("validation")
        with torch.no_grad():
            unbroken.head.bias += 10 * torch.arange(5)
        assert unbroken.evaluate("validation") == before


def run(**fields) -> RunConfig:
    task = {"name": "transfer", "pretraining": SHORT} | fields
    return parse(RunConfig, {"task": task, "max_updates": 4, "evaluation": {"every": 4}})


def test_what_was_spent_before_stands_in_the_ledger(tmp_path):
    ledger = train(run(), tmp_path).summary["ledger"]
    assert ledger["pretraining_updates"] == 30
    assert ledger["pretraining_forward_samples"] == 30 * 32
    assert ledger["pretraining_backward_samples"] == 30 * 32
    assert ledger["pretraining_seconds"] > 0
    assert (ledger["updates"], ledger["forward_samples"]) == (4, 4 * 64)


@pytest.fixture
def shapes(monkeypatch):
    """Offer a dataset of three classes of bright squares, 12 pixels wide, in so many channels."""

    def offer(channels: int) -> None:
        labels = torch.arange(90) % 3
        images = torch.zeros(90, channels, 12, 12, dtype=torch.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, : 4 * (label + 1)] = 200
        data = ImageSet(images, labels)
        monkeypatch.setitem(DATASETS, "shapes", lambda root: (data, data, 30))

    return offer


def test_another_dataset_is_learnt_as_a_whole_and_so_is_the_target(shapes):
    shapes(1)
    task = build(source="shapes", pretraining=SHORT | {"updates": 5})
    assert task.head.out_features == 10
    assert len(task.population(0)) == len(task.data.train)
    assert task.pretraining["pretraining_updates"] == 5
    advance(task, 1)


def test_an_unknown_source_is_named():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        parse(TransferConfig, {"name": "transfer", "source": "digit"})


@pytest.fixture
def untrained(monkeypatch):
    """Fail where anything is trained."""
    trained = "repeatlab.tasks.transfer.pretrained"
    monkeypatch.setattr(trained, lambda *_, **__: pytest.fail("a network was trained"))


def own(first: int = 5) -> int:
    """Return how many training images of digits have a label from `first` on."""
    return int((load_splits("digits").train.labels >= first).sum())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "shapes"}, "task.source: shapes has not the channels of digits"),
        (
            {"source_classes": 9},
            "task.source_classes: must leave two of the 10 classes of digits to the run; not 9",
        ),
        ({"labels": 20}, "task.batch_size: 64 exceeds the 20 samples that the run trains on"),
        (
            {"batch_size": 1 + own()},
            f"task.batch_size: {1 + own()} exceeds the {own()} samples that the run trains on",
        ),
        (
            {"labels": 4, "batch_size": 2},
            f"task.labels: `labels` must be from 5, one of every class, to {own() - 5}, or null",
        ),
        ({"labels": own() + 1}, f"or null for all {own()}; not {own() + 1}"),
        (
            {"pretraining": {"batch_size": own(0) - own() + 1}},
            f"task.pretraining.batch_size: {own(0) - own() + 1} exceeds the {own(0) - own()} "
            "samples that the pretraining trains on",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_trained(
    shapes, untrained, fields, message, refused
):
    shapes(3)
    refused(parse(TransferConfig, {"name": "transfer"} | fields), Transfer, message)


@pytest.mark.parametrize(
    "fields",
    [
        {"source_classes": 8},
        {"labels": 5, "batch_size": 5},
        {"batch_size": own()},
        {"pretraining": {"updates": 1, "batch_size": own(0) - own()}},
        {"source": "shapes", "pretraining": {"updates": 1, "batch_size": 60}},
    ],
)
def test_the_largest_and_the_smallest_that_fit_are_trained(shapes, fields):
    shapes(1)
    config = parse(TransferConfig, {"name": "transfer", "pretraining": SHORT} | fields)
    config.prepare()
    advance(Transfer(config, seed=0, device="cpu"), 1)
