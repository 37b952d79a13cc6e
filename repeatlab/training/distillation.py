"""The task of a distilled run, whose teacher is an ensemble of ordinary runs (`teacher_runs`).

All that they cost is charged to the run that learns from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from time import perf_counter

from repeatlab.cost import spent_on
from repeatlab.store.records import Run
from repeatlab.tasks import Task
from repeatlab.tasks.distillation import Distilled
from repeatlab.training.config import RunConfig
from repeatlab.training.ensembles import member_log_probabilities, of_seeds


def distilled_task(config: RunConfig, teachers: Sequence[Run], *, device: str) -> Task:
    """Return the task of a distilled run, with what its teachers say of every training image.

    The soft targets are the mean of the teachers' distributions at the temperature.
    """
    start = perf_counter()
    settings = config.method.distillation
    log_probabilities, data = member_log_probabilities(of_seeds(teachers), "train", device=device)
    targets = (log_probabilities / settings.temperature).softmax(2).mean(0)
    spent = Counter()
    for run in teachers:
        spent.update(spent_on("holdout", run.summary["ledger"]))
    spent["holdout_forward_samples"] += len(teachers) * len(data)
    spent["holdout_seconds"] += perf_counter() - start
    task = Distilled(config.task, seed=config.stream_seed, device=device)
    task.imitate(targets, temperature=settings.temperature, share=settings.share, spent=spent)
    return task
