"""Augmentation of whole batches, each sample with its own draw, on the device of the images.

Cropping and flipping are one gather: a crop position and a mirror only say which source pixel
each target pixel copies. One formulation serves every device and gives the same bytes on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


def random_crop_flip(
    images: Tensor, generator: torch.Generator, *, padding: int = 0, flip: bool = False
) -> Tensor:
    """Crop each image at its own random place after zero padding; mirror each at even odds.

    The law is that of torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip()` on
    every sample. Both draws are always made, so switching one off leaves the other's as it was.

    Args:
        images: (b, channels, height, width), any type.
        generator: On the CPU, so that every device sees the same draws.
        padding: Pixels of zeros on each side before cropping back to the size; 0 does not crop.
        flip: Whether to mirror left and right.

    Returns:
        Images of the same shape, type and device; `images` itself when nothing is asked for.
    """
    if not padding and not flip:
        return images
    draws = crop_flip_draws(len(images), generator, padding=padding, flip=flip)
    # One transfer for all draws.
    return crop_flip(images, *draws.to(images.device, non_blocking=True), padding=padding)


def crop_flip_draws(
    count: int, generator: torch.Generator, *, padding: int = 0, flip: bool = False
) -> Tensor:
    """Return what `random_crop_flip` draws for `count` images: int64, (3, count).

    Top, left and mirrored, as `crop_flip` takes them.
    """
    place = torch.randint(2 * padding + 1, (2, count), generator=generator)
    mirror = torch.randint(2, (1, count), generator=generator) * flip
    return torch.cat([place, mirror])


def crop_flip(
    images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, *, padding: int
) -> Tensor:
    """Crop image i, padded with zeros, at (`top[i]`, `left[i]`), then mirror it if `mirrored[i]`.

    Args:
        images: (b, channels, height, width), any type.
        top: int64, (b,), 0 to 2 `padding`: rows cut off the padded image's upper side.
        left: int64, (b,), 0 to 2 `padding`: columns cut off its left side.
        mirrored: int64, (b,), 0 or 1.
        padding: Pixels of zeros on each side; the crop has the size of the image.

    Returns:
        (b, channels, height, width), same type.
    """
    count, channels, height, width = images.shape
    padded = pad(images, (padding,) * 4).flatten(2)
    pixels = _windows(height, width, padding, images.device).index_select(0, mirrored)
    pixels += (top * (width + 2 * padding) + left)[:, None]
    # The channels share the index: expanded, not copied.
    chosen = padded.gather(2, pixels[:, None].expand(-1, channels, -1))
    return chosen.view(count, channels, height, width)


@lru_cache(maxsize=16)
def _windows(height: int, width: int, padding: int, device: torch.device) -> Tensor:
    """Return the flat positions of the upper left crop's pixels, as they are and mirrored.

    int64, (2, height * width), into an image of (height + 2 padding) x (width + 2 padding).
    """
    rows = torch.arange(height)[:, None] * (width + 2 * padding)
    plain = rows + torch.arange(width)
    return torch.stack([plain, plain.flip(1)]).flatten(1).to(device)


def normalize(
    images: Tensor, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]
) -> Tensor:
    """Return `(images - mean) / std` as float32, on the CPU bit-equal to torchvision's.

    Args:
        images: (b, channels, height, width); uint8 is first divided by 255, as `ToTensor` does,
            floats are taken to be scaled already.
        mean: One value for each channel.
        std: One value for each channel, above 0.

    Returns:
        float32, (b, channels, height, width), in new memory.
    """
    if images.dtype == torch.uint8:
        # In place from here on: fresh memory costs more than the arithmetic.
        result = images.to(torch.float32).div_(255)
    else:
        result = images.to(torch.float32, copy=True)
    shift, scale = (
        torch.as_tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        for values in (mean, std)
    )
    return result.sub_(shift).div_(scale)


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8, rounded to the nearest of 256 levels."""
    return images.mul(255).round().clamp(0, 255).to(torch.uint8)


def as_pictures(images: Tensor) -> np.ndarray:
    """Return uint8 images (n, channels, height, width) as (n, height, width[, 3])."""
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures
