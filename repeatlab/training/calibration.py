"""t from the loss distribution of a short standard run.

One rule for all tasks. The short run is an ordinary run in the store, so it is made once per task,
data and seed, and every arm that needs it is charged for it.
"""

from __future__ import annotations

import numpy as np

from repeatlab.training.config import CalibrationConfig, EvaluationConfig, MethodConfig, RunConfig


def calibration_run(config: RunConfig) -> RunConfig:
    """Return the short standard run that `config`'s `t: auto` is measured on.

    Standard training at the task's constant learning rate. It never sees validation or test split.
    """
    settings = config.calibration or CalibrationConfig()
    return RunConfig(
        task=config.task,
        method=MethodConfig(),
        max_updates=min(settings.updates, config.max_updates),
        seed=config.seed,
        evaluation=EvaluationConfig(splits=(), test=False),
        device=config.device,
        threads=config.threads,
    )


def calibrate(config: RunConfig, losses: np.ndarray) -> float:
    """Return t for the mapping of `config`, given the fresh-batch losses of the short run.

    Raises:
        ValueError: the losses do not determine one.
    """
    mapping = config.method.mapping
    if mapping.name != "linear":
        return mean_plus_std(losses)
    settings = config.calibration or CalibrationConfig()
    return linear_t(losses, settings.target_repeats, max_repeats=mapping.max_repeats)


def mean_plus_std(losses: np.ndarray) -> float:
    """Return mean + one population standard deviation: t for the threshold mapping.

    Raises:
        ValueError: they are not positive together, as where the driver loss is 0 on every batch.
    """
    t = float(np.mean(losses) + np.std(losses))
    if t <= 0:
        raise ValueError(
            f"the driver loss's mean plus standard deviation must be positive to serve as t; it is "
            f"{t:.4g} over {len(losses)} batches (give t, or use a quantile or zscore mapping)"
        )
    return t


def linear_t(losses: np.ndarray, target: float, *, max_repeats: int) -> float:
    """Return the t at which the linear mapping makes `target` updates a batch on average.

    E[N](t) = mean of max(1, min(max_repeats, floor(L / t))) falls in steps as t grows; the t
    returned is where it crosses `target`, to double precision.

    Raises:
        ValueError: `target` is not between 1 and `max_repeats`, or too few losses are positive.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if not 1 < target < max_repeats:
        raise ValueError(
            f"calibration.target_repeats must lie between 1 and max_repeats = {max_repeats}, "
            f"not {target}"
        )

    def expected(t: float) -> float:
        return float(np.clip(np.floor(losses / t), 1, max_repeats).mean())

    # At `high` every count is 1; at `low` the positive losses all ask for the most, also where
    # x / (x / max_repeats) is rounded to just below max_repeats.
    high = float(losses.max())
    low = float(losses[losses > 0].min(initial=high)) / (max_repeats + 1) if high > 0 else 0.0
    if low <= 0 or expected(low) < target:
        raise ValueError(
            "no t gives the linear mapping its target: the driver loss is not positive on enough "
            "batches (give t, or use a quantile or zscore mapping)"
        )
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if expected(middle) >= target else (low, middle)
    return low
