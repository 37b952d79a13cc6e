"""What a run has spent: updates, samples forward and backward, fresh batches, seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Of a ledger, by the prefix of their counts: training, then what came before the first update.
PARTS = ("", "calibration_", "holdout_", "pretraining_")


def cost_units(counts: Mapping[str, Any], k: Any, *, parts: Collection[str] = PARTS) -> Any:
    """Return what was spent in forward equivalents: forward + k backward + scoring samples.

    >>> cost_units({"forward_samples": 30, "backward_samples": 10, "holdout_forward_samples": 5}, 2)
    55

    Args:
        counts: A ledger's by name, or a table with columns of these names; what is missing is 0.
        k: A backward's time in forwards, as `repeatlab measure` finds it; a number or a column.
        parts: What is counted; scoring belongs to training, "".
    """
    forward, backward = (
        sum(counts.get(f"{part}{way}_samples", 0) for part in parts)
        for way in ("forward", "backward")
    )
    scoring = counts.get("scoring_samples", 0) if "" in parts else 0
    return forward + k * backward + scoring


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
        skipped_steps: 0; earlier versions left out steps whose float16 gradients overflowed.
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
        pretraining_updates: Updates that the task itself had behind it at its start (what a
            continual learner knows already). Every arm has the same, so that no budget counts it;
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

    def cost_units(self, k: float) -> float:
        """Return what was spent in forward equivalents: see the function of this name."""
        return cost_units(vars(self), k)


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
