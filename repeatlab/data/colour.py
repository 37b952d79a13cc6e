"""Colour operations on batches, each sample with its own strength.

Every function does to sample i what the function of torchvision's `transforms.v2.functional` with
the same name does to one image, up to float32 rounding. Images are (b, channels, height, width)
with one or three channels: floats in [0, 1], or uint8, on which results are cut to whole numbers
as torchvision does. Strengths are float32, (b,), on the device of the images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply sample i by `factor[i]`: 0 is black, 1 changes nothing."""
    return _bounded(images * _column(factor), images)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend sample i with its mean grey: 0 is that grey everywhere, 1 changes nothing."""
    mean = _luminance(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend sample i with its grey picture: 0 is grey, 1 changes nothing.

    Samples of one channel stay as they are.
    """
    if images.shape[1] == 1:
        return images
    return _blend(images, _luminance(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of sample i by `shift[i]` of the colour circle, from -0.5 to 0.5.

    torchvision's way through HSV and back, written without its two gathers: on the hexagon every
    channel is `max - (max - min) * clamp(distance of the hue from that channel's - 1, 0, 1)`.
    Floats only; samples of one channel stay as they are.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    low, high = torch.aminmax(images, dim=1)
    span = high - low
    # Position on the hexagon times the span: around red 0, green 2, blue 4.
    hue = torch.where(
        high == red,
        green - blue,
        torch.where(
            high == green,
            (blue - red).add_(span, alpha=2),
            (red - green).add_(span, alpha=4),
        ),
    )
    # Greys have no hue; any will do, as nothing is taken off `high`.
    hue.div_(span.clamp(min=torch.finfo(span.dtype).tiny))
    hue.add_(6 * shift[:, None, None]).remainder_(6)
    result = torch.empty_like(images)
    for channel, (centre, sign, offset) in enumerate(((3, -1, 2), (2, 1, -1), (4, 1, -1))):
        # Red lies at 0 = 6: its distance is 3 - |hue - 3|.
        share = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(high, share, span, value=-1, out=result[:, channel])
    return result


def grayscale(images: Tensor) -> Tensor:
    """Return the grey pictures with as many equal channels as before."""
    return _luminance(images).to(images.dtype).expand_as(images)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _bounded(result: Tensor, images: Tensor) -> Tensor:
    """Cut `result` to the range of `images`, and to its type."""
    return result.clamp_(0, 1 if images.is_floating_point() else 255).to(images.dtype)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _column(factor)
    return _bounded((images * factor).add_(other * (1 - factor)), images)


def _luminance(images: Tensor) -> Tensor:
    """Return the luma (ITU-R 601), float, (b, 1, height, width); of uint8 in whole numbers."""
    if images.shape[1] == 1:
        return images if images.is_floating_point() else images.to(torch.float32)
    red, green, blue = images.unbind(1)
    grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return (grey if images.is_floating_point() else grey.floor_())[:, None]
