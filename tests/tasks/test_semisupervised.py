"""FixMatch: its losses, its one update against the formulas, its data and its metrics."""

from __future__ import annotations

import io
from copy import deepcopy
from math import log

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch.nn import functional

from repeatlab.core.schema import ConfigError, parse
from repeatlab.data import stl10
from repeatlab.data.unlabelled import EpochOrder, labelled_subset
from repeatlab.tasks import dataset, learner
from repeatlab.tasks.models import build_classifier
from repeatlab.tasks.optimization import chosen
from repeatlab.tasks.semisupervised import SemiBatch, SemiSupervised, SemiSupervisedConfig
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed: int = 0, **fields) -> SemiSupervised:
    usual = {"batch_size": 8, "mu": 2, "labels": 40, "width": 4}
    config = parse(SemiSupervisedConfig, {"name": "semisupervised", **usual, **fields})
    return SemiSupervised(config, seed=seed, device="cpu")


def ignore(loss: torch.Tensor) -> None:
    """Take a report and do nothing with it."""


def tensors(task: SemiSupervised) -> list[torch.Tensor]:
    models = [*task.model.state_dict().values(), *task.ema.state_dict().values()]
    return [tensor.clone() for tensor in models]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def same_batch(first: SemiBatch, second: SemiBatch) -> bool:
    return first.index == second.index and same(list(first[:-1]), list(second[:-1]))


# --- the losses ---------------------------------------------------------------------------------


def median_confidence(**fields) -> float:
    """Return a threshold that half of the weak views of the first fresh batch pass."""
    task = build(**fields)
    with torch.no_grad():
        best = task.model(task.fresh_batch(0).weak).softmax(1).amax(1).sort().values
    return float(best[len(best) // 2 - 1 : len(best) // 2 + 1].mean())


def losses_by_hand(task: SemiSupervised, batch: SemiBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 3 and 4 of the paper, sample by sample, in evaluation mode."""
    task.model.eval()
    labelled, unlabelled = [], []
    with torch.no_grad():
        for image, label in zip(batch.labelled, batch.labels, strict=True):
            labelled.append(-task.model(image[None]).log_softmax(1)[0, label])
        for weak, strong in zip(batch.weak, batch.strong, strict=True):
            chances = task.model(weak[None]).softmax(1)[0]
            loss = -task.model(strong[None]).log_softmax(1)[0, chances.argmax()]
            unlabelled.append(loss if chances.max() >= task.config.threshold else 0 * loss)
    task.model.train()
    return torch.stack(labelled), torch.stack(unlabelled)


@pytest.mark.parametrize("driver", ["total", "supervised", "unsupervised"])
def test_the_driver_is_the_named_loss_and_its_samples_average_to_it(driver):
    threshold = median_confidence(batch_size=16)
    task = build(driver=driver, threshold=threshold, unlabelled_weight=0.5, batch_size=16)
    batch = task.fresh_batch(0)
    supervised, unsupervised = losses_by_hand(task, batch)
    assert int((unsupervised > 0).sum()) == 16  # of 32
    per_sample = {
        "supervised": supervised,
        "unsupervised": unsupervised.view(16, 2).mean(1),
        "total": supervised + 0.5 * unsupervised.view(16, 2).mean(1),
    }[driver]
    torch.testing.assert_close(task.sample_losses(batch), per_sample)
    reported = []
    task.step(batch, reported.append)
    assert len(reported) == 1
    assert reported[0].ndim == 0
    assert reported[0].item() == pytest.approx(per_sample.mean().item(), rel=1e-5)


@pytest.mark.parametrize("model", ["cnn", "norm_cnn", "resnet18"])
def test_before_training_the_total_is_that_of_a_guess(model):
    """ln 10, as no image passes the mask: all logits are equal."""
    task = build(model=model)
    with torch.no_grad():
        last = [p for name, p in task.model.named_parameters()][-2:]
        for p in last:
            p.zero_()
    reported = []
    task.step(task.fresh_batch(0), reported.append)
    assert reported[0].item() == pytest.approx(log(10), rel=1e-6)


def test_a_full_mask_adds_the_loss_of_every_strong_view():
    """With threshold 0 and equal logits, supervised and unsupervised are ln 10 each."""
    task = build(threshold=0.0, unlabelled_weight=2.0)
    with torch.no_grad():
        for p in list(task.model.parameters())[-2:]:
            p.zero_()
    reported = []
    task.step(task.fresh_batch(0), reported.append)
    assert reported[0].item() == pytest.approx(3 * log(10), rel=1e-6)


def test_no_gradient_goes_through_the_pseudo_label():
    """The gradient is that of a loss in which guess and mask are constants."""
    threshold = median_confidence()
    task = build(threshold=threshold, lr=1.0, optimizer=chosen("sgd"))
    batch = task.fresh_batch(0)
    before = [p.detach().clone() for p in task.model.parameters()]
    with torch.no_grad():
        chances = task.model(batch.weak).softmax(1)
    kept = chances.amax(1) >= threshold
    assert int(kept.sum()) == 8  # of 16
    loss = functional.cross_entropy(task.model(batch.labelled), batch.labels)
    strong = functional.cross_entropy(task.model(batch.strong[kept]), chances.argmax(1)[kept])
    loss = loss + strong * kept.double().mean()
    gradients = torch.autograd.grad(loss, list(task.model.parameters()))
    task.step(batch, ignore)
    for p, old, gradient in zip(task.model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(old - p, gradient.to(p.dtype), rtol=1e-3, atol=1e-6)


# --- one update ---------------------------------------------------------------------------------


def plain_loop(task: SemiSupervised, visits: list[int]) -> tuple[dict, dict]:
    """FixMatch written out, over the task's batches: weights and EMA weights at the end."""
    config = task.config
    model, ema = deepcopy(task.model), deepcopy(task.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, fused=True)
    for index in visits:
        batch = task.fresh_batch(index)
        logits = model(torch.cat([batch.labelled, batch.weak, batch.strong]))
        b, u = len(batch.labelled), len(batch.weak)
        chances = torch.softmax(logits[b : b + u].detach(), dim=1)
        best, guess = chances.max(dim=1)
        mask = (best >= config.threshold).float()
        supervised = functional.cross_entropy(logits[:b], batch.labels, reduction="none")
        unsupervised = functional.cross_entropy(logits[b + u :], guess, reduction="none") * mask
        loss = (supervised + unsupervised.view(b, -1).mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - config.ema_decay)
            for slow, fast in zip(ema.buffers(), model.buffers(), strict=True):
                slow.copy_(fast)
    return model.state_dict(), ema.state_dict()


@pytest.mark.parametrize("model", ["cnn", "norm_cnn"])
def test_updates_are_bit_equal_to_a_plain_loop(model):
    task = build(model=model, lr=0.05, threshold=0.2, ema_decay=0.7)
    visits = [0, 0, 1, 2, 2, 2]
    wanted = [deepcopy(part) for part in plain_loop(task, visits)]
    for index in visits:
        task.step(task.fresh_batch(index), ignore)
    for found, expected in zip((task.model, task.ema), wanted, strict=True):
        assert same(list(found.state_dict().values()), list(expected.values()))


def test_the_loop_makes_the_same_updates(tmp_path):
    """From the store, through repetition, to the last bit."""
    fields = {"labels": 40, "batch_size": 8, "mu": 2, "width": 4, "lr": 0.05, "threshold": 0.2}
    config = parse(
        RunConfig,
        {
            "task": {"name": "semisupervised", **fields},
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
    assert run.summary["ledger"]["forward_samples"] == 5 * 8 * (1 + 2 * 2)
    assert set(run.pictures) == {"weak", "strong"}


def test_the_ema_moves_once_an_update_or_once_a_fresh_batch():
    ends = {}
    for clock in ("updates", "fresh_batches"):
        task = build(ema_clock=clock, ema_decay=0.5, lr=0.05)
        start = [p.clone() for p in task.ema.parameters()]
        passed = []
        for index in (0, 0, 1):
            task.step(task.fresh_batch(index), ignore)
            passed.append([p.detach().clone() for p in task.model.parameters()])
        moves = passed if clock == "updates" else [passed[0], passed[2]]
        for weights in moves:
            start = [old + 0.5 * (new - old) for old, new in zip(start, weights, strict=True)]
        ends[clock] = list(task.ema.parameters())
        for found, expected in zip(ends[clock], start, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not same(ends["updates"], ends["fresh_batches"])


def test_a_batch_that_comes_back_later_is_not_fresh_again():
    """Spaced visits: the EMA moves at the first visit to batches 0, 1 and 2 alone."""
    task, moved = build(ema_clock="fresh_batches", ema_decay=0.5, lr=0.05), []
    batches = [task.fresh_batch(index) for index in range(3)]
    for place, index in enumerate((0, 1, 0, 1, 2, 0, 2)):
        before = [p.clone() for p in task.ema.parameters()]
        task.step(batches[index], ignore)
        if not same(before, list(task.ema.parameters())):
            moved.append(place)
    assert moved == [0, 1, 4]


def test_weights_act_on_the_gradient_and_not_on_the_driver_loss():
    """A weight of 2 on half of the samples is the plain update on that half alone."""
    reports, ends = [], []
    batch = build(threshold=0.1).fresh_batch(0)
    half = SemiBatch(
        *(part[:4] for part in batch[:2]),
        *(part[:8] for part in batch[2:4]),
        batch.indices[:4],
        batch.unlabelled[:8],
        0,
    )
    chosen = torch.tensor([2.0] * 4 + [0.0] * 4)
    for step_batch, sample_weights in ((batch, None), (batch, chosen), (half, None)):
        task = build(lr=0.1, threshold=0.1)
        task.step(step_batch, lambda loss, *_: reports.append(loss), sample_weights)
        ends.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))
    assert reports[0].item() == reports[1].item()
    torch.testing.assert_close(ends[1], ends[2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-4, atol=1e-6)


def test_without_unlabelled_images_it_is_supervised_training():
    task = build(mu=0, lr=0.05)
    assert task.forward_samples == 8
    batch = task.fresh_batch(0)
    reported = []
    task.step(batch, reported.append)
    expected = functional.cross_entropy(build(mu=0).model(batch.labelled), batch.labels)
    assert reported[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert task.pictures() == {}


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


def test_a_fresh_batch_is_a_function_of_seed_and_index():
    task = build(lr=0.1)
    for index in (4, 0, 2):
        task.step(task.fresh_batch(index), ignore)
    torch.rand(1)
    wanted = build(driver="unsupervised").fresh_batch(3)
    assert same_batch(task.fresh_batch(3), wanted)
    assert not same_batch(build(seed=1).fresh_batch(3), wanted)


def test_companions_are_weak_and_strong_views_of_the_unlabelled_images_they_name():
    task = build(dataset="digits")
    batch = task.fresh_batch(5)
    assert batch.weak.shape == batch.strong.shape == (16, 1, 8, 8)
    mean, std = task.data.mean[0], task.data.std[0]
    images = functional.pad(task.data.train.images[batch.unlabelled].float(), (1, 1, 1, 1))
    seen = ((batch.weak * std + mean) * 255).round()
    for padded, view in zip(images, seen, strict=True):
        crops = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        assert any(torch.equal(view, crop) for crop in crops)
    changed = (batch.weak != batch.strong).flatten(1).any(1)
    assert changed.all()


def test_a_refreshed_batch_shows_the_same_samples_anew():
    task = build()
    batch = task.fresh_batch(5)
    first, second, again = (task.refresh(batch, visit) for visit in (1, 2, 1))
    assert same_batch(first, again)
    for view in (first, second):
        assert torch.equal(view.indices, batch.indices)
        assert torch.equal(view.unlabelled, batch.unlabelled)
        assert torch.equal(view.labels, batch.labels)
    for part in ("labelled", "weak", "strong"):
        seen = {getattr(view, part).numpy().tobytes() for view in (batch, first, second)}
        assert len(seen) == 3


@pytest.mark.parametrize(("total", "size"), [(10, 4), (10, 10), (3, 8), (7, 1)])
def test_unlabelled_images_come_in_whole_epochs(total, size):
    order = EpochOrder(total, size, seed=0, name="order")
    pieces = torch.cat([order.piece(i) for i in range(total)])
    assert len(pieces) == total * size
    for epoch in pieces.split(total):
        assert sorted(epoch.tolist()) == list(range(total))
    assert torch.equal(EpochOrder(total, size, seed=0, name="order").piece(2), order.piece(2))
    assert not torch.equal(
        torch.cat([EpochOrder(total, size, seed=1, name="order").piece(i) for i in range(total)]),
        pieces,
    )


def test_labels_are_stratified_and_fixed_by_the_split_seed_alone():
    first, other = build(labels=40), build(seed=5, labels=40)
    assert torch.equal(first.labelled.images, other.labelled.images)
    # Digits has between 174 and 183 images of a class: forty labels are four of each.
    assert np.bincount(first.labelled.labels).tolist() == [4] * 10
    assert not torch.equal(build(split_seed=1).labelled.images, first.labelled.images)
    whole = first.data.train
    assert labelled_subset(whole, None, 0) is whole
    assert labelled_subset(whole, len(whole), 0) is whole


@pytest.mark.parametrize("labels", [9, 1075])
def test_a_number_of_labels_that_leaves_a_class_out_is_refused(labels):
    with pytest.raises(ValueError, match=f"`labels` must be from 10, .* not {labels}"):
        labelled_subset(build().data.train, labels, 0)


def test_stl10_s_unlabelled_images_are_taken_from_their_file(tmp_path, monkeypatch):
    from hashlib import md5

    draws = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 60), ("test", 20), ("unlabeled", 30)):
        pixels = draws.integers(256, size=(count, 3, 96, 96), dtype=np.uint8)
        files[f"stl10_binary/{part}_X.bin"] = pixels.tobytes()
        if part != "unlabeled":
            files[f"stl10_binary/{part}_y.bin"] = bytes(1 + i % 10 for i in range(count))
    (tmp_path / "stl10_binary").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    sums = {name: md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(stl10, "STL10", stl10.sources.Source("stl10", "", sums, {}))
    monkeypatch.setenv("REPEATLAB_DATA", str(tmp_path))
    loaded = dataset.load_splits("stl10", validation=20)
    monkeypatch.setattr(dataset, "load_splits", lambda *_, **__: loaded)

    config = {"dataset": "stl10", "labels": None, "model": "resnet18", "batch_size": 2, "mu": 1}
    task = build(**config)
    task.config.prepare()
    assert isinstance(task.unlabelled, stl10.MappedImages)
    assert task.model.maxpool.kernel_size == 3  # the stem for large images
    batch = task.fresh_batch(0)
    assert batch.weak.shape == (2, 3, 96, 96)
    image = task.unlabelled.take(batch.unlabelled[:1])[0]
    seen = (batch.weak[0] * torch.tensor(task.data.std).view(-1, 1, 1)).add(
        torch.tensor(task.data.mean).view(-1, 1, 1)
    )
    padded = functional.pad((image / 255), (12, 12, 12, 12))
    mirrored = padded.flip(-1)
    places = [
        (source[:, i : i + 96, j : j + 96] - seen).abs().max()
        for source in (padded, mirrored)
        for i in range(25)
        for j in range(25)
    ]
    assert min(places) < 1e-5
    reported = []
    task.step(batch, reported.append)
    assert torch.isfinite(reported[0])


# --- networks -----------------------------------------------------------------------------------


def test_networks_have_the_parameters_of_their_layers():
    count = {
        name: sum(
            p.numel() for p in build_classifier(name, 3, 10, side=side, width=16)[0].parameters()
        )
        for name, side in (("cnn", 32), ("norm_cnn", 32), ("resnet18", 96))
    }
    assert count["cnn"] == (27 + 1) * 16 + (144 + 1) * 32 + (128 + 1) * 10
    assert count["norm_cnn"] == 27 * 16 + 144 * 32 + 288 * 64 + 2 * (16 + 32 + 64) + 65 * 10
    # torchvision's own count of ResNet-18, 11,689,512, with 10 classes in place of 1,000.
    assert count["resnet18"] == 11_689_512 - 990 * 513


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="cnn, norm_cnn, resnet9 and resnet18; not 'vgg'"):
        build_classifier("vgg", 3, 10, side=32, width=1)


# --- evaluation and state -----------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_evaluation_leaves_no_trace(split):
    task = build(model="norm_cnn", lr=0.05)
    task.step(task.fresh_batch(0), ignore)
    before, state = tensors(task), torch.get_rng_state()
    found = task.evaluate(split)
    assert task.evaluate(split) == found
    task.sample_losses(task.fresh_batch(1))
    assert same(before, tensors(task))
    assert task.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_metrics_are_those_of_scikit_learn_on_the_ema_network(monkeypatch):
    monkeypatch.setattr(learner, "EVALUATION_BATCH", 100)
    task = build(lr=0.05, ema_decay=0.5, threshold=0.6, width=8)
    for index in range(40):
        task.step(task.fresh_batch(index), ignore)
    found = task.evaluate("validation")
    data = task.data.validation
    images = (data.images.double() / 255 - task.data.mean[0]) / task.data.std[0]
    with torch.no_grad():
        chances = task.ema(images.float()).double().softmax(1).numpy()
    labels, guesses = data.labels.numpy(), chances.argmax(1)
    assert found == pytest.approx(
        {
            "loss": log_loss(labels, chances, labels=range(10)),
            "accuracy": accuracy_score(labels, guesses),
            "macro_f1": f1_score(labels, guesses, average="macro", zero_division=0),
            "mask_rate": (chances.max(1) >= 0.6).mean(),
        },
        rel=1e-5,
    )
    assert found["accuracy"] > 0.4
    assert 0 < found["mask_rate"] < 1


@pytest.mark.parametrize("clock", ["updates", "fresh_batches"])
def test_a_restored_task_goes_on_as_if_nothing_had_happened(clock):
    settings = {"lr": 0.1, "model": "norm_cnn", "ema_clock": clock}
    task, other = build(**settings), build(seed=9, **settings)
    other.seed = other.stream.seed = other.order.seed = 0
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


def test_pictures_are_views_in_grey_levels():
    found = build().pictures()
    assert {name: (views.shape, views.dtype) for name, views in found.items()} == {
        "weak": ((16, 8, 8), np.dtype("uint8")),
        "strong": ((16, 8, 8), np.dtype("uint8")),
    }


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"mu": 0, "driver": "unsupervised"}, "mu: 0 leaves no unsupervised loss"),
        ({"optimizer": {"name": "nesterov", "momentum": 0.0}}, "optimizer: momentum must be above"),
        ({"threshold": 1.5}, "threshold"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"driver": "ema"}, "driver"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse(SemiSupervisedConfig, {"name": "semisupervised", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # Digits has 1,079 training images of ten classes.
        ({"labels": 9, "batch_size": 4}, "labels: .* from 10, one of every class, to 1069, or nul"),
        ({"labels": 1075}, "labels: .* to 1069, or null for all 1079; not 1075"),
        ({"labels": 2000}, "labels: .* to 1069, or null for all 1079; not 2000"),
        ({"labels": None, "batch_size": 1080}, "batch_size: 1080 exceeds the 1079 samples that"),
    ],
)
def test_sizes_that_the_data_have_not_are_refused_before_a_run(fields, message):
    config = parse(SemiSupervisedConfig, {"name": "semisupervised", **fields})
    with pytest.raises(ConfigError, match=rf"task\.{message}"):
        config.prepare()


@pytest.mark.parametrize("labels", [10, 1069, 1079, None])
def test_sizes_that_the_data_have_are_fine(labels):
    build(labels=labels).config.prepare()


def test_the_defaults_are_the_plan_s():
    config = SemiSupervisedConfig()
    assert (config.lr, config.batch_size) == (1e-3, 64)
    assert config.optimizer == chosen("momentum", momentum=0.9, weight_decay=0.0)
    assert (config.threshold, config.unlabelled_weight, config.ema_decay) == (0.95, 1.0, 0.999)


# --- fewer labels than a batch ------------------------------------------------------------------


def test_40_labels_are_repeated_to_fill_a_batch_of_64_evenly(tmp_path):
    task = build(labels=40, batch_size=64, mu=1)
    seen = torch.zeros(40, dtype=torch.int64)
    for index in range(50):
        indices = task.fresh_batch(index).indices
        counts = indices.bincount(minlength=40)
        assert len(indices) == 64
        assert int(counts.max()) <= 2  # 64 of 40 labels, each twice
        assert int((counts > 0).sum()) >= 32
        seen += counts
    assert (seen.double() / 80 - 1).abs().max() < 0.25
    assert not torch.equal(task.fresh_batch(0).indices, task.fresh_batch(1).indices)
    run = {
        "task": {"name": "semisupervised", "labels": 40, "batch_size": 64, "mu": 1, "width": 2},
        "max_updates": 3,
        "evaluation": {"splits": [], "test": False},
    }
    assert train(parse(RunConfig, run), tmp_path).status == {"status": "complete"}


@pytest.mark.parametrize("sampler", [{"name": "hard_mining"}, {"name": "online"}])
def test_different_samples_cannot_fill_it(sampler):
    run = {
        "task": {"name": "semisupervised", "labels": 40, "batch_size": 64},
        "method": {"sampler": sampler},
        "max_updates": 3,
    }
    with pytest.raises(ConfigError, match="40 labels are fewer than the different samples"):
        parse(RunConfig, run)
