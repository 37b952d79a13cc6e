"""The unsupervised task: the VAE's losses by other formulas, its update, metrics and state."""

from __future__ import annotations

import io
from math import log

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive
from repeatlab.data import Batch, TrainStream, load_splits
from repeatlab.tasks.fid import Fid
from repeatlab.tasks.unsupervised import VAE, Unsupervised, UnsupervisedConfig, binarize
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed: int = 0, **fields) -> Unsupervised:
    fields = {"width": 4, "latent": 3, "batch_size": 32, "fid_samples": 100} | fields
    return Unsupervised(UnsupervisedConfig(**fields), seed=seed, device="cpu")


def weights(task: Unsupervised) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in task.model.parameters()])


def run(task: Unsupervised, *indices: int) -> list[float]:
    """Make one update on each of these fresh batches and return the losses reported."""
    losses: list[float] = []
    for index in indices:
        task.step(task.fresh_batch(index), lambda loss: losses.append(loss.item()))
    return losses


# --- the network and its losses -----------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size", "width", "latent"), [(1, 28, 32, 20), (3, 8, 4, 2)])
def test_the_parameters_are_those_of_the_layers(channels, size, width, latent):
    flat, hidden = 2 * width * (size // 4) ** 2, 5 * width
    encoder = (16 * channels + 1) * width + (16 * width + 1) * 2 * width
    encoder += (flat + 1) * hidden + (hidden + 1) * 2 * latent
    decoder = (latent + 1) * hidden + (hidden + 1) * flat
    decoder += (16 * 2 * width + 1) * width + (16 * width + 1) * channels
    model = VAE(channels, size, width=width, latent=latent)
    total = sum(p.numel() for p in model.parameters())
    assert total == encoder + decoder
    if size == 28:
        assert total == pytest.approx(1e6, rel=0.1)  # the plan: about a million


@pytest.mark.parametrize(("size", "expected"), [(28, 543.4274), (8, 44.3614)])
def test_a_fresh_network_reconstructs_at_ln_2_a_pixel(size, expected):
    assert expected == pytest.approx(size**2 * log(2), abs=1e-4)
    torch.manual_seed(0)
    model = VAE(1, size, width=4, latent=3)
    terms = model.terms(torch.rand(6, 1, size, size), torch.randn(6, 3))
    _, reconstruction, divergence = terms
    assert reconstruction.tolist() == pytest.approx([expected] * 6, abs=1e-3)
    assert divergence.mean() < 1


def test_a_fresh_task_starts_at_the_loss_of_a_guess():
    first = run(build(), 0)[0]
    assert first == pytest.approx(64 * log(2), rel=0.02)


def test_the_losses_are_those_of_torch_s_distributions():
    """Binary pixels, so that the Bernoulli is one; weights away from their start."""
    torch.manual_seed(1)
    model = VAE(1, 8, width=4, latent=3).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    images = torch.randint(2, (5, 1, 8, 8)).double()
    epsilon = torch.randn(5, 3).double()
    _, reconstruction, divergence = model.terms(images, epsilon)
    mean, log_variance = model.encode(images)
    posterior = Normal(mean, (log_variance / 2).exp())
    z = posterior.loc + posterior.scale * epsilon
    likelihood = Bernoulli(logits=model.decoder(z)).log_prob(images).flatten(1).sum(1)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(reconstruction, -likelihood)
    torch.testing.assert_close(divergence, kl_divergence(posterior, prior).sum(1))


def test_images_that_cannot_be_halved_twice_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        VAE(1, 30, width=4, latent=3)


# --- one update ---------------------------------------------------------------------------------


def test_updates_are_bit_identical_to_a_loop_written_out():
    """Two visits of each fresh batch, epsilon redrawn."""
    config, visits = UnsupervisedConfig(width=4, latent=3, batch_size=32), [0, 0, 1, 1, 2, 2]
    task = Unsupervised(config, seed=5, device="cpu")
    reported = run(task, *visits)

    train_split = load_splits("digits").train
    stream = TrainStream(train_split, batch_size=32, seed=5, mean=(0.0,), std=(1.0,))
    torch.manual_seed(derive(5, "weights"))
    model = VAE(1, 8, width=4, latent=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    noise = torch.Generator().manual_seed(derive(5, "epsilon"))
    losses = []
    for index in visits:
        images = stream.fresh_batch(index).images
        epsilon = torch.randn((32, 3), generator=noise)
        mean, log_variance = model.encoder(images).chunk(2, dim=1)
        logits = model.decoder(mean + (0.5 * log_variance).exp() * epsilon)
        bce = nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="none")
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        loss = (bce.flatten(1).sum(1) + kl.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert reported == losses
    assert torch.equal(weights(task), torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_the_loss_is_reported_once_before_the_backward():
    task, seen = build(), []
    task.optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    before = weights(task)

    def report(loss):
        assert loss.ndim == 0
        assert all(p.grad is None for p in task.model.parameters())
        assert torch.equal(weights(task), before)
        seen.append("report")

    task.step(task.fresh_batch(0), report)
    assert seen == ["report", "step"]
    assert not torch.equal(weights(task), before)


def test_the_driver_is_the_part_that_was_asked_for_and_the_update_the_same():
    ends, reports = {}, {}
    for driver in ("elbo", "reconstruction", "kl"):
        task = build(driver=driver)
        reports[driver] = run(task, 0, 1, 1)
        ends[driver] = weights(task)
    parts = zip(reports["reconstruction"], reports["kl"], strict=True)
    assert reports["elbo"] == pytest.approx([sum(part) for part in parts], rel=1e-6)
    assert min(reports["kl"]) > 0
    assert torch.equal(ends["elbo"], ends["kl"])
    assert torch.equal(ends["elbo"], ends["reconstruction"])


def test_weights_act_on_the_gradient_and_not_on_the_driver_loss():
    chosen = torch.zeros(32)
    chosen[:8] = 4.0  # the mean over 32 of these is the plain mean over the first 8
    batch = build().fresh_batch(0)
    part = Batch(batch.images[:8], batch.labels[:8], batch.indices[:8], 0)
    reports, ends = [], []
    for given, sample_weights in ((batch, None), (batch, chosen), (part, None)):
        task = build()
        # One epsilon for all samples: which of them are in the batch then makes no difference.
        task.draw = lambda b: (torch.arange(3.0).expand(len(b.images), 3),)
        for _ in range(2):
            task.step(given, lambda loss, *_: reports.append(loss.item()), sample_weights)
        ends.append(weights(task))
    assert reports[2] == pytest.approx(reports[0], rel=1e-6)
    torch.testing.assert_close(ends[1], ends[2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("driver", ["elbo", "reconstruction", "kl"])
@pytest.mark.parametrize("redraw", [True, False])
def test_sample_losses_average_to_the_next_driver_loss_and_leave_no_trace(driver, redraw):
    task, other = build(driver=driver, redraw_epsilon=redraw), build(redraw_epsilon=redraw)
    run(task, 0)
    run(other, 0)
    losses = task.sample_losses(task.fresh_batch(1))
    assert losses.shape == (32,)
    assert not losses.requires_grad
    assert losses.mean().item() == pytest.approx(run(task, 1)[0], rel=1e-6)
    run(other, 1)
    assert torch.equal(weights(task), weights(other))


# --- repetition ---------------------------------------------------------------------------------


def test_a_repeat_redraws_epsilon_unless_it_is_told_to_keep_it():
    for redraw, equal in ((True, False), (False, True)):
        task = build(redraw_epsilon=redraw)
        batch = task.fresh_batch(0)
        draws = [*task.draw(batch), *task.draw(batch)]
        assert torch.equal(*draws) is equal
        (other,) = task.draw(task.fresh_batch(1))
        assert not torch.equal(draws[0], other)


def test_binarised_batches_are_a_function_of_seed_and_index():
    task = build(binarize=True)
    batch = task.fresh_batch(3)
    assert set(batch.images.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(batch.images, build(binarize=True).fresh_batch(3).images)
    assert not torch.equal(batch.images, build(1, binarize=True).fresh_batch(3).images)
    first, second, again = (task.refresh(batch, visit) for visit in (1, 2, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.indices, batch.indices)
    assert not torch.equal(first.images, batch.images)
    assert not torch.equal(first.images, second.images)


def test_binarised_pixels_have_the_grey_level_as_their_mean():
    levels = torch.tensor([0.0, 0.25, 0.9, 1.0])
    draws = binarize(levels.expand(20_000, 4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), levels, atol=0.015, rtol=0)  # four sigma
    assert draws[:, 0].max() == 0
    assert draws[:, 3].min() == 1


def test_grey_batches_are_the_data_themselves():
    task = build()
    batch = task.fresh_batch(0)
    expected = load_splits("digits").train.images[batch.indices].float() / 255
    assert torch.equal(batch.images, expected)
    assert torch.equal(task.refresh(batch, 1).images, expected)


# --- evaluation ---------------------------------------------------------------------------------


def test_the_metrics_are_means_over_the_split():
    task = build(driver="kl")
    run(task, *range(5))
    metrics = task.evaluate("validation")
    assert set(metrics) == {"loss", "negative_elbo", "reconstruction", "kl", "fid_classifier"}
    assert metrics["loss"] == metrics["kl"]
    total = metrics["reconstruction"] + metrics["kl"]
    assert metrics["negative_elbo"] == pytest.approx(total)
    images = load_splits("digits").validation.images.float() / 255
    mean, log_variance = task.model.encode(images)
    posterior = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean().item()
    assert metrics["kl"] == pytest.approx(expected, rel=1e-5)
    assert set(task.evaluate("train")) == set(metrics) - {"fid_classifier"}


def test_fid_is_that_of_the_decoder_s_means():
    task = build()
    run(task, *range(5))
    samples = task._samples(100)
    assert samples.dtype == torch.uint8
    assert samples.shape == (100, 1, 8, 8)
    expected = Fid(load_splits("digits"), "classifier")(samples, "test")
    assert task.evaluate("test")["fid_classifier"] == expected


@pytest.mark.parametrize("fields", [{}, {"binarize": True}, {"redraw_epsilon": False}])
def test_evaluation_is_repeatable_and_leaves_no_trace(fields):
    task, other = build(**fields), build(**fields)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    run(task, 0, 0)
    metrics = [task.evaluate("validation") for _ in range(2)]
    assert metrics[0] == metrics[1]
    task.evaluate("train")
    task.pictures()
    run(task, 1)
    run(other, 0, 0, 1)
    assert torch.equal(weights(task), weights(other))
    assert torch.equal(torch.get_rng_state(), state)


def test_it_learns():
    task = build(width=8, latent=8)
    before = task.evaluate("validation")
    run(task, *range(300))
    after = task.evaluate("validation")
    for metric in ("negative_elbo", "reconstruction", "fid_classifier"):
        assert after[metric] < 0.75 * before[metric]


def test_the_pictures_are_bytes_of_the_data_s_size():
    pictures = build().pictures()
    assert list(pictures) == ["originals", "reconstructions", "samples"]
    for images in pictures.values():
        assert images.dtype == np.uint8
        assert images.shape == (16, 8, 8)
    validation = load_splits("digits").validation.images
    assert np.array_equal(pictures["originals"], validation[:16, 0].numpy())
    # Before training every pixel is even odds.
    assert set(np.unique(pictures["samples"])) == {128}


# --- seeds, state, configuration ----------------------------------------------------------------


def test_all_arms_of_a_seed_share_weights_and_fresh_batches():
    arms = [build(3), build(3, driver="kl"), build(3, redraw_epsilon=False)]
    assert all(torch.equal(weights(arm), weights(arms[0])) for arm in arms)
    run(arms[0], 0, 0, 0, 1)
    for arm in arms:
        assert torch.equal(arm.fresh_batch(7).images, arms[0].fresh_batch(7).images)
    assert not torch.equal(weights(build(4)), weights(build(3)))


@pytest.mark.parametrize("fields", [{}, {"redraw_epsilon": False}, {"binarize": True}])
def test_a_restored_task_goes_on_bit_by_bit(fields):
    task = build(**fields)
    run(task, 0, 0, 1)
    file = io.BytesIO()
    torch.save(task.state_dict(), file)
    file.seek(0)
    restored = build(seed=0, **fields)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert run(task, 1, 2, 2) == run(restored, 1, 2, 2)
    assert torch.equal(weights(task), weights(restored))


def test_one_repeat_is_standard_training(tmp_path):
    digests = []
    for method in ({}, {"mapping": {"name": "constant", "repeats": 1}}):
        config = {
            "task": {"name": "unsupervised", "width": 4, "fid_samples": 50},
            "method": method,
            "max_updates": 6,
            "device": "cpu",
        }
        record = train(parse(RunConfig, config), tmp_path)
        assert record.summary["ledger"]["forward_samples"] == 6 * 128
        assert list(record.pictures) == ["originals", "reconstructions", "samples"]
        digests.append(record.summary["state_sha256"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "mnits"}, "did you mean 'mnist'"),
        ({"driver": "recon"}, "driver"),
        ({"latent": 0}, "latent"),
        ({"fid_samples": 1}, "fid_samples"),
        ({"extractor": "vgg"}, "extractor"),
        ({"beta": 2.0}, "unknown key"),
    ],
)
def test_a_wrong_configuration_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse(UnsupervisedConfig, {"name": "unsupervised"} | fields)
