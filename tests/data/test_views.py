"""Strong augmentation of batches: torchvision's result on every sample, and the right laws."""

from __future__ import annotations

from math import atan, degrees

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torchvision import transforms
from torchvision.transforms.v2 import functional

from repeatlab.data import colour, randaugment
from repeatlab.data.randaugment import OPERATIONS, cutout, strong_augment
from repeatlab.data.views import ContrastiveViews, crop_resize, draw_crops, gaussian_blur

ROUNDING = {"rtol": 0, "atol": 3e-6}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 3, height: int = 12, width: int = 10) -> torch.Tensor:
    """Noise in which equal channels, black and white occur too."""
    images = torch.randint(
        256, (count, channels, height, width), dtype=torch.uint8, generator=generator()
    )
    images[:, :, 0] = images[:, :1, 0]
    images[:, :, 1, ::2] = 0
    images[:, :, 1, 1::2] = 255
    images[:, 0, 2] = images[:, -1, 2]  # two channels share the maximum or the minimum
    return images


def scaled(images: torch.Tensor) -> torch.Tensor:
    return images.to(torch.float32) / 255


def each(function, images, *strengths, **named) -> torch.Tensor:
    """Apply a function of torchvision image by image, each with its own strengths."""
    if not strengths:
        return torch.stack([function(image, **named) for image in images])
    rows = zip(*strengths, strict=True)
    return torch.stack([function(i, *s, **named) for i, s in zip(images, rows, strict=True)])


# --- colour -------------------------------------------------------------------------------------

# Not round: 0.2 * 5 k would lie on the edge at which bytes are cut.
FACTORS = [0.0, 0.2173, 0.6119, 1.0, 1.3217, 1.8071, 3.0]
HUES = [-0.5, -0.31, -0.1, 0.0, 0.07, 0.25, 0.5]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
def test_colour_factors_are_torchvision_s_on_floats_and_bytes(name, channels):
    images = pictures(len(FACTORS), channels)
    ours, theirs = getattr(colour, name), getattr(functional, name)
    found = ours(scaled(images), torch.tensor(FACTORS))
    torch.testing.assert_close(found, each(theirs, scaled(images), FACTORS), **ROUNDING)
    found, wanted = ours(images, torch.tensor(FACTORS)), each(theirs, images, FACTORS)
    assert found.dtype == torch.uint8
    # Cutting to whole numbers may turn the last bit of a float32 into a grey level.
    difference = (found.int() - wanted.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.005


@pytest.mark.parametrize("channels", [1, 3])
def test_the_hue_is_torchvision_s(channels):
    images = scaled(pictures(len(HUES), channels))
    found = colour.adjust_hue(images, torch.tensor(HUES))
    torch.testing.assert_close(found, each(functional.adjust_hue, images, HUES), **ROUNDING)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 255), min_size=3, max_size=3), st.floats(-0.5, 0.5, width=32))
def test_the_hue_of_any_colour_is_torchvision_s(pixel, shift):
    image = scaled(torch.tensor(pixel, dtype=torch.uint8)).view(1, 3, 1, 1)
    found = colour.adjust_hue(image, torch.tensor([shift]))
    torch.testing.assert_close(found, functional.adjust_hue(image, shift), **ROUNDING)


def test_grayscale_is_torchvision_s():
    images = scaled(pictures(3))
    wanted = functional.rgb_to_grayscale(images, num_output_channels=3)
    assert torch.equal(colour.grayscale(images), wanted)


# --- crop and blur ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(1, 13), st.integers(1, 13))
def test_a_resized_crop_is_torchvision_s_on_every_sample(data, channels, height, width):
    count = 3
    images = scaled(pictures(count, channels, max(height, 4), max(width, 4)))[..., :height, :width]
    tall = [data.draw(st.integers(1, height)) for _ in range(count)]
    wide = [data.draw(st.integers(1, width)) for _ in range(count)]
    top = [data.draw(st.integers(0, height - t)) for t in tall]
    left = [data.draw(st.integers(0, width - w)) for w in wide]
    mirrored = [data.draw(st.integers(0, 1)) for _ in range(count)]
    found = crop_resize(images, *(torch.tensor(v) for v in (top, left, tall, wide, mirrored)))
    # torch 2.15's antialiased interpolation is wrong for one column; enlarging needs none.
    size = {"size": [height, width], "antialias": min(wide + tall) > 1}
    wanted = each(functional.resized_crop, images, top, left, tall, wide, **size)
    wanted = [functional.hflip(w) if m else w for w, m in zip(wanted, mirrored, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("taps", [3, 5, 9])
def test_the_blur_is_torchvision_s_on_every_sample(taps):
    sigma = [0.1, 0.5, 1.0, 2.0]
    images = scaled(pictures(4))
    wanted = each(
        lambda image, s: functional.gaussian_blur(image, [taps, taps], [s, s]), images, sigma
    )
    found = gaussian_blur(images, torch.tensor(sigma), taps)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 47)])
def test_crops_have_the_law_of_torchvision_s(height, width):
    """Two samples of 4,000 boxes are told apart by no Kolmogorov-Smirnov test."""
    image = torch.empty(1, height, width)
    torch.manual_seed(0)
    drawn = transforms.RandomResizedCrop
    theirs = torch.tensor(
        [drawn.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    )
    ours = draw_crops(4000, height, width, generator(), min_area=0.08).T
    for one, other in zip(ours.T, theirs.T, strict=True):
        assert kstest(one.numpy(), other.numpy()).pvalue > 1e-3
    areas = [(boxes[:, 2] * boxes[:, 3]).numpy() for boxes in (ours, theirs)]
    assert kstest(*areas).pvalue > 1e-3


def test_boxes_that_cannot_fit_are_torchvision_s_centred_ones():
    height, width = 4, 40  # no box of a legal ratio has 90 % of the area
    wanted = transforms.RandomResizedCrop.get_params(
        torch.empty(1, height, width), (0.9, 1.0), (3 / 4, 4 / 3)
    )
    found = draw_crops(5, height, width, generator(), min_area=0.9)
    assert found.T.tolist() == [list(wanted)] * 5


# --- SimCLR's views -----------------------------------------------------------------------------


def test_without_any_change_a_view_is_the_image():
    plain = ContrastiveViews(min_area=1.0, flip=False, strength=0.0, gray=0.0)
    images = pictures(4, height=9, width=9)
    # At an area of 1 only a ratio near 1 fits, and the fallback is the whole square.
    boxes = draw_crops(4, 9, 9, generator(), min_area=1.0)
    whole = (boxes[2:] == 9).all(0)
    assert whole.any()
    torch.testing.assert_close(plain(images, generator())[whole], scaled(images)[whole], **ROUNDING)


def test_a_jittered_view_is_torchvision_s_four_operations_in_some_order():
    from itertools import permutations

    images = pictures(40, height=6, width=6)
    settings = {"min_area": 0.5, "flip": False, "gray": 0.0}
    before = ContrastiveViews(strength=0.0, **settings)(images, generator())
    after = ContrastiveViews(strength=0.5, jitter=1.0, **settings)(images, generator())
    # The draws that come after the crop's and the mirror's, made again.
    draws = generator()
    draw_crops(40, 6, 6, draws, min_area=0.5)
    torch.randint(2, (40,), generator=draws)
    torch.rand(40, generator=draws)
    torch.rand(40, 4, generator=draws)
    spread = 2 * torch.rand(4, 40, generator=draws) - 1
    factors = torch.cat([1 + 0.4 * spread[:3], 0.1 * spread[3:]])
    functions = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    orders = []
    for sample in range(40):
        distances = {}
        for order in permutations(range(4)):
            image = before[sample]
            for which in order:
                image = functions[which](image, float(factors[which, sample]))
            distances[order] = float((image - after[sample]).abs().max())
        orders.append(min(distances, key=distances.get))
        assert min(distances.values()) < 1e-5
    assert len(set(orders)) > 8  # each sample in an order of its own


def test_shares_of_samples_are_as_asked_for():
    images = torch.zeros(6000, 3, 4, 4, dtype=torch.uint8)
    images[:, 0], images[:, 1], images[:, 2] = 200, 100, 50  # flat: crops change nothing
    views = ContrastiveViews(strength=0.0, gray=0.2)(images, generator())
    grey = int((views[:, 0, 0, 0] == views[:, 2, 0, 0]).sum())
    assert chisquare([grey, 6000 - grey], [1200, 4800]).pvalue > 1e-3
    views = ContrastiveViews(strength=0.5, jitter=0.8, gray=0.0)(images, generator())
    same = int((views[:, 0, 0, 0] - 200 / 255).abs().lt(1e-5).sum())
    assert chisquare([same, 6000 - same], [1200, 4800]).pvalue > 1e-3


def test_the_mirror_falls_evenly():
    images = torch.zeros(2000, 1, 8, 8, dtype=torch.uint8)
    images[..., 4:] = 255
    views = ContrastiveViews(min_area=0.9, strength=0.0)(images, generator())
    left_bright = int((views[..., 0].mean((1, 2)) > views[..., -1].mean((1, 2))).sum())
    assert chisquare([left_bright, 2000 - left_bright]).pvalue > 1e-3
    views = ContrastiveViews(min_area=0.9, strength=0.0, flip=False)(images, generator())
    assert not (views[..., 0].mean((1, 2)) > views[..., -1].mean((1, 2))).any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [ContrastiveViews(blur=0.5), strong_augment])
def test_views_are_a_function_of_the_generator_alone(augment, channels):
    images = pictures(50, channels, 16, 16)
    untouched, state = images.clone(), torch.get_rng_state()
    first, again, other = (augment(images, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, untouched)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= (1 if first.is_floating_point() else 255)


# --- FixMatch's operations ----------------------------------------------------------------------

AFFINE = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}


def of_torchvision(name: str, image: torch.Tensor, strength: float) -> torch.Tensor:
    """One operation as torchvision's RandAugment calls it."""
    height, width = image.shape[-2:]
    shear = degrees(atan(strength))
    return {
        "autocontrast": lambda: functional.autocontrast(image),
        "brightness": lambda: functional.adjust_brightness(image, strength),
        "color": lambda: functional.adjust_saturation(image, strength),
        "contrast": lambda: functional.adjust_contrast(image, strength),
        "equalize": lambda: functional.equalize(image),
        "posterize": lambda: functional.posterize(image, int(strength)),
        "rotate": lambda: functional.rotate(image, strength),
        "sharpness": lambda: functional.adjust_sharpness(image, strength),
        "shear_x": lambda: functional.affine(
            image, **AFFINE | {"shear": [shear, 0.0], "center": [0, 0]}
        ),
        "shear_y": lambda: functional.affine(
            image, **AFFINE | {"shear": [0.0, shear], "center": [0, 0]}
        ),
        "solarize": lambda: functional.solarize(image, 255 * strength),
        "translate_x": lambda: functional.affine(
            image, **AFFINE | {"translate": [int(strength * width), 0]}
        ),
        "translate_y": lambda: functional.affine(
            image, **AFFINE | {"translate": [0, int(strength * height)]}
        ),
    }[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_every_operation_is_torchvision_s_on_every_sample(name, channels):
    operation, low, high = OPERATIONS[name]
    count = 25
    images = pictures(count, channels, 32, 20)
    strength = torch.empty(count).uniform_(low, high, generator=generator(3))
    strength[0], strength[1] = low, high
    found = operation(images, strength)
    wanted = torch.stack(
        [of_torchvision(name, i, float(s)) for i, s in zip(images, strength, strict=True)]
    )
    assert found.dtype == torch.uint8
    difference = (found.int() - wanted.int()).abs()
    if name in ("brightness", "color", "contrast", "sharpness"):
        assert difference.max() <= 1  # float32 sums cut to whole numbers
        assert (difference > 0).double().mean() < 0.005
    else:
        # Where a pixel lies half way between two, rounding may pick the other.
        assert (difference > 0).double().mean() < (0.002 if "r" in name else 0) + 1e-9


def test_cutout_erases_a_square_cut_off_at_the_border():
    images = pictures(3, 3, 10, 12)
    found = cutout(images, torch.tensor([5, 0, 9]), torch.tensor([6, 1, 11]), 4)
    boxes = [(3, 4, 4, 4), (0, 0, 2, 3), (7, 9, 3, 3)]  # top, left, height, width
    for image, result, box in zip(images, found, boxes, strict=True):
        grey = torch.full((1,), randaugment.CUTOUT_GREY, dtype=torch.uint8)
        assert torch.equal(result, functional.erase(image, *box, grey))


def test_all_fourteen_operations_are_drawn_evenly(monkeypatch):
    counts = dict.fromkeys(OPERATIONS, 0)

    def counting(name):
        def operation(images, strength):
            counts[name] += len(images)
            assert len(strength) == len(images)
            return images

        return operation

    assert len(OPERATIONS) == 14
    for name, (_, low, high) in OPERATIONS.items():
        monkeypatch.setitem(OPERATIONS, name, (counting(name), low, high))
    strong_augment(torch.zeros(7000, 1, 8, 8, dtype=torch.uint8), generator())
    assert sum(counts.values()) == 2 * 7000
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_cutout_of_half_the_side_ends_every_strong_augmentation():
    white = torch.full((500, 1, 8, 8), 255, dtype=torch.uint8)
    cut = (strong_augment(white, generator()) == randaugment.CUTOUT_GREY).sum((1, 2, 3))
    assert cut.max() == 16
    assert cut.min() >= 4  # centred on a corner, a quarter of the square is left
