"""What a run has spent, in counts that do not depend on the machine, and in seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Ledger:
    """Counts from the start of a run; "sample" means one sample passing once.

    Attributes:
        updates: Gradient updates.
        fresh_batches: Minibatches drawn.
        distinct_samples: Different training samples seen so far.
        forward_samples: Samples that went forward in training.
        backward_samples: Samples that went backward.
        environment_steps: Steps made in a simulator.
        seconds: Training time; evaluation is outside the clock.
        host_reads: How often the host waited for a loss on the device.
        calibration_updates: Updates of the short run that `t: auto` needed, on top of the above.
        calibration_samples: Samples of that run, each once forward and once backward.
        calibration_seconds: Its training time.
    """

    updates: int = 0
    fresh_batches: int = 0
    distinct_samples: int = 0
    forward_samples: int = 0
    backward_samples: int = 0
    environment_steps: int = 0
    seconds: float = 0.0
    host_reads: int = 0
    calibration_updates: int = 0
    calibration_samples: int = 0
    calibration_seconds: float = 0.0

    def to_json(self) -> dict[str, int | float]:
        """Return the counts by name."""
        return asdict(self)
