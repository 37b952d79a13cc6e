"""Which runs a run needs before it can begin: its calibration, its trace's source."""

from __future__ import annotations

from repeatlab.training.calibration import calibration_run
from repeatlab.training.config import MethodConfig, RunConfig


def source_run(config: RunConfig) -> RunConfig | None:
    """Return the run whose recorded counts `config` replays, or None.

    It differs in nothing but the method, so that in a study it is the source's own arm.
    """
    source = config.method.source
    if not isinstance(source, MethodConfig):
        return None
    return config.model_copy(update={"method": source})


def prerequisites(config: RunConfig) -> list[RunConfig]:
    """Return the runs that must be done before `config`, each of which may need others."""
    source = source_run(config)
    calibration = [calibration_run(config)] if config.method.calibrated else []
    return calibration + ([] if source is None else [source])
