"""What a run costs: `Ledger` counts what it has spent, `CostModel` predicts seconds from parts.

Symbols: t is the time of one sample's forward, k the backward's time in forwards, b the batch, s
the optimizer's step, d the time to make a fresh batch, p the presample in batches (B = p b).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf


@dataclass
class Ledger:
    """Counts from the start of a run; "sample" means one sample passing once.

    Attributes:
        updates: Gradient updates.
        fresh_batches: Minibatches that were trained on.
        passed_batches: Minibatches that a sampler drew beyond these, to choose from.
        distinct_samples: Different training samples seen so far.
        forward_samples: Samples that went forward in training.
        backward_samples: Samples that went backward.
        scoring_samples: Samples that went forward without a graph, for a sampler to choose by.
        environment_steps: Steps made in a simulator.
        seconds: Training time; evaluation is outside the clock.
        host_reads: How often the host waited for a loss on the device.
        skipped_steps: Optimizer steps left out because float16 gradients overflowed; their updates
            are counted all the same.
        calibration_updates: Updates of the short run that `t: auto` needed, on top of the above.
        calibration_forward_samples: Samples that went forward in that run.
        calibration_backward_samples: Samples that went backward in it.
        calibration_fresh_batches: Its minibatches.
        calibration_environment_steps: Steps made in its simulator.
        calibration_seconds: Its training time.
        holdout_updates: Updates of the models that a sampler trained beforehand (RHO-LOSS).
        holdout_forward_samples: Samples that went forward in training these.
        holdout_backward_samples: Samples that went backward.
        holdout_fresh_batches: Minibatches that they were trained on.
        holdout_seconds: Their training time, with that of their scoring.
        pretraining_updates: Updates that the task itself had behind it at its start (transfer, what
            a continual learner knows already). Every arm has the same, so that no budget counts it;
            costs and times do.
        pretraining_forward_samples: Samples that went forward in these.
        pretraining_backward_samples: Samples that went backward.
        pretraining_seconds: Their training time.
    """

    updates: int = 0
    fresh_batches: int = 0
    passed_batches: int = 0
    distinct_samples: int = 0
    forward_samples: int = 0
    backward_samples: int = 0
    scoring_samples: int = 0
    environment_steps: int = 0
    seconds: float = 0.0
    host_reads: int = 0
    skipped_steps: int = 0
    calibration_updates: int = 0
    calibration_forward_samples: int = 0
    calibration_backward_samples: int = 0
    calibration_fresh_batches: int = 0
    calibration_environment_steps: int = 0
    calibration_seconds: float = 0.0
    holdout_updates: int = 0
    holdout_forward_samples: int = 0
    holdout_backward_samples: int = 0
    holdout_fresh_batches: int = 0
    holdout_seconds: float = 0.0
    pretraining_updates: int = 0
    pretraining_forward_samples: int = 0
    pretraining_backward_samples: int = 0
    pretraining_seconds: float = 0.0

    def to_json(self) -> dict[str, int | float]:
        """Return the counts by name."""
        return asdict(self)

    def charge(self, prepared: Mapping[str, float]) -> None:
        """Enter what was spent before the first update, by the names of the attributes."""
        for name, amount in prepared.items():
            setattr(self, name, getattr(self, name) + amount)

    def prepared_units(self, k: float) -> float:
        """Return what the arm spent before its first update, as `cost_units` counts it.

        Without what every arm of the task starts from: its pretraining.
        """
        forward = self.calibration_forward_samples + self.holdout_forward_samples
        return forward + k * (self.calibration_backward_samples + self.holdout_backward_samples)

    def cost_units(self, k: float) -> float:
        """Return what was spent in forward equivalents: a backward costs `k` forwards."""
        trained = self.forward_samples + k * self.backward_samples
        pretrained = self.pretraining_forward_samples + k * self.pretraining_backward_samples
        return trained + self.scoring_samples + self.prepared_units(k) + pretrained


def spent_on(part: str, ledger: Mapping[str, float]) -> dict[str, float]:
    """Return what a run has spent by the names of that part of the ledger of one that rests on it.

    >>> spent_on("holdout", {"updates": 3, "fresh_batches": 2})["holdout_updates"]
    3

    Args:
        part: "calibration" or "holdout".
        ledger: The counts of `Ledger` by name; those that are missing are 0.
    """
    names = [field.name for field in fields(Ledger) if field.name.startswith(f"{part}_")]
    return {name: ledger.get(name.removeprefix(f"{part}_"), 0) for name in names}


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
        waking: w, what it costs besides to have slept until a batch came: the sleep ends late, and
            what follows it is slower.
        prefetch_waking: The same where batches are made meanwhile and the loader is the slower one.
    """

    forward: float
    backward_ratio: float
    batch_size: int
    optimizer: float = 0.0
    data: float = 0.0
    scoring: float | None = None
    recording: float = 0.0
    waking: float = 0.0
    prefetch_waking: float = 0.0

    def __post_init__(self) -> None:
        for field in ("forward", "backward_ratio", "batch_size"):
            if not 0 < getattr(self, field) < inf:
                raise ValueError(f"{field} must be positive and finite, not {getattr(self, field)}")
        for field in (
            "optimizer", "data", "scoring", "recording", "waking", "prefetch_waking"
        ):  # fmt: skip
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

        N update + d + w one after the other; max(d + w, N update) if data is made meanwhile (Choi
        et al. 2019, data echoing).
        """
        if prefetch:
            return max(self.data + self.prefetch_waking, repeats * self.update)
        return repeats * self.update + self.data + self.waking

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
        """Return up to how many updates a fresh batch are free under prefetch: (d + w) / update.

        Below 1 nothing is: the loader is faster than the updates.
        """
        return (self.data + self.prefetch_waking) / self.update


def backward_ratio(presample: float, score_cost: float) -> float:
    """Return k = p / a - 1, given a, the time to score B samples over that to train on b.

    >>> round(backward_ratio(2, 0.55), 2), backward_ratio(5, 1.25)
    (2.64, 3.0)
    """
    return presample / score_cost - 1


def score_cost(presample: float, k: float) -> float:
    """Return a = p / (1 + k), the time to score B = p b samples over that to train on b."""
    return presample / (1 + k)


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


def expected_keep(beta: float) -> float:
    """Return the share of samples that selective backprop keeps: 1 / (beta + 1).

    The keep probability is percentile^beta (Jiang et al. 2019), and percentiles are uniform.
    """
    return 1 / (beta + 1)


def break_even_keep(k: float) -> float:
    """Return the share kept below which selective backprop is the cheaper: k / (1 + k).

    Every sample is forwarded once to be selected and, if kept, once more to be trained on.
    """
    return k / (1 + k)
