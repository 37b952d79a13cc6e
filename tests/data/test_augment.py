"""Augmented batches: torchvision's results sample by sample, as a function of (seed, index)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import transforms
from torchvision.transforms import functional, v2

from repeatlab.data import ImageSet, TrainStream, iter_batches
from repeatlab.data.augment import crop_flip, normalize, random_crop_flip

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def pictures(count: int, channels: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=draws)


def dataset(count: int) -> ImageSet:
    """`count` samples that can be told apart by their labels."""
    return ImageSet(pictures(count), torch.arange(count))


def stream(count: int = 20, **settings) -> TrainStream:
    usual = {"batch_size": 6, "seed": 3, "mean": MEAN, "std": STD, "crop_padding": 2, "flip": True}
    return TrainStream(dataset(count), **{**usual, **settings})


def reference(image: torch.Tensor, top: int, left: int, mirrored: int, padding: int):
    """One sample by torchvision's functions, as RandomCrop and RandomHorizontalFlip call them."""
    height, width = image.shape[-2:]
    cropped = functional.crop(functional.pad(image, [padding]), top, left, height, width)
    return functional.hflip(cropped) if mirrored else cropped


# --- crop and flip ------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 4),
    channels=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 5),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
)
def test_crop_flip_is_torchvision_s_on_every_sample(
    data, count, channels, height, width, padding, dtype
):
    images = pictures(count, channels, height, width).to(dtype)
    place = st.lists(st.integers(0, 2 * padding), min_size=count, max_size=count)
    top, left = data.draw(place), data.draw(place)
    mirrored = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    found = crop_flip(
        images, torch.tensor(top), torch.tensor(left), torch.tensor(mirrored), padding=padding
    )
    wanted = [
        reference(image, *choice, padding)
        for image, *choice in zip(images, top, left, mirrored, strict=True)
    ]
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack(wanted))


@pytest.mark.parametrize("flip", [False, True])
def test_every_sample_draws_its_own_place_and_mirror_evenly(flip):
    from scipy.stats import chisquare

    padding, count = 1, 9_000
    image = pictures(1, height=5, width=5)
    outcomes = {
        reference(image[0], top, left, mirrored, padding).numpy().tobytes(): (top, left, mirrored)
        for top in range(3)
        for left in range(3)
        for mirrored in range(1 + flip)
    }
    assert len(outcomes) == 9 * (1 + flip)  # the picture tells all outcomes apart
    found = random_crop_flip(
        image.expand(count, -1, -1, -1), torch.Generator().manual_seed(0), padding=1, flip=flip
    )
    counts = Counter(outcomes[sample.tobytes()] for sample in found.numpy())
    assert set(counts) == set(outcomes.values())
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_switching_the_flip_off_leaves_the_crops_as_they_were():
    images = pictures(32)
    cropped = random_crop_flip(images, torch.Generator().manual_seed(1), padding=2)
    both = random_crop_flip(images, torch.Generator().manual_seed(1), padding=2, flip=True)
    mirrored = (both == cropped.flip(-1)).flatten(1).all(1)
    plain = (both == cropped).flatten(1).all(1)
    assert bool((mirrored ^ plain).all())
    assert bool(mirrored.any())
    assert bool(plain.any())


# --- normalisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_is_bit_equal_to_to_tensor_and_normalize(channels):
    # All 256 values in every channel.
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    mean, std = MEAN[:channels], STD[:channels]
    by_pil = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    by_v2 = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    found = normalize(images, mean, std)
    assert found.dtype == torch.float32
    for image, result in zip(images, found, strict=True):
        assert torch.equal(result, by_pil(functional.to_pil_image(image)))
        # v2 multiplies by 1 / 255 where ToTensor divides: a rounding apart, no more.
        torch.testing.assert_close(result, by_v2(image), rtol=0, atol=1e-6)


def test_normalize_takes_scaled_floats_and_leaves_them_alone():
    images = pictures(2)
    scaled = images.to(torch.float32) / 255
    before = scaled.clone()
    assert torch.equal(normalize(scaled, MEAN, STD), normalize(images, MEAN, STD))
    assert torch.equal(scaled, before)


# --- the stream of batches ----------------------------------------------------------------------


def assert_same(one, other) -> None:
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.indices, other.indices)
    assert one.index == other.index


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 30))
@settings(deadline=None)
def test_a_batch_depends_on_seed_and_index_alone(history, index):
    busy = stream()
    for earlier in history:
        busy.fresh_batch(earlier, view=earlier % 3)
    torch.rand(1)  # the global generator has no part in it
    assert_same(busy.fresh_batch(index), stream().fresh_batch(index))


@given(st.integers(0, 30), st.integers(1, 9), st.integers(0, 2), st.booleans())
@settings(deadline=None)
def test_batches_made_together_are_those_made_one_by_one(first, count, padding, flip):
    made = stream(crop_padding=padding, flip=flip)
    together = made.fresh_batches(first, count)
    assert [batch.index for batch in together] == list(range(first, first + count))
    for batch in together:
        assert_same(batch, stream(crop_padding=padding, flip=flip).fresh_batch(batch.index))


def test_making_batches_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    stream().fresh_batch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_seeds_and_epochs_have_other_orders():
    orders = [
        tuple(torch.cat([s.indices(e * 5 + i) for i in range(5)]).tolist())
        for s in (stream(50, batch_size=10), stream(50, batch_size=10, seed=4))
        for e in range(3)
    ]
    assert len(set(orders)) == 6


@given(st.integers(1, 40), st.data())
@settings(deadline=None)
def test_an_epoch_visits_every_sample_at_most_once_and_leaves_less_than_a_batch(count, data):
    size = data.draw(st.integers(1, count))
    epoch = data.draw(st.integers(0, 3))
    batches = stream(count, batch_size=size)
    per_epoch = batches.batches_per_epoch
    visited = [
        sample
        for index in range(epoch * per_epoch, (epoch + 1) * per_epoch)
        for sample in batches.fresh_batch(index).indices.tolist()
    ]
    assert len(visited) == len(set(visited))
    assert set(visited) <= set(range(count))
    assert 0 <= count - len(visited) < size


def test_without_augmentation_a_batch_holds_the_samples_it_names():
    batch = stream(crop_padding=0, flip=False).fresh_batch(4)
    data = dataset(20)
    assert torch.equal(batch.images, normalize(data.images[batch.indices], MEAN, STD))
    assert torch.equal(batch.labels, batch.indices)  # the labels of `dataset` count its samples
    assert batch.index == 4


def test_an_augmented_batch_shows_each_sample_at_some_place():
    batch = stream().fresh_batch(2)
    data = dataset(20)
    for image, sample in zip(batch.images, batch.indices, strict=True):
        candidates = [
            normalize(reference(data.images[sample], top, left, mirrored, 2)[None], MEAN, STD)[0]
            for top in range(5)
            for left in range(5)
            for mirrored in range(2)
        ]
        assert any(torch.equal(image, candidate) for candidate in candidates)


def test_other_views_show_the_same_samples_under_other_draws():
    batches = stream(batch_size=20)
    views = [batches.fresh_batch(1, view) for view in range(3)]
    assert_same(views[0], batches.fresh_batch(1))
    for view in views[1:]:
        assert torch.equal(view.indices, views[0].indices)
        assert torch.equal(view.labels, views[0].labels)
    assert len({view.images.numpy().tobytes() for view in views}) == 3


def test_batch_of_takes_any_samples_under_the_augmentation_of_its_index():
    batches = stream()
    chosen = torch.tensor([5, 5, 0, 19])
    batch = batches.batch_of(chosen, 7)
    assert torch.equal(batch.indices, chosen)
    assert torch.equal(batch.labels, chosen)
    assert batch.index == 7
    assert_same(batches.batch_of(batches.indices(7), 7), batches.fresh_batch(7))


@pytest.mark.parametrize("size", [0, 21])
def test_a_batch_size_that_no_epoch_can_fill_is_refused(size):
    with pytest.raises(ValueError, match=rf"from 1 to the 20 samples.* not {size}"):
        stream(batch_size=size)


def test_a_negative_batch_index_is_refused():
    with pytest.raises(ValueError, match="counts from 0; not -1"):
        stream().fresh_batch(-1)


@pytest.mark.parametrize(("size", "lengths"), [(6, [6, 6, 6, 2]), (10, [10, 10]), (50, [20])])
def test_iter_batches_yields_everything_once_in_order(size, lengths):
    data = dataset(20)
    batches = list(iter_batches(data, size, MEAN, STD))
    assert [len(batch.labels) for batch in batches] == lengths
    assert [batch.index for batch in batches] == list(range(len(lengths)))
    assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.arange(20))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), data.labels)
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(images, normalize(data.images, MEAN, STD))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_batch_is_the_cpu_batch():
    usual = stream()
    there = TrainStream(
        dataset(20).to("cuda"), batch_size=6, seed=3, mean=MEAN, std=STD, crop_padding=2, flip=True
    )
    wanted, found = usual.fresh_batch(5), there.fresh_batch(5)
    assert found.images.is_cuda
    assert torch.equal(found.indices.cpu(), wanted.indices)
    assert torch.equal(found.labels.cpu(), wanted.labels)
    # CUDA multiplies by 1 / 255 where the CPU divides: one unit in the last place.
    torch.testing.assert_close(found.images.cpu(), wanted.images, rtol=1e-5, atol=1e-6)
