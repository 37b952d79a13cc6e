"""What the configurations of all tasks on a data set share."""

from __future__ import annotations

from pydantic import field_validator

from repeatlab.data import DATASETS, load_splits
from repeatlab.schema import did_you_mean
from repeatlab.tasks import TaskConfig


class DatasetTaskConfig(TaskConfig):
    """A task on one of `repeatlab.data.DATASETS`; by default the embedded one."""

    dataset: str = "digits"

    def prepare(self) -> None:
        load_splits(self.dataset)

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DATASETS:
            raise ValueError(f"unknown dataset {value!r}; {did_you_mean(value, DATASETS)}")
        return value
