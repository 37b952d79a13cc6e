"""What a careful practitioner looks at before training: `check` makes all of it for one task.

The inputs and their labels, the first loss against theory, gradients by central differences, that
twenty samples can be learnt by heart, and that regularisation costs training loss. Every check
looks at the task's own `step` from outside, so that a task needs nothing for it; what theory says
of a task is in `expectations`.

To look at the pictures: `figures.picture_grid(check(...).seen)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repeatlab.core.environment import pick_device
from repeatlab.core.schema import Model, parse
from repeatlab.studies.checks.expectations import EXPECTATIONS, Expectations
from repeatlab.studies.checks.gradient import gradient
from repeatlab.studies.checks.learning import initial_loss, overfitting, regularisation
from repeatlab.studies.checks.pipeline import inputs, labels, seen
from repeatlab.studies.checks.probe import Subject
from repeatlab.studies.checks.report import Report, Result
from repeatlab.tasks import TASKS, Task, TaskConfig, load_task
from repeatlab.training.config import TaskChoice
from repeatlab.training.making import torch_settings

__all__ = ["CHECKS", "EXPECTATIONS", "Expectations", "Report", "Result", "check"]

CHECKS = (inputs, labels, initial_loss, gradient, overfitting, regularisation)


class _Chosen(Model):
    task: TaskChoice


def check(
    config: TaskConfig | Mapping[str, Any],
    *,
    seed: int = 0,
    device: str = "cpu",
    task: type[Task] | None = None,
) -> Report:
    """Make every check of a task; nothing is written.

    Args:
        config: The task's configuration, or its fields, `name` among them.
        seed: Of first weights, order and everything drawn.
        device: "cpu", "cuda", or "auto" as in a run; where there is no float64, the CPU.
        task: The task's class, where it is not the one that `TASKS` has under that name.

    Raises:
        ConfigError: the fields are not valid.
        DataError: the task's data are missing or damaged.
    """
    if not isinstance(config, TaskConfig):
        config = parse(_Chosen, {"task": dict(config)}).task
    device = pick_device(device)
    subject = Subject(
        config,
        task or load_task(TASKS[config.name]),
        EXPECTATIONS.get(config.name, Expectations()),
        seed=seed,
        device="cpu" if device == "mps" else device,
    )
    with torch_settings(1, seed):
        results = tuple(make(subject) for make in CHECKS)
        dataset = getattr(config, "dataset", "")
        title = f"{config.name} on {dataset}" if dataset else config.name
        return Report(title, results, seen(subject))
