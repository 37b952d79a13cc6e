"""SimCLR's two views of 64 CIFAR-sized images: the whole batch at once against PIL image by image.

Inside the clock: from uint8 images to two normalised float32 views of each, one thread, no worker
process, PIL images made beforehand. Both sides run in turn; the figure is the median of the rounds'
ratios.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
from torchvision import transforms

from repeatlab.core.environment import processor
from repeatlab.core.seeding import generator
from repeatlab.data.augment import normalize
from repeatlab.data.views import ContrastiveViews

IMAGES = 64
BATCHES = 4
ROUNDS = 15
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def seconds(make) -> float:
    start = perf_counter()
    for _ in range(BATCHES):
        make()
    return perf_counter() - start


def test_views_at_once_against_pil_one_by_one(benchmark, capsys):
    draws = generator(0, "views")
    # Smooth pictures: noise would be hard on no step of either side, but is no picture either.
    images = torch.nn.functional.interpolate(
        torch.rand(IMAGES, 3, 8, 8, generator=draws), size=32, mode="bilinear"
    )
    images = (images * 255).to(torch.uint8)
    pictures = [transforms.functional.to_pil_image(image) for image in images]
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    by_pil = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    views = ContrastiveViews()

    def ours() -> torch.Tensor:
        return normalize(views(torch.cat([images, images]), draws), MEAN, STD)

    def theirs() -> torch.Tensor:
        return torch.stack([by_pil(picture) for picture in pictures + pictures])

    assert ours().shape == theirs().shape
    times = [(seconds(theirs), seconds(ours)) for _ in range(ROUNDS)]
    ratio = median(slow / fast for slow, fast in times)
    slow, fast = (median(side) / (BATCHES * 2 * IMAGES) for side in zip(*times, strict=True))
    benchmark.pedantic(ours, rounds=ROUNDS)
    benchmark.extra_info.update(ratio=ratio, processor=processor())
    with capsys.disabled():
        print(
            f"\nSimCLR views: PIL {1e-3 / slow:.2f} k/s, batched {1e-3 / fast:.2f} k/s,"
            f" ratio {ratio:.2f}, {ROUNDS} rounds ({processor()})"
        )
    assert ratio >= 3
