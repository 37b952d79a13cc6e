"""Each task's update against the same update written out, as lean as it can be.

Both sides train, alike, on the same batches: one update of ours, two by hand, one of ours, and so
on, so that a slow moment meets both, and neither is always the one that finds the caches full of
the other. The clock is the processor's. A ratio is the median over such fours, low and high its
95 % limits (of order statistics). Networks are small: overhead shows most in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch
from benchmarks.tables import record
from scipy.stats import binom
from torch import nn
from torch.nn import functional
from torch.nn.functional import softplus

from repeatlab.core.environment import processor
from repeatlab.tasks.generative import Generative, GenerativeConfig
from repeatlab.tasks.reinforcement import Reinforcement, ReinforcementConfig
from repeatlab.tasks.selfsupervised import SelfSupervised, SelfSupervisedConfig
from repeatlab.tasks.semisupervised import SemiSupervised, SemiSupervisedConfig
from repeatlab.tasks.supervised import Supervised, SupervisedConfig
from repeatlab.tasks.unsupervised import Unsupervised, UnsupervisedConfig

RESULTS = Path(__file__).parent / "results" / "updates.csv"
MOST = 1.02
SECONDS = 20.0
BATCHES = 64  # made beforehand, and gone through again and again
Update = Callable[[object], object]


def supervised(task: Supervised) -> Update:
    model, optimizer = task.model, task.optimizer

    def update(batch) -> float:
        loss = functional.cross_entropy(model(batch.images), batch.labels)
        seen = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return seen

    return update


def unsupervised(task: Unsupervised) -> Update:
    model, optimizer, noise = task.model, task.optimizer, torch.Generator()
    noise.set_state(task.noise.get_state())
    latent = task.config.latent

    def update(batch) -> float:
        epsilon = torch.randn((len(batch.images), latent), generator=noise)
        mean, log_variance = model.encoder(batch.images).chunk(2, dim=1)
        logits = model.decoder(mean + (0.5 * log_variance).exp() * epsilon)
        bce = functional.binary_cross_entropy_with_logits(logits, batch.images, reduction="none")
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        loss = (bce.flatten(1).sum(1) + kl.sum(1)).mean()
        seen = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return seen

    return update


def semisupervised(task: SemiSupervised) -> Update:
    model, optimizer, config = task.model, task.optimizer, task.config
    averaged, trained = list(task.ema.parameters()), list(model.parameters())
    buffers = list(zip(task.ema.buffers(), model.buffers(), strict=True))

    def update(batch) -> float:
        logits = model(torch.cat([batch.labelled, batch.weak, batch.strong]))
        b, u = len(batch.labelled), len(batch.weak)
        best, guess = logits[b : b + u].detach().softmax(1).max(1)
        loss = functional.cross_entropy(logits[:b], batch.labels)
        strong = functional.cross_entropy(logits[b + u :], guess, reduction="none")
        loss = loss + (strong * (best >= config.threshold)).mean()
        seen = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, trained, 1 - config.ema_decay)
            for copy, buffer in buffers:
                copy.copy_(buffer)
        return seen

    return update


def reinforcement(task: Reinforcement) -> Update:
    model, target, optimizer = task.model, task.target, task.optimizer
    pairs = list(zip(target.parameters(), model.parameters(), strict=True))
    made = iter(range(1, 10**9))

    def update(batch) -> float:
        s, a, r, s2, discount, _, _ = batch
        with torch.no_grad():
            best = model(s2).argmax(1, keepdim=True)
            goal = r + discount * target(s2).gather(1, best).squeeze(1)
        value = model(s).gather(1, a.unsqueeze(1)).squeeze(1)
        loss = functional.smooth_l1_loss(value, goal)
        seen = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if next(made) % 100 == 0:
            with torch.no_grad():
                for copy, weight in pairs:
                    copy.copy_(weight)
        return seen

    return update


def selfsupervised(task: SelfSupervised) -> Update:
    encoder, head, optimizer = task.encoder, task.head, task.optimizer
    count, temperature = 2 * task.config.batch_size, task.config.temperature
    itself = torch.eye(count, dtype=torch.bool)
    other = (torch.arange(count) + count // 2) % count

    def update(batch) -> float:
        z = functional.normalize(head(encoder(batch.views)), dim=1)
        logits = (z @ z.T / temperature).masked_fill(itself, -float("inf"))
        loss = functional.cross_entropy(logits, other)
        seen = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return seen

    return update


def generative(task: Generative) -> Update:
    """As scripts do it: D's parameters gather gradients in G's step, too."""
    g, d, noise = task.g, task.d, torch.Generator()
    noise.set_state(task.noise.get_state())
    d_optimizer, g_optimizer, latent = task.d_optimizer, task.g_optimizer, task.config.latent

    def update(batch) -> float:
        fake = g(torch.randn((len(batch.images), latent, 1, 1), generator=noise))
        d_loss = softplus(-d(batch.images)).mean() + softplus(d(fake.detach())).mean()
        seen = d_loss.item()
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_loss = softplus(-d(fake)).mean()
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        return seen

    return update


CASES = {
    "supervised": (Supervised, SupervisedConfig(), supervised),
    "unsupervised": (Unsupervised, UnsupervisedConfig(width=8), unsupervised),
    "semisupervised": (SemiSupervised, SemiSupervisedConfig(), semisupervised),
    "reinforcement": (Reinforcement, ReinforcementConfig(), reinforcement),
    "selfsupervised": (SelfSupervised, SelfSupervisedConfig(), selfsupervised),
    "generative": (Generative, GenerativeConfig(width=8), generative),
}


def median_with_limits(values: list[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % limits, whatever the values' distribution."""
    below = int(binom.ppf(0.025, len(values), 0.5))
    ordered = sorted(values)
    return float(np.median(values)), ordered[below], ordered[len(values) - 1 - below]


def endlessly(batches: list) -> Iterator:
    while True:
        yield from batches


@pytest.mark.parametrize("name", CASES)
def test_an_update_against_the_one_by_hand(name, capsys):
    kind, config, written_out = CASES[name]
    tasks = [kind(config, seed=0, device="cpu") for _ in range(2)]
    made = [tasks[0].fresh_batch(index) for index in range(BATCHES)]
    losses: tuple[list, list] = ([], [])
    step, by_hand = tasks[0].step, written_out(tasks[1])

    def report(loss, *_) -> None:
        losses[0].append(loss.item())

    sides = (lambda batch: step(batch, report), lambda batch: losses[1].append(by_hand(batch)))
    batches = [endlessly(made) for _ in sides]

    def seconds(side: int) -> float:
        batch = next(batches[side])
        start = process_time()
        sides[side](batch)
        return process_time() - start

    for _ in range(10):
        first = seconds(0), seconds(1)
    ratios, times = [], []
    for _ in range(ceil(SECONDS / 4 / max(first))):
        ours, theirs, theirs_too, ours_too = seconds(0), seconds(1), seconds(1), seconds(0)
        ratios.append((ours + ours_too) / (theirs + theirs_too))
        times.append((theirs + theirs_too) / 2)
    # The same training: where sums are ordered otherwise, to the last places at first.
    np.testing.assert_allclose(losses[0][:20], losses[1][:20], rtol=1e-4)
    ratio, low, high = median_with_limits(ratios)
    row = {
        "task": name,
        "data": getattr(config, "dataset", "CartPole-v1"),
        "scale": f"{sum(p.numel() for p in _parameters(tasks[0]))} parameters",
        "arm": "update",
        "metric": "our processor time / by hand",
        "n": len(ratios),
        "median": round(ratio, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "ms by hand": round(1000 * float(np.median(times)), 3),
        "processor": f"one thread of {processor()}",
    }
    record(RESULTS, [row])
    with capsys.disabled():
        print(
            f"\n  {name}, {row['scale']}, {row['ms by hand']} ms: {ratio:.3f} [{low:.3f},"
            f" {high:.3f}], {len(ratios)} fours",
            end="",
        )
    assert ratio <= MOST


def _parameters(task) -> list[nn.Parameter]:
    return [p for o in task.optimizers for group in o.param_groups for p in group["params"]]
