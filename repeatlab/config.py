"""One run's whole configuration, and the identity that follows from it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from repeatlab.mappings import MAPPINGS
from repeatlab.schedules import SCHEDULES
from repeatlab.schema import Model, choice, named, parse
from repeatlab.tasks import TASKS, load_task

# Part of every run's identity: raise it when the same configuration would give other records.
RECORD_VERSION = 1

PositiveInt = Annotated[int, Field(ge=1)]
Device = Literal["auto", "cpu", "cuda", "mps"]
TaskChoice = named("task", TASKS, lambda target: load_task(target).Config)


class MethodConfig(Model):
    """How batches are repeated and the learning rate moves; `{}` is standard training."""

    mapping: choice("mapping", MAPPINGS, without=("seed",)) | None = None
    schedule: choice("schedule", SCHEDULES) | None = None
    fresh_views: bool = False
    """Whether a repeat draws its augmentation anew; by default it sees the same view."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the mapping has a field that says `auto`."""
        return self.mapping is not None and "auto" in dict(self.mapping).values()


class CalibrationConfig(Model):
    """How `t: auto` is found: from the fresh-batch losses of a short standard run."""

    updates: PositiveInt = 500
    """Updates of the short run; they are charged to the arm that asks for them."""
    target_repeats: Annotated[float, Field(gt=1)] = 2.0
    """For `linear`: E[N] on the loss distribution of the short run."""


class EvaluationConfig(Model):
    """When the task is evaluated; never inside the clock."""

    every: PositiveInt = 1000
    """Updates between evaluations; they are also made at update 0 and at T."""
    splits: Annotated[tuple[Literal["train", "validation"], ...], Field(strict=False)] = (
        "train",
        "validation",
    )
    """What is evaluated; "train" is a fixed part of the training split."""
    test: bool = True
    """Whether the test split is read, once, after the last update."""


class RunConfig(Model):
    """Everything that one run depends on."""

    task: TaskChoice
    method: MethodConfig = MethodConfig()
    max_updates: PositiveInt
    seed: Annotated[int, Field(ge=0)] = 0
    evaluation: EvaluationConfig = EvaluationConfig()
    calibration: CalibrationConfig | None = None
    device: Device = "auto"
    threads: PositiveInt = 1
    """CPU threads of torch: sums, and so the records, depend on their number."""

    @property
    def run_id(self) -> str:
        """Sixteen hex digits that identify the configuration."""
        text = json.dumps([RECORD_VERSION, self.to_json()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON-safe values; `parse` reads it back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunConfig:
        """Return what `to_json` wrote."""
        return parse(cls, data)
