"""Which samples to train on, and with what weights, in a training loop of one's own.

Functions of losses or other scores, with the little that has to be remembered as an object of its
own; the samplers of a study (`repeatlab.methods.sampling`) call the same ones. Prioritized draws:

    memory = LastScores(len(images))
    for update in range(updates):
        indices, weights = hard_mining(memory.known(), 64, draws(seed, update), beta=0.4)
        losses = cross_entropy(model(images[indices]), labels[indices], reduction="none")
        (weights * losses).mean().backward()
        memory.update(indices, losses)

Importance sampling, which trains on a batch as it comes until more would pay:

    switch = ImportanceSwitch(tau_threshold(presample=3, k=2.0))  # of `repeatlab.cost`
    ...
    if switch.on:  # `scores` of three batches, from a forward without gradient
        indices, weights = importance_sampling(scores, 64, draws(seed, update))
    switch.update(scores)

Scores are torch tensors on any device, or NumPy arrays; what is returned are tensors on the same
device. The arithmetic is float64 on the CPU: not every device has float64.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repeatlab.core.seeding import generator


class Chosen(NamedTuple):
    """Samples to train on.

    Attributes:
        indices: int64, (m,): their places among those that there were scores of.
        weights: float32, (m,): factors on their losses; 1 where a method has none.
    """

    indices: Tensor
    weights: Tensor


def draws(seed: int, index: int) -> torch.Generator:
    """Return the generator of draw number `index`, a function of (seed, index) alone."""
    return generator(seed, "sampler", index)


def _on_cpu(scores: Any) -> Tensor:
    return torch.as_tensor(scores).detach().cpu().double()


def _chosen(indices: Tensor, weights: Tensor | None, scores: Any) -> Chosen:
    """Return the choice where the scores are."""
    device = torch.as_tensor(scores).device
    weights = torch.ones(len(indices)) if weights is None else weights.float()
    return Chosen(indices.to(device), weights.to(device))


# --- what is remembered ---------------------------------------------------------------------------


class LastScores:
    """The last score seen of every sample.

    Args:
        samples: How many there are at first; there may be more later.

    Attributes:
        scores: float, (samples so far,), by sample number; NaN for one that was never seen.
        largest: The largest score so far.
    """

    def __init__(self, samples: int = 0) -> None:
        self.scores = torch.full((samples,), float("nan"))
        self.largest = 0.0

    def update(self, indices: Any, scores: Any) -> None:
        """Remember the scores, (b,), of the samples `indices`, int64, (b,)."""
        scores = torch.as_tensor(scores).detach()
        self.scores = self.scores.to(scores)
        self.scores[torch.as_tensor(indices).to(scores.device)] = scores

    def known(self, numbers: range | None = None) -> Tensor:
        """Return the scores of the samples `numbers`, by default of all, (n,).

        Those never seen count as the largest so far, so that all are seen soon.
        """
        numbers = range(len(self.scores)) if numbers is None else numbers
        missing = numbers.stop - len(self.scores)
        if missing > 0:
            unseen = self.scores.new_full((missing,), float("nan"))
            self.scores = torch.cat([self.scores, unseen])
        scores = self.scores[numbers.start : numbers.stop]
        self.largest = max(self.largest, float(scores.nan_to_num(-torch.inf).max()))
        return scores.nan_to_num(self.largest or 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {"scores": self.scores.cpu(), "largest": self.largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.scores, self.largest = state["scores"], state["largest"]


@dataclass
class ImportanceSwitch:
    """Whether importance sampling is worth its presample: while the average of tau exceeds tau_th.

    Attributes:
        threshold: tau_th, as `repeatlab.cost.tau_threshold` gives it.
        ema: Decay of the moving average.
        tau: The average; it begins at 0 and is not corrected for that, as in the paper.
    """

    threshold: float
    ema: float = 0.9
    tau: float = 0.0

    @property
    def on(self) -> bool:
        """Whether to sample the next batch."""
        return self.tau > self.threshold

    def update(self, scores: Any) -> float:
        """See the scores, (B,), of a batch or presample that was drawn uniformly; return its tau.

        Of a batch that was resampled they say nothing.
        """
        now = tau(scores)
        self.tau = self.ema * self.tau + (1 - self.ema) * now
        return now


# --- what is chosen -------------------------------------------------------------------------------


def hard_mining(
    scores: Any,
    count: int,
    generator: torch.Generator,
    *,
    alpha: float = 1.0,
    floor: float = 0.1,
    beta: float = 0.0,
) -> Chosen:
    """Choose samples with p_i in proportion to max(s_i, floor * mean s)^alpha.

    With `beta` 0 they are different ones, without weights. Else they are drawn with replacement,
    with weights (n p_i)^-beta, divided by the largest of them (Schaul et al. 2015, arXiv
    1511.05952, section 3.4).

    Args:
        scores: (n,), last known, none negative; see `LastScores`.
        count: Samples of a batch.
        generator: Of this draw, on the CPU.
        alpha: Exponent of the priority; 0 draws uniformly.
        floor: Smallest priority, as a share of the mean score.
        beta: Exponent of the weights.

    Raises:
        ValueError: different samples are wanted, and there are fewer.
    """
    known = _on_cpu(scores)
    # Where every score is 0 the floor is too, and all are equally likely.
    priorities = known.clamp(min=floor * float(known.mean()) or 1.0) ** alpha
    if not beta:
        return _chosen(draw_distinct(priorities, count, generator), None, scores)
    places = draw(priorities, count, generator)
    weights = (priorities[places] * len(known) / priorities.sum()) ** -beta
    return _chosen(places, weights / weights.max(), scores)


def online_selection(
    losses: Any, count: int, generator: torch.Generator, *, pressure: float = 100.0
) -> Chosen:
    """Choose different samples by rank r of their loss: p in proportion to pressure^(-r / n).

    Loshchilov and Hutter 2015, arXiv 1511.06343, equation 3. `draw_by_rank` spares the sorting.

    Args:
        losses: (n,), last known; see `LastScores`.
        count: Samples of a batch.
        generator: Of this draw, on the CPU.
        pressure: How much likelier the largest loss is than the smallest.
    """
    order = torch.as_tensor(losses).argsort(descending=True, stable=True)
    return _chosen(draw_by_rank(order, count, generator, pressure=pressure), None, losses)


def importance_sampling(scores: Any, count: int, generator: torch.Generator) -> Chosen:
    """Choose places of a presample in proportion to their scores, and weigh them without bias.

    Katharopoulos and Fleuret 2018, arXiv 1803.00942, algorithm 1. The weight of place i is
    1 / (B p_i): sum p_i w_i f_i = mean f for every f that is 0 where the score is.

    Args:
        scores: (B,), of a presample, none negative; where all are 0, all are equally likely.
        count: Samples of a batch, drawn with replacement.
        generator: Of this draw, on the CPU.
    """
    known = _on_cpu(scores)
    if not bool(known.any()):
        known = torch.ones_like(known)
    places = draw(known, count, generator)
    return _chosen(places, known.mean() / known[places], scores)


def selective_backprop(
    losses: Any, history: deque[float], generator: torch.Generator, *, beta: float = 1.0
) -> Chosen:
    """Keep each sample with probability percentile^beta; a share 1 / (beta + 1) is kept.

    Jiang et al. 2019, arXiv 1910.00762, algorithm 1. Kept samples wait until they fill a batch.

    Args:
        losses: (b,), of samples from a forward without gradient.
        history: The latest losses, a `deque(maxlen=...)`; these are added to it.
        generator: Of this draw, on the CPU.
        beta: Selectivity; 0 keeps all.
    """
    known = _on_cpu(losses).numpy()
    history.extend(known.tolist())
    uniform = torch.rand(len(known), generator=generator, dtype=torch.float64).numpy()
    kept = np.flatnonzero(uniform < percentile(known, np.array(history)) ** beta)
    return _chosen(torch.from_numpy(kept), None, losses)


def rho_loss(losses: Any, irreducible: Any, count: int) -> Chosen:
    """Choose the largest reducible losses (Mindermann et al. 2022, arXiv 2206.07137).

    Args:
        losses: (B,), of a presample.
        irreducible: (B,), the same samples' losses under a model that was trained on other data.
        count: Samples of a batch.
    """
    losses = torch.as_tensor(losses)
    reducible = losses - torch.as_tensor(irreducible).to(losses.device)
    return _chosen(reducible.topk(count).indices, None, losses)


# --- how it is drawn ------------------------------------------------------------------------------


def tau(scores: Any) -> float:
    """Return sqrt(B) ||g||_2 = sqrt(1 + CV^2) of the normalised scores, in [1, sqrt(B)].

    By how much importance sampling lowers the variance, as a factor on the batch size; 1 where all
    scores are 0.
    """
    scores = _on_cpu(scores)
    total = float(scores.sum())
    if total == 0:
        return 1.0
    return len(scores) ** 0.5 * float((scores / total).norm())


def percentile(losses: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Return the share of `history` that each loss is not below: in (0, 1] if it is among it."""
    return np.searchsorted(np.sort(history), losses, side="right") / len(history)


def draw(priorities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` places drawn with replacement in proportion to `priorities`, (n,), float64."""
    cumulative = priorities.cumsum(0)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    places = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return places.clamp(max=len(priorities) - 1)


def draw_distinct(priorities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` different places, each drawn in proportion to what is left, (n,), float64.

    Raises:
        ValueError: fewer than `count` priorities are positive.
    """
    if int((priorities > 0).sum()) < count:
        raise ValueError(f"{count} different samples cannot be drawn from {len(priorities)}")
    chosen: dict[int, None] = {}
    # Drawing on until enough are new is drawing from what is left.
    while len(chosen) < count:
        before = len(chosen)
        chosen |= dict.fromkeys(draw(priorities, 2 * count, generator).tolist())
        if len(chosen) == before:  # what is left is too improbable to come up
            priorities = priorities.clone()
            priorities[list(chosen)] = 0.0
    return torch.tensor(list(chosen)[:count])


def draw_by_rank(
    order: Tensor, count: int, generator: torch.Generator, *, pressure: float
) -> Tensor:
    """Return `count` different samples of `order`, int64, (n,), likeliest first; see above."""
    ranks = torch.arange(len(order), dtype=torch.float64)
    places = draw_distinct(pressure ** (-ranks / len(order)), count, generator)
    return order[places.to(order.device)]
