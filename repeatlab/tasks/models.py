"""Image networks that several tasks share. Never imports a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from repeatlab.core.seeding import derive

# From this side on, ResNet-18 has its original stem, which quarters the image at once.
LARGE_IMAGE = 64


@contextmanager
def drawn_from(seed: int, stream: str = "weights") -> Iterator[None]:
    """Have initial weights drawn from a random stream of the run, on the CPU."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(derive(seed, stream))
        yield


def small_cnn(channels: int, classes: int, *, width: int) -> nn.Module:
    """Two 3x3 convolutions, each halving the image, and a linear layer on the pooled features."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 4, classes),
    )


def mlp(inputs: int, classes: int, *, width: int) -> nn.Module:
    """Two hidden layers of `width` ReLUs on the flattened image.

    3,466 parameters for digits (64 pixels, ten classes) and width 32.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def resnet18(channels: int, classes: int, *, large: bool = False) -> nn.Module:
    """ResNet-18 (He et al. 2016) with the stem for small images: 3x3, stride 1, no pooling.

    For large ones with the original stem: 7x7, stride 2, then pooling. 11.17 and 11.18 million
    parameters for three channels and ten classes.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    model = torchvision_resnet18(num_classes=classes)
    if not large or channels != 3:
        size, stride = (7, 2) if large else (3, 1)
        model.conv1 = nn.Conv2d(channels, 64, size, stride=stride, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not large:
        model.maxpool = nn.Identity()
    return model


class Residual(nn.Sequential):
    """Layers whose output is added to their input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Scaled(nn.Linear):
    """A linear layer whose outputs are scaled by an eighth."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 8


def resnet9(channels: int, classes: int) -> nn.Module:
    """The small residual network of CIFAR-10's speed runs (Page 2018, "How to train your ResNet").

    6.57 million parameters for three channels and ten classes, and 379 million multiplications for
    an image of 32 x 32 pixels, where ResNet-18 has 555: few, wide layers, which keep a GPU busy.
    """

    def halved(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(*_norm_layer(before, after), nn.MaxPool2d(2))

    def residual(width: int) -> Residual:
        return Residual(*_norm_layer(width, width), *_norm_layer(width, width))

    return nn.Sequential(
        *_norm_layer(channels, 64),
        halved(64, 128),
        residual(128),
        halved(128, 256),
        halved(256, 512),
        residual(512),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        Scaled(512, classes, bias=False),
    )


def norm_cnn(channels: int, classes: int, *, width: int) -> nn.Module:
    """Three 3x3 convolutions with BatchNorm, two poolings, a linear layer on mean features.

    The network of the benchmarks at the scale of two CPU cores.
    """
    return nn.Sequential(
        *_norm_layer(channels, width),
        nn.MaxPool2d(2),
        *_norm_layer(width, 2 * width),
        nn.MaxPool2d(2),
        *_norm_layer(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def _norm_layer(channels: int, width: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(width), nn.ReLU()


# With each, its features by its width.
PLAIN = {"cnn": (small_cnn, 8), "norm_cnn": (norm_cnn, 4)}


def build_classifier(
    name: str, channels: int, classes: int, *, side: int, width: int
) -> tuple[nn.Module, int]:
    """Return a network giving (batch, classes) logits, and the size of the features before them.

    Args:
        name: "cnn" (no BatchNorm), "norm_cnn", "resnet9" or "resnet18".
        channels: Of the images.
        classes: Outputs of the linear layer at the end.
        side: Height of the images in pixels: `resnet18` has its original stem from 64 upwards.
        width: Channels of the first layer of all but the residual networks.

    Raises:
        ValueError: `name` is none of these.
    """
    if name == "resnet18":
        return resnet18(channels, classes, large=side >= LARGE_IMAGE), 512
    if name == "resnet9":
        return resnet9(channels, classes), 512
    if name not in PLAIN:
        raise ValueError(
            f"model must be one of {', '.join(PLAIN)}, resnet9 and resnet18; not {name!r}"
        )
    build, features = PLAIN[name]
    return build(channels, classes, width=width), features * width


def build_encoder(name: str, channels: int, *, side: int, width: int) -> tuple[nn.Module, int]:
    """Return the network of `build_classifier` without its last layer, and its feature count."""
    model, features = build_classifier(name, channels, 1, side=side, width=width)
    if name == "resnet18":
        model.fc = nn.Identity()
    else:
        del model[-1]
    return model, features
