"""The generative task: DCGAN's networks, its two-step update, metrics and state."""

from __future__ import annotations

import io
from math import log

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive
from repeatlab.data import ImageSet, Splits, TrainStream, load_splits
from repeatlab.tasks import dataset
from repeatlab.tasks.fid import Fid
from repeatlab.tasks.generative import (
    Generative,
    GenerativeConfig,
    build_discriminator,
    build_generator,
    initialize,
    stages,
)
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

pytestmark = pytest.mark.usefixtures("one_thread")
DRIVERS = ["discriminator", "generator", "sum"]


def build(seed: int = 0, **fields) -> Generative:
    fields = {"width": 4, "latent": 6, "batch_size": 16, "fid_samples": 100} | fields
    return Generative(GenerativeConfig(**fields), seed=seed, device="cpu")


def state(task: Generative) -> torch.Tensor:
    """Return all weights and BatchNorm statistics of both networks."""
    tensors = [*task.g.state_dict().values(), *task.d.state_dict().values()]
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def run(task: Generative, *indices: int) -> list[float]:
    """Make one update on each of these fresh batches and return the losses reported."""
    losses: list[float] = []
    for index in indices:
        task.step(task.fresh_batch(index), lambda loss: losses.append(loss.item()))
    return losses


def undecided(**fields) -> Generative:
    """Return a task whose D says 1/2 to everything, and cannot learn otherwise."""
    task = build(lr=1e-12, **fields)
    nn.init.zeros_(task.d[-2].weight)
    return task


# --- the networks -------------------------------------------------------------------------------


def test_the_pair_for_cifar_10_has_about_two_million_parameters():
    """Layer by layer at width 64 and 100 latent dimensions."""
    g = build_generator(channels=3, size=32, width=64, latent=100)
    d = build_discriminator(channels=3, size=32, width=64)
    doubling = 16 * (256 * 128 + 128 * 64)
    expected_g = 16 * 100 * 256 + doubling + 16 * 64 * 3 + 2 * (256 + 128 + 64)
    expected_d = 16 * 3 * 64 + doubling + 16 * 256 + 2 * (128 + 256)
    assert sum(p.numel() for p in g.parameters()) == expected_g
    assert sum(p.numel() for p in d.parameters()) == expected_d
    assert round((expected_g + expected_d) / 1e6) == 2


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 16), (3, 32), (3, 128)])
def test_images_have_the_size_that_was_asked_for(channels, size):
    shape = {"channels": channels, "size": size, "width": 2}
    images = build_generator(**shape, latent=5)(torch.randn(3, 5, 1, 1))
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1
    assert build_discriminator(**shape)(images).shape == (3,)


@pytest.mark.parametrize("size", [4, 12, 28, 33])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=str(size)):
        stages(size, 8)


def test_only_hidden_layers_have_batch_norm():
    """Radford et al. 2016, section 3: not at G's output, not at D's input."""
    kinds = {
        name: [type(layer).__name__ for layer in network]
        for name, network in (
            ("g", build_generator(channels=3, size=32, width=2, latent=5)),
            ("d", build_discriminator(channels=3, size=32, width=2)),
        )
    }
    assert kinds["g"] == ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 3 + [
        "ConvTranspose2d",
        "Tanh",
    ]
    hidden = ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2
    assert kinds["d"] == ["Conv2d", "LeakyReLU", *hidden, "Conv2d", "Flatten"]


def test_weights_start_as_in_the_paper():
    torch.manual_seed(0)
    for network in (
        build_generator(channels=3, size=32, width=32, latent=100),
        build_discriminator(channels=3, size=32, width=32),
    ):
        network.apply(initialize)
        for layer in network:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.weight.numel() > 1000:
                values = layer.weight.detach()
                error = 4 * 0.02 / values.numel() ** 0.5
                assert values.mean().item() == pytest.approx(0, abs=error)
                assert values.std().item() == pytest.approx(0.02, abs=error)
            elif isinstance(layer, nn.BatchNorm2d):
                assert layer.weight.mean().item() == pytest.approx(1, abs=0.02)
                assert not layer.bias.any()


# --- one update ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "expected"),
    [("discriminator", 1.386294), ("generator", 0.693147), ("sum", 2.079442)],
)
def test_a_discriminator_that_says_one_half_gives_the_equilibrium_s_loss(driver, expected):
    assert expected == pytest.approx(log(2) * {"d": 2, "g": 1, "s": 3}[driver[0]], abs=1e-6)
    assert run(undecided(driver=driver), 0)[0] == pytest.approx(expected, abs=1e-5)
    metrics = undecided(driver=driver).evaluate("train")
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["discriminator_loss"] == pytest.approx(2 * log(2), abs=1e-5)
    assert metrics["generator_loss"] == pytest.approx(log(2), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_fresh_pair_starts_near_the_equilibrium_s_loss(seed):
    assert run(build(seed, width=16, batch_size=64), 0)[0] == pytest.approx(2 * log(2), rel=0.25)


@pytest.mark.parametrize("driver", DRIVERS)
def test_updates_are_bit_identical_to_a_loop_written_out(driver):
    """The usual script: D on real and generated, then G through the new D. Two visits a batch."""
    visits = [0, 0, 1, 1]
    task = build(seed=5, driver=driver)
    reported = run(task, *visits)

    stream = TrainStream(
        load_splits("digits").train, batch_size=16, seed=5, mean=(0.5,), std=(0.5,)
    )
    torch.manual_seed(derive(5, "weights"))
    g = build_generator(channels=1, size=8, width=4, latent=6).apply(initialize)
    d = build_discriminator(channels=1, size=8, width=4).apply(initialize)
    adam = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": True}
    g_optimizer, d_optimizer = (torch.optim.Adam(m.parameters(), **adam) for m in (g, d))
    noise = torch.Generator().manual_seed(derive(5, "noise"))
    losses = []
    for index in visits:
        real = stream.fresh_batch(index).images
        fake = g(torch.randn((16, 6, 1, 1), generator=noise))
        d_loss = functional.softplus(-d(real)).mean() + functional.softplus(d(fake.detach())).mean()
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_loss = functional.softplus(-d(fake)).mean()
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        total = (g_loss + d_loss).item()
        losses.append({"d": d_loss.item(), "g": g_loss.item(), "s": total}[driver[0]])
    assert reported == losses
    expected = [*g.state_dict().values(), *d.state_dict().values()]
    assert torch.equal(state(task), torch.cat([t.double().flatten() for t in expected]))


def test_the_losses_are_the_cross_entropies_of_real_and_generated():
    """Through binary cross-entropy, as the paper's code has it; `sum` so that both are seen."""
    task, logits = build(driver="sum"), []
    task.d.register_forward_hook(lambda module, given, result: logits.append(result.detach()))
    (reported,) = run(task, 0)
    real, fake, later = logits  # three passes through D, as the ledger's count has it
    bce = functional.binary_cross_entropy
    expected = bce(real.sigmoid(), torch.ones(16)) + bce(fake.sigmoid(), torch.zeros(16))
    expected += bce(later.sigmoid(), torch.ones(16))
    assert reported == pytest.approx(expected.item(), rel=1e-5)
    assert not torch.equal(fake, later)
    assert task.forward_samples == task.backward_samples == 16 * (len(logits) + 1)


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_loss_is_reported_once_and_as_soon_as_it_is_known(driver):
    task, seen = build(driver=driver), []
    task.d_learner.optimizer.register_step_pre_hook(lambda *_: seen.append("d"))
    task.g_learner.optimizer.register_step_pre_hook(lambda *_: seen.append("g"))

    def report(loss):
        assert loss.ndim == 0
        seen.append("report")
        assert all(p.grad is None for p in task.g.parameters())
        assert (driver == "discriminator") == all(p.grad is None for p in task.d.parameters())

    task.step(task.fresh_batch(0), report)
    assert seen == (["report", "d", "g"] if driver == "discriminator" else ["d", "report", "g"])
    assert all(p.requires_grad for p in task.d.parameters())


def test_each_step_moves_its_own_network_only():
    task, changed = build(), []

    def compare(*_):
        changed.append([torch.equal(*pair) for pair in zip(before, snapshot(), strict=True)])

    def snapshot():
        return [nn.utils.parameters_to_vector(m.parameters()).clone() for m in (task.d, task.g)]

    before = snapshot()
    task.d_learner.optimizer.register_step_post_hook(compare)
    task.g_learner.optimizer.register_step_post_hook(compare)
    run(task, 0)
    assert changed == [[False, True], [False, False]]


def test_weights_act_on_the_real_images_in_d_s_gradient_and_not_on_the_driver_loss():
    batch = build().fresh_batch(0)
    draws = torch.Generator().manual_seed(0)
    sample_weights = torch.rand(16, generator=draws) * 2
    plain, weighted = build(), build()
    reports, gradients = [], []
    for task, chosen in ((plain, None), (weighted, sample_weights)):
        task.d_learner.optimizer.register_step_pre_hook(
            lambda *_, task=task: gradients.append([p.grad.clone() for p in task.d.parameters()])
        )
        task.step(batch, lambda loss, *_: reports.append(loss.item()), chosen)
    assert reports[0] == reports[1]

    reference = build()
    fake = reference.g(torch.randn((16, 6, 1, 1), generator=reference.noise)).detach()
    real_losses = functional.softplus(-reference.d(batch.images))
    fake_losses = functional.softplus(reference.d(fake))
    loss = (sample_weights * real_losses + fake_losses).mean()
    expected = torch.autograd.grad(loss, list(reference.d.parameters()))
    for found, other, plainly in zip(gradients[1], expected, gradients[0], strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found, plainly, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("driver", DRIVERS)
def test_sample_losses_average_to_the_driver_in_evaluation_mode_and_leave_no_trace(driver):
    task, other = build(driver=driver), build()
    run(task, 0)
    run(other, 0)
    batch = task.fresh_batch(1)
    losses = task.sample_losses(batch)
    assert losses.shape == (16,)
    assert not losses.requires_grad
    assert task.g.training
    assert task.d.training
    run(task, 1)
    run(other, 1)
    assert torch.equal(state(task), state(other))

    # With BatchNorm on its running statistics in the update as well, and nothing learned in it.
    task = build(driver=driver, lr=1e-12)
    task.g.eval()
    task.d.eval()
    losses = []
    expected = task.sample_losses(batch).mean().item()
    task.g.eval()
    task.d.eval()
    task.step(batch, lambda loss: losses.append(loss.item()))
    assert losses == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("driver", DRIVERS)
def test_with_weights_an_update_reports_the_driver_of_every_pair_and_d_s_bounds(driver):
    """Through binary cross-entropy, from D's three passes, which are those without weights."""
    task, logits, reported = build(driver=driver), [], []
    run(task, 0)
    task.d.register_forward_hook(lambda module, given, result: logits.append(result.detach()))
    sample_weights = torch.rand(16, generator=torch.Generator().manual_seed(0)) * 2
    task.step(task.fresh_batch(1), lambda *told: reported.append(told), sample_weights)
    real, fake, later = logits
    bce = functional.binary_cross_entropy
    by_d = bce(real.sigmoid(), torch.ones(16), reduction="none")
    by_d += bce(fake.sigmoid(), torch.zeros(16), reduction="none")
    by_g = bce(later.sigmoid(), torch.ones(16), reduction="none")
    expected = {"discriminator": by_d, "generator": by_g, "sum": by_d + by_g}[driver]
    ((loss, losses, bounds),) = reported
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert losses.std() > 0
    assert not losses.requires_grad
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(bounds, 1 - real.sigmoid(), rtol=1e-4, atol=1e-6)


# --- repetition ---------------------------------------------------------------------------------


def test_a_repeat_redraws_the_noise_unless_it_is_told_to_keep_it():
    for redraw, equal in ((True, False), (False, True)):
        task = build(redraw_noise=redraw)
        batch = task.fresh_batch(0)
        draws = [task._latents(batch) for _ in range(2)]
        assert torch.equal(*draws) is equal
        assert not torch.equal(draws[0], task._latents(task.fresh_batch(1)))


def test_batch_norm_counts_the_passes_that_the_docstring_names():
    task = build(width=2)
    run(task, 0, 0)
    counts = [
        {int(m.num_batches_tracked) for m in network if isinstance(m, nn.BatchNorm2d)}
        for network in (task.g, task.d)
    ]
    assert counts == [{2}, {6}]


def test_a_refreshed_batch_is_the_batch():
    task = build()
    batch = task.fresh_batch(2)
    assert task.refresh(batch, 1) is batch


# --- evaluation ---------------------------------------------------------------------------------


def test_the_metrics_are_those_of_fixed_samples():
    task = build(driver="sum")
    run(task, *range(4))
    metrics = task.evaluate("test")
    assert set(metrics) == {"loss", "discriminator_loss", "generator_loss", "fid_classifier"}
    total = metrics["discriminator_loss"] + metrics["generator_loss"]
    assert metrics["loss"] == pytest.approx(total)
    assert set(task.evaluate("train")) == set(metrics) - {"fid_classifier"}

    splits = load_splits("digits")
    g, d = task.g.eval(), task.d.eval()
    with torch.no_grad():
        fakes = task._samples(100)
        real = splits.test.images / 127.5 - 1
        d_loss = -functional.logsigmoid(d(real)).mean() - functional.logsigmoid(-d(fakes)).mean()
        assert torch.equal(fakes[:3], build_samples(g, 100)[:3])
    assert metrics["discriminator_loss"] == pytest.approx(d_loss.item(), rel=1e-4)
    pixels = ((fakes + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    expected = Fid(splits, "classifier")(pixels, "test")
    assert metrics["fid_classifier"] == pytest.approx(expected, rel=1e-3)


def build_samples(g: nn.Module, count: int) -> torch.Tensor:
    latents = torch.Generator().manual_seed(derive(0, "latents"))
    return g(torch.randn((count, 6, 1, 1), generator=latents))


@pytest.mark.parametrize("fields", [{}, {"driver": "sum"}, {"redraw_noise": False}])
def test_evaluation_is_repeatable_and_leaves_no_trace(fields):
    task, other = build(**fields), build(**fields)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(task, 0, 0)
    metrics = [task.evaluate("validation") for _ in range(2)]
    assert metrics[0] == metrics[1]
    task.evaluate("train")
    task.pictures()
    assert task.g.training
    assert task.d.training
    run(task, 1)
    run(other, 0, 0, 1)
    assert torch.equal(state(task), state(other))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_learns():
    task = build(width=16, latent=20, batch_size=32, lr=4e-3, fid_samples=300)
    before = task.evaluate("validation")["fid_classifier"]
    run(task, *range(300))
    assert task.evaluate("validation")["fid_classifier"] < 0.5 * before


@pytest.fixture
def framed(monkeypatch):
    """Images of 12 pixels, which DCGAN cannot make: 16 with a frame of two."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 12, 12), generator=draws).to(torch.uint8)
    part = ImageSet(images, torch.arange(60) % 10)
    splits = Splits("squares", part, part, part, 10, (0.5,) * 3, (0.3,) * 3)
    monkeypatch.setattr(dataset, "load_splits", lambda *_, **__: splits)
    return build()


def test_images_of_other_sizes_are_framed_in_black_for_the_networks_only(framed):
    batch = framed.fresh_batch(0)
    assert batch.images.shape == (16, 3, 16, 16)
    assert (batch.images[:, :, :2] == -1).all()
    assert (batch.images[..., -2:] == -1).all()
    inside = framed.data.train.images[batch.indices] / 127.5 - 1
    torch.testing.assert_close(batch.images[..., 2:14, 2:14], inside)
    assert np.isfinite(run(framed, 0)[0])
    assert framed._to_pixels(batch.images).equal(framed.data.train.images[batch.indices])
    assert framed.pictures()["samples"].shape == (64, 12, 12, 3)


def test_the_pictures_are_bytes_of_the_data_s_size():
    pictures = build().pictures()
    assert list(pictures) == ["data", "samples"]
    for images in pictures.values():
        assert images.dtype == np.uint8
        assert images.shape == (64, 8, 8)
    validation = load_splits("digits").validation.images
    assert np.array_equal(pictures["data"], validation[:64, 0].numpy())


# --- seeds, state, configuration ----------------------------------------------------------------


def test_all_arms_of_a_seed_share_weights_and_fresh_batches():
    arms = [build(3), build(3, driver="generator"), build(3, redraw_noise=False)]
    assert all(torch.equal(state(arm), state(arms[0])) for arm in arms)
    run(arms[0], 0, 0, 0, 1)
    for arm in arms:
        assert torch.equal(arm.fresh_batch(7).images, arms[0].fresh_batch(7).images)
    assert not torch.equal(state(build(4)), state(build(3)))


@pytest.mark.parametrize("fields", [{}, {"driver": "sum"}, {"redraw_noise": False}])
def test_a_restored_task_goes_on_bit_by_bit(fields):
    task = build(**fields)
    run(task, 0, 0, 1)
    file = io.BytesIO()
    torch.save(task.state_dict(), file)
    file.seek(0)
    restored = build(**fields)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert run(task, 1, 2, 2) == run(restored, 1, 2, 2)
    assert torch.equal(state(task), state(restored))


def test_a_schedule_reaches_both_optimizers_and_one_repeat_is_standard(tmp_path):
    digests = []
    methods = ({}, {"mapping": {"name": "constant"}}, {"schedule": {"name": "cosine"}})
    for method in methods:
        config = {
            "task": {"name": "generative", "width": 4, "fid_samples": 50},
            "method": method,
            "max_updates": 5,
            "device": "cpu",
        }
        record = train(parse(RunConfig, config), tmp_path)
        assert record.summary["ledger"]["forward_samples"] == 5 * 4 * 64
        assert list(record.pictures) == ["data", "samples"]
        digests.append(record.summary["state_sha256"])
    assert digests[0] == digests[1] != digests[2]
    assert len(build().optimizers) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "cifar"}, "did you mean 'cifar10'"),
        ({"driver": "both"}, "driver"),
        ({"optimizer": {"name": "adam", "betas": [0.5, 1.0]}}, "optimizer: betas must be"),
        ({"batch_size": 1}, "batch_size"),
        ({"extractor": "vgg"}, "extractor"),
        ({"momentum": 0.5}, "unknown key"),
    ],
)
def test_a_wrong_configuration_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse(GenerativeConfig, {"name": "generative"} | fields)
