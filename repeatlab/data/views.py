"""SimCLR's augmentation (Chen et al. 2020, arXiv 2002.05709) of whole batches, per sample.

Random resized crop, mirror, colour jitter, grayscale and, where asked for, blur: for every sample
the law of torchvision's `RandomResizedCrop`, `RandomHorizontalFlip`, `ColorJitter` (its four
operations in an order of their own for every sample), `RandomGrayscale` and `GaussianBlur`.
All draws come from a CPU generator, so every device sees the same views.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from repeatlab.data.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    grayscale,
)

ATTEMPTS = 10  # to find a crop that fits, as torchvision makes
RATIO = (3 / 4, 4 / 3)
JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


@dataclass(frozen=True, kw_only=True)
class ContrastiveViews:
    """Draws a random view of every image; the defaults are SimCLR's for CIFAR-10.

    Attributes:
        min_area: Smallest share of the image that a crop covers, up to 1; 1 does not crop squares.
        flip: Whether to mirror at even odds.
        strength: s of the colour jitter: brightness, contrast and saturation by up to 0.8 s, hue
            by up to 0.2 s of the circle.
        jitter: Share of samples whose colours are jittered.
        gray: Share of samples turned grey.
        blur: Share of samples blurred, with sigma from 0.1 to 2 pixels; 0 on CIFAR-10.
    """

    min_area: float = 0.08
    flip: bool = True
    strength: float = 0.5
    jitter: float = 0.8
    gray: float = 0.2
    blur: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return one view of each image.

        Args:
            images: uint8, (b, channels, height, width), one or three channels.
            generator: On the CPU.

        Returns:
            float32 in [0, 1], same shape, on the device of `images`, in new memory.
        """
        count, channels, height, width = images.shape
        box = draw_crops(count, height, width, generator, min_area=self.min_area)
        mirrored = torch.randint(2, (count,), generator=generator) * self.flip
        box = torch.cat([box, mirrored[None]]).to(images.device, non_blocking=True)
        views = crop_resize(images.to(torch.float32).div_(255), *box)
        self._jitter(views, generator)
        chosen = torch.rand(count, generator=generator) < self.gray
        if channels == 3 and self.gray:
            _on_subset(views, chosen, grayscale)
        if self.blur:
            blurred = torch.rand(count, generator=generator) < self.blur
            sigma = torch.empty(count).uniform_(0.1, 2.0, generator=generator)
            _on_subset(views, blurred, lambda x, s: gaussian_blur(x, s, _blur_taps(height)), sigma)
        return views

    def _jitter(self, views: Tensor, generator: torch.Generator) -> None:
        """Change the colours of `views` in place."""
        count, channels = views.shape[:2]
        jittered = torch.rand(count, generator=generator) < self.jitter
        order = torch.rand(count, len(JITTER), generator=generator).argsort(1)
        spread = 2 * torch.rand(len(JITTER), count, generator=generator) - 1  # in [-1, 1)
        spread[:3] = 1 + 0.8 * self.strength * spread[:3]
        spread[3] *= 0.2 * self.strength
        if not self.strength:
            return
        # Saturation and hue leave one channel as it is.
        operations = JITTER if channels == 3 else JITTER[:2]
        for place in range(len(JITTER)):
            for which, operation in enumerate(operations):
                chosen = jittered & (order[:, place] == which)
                _on_subset(views, chosen, operation, spread[which])


def _on_subset(images: Tensor, chosen: Tensor, operation, strength: Tensor | None = None) -> None:
    """Replace `images[chosen]` by `operation` of them, with their strengths where it has any.

    `chosen` (bool, (b,)) and `strength` are on the CPU: no device has to be asked how many.
    """
    places = chosen.nonzero().flatten()
    if not len(places):
        return
    arguments = ()
    if strength is not None:
        arguments = (strength[places].to(images.device, non_blocking=True),)
    places = places.to(images.device, non_blocking=True)
    images.index_copy_(0, places, operation(images.index_select(0, places), *arguments))


def draw_crops(
    count: int, height: int, width: int, generator: torch.Generator, *, min_area: float
) -> Tensor:
    """Draw `count` boxes with the law of torchvision's `RandomResizedCrop.get_params`.

    The area is uniform from `min_area` to 1 of the image's, the logarithm of the aspect ratio
    uniform; of ten attempts the first that fits counts, and the largest centred box of a legal
    ratio where none does.

    Returns:
        int64, (4, count), on the CPU: top, left, height, width.
    """
    draws = torch.rand(4, ATTEMPTS, count, generator=generator, dtype=torch.float64)
    area = height * width * (min_area + (1 - min_area) * draws[0])
    low, high = map(log, RATIO)
    ratio = (low + (high - low) * draws[1]).exp()
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    wide, tall, down, right = (
        values.gather(0, first)[0] for values in (wide, tall, draws[2], draws[3])
    )
    boxes = torch.stack(
        [(down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor(), tall, wide]
    )
    none = ~fits.any(0)
    if none.any():
        wide = min(width, round(height * RATIO[1]))
        tall = min(height, round(width / RATIO[0]))
        centred = [(height - tall) // 2, (width - wide) // 2, tall, wide]
        boxes[:, none] = torch.tensor(centred, dtype=boxes.dtype)[:, None]
    return boxes.to(torch.int64)


def crop_resize(
    images: Tensor, top: Tensor, left: Tensor, tall: Tensor, wide: Tensor, mirrored: Tensor
) -> Tensor:
    """Cut box i out of image i, resize it bilinearly to the image's size, mirror where asked.

    As torchvision's `resized_crop` and `horizontal_flip`. Bilinear resizing is a matrix on the
    rows and another on the columns: two batched products, no gather. A box is never larger than
    the image, so that antialiasing has nothing to do.

    Args:
        images: float, (b, channels, height, width).
        top: int64, (b,), like the others.
        left: First column of the box.
        tall: Its height.
        wide: Its width.
        mirrored: 0 or 1: mirror left and right after resizing.
    """
    height, width = images.shape[-2:]
    rows = _interpolation(height, top, tall, torch.zeros_like(top), images.dtype)
    columns = _interpolation(width, left, wide, mirrored, images.dtype)
    return _separable(images, rows, columns)


def _interpolation(size: int, start: Tensor, length: Tensor, mirrored: Tensor, dtype) -> Tensor:
    """Return (b, size, size): weights of the source pixels in each target pixel."""
    pixels = torch.arange(size, device=start.device, dtype=dtype)
    target = torch.where(mirrored[:, None] == 1, pixels.flip(0), pixels)
    # Pixel centres lie at halves; beyond the box its border pixels go on.
    source = (target + 0.5) * (length[:, None].to(dtype) / size) - 0.5
    source = torch.minimum(source.clamp_(min=0), length[:, None] - 1) + start[:, None]
    # A hat of width 1 at the source position is linear interpolation between its neighbours.
    return (source[:, :, None] - pixels).abs_().neg_().add_(1).clamp_(min=0)


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply (b, size, size) matrices to the rows and to the columns of every channel."""
    count, channels, height, width = images.shape
    across = torch.bmm(images.reshape(count, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], across.view(count, channels, height, width))


def gaussian_blur(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Blur image i with a Gaussian of `sigma[i]` pixels, as torchvision's `gaussian_blur`.

    Args:
        images: float, (b, channels, height, width), larger than `taps // 2` on both sides.
        sigma: float, (b,).
        taps: Odd size of the kernel; the border is reflected.
    """
    offsets = torch.arange(taps, device=images.device) - taps // 2
    weights = (-0.5 * (offsets / sigma[:, None]) ** 2).softmax(1)
    rows, columns = (
        torch.einsum("bt,tij->bij", weights, _reflected(size, offsets))
        for size in images.shape[-2:]
    )
    return _separable(images, rows, columns)


def _reflected(size: int, offsets: Tensor) -> Tensor:
    """Return (taps, size, size): 1 where target pixel i reads source pixel j at that offset."""
    source = (torch.arange(size, device=offsets.device) + offsets[:, None]).abs()
    source = torch.minimum(source, 2 * (size - 1) - source)
    return torch.nn.functional.one_hot(source, size).to(torch.float32)


def _blur_taps(height: int) -> int:
    """Return SimCLR's kernel size: a tenth of the image, made odd, at least 3."""
    return max(3, height // 10 // 2 * 2 + 1)
