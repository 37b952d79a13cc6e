"""What a search is: its space, how it is searched, what decides, and what is the same for all."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from repeatlab.analysis.frames import LOWER_IS_BETTER
from repeatlab.core.files import safe_name
from repeatlab.core.schema import ConfigError, Model, choice, parse
from repeatlab.studies.search.space import Dimension, Point, Range
from repeatlab.studies.search.strategies import STRATEGIES
from repeatlab.training.calibration import calibrate
from repeatlab.training.config import (
    BudgetConfig,
    CalibrationConfig,
    Device,
    EvaluationConfig,
    LoaderConfig,
    MethodConfig,
    PositiveInt,
    RunConfig,
    TaskChoice,
)

# What may be searched: budget, seeds and machine are the same for all trials.
PARTS = ("task", "method", "calibration")


class Search(Model):
    """Which hyperparameters of one task and method are tried, how, and what decides."""

    name: str
    task: TaskChoice
    method: MethodConfig = MethodConfig()
    """Like `task` with a value wherever it needs one; what the space varies is replaced."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Dotted path into the run's configuration -> where to look."""
    sampler: choice("sampler", STRATEGIES)
    """How the space is searched; the name alone will do."""
    trials: PositiveInt | None = None
    """How many; a grid has as many as points."""
    seeds: PositiveInt = 1
    """Runs of a trial, with seeds counted from 0."""
    metric: str
    """The metric on the validation split at the last update, averaged over seeds."""
    max_updates: PositiveInt
    evaluation: EvaluationConfig = EvaluationConfig(test=False)
    budget: BudgetConfig | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    loader: LoaderConfig = LoaderConfig()
    device: Device = "auto"
    threads: PositiveInt = 1
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of what is tried; it is no seed of a run."""

    @classmethod
    def of(cls, **fields: Any) -> Search:
        """Return the search with these fields, naming every bad one in the error."""
        return parse(cls, fields)

    @property
    def direction(self) -> str:
        """Whether to "minimize" or to "maximize" the metric."""
        return "minimize" if self.metric in LOWER_IS_BETTER else "maximize"

    @property
    def total(self) -> int:
        """The number of trials."""
        return self.trials or prod(len(dimension.grid()) for dimension in self.space.values())

    def corners(self) -> list[Point]:
        """Return every combination of the ranges' ends and of the choices."""
        values = product(*(dimension.ends for dimension in self.space.values()))
        return [dict(zip(self.space, point, strict=True)) for point in values]

    def configs(self, point: Point) -> list[RunConfig]:
        """Return the runs of the trial at `point`, one for each seed."""
        return [self.config(point, seed=seed) for seed in range(self.seeds)]

    def config(self, point: Point, *, seed: int) -> RunConfig:
        """Return the run with the values of `point` at its paths.

        Raises:
            ConfigError: a path leads nowhere, or a value is refused.
        """
        fields = {name: value for name, value in self if name in RunConfig.model_fields}
        fields |= {
            "task": self.task.model_dump(),
            "method": self.method.model_dump(exclude_unset=True),
            "calibration": self.calibration.model_dump(),
            "seed": seed,
        }
        for path, value in point.items():
            _place(fields, path, value)
        config = parse(RunConfig, fields)
        # Only runs that are calibrated depend on how: the others keep their identity.
        if config.method.depends_on_calibration:
            return config
        return config.model_copy(update={"calibration": None})

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, value: str) -> str:
        return safe_name("search name", value)

    @field_validator("sampler", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("evaluation")
    @classmethod
    def _never_test(cls, value: EvaluationConfig) -> EvaluationConfig:
        if value.test and "test" in value.model_fields_set:
            raise ValueError("test: a search never reads the test split")
        if "validation" not in value.splits:
            raise ValueError("splits: a search needs the validation split")
        return value.model_copy(update={"test": False})

    @model_validator(mode="after")
    def _has_its_number_of_trials(self) -> Self:
        grid = self.sampler.name == "grid"
        if grid and self.trials is not None:
            raise ValueError("trials: a grid has as many trials as points; leave it out")
        if not grid and self.trials is None:
            raise ValueError(f"trials: must be given for the sampler {self.sampler.name}")
        for path, dimension in self.space.items():
            if isinstance(dimension, Range) and grid == (dimension.points is None):
                raise ValueError(f"space.{path}.points: must be given for a grid, and only for it")
        return self

    @model_validator(mode="after")
    def _corners_are_runs(self) -> Self:
        for path in self.space:
            part, _, inside = path.partition(".")
            if part not in PARTS or not inside:
                known = ", ".join(f"{name}." for name in PARTS)
                raise ValueError(f"space.{path}: must begin with one of {known}")
        corners = self.corners()
        for point in corners:
            try:
                config = self.config(point, seed=0)
                if config.method.calibrated:
                    # A rule that finds no t on these losses finds none on any.
                    calibrate(config, np.linspace(1, 2))
            except ValueError as error:
                raise ValueError(f"space: with {describe(point)}: {error}") from None
        for path, dimension in self.space.items():
            varied = [corners[0] | {path: value} for value in dimension.ends]
            if len({self.config(point, seed=0).run_id for point in varied}) == 1:
                raise ValueError(f"space.{path}: changes nothing in the run")
        return self


def describe(point: Point) -> str:
    """Return the values of `point` by path, for a message."""
    return ", ".join(f"{path} = {value}" for path, value in point.items())


def _place(fields: dict[str, Any], path: str, value: Any) -> None:
    """Put `value` at the dotted `path`."""
    *parents, name = path.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: {parent} is {fields!r}, which has no parts")
    fields[name] = value
