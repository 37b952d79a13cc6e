"""What a task has learnt before the run begins: a classifier, and what training it has cost.

Ordinary training with SGD, momentum 0.9, at a constant rate: a function of settings, classes and
seed, so that all arms of one seed start from the same network. Within a process it is made once.
"""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from repeatlab.core.schema import Model
from repeatlab.core.seeding import derive
from repeatlab.tasks.classification import ClassifierConfig, make_classifier, of_classes
from repeatlab.tasks.dataset import make_stream
from repeatlab.tasks.optimization import Momentum


class PretrainingConfig(Model):
    """How the network is trained before the run."""

    updates: Annotated[int, Field(ge=0)] = 300
    """0 keeps the first weights: nothing is known beforehand."""
    lr: Annotated[float, Field(gt=0)] = 0.05
    batch_size: Annotated[int, Field(ge=1)] = 64


@lru_cache(maxsize=4)
def pretrained(
    config: ClassifierConfig,
    settings: PretrainingConfig,
    classes: range,
    *,
    seed: int,
    device: str,
) -> tuple[nn.Sequential, dict[str, float]]:
    """Return a classifier of all classes that has learnt some of them, and its cost.

    Both are one for all who ask for the same: to be copied, and left as they are.

    Args:
        config: What the network is, and its data; its rate and batch size are not used.
        settings: How it is trained.
        classes: Which classes it sees.
        seed: The run's seed.
        device: Where it is trained and stays.
    """
    data = config.splits(seed, device)
    network = make_classifier(config, data, seed=seed).to(device)
    stream = make_stream(
        of_classes(data.train, classes),
        data,
        batch_size=settings.batch_size,
        seed=derive(seed, "pretraining"),
        augment=config.augment,
    )
    optimizer = Momentum().make(network.parameters(), lr=settings.lr, device=device)
    start = perf_counter()
    for index in range(settings.updates):
        batch = stream.fresh_batch(index)
        loss = functional.cross_entropy(network(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    samples = settings.updates * settings.batch_size
    spent = {
        "pretraining_updates": settings.updates,
        "pretraining_forward_samples": samples,
        "pretraining_backward_samples": samples,
        "pretraining_seconds": perf_counter() - start,
    }
    return network, spent
