"""FixMatch's strong augmentation (Sohn et al. 2020, arXiv 2001.07685, appendix) per sample.

RandAugment in the paper's form: two operations drawn from fourteen, each at a strength drawn from
the range of its table, then Cutout. Every operation does to a sample what torchvision's function
does to one uint8 image. All draws come from a CPU generator, so every device sees the same images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample
from torchvision.transforms.v2 import functional

from repeatlab.data.colour import adjust_brightness, adjust_contrast, adjust_saturation

OPERATIONS_PER_SAMPLE = 2
CUTOUT_SHARE = 0.5  # of the image's side
CUTOUT_GREY = 127


def strong_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return two random operations of every image, and then Cutout.

    Args:
        images: uint8, (b, channels, height, width), one or three channels, weakly augmented.
        generator: On the CPU.

    Returns:
        Same type, shape and device, in new memory.
    """
    count, _, height, width = images.shape
    choices = torch.randint(len(OPERATIONS), (OPERATIONS_PER_SAMPLE, count), generator=generator)
    levels = torch.rand(OPERATIONS_PER_SAMPLE, count, generator=generator)
    centre = torch.rand(2, count, generator=generator)
    result = images.clone()
    for choice, level in zip(choices, levels, strict=True):
        for which, (operation, low, high) in enumerate(OPERATIONS.values()):
            places = (choice == which).nonzero().flatten()
            if operation is None or not len(places):
                continue
            strength = low + (high - low) * level[places]
            if operation not in GEOMETRIC:  # these make their matrices of it on the CPU
                strength = strength.to(images.device, non_blocking=True)
            places = places.to(images.device, non_blocking=True)
            result.index_copy_(0, places, operation(result.index_select(0, places), strength))
    down, right = (centre * torch.tensor([[height], [width]])).floor().to(torch.int64)
    side = round(CUTOUT_SHARE * min(height, width))
    down, right = torch.stack([down, right]).to(images.device, non_blocking=True)
    return cutout(result, down, right, side)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `floor(bits[i])` of the eight bits of image i."""
    mask = 255 - (2 ** (8 - bits.floor().clamp(max=8)) - 1)
    return images & mask.to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values of image i from `threshold[i]` (of 1) upwards."""
    inverted = images >= 255 * threshold[:, None, None, None]
    return torch.where(inverted, 255 - images, images)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend image i with its 3 x 3 smoothed picture: 0 is smooth, 1 changes nothing."""
    channels = images.shape[1]
    if min(images.shape[-2:]) <= 2:
        return images
    kernel = torch.full((channels, 1, 3, 3), 1 / 13, device=images.device)
    kernel[:, :, 1, 1] = 5 / 13
    result = images.to(torch.float32)
    smooth = conv2d(result, kernel, groups=channels).round_()
    inside = result[..., 1:-1, 1:-1]  # the border stays as it is
    inside.add_(smooth.sub_(inside).mul_(1 - factor[:, None, None, None]))
    return result.clamp_(0, 255).to(torch.uint8)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn image i counter-clockwise around its centre; nearest pixels, black outside."""
    # In float64 and on to float32 as torchvision does, so that ties between pixels fall alike; on
    # the CPU, as not every device has float64.
    angle = torch.deg2rad(degrees.cpu().to(torch.float64))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _affine(images, [cos, -sin, zero, sin, cos, zero])


def shear_x(images: Tensor, amount: Tensor) -> Tensor:
    """Move row y of image i by `amount[i] * y` pixels to the left, as PIL's RandAugment does."""
    one, zero, amount = _ones_zeros(amount)
    return _affine(images, [one, amount, amount * images.shape[-2] / 2, zero, one, zero])


def shear_y(images: Tensor, amount: Tensor) -> Tensor:
    """Move column x of image i by `amount[i] * x` pixels upwards, as PIL's RandAugment does."""
    one, zero, amount = _ones_zeros(amount)
    return _affine(images, [one, zero, zero, amount, one, amount * images.shape[-1] / 2])


def translate_x(images: Tensor, share: Tensor) -> Tensor:
    """Move image i by `share[i]` of its width to the right, in whole pixels towards 0."""
    one, zero, share = _ones_zeros(share)
    return _affine(images, [one, zero, -(share * images.shape[-1]).trunc(), zero, one, zero])


def translate_y(images: Tensor, share: Tensor) -> Tensor:
    """Move image i by `share[i]` of its height downwards, in whole pixels towards 0."""
    one, zero, share = _ones_zeros(share)
    return _affine(images, [one, zero, zero, zero, one, -(share * images.shape[-2]).trunc()])


def _ones_zeros(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = values.cpu().to(torch.float64)
    return torch.ones_like(values), torch.zeros_like(values), values


def _affine(images: Tensor, matrix: list[Tensor]) -> Tensor:
    """Let target pixel (x, y), counted from the centre, read (a x + b y + c, d x + e y + f).

    Nearest pixel, black outside. `matrix` is a to f, each float64, (b,), on the CPU.
    """
    count, _, height, width = images.shape
    theta = torch.stack(matrix, 1).to(torch.float32).view(count, 2, 3)
    theta = theta.to(images.device, non_blocking=True)
    x, y = (
        torch.linspace((1 - size) / 2, (size - 1) / 2, size, device=images.device)
        for size in (width, height)
    )
    target = torch.stack(
        [x.expand(height, -1), y[:, None].expand(-1, width), torch.ones_like(x).expand(height, -1)],
        dim=-1,
    )
    # grid_sample counts from -1 to 1 across the image.
    half = torch.tensor([width / 2, height / 2], device=images.device)
    scaled = theta.transpose(1, 2) / half
    grid = torch.bmm(target.view(1, -1, 3).expand(count, -1, -1), scaled)
    sampled = grid_sample(
        images.to(torch.float32),
        grid.view(count, height, width, 2),
        mode="nearest",
        padding_mode="zeros",
        align_corners=False,
    )
    return sampled.to(torch.uint8)


def cutout(images: Tensor, down: Tensor, right: Tensor, side: int) -> Tensor:
    """Paint a grey square of `side` pixels over image i, cut off at the image's border.

    Args:
        images: uint8, (b, channels, height, width).
        down: int64, (b,): row of the square's centre.
        right: int64, (b,): column of its centre.
        side: Its first row is `down - side // 2`.
    """
    height, width = images.shape[-2:]
    rows, columns = (
        (distance >= 0) & (distance < side)
        for distance in (
            torch.arange(size, device=images.device) - (centre - side // 2)[:, None]
            for size, centre in ((height, down), (width, right))
        )
    )
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], CUTOUT_GREY)


GEOMETRIC = (rotate, shear_x, shear_y, translate_x, translate_y)
Operation = Callable[[Tensor, Tensor], Tensor]

# The paper's table of operations with the ranges of their strengths.
OPERATIONS: dict[str, tuple[Operation | None, float, float]] = {
    "autocontrast": (lambda images, _: functional.autocontrast(images), 0, 0),
    "brightness": (adjust_brightness, 0.05, 0.95),
    "color": (adjust_saturation, 0.05, 0.95),
    "contrast": (adjust_contrast, 0.05, 0.95),
    "equalize": (lambda images, _: functional.equalize(images), 0, 0),
    "identity": (None, 0, 0),
    "posterize": (posterize, 4, 8),
    "rotate": (rotate, -30, 30),
    "sharpness": (adjust_sharpness, 0.05, 0.95),
    "shear_x": (shear_x, -0.3, 0.3),
    "shear_y": (shear_y, -0.3, 0.3),
    "solarize": (solarize, 0, 1),
    "translate_x": (translate_x, -0.3, 0.3),
    "translate_y": (translate_y, -0.3, 0.3),
}
