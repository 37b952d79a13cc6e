"""Which runs a run needs before it can begin: its calibration, its trace's source, its teachers."""

from __future__ import annotations

from repeatlab.core.seeding import derive
from repeatlab.training.calibration import calibration_run
from repeatlab.training.config import EvaluationConfig, MethodConfig, RunConfig


def source_run(config: RunConfig) -> RunConfig | None:
    """Return the run whose recorded counts `config` replays, or None.

    It differs in nothing but the method, so that in a study it is the source's own arm.
    """
    source = config.method.source
    if not isinstance(source, MethodConfig):
        return None
    return config.model_copy(update={"method": source})


def teacher_runs(config: RunConfig) -> list[RunConfig]:
    """Return the runs that `config` learns from; none where it is not distilled.

    Standard training of its own task at its rates, each from a seed that follows from its own:
    every seed of a study has other teachers. They never see validation or test split.
    """
    method, settings = config.method, config.method.distillation
    if settings is None:
        return []
    return [
        RunConfig(
            task=config.task,
            method=MethodConfig(schedule=method.schedule),
            max_updates=settings.updates or config.max_updates,
            seed=derive(config.seed, "teacher", number),
            evaluation=EvaluationConfig(splits=(), test=False, keep=1),
            device=config.device,
            threads=config.threads,
        )
        for number in range(settings.teachers)
    ]


def prerequisites(config: RunConfig) -> list[RunConfig]:
    """Return the runs that must be done before `config`, each of which may need others."""
    source = source_run(config)
    return [
        *([calibration_run(config)] if config.method.calibrated else []),
        *([] if source is None else [source]),
        *teacher_runs(config),
    ]
