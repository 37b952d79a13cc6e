"""What a run will cost: seconds from the times of its parts, and where choosing samples pays.

Symbols: t is the time of one sample's forward, k the backward's time in forwards, b the batch, s
the optimizer's step, d the time to make a fresh batch, p the presample in batches (B = p b).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Predicted training time from the times of its parts, all in seconds.

    Attributes:
        forward: t, one sample forward with its graph.
        backward_ratio: k, the backward's time in forwards.
        batch_size: b.
        optimizer: s, one optimizer step.
        data: d, one fresh batch.
        scoring: Time of one sample's forward without a graph; by default `forward`.
        recording: c, what the loop itself takes of an update.
    """

    forward: float
    backward_ratio: float
    batch_size: int
    optimizer: float = 0.0
    data: float = 0.0
    scoring: float | None = None
    recording: float = 0.0

    def __post_init__(self) -> None:
        for field in ("forward", "backward_ratio", "batch_size"):
            if not 0 < getattr(self, field) < inf:
                raise ValueError(f"{field} must be positive and finite, not {getattr(self, field)}")
        for field in ("optimizer", "data", "scoring", "recording"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < inf:
                raise ValueError(f"{field} must not be negative, not {value}")

    @property
    def update(self) -> float:
        """(1 + k) b t + s + c: forward, backward and step on a batch that is there."""
        passes = (1 + self.backward_ratio) * self.batch_size * self.forward
        return passes + self.optimizer + self.recording

    def fresh_batch(self, repeats: float = 1, *, prefetch: bool = False) -> float:
        """Return the time of a fresh batch with its `repeats` updates.

        N update + d one after the other; max(d, N update) if data is made meanwhile (Choi et al.
        2019, data echoing).
        """
        if prefetch:
            return max(self.data, repeats * self.update)
        return repeats * self.update + self.data

    def run(self, updates: int, fresh_batches: int, *, prefetch: bool = False) -> float:
        """Return the time of a run of so many updates on so many fresh batches.

        An epoch is n / b fresh batches. With `prefetch` every batch is taken to have the mean
        number of updates: where N varies that is too little, since a batch with few of them waits
        for the loader while one with many cannot make up for it (sum `fresh_batch` over them).
        """
        return fresh_batches * self.fresh_batch(updates / fresh_batches, prefetch=prefetch)

    def importance_update(self, presample: float) -> float:
        """p d + p b t_scoring + update: one update of importance sampling with B = p b scored."""
        scoring = self.forward if self.scoring is None else self.scoring
        return presample * (self.data + self.batch_size * scoring) + self.update

    def free_repeats(self) -> float:
        """Return up to how many updates a fresh batch are free under prefetch: d / update.

        Below 1 nothing is: the loader is faster than the updates.
        """
        return self.data / self.update


def tau_threshold(presample: float, k: float) -> float:
    """Return tau_th = (p + 1 + k) / (1 + k): an importance update over a uniform one.

    Katharopoulos and Fleuret 2018, arXiv 1803.00942: sampling pays where the variance reduction
    tau exceeds it.

    >>> tau_threshold(3, 2)
    2.0
    """
    return (presample + 1 + k) / (1 + k)


def cost_ratio(presample: float, k: float) -> float:
    """Return u = (p + k + 1) / (p (1 + k)): cost against training on all B samples.

    A ratio of times, no speed-up: below 1 importance sampling is the cheaper.

    >>> [round(cost_ratio(p, k), 5) for p, k in ((3, 2), (5, 2), (1.5, 2), (3, 1.4265))]
    [0.66667, 0.53333, 1.0, 0.74545]
    """
    return tau_threshold(presample, k) / presample


def break_even_presample(k: float) -> float:
    """Return the p above which `cost_ratio` is below 1: (k + 1) / k."""
    return (k + 1) / k


def break_even_keep(k: float) -> float:
    """Return the share kept below which selective backprop is the cheaper: k / (1 + k).

    Every sample is forwarded once to be selected and, if kept, once more to be trained on.
    """
    return k / (1 + k)
