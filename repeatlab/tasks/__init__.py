"""The kinds of learning that the method is compared on.

A task is one file: its configuration, its model, and one complete update, in the terms of its
field. To add one: write the file and name its class in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field

from repeatlab.schema import Model

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

TASKS: dict[str, str] = {
    "supervised": "repeatlab.tasks.supervised:Supervised",
}


def load_task(target: str) -> type[Task]:
    """Return the class that an entry of `TASKS` names, importing its file only now."""
    module, name = target.split(":")
    return getattr(import_module(module), name)


class TaskConfig(Model):
    """Base of every task's configuration; a task gives its own defaults and adds its fields."""

    name: str
    lr: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=1)]

    def prepare(self) -> None:
        """Fetch and check the files that the task needs; by default none.

        Raises:
            DataError: they are missing or damaged, and what to do about it.
        """


class Task(Protocol):
    """What `loop.train` needs of a task; constructed as `Task(config, seed=..., device=...)`.

    Initial weights and every draw that concerns a fresh batch are functions of (seed, index), so
    that all arms of one seed start equal and see the same k-th fresh batch.

    Attributes:
        Config: The task's configuration model.
        optimizers: Every optimizer of the task; the loop sets their learning rates.
    """

    Config: ClassVar[type[TaskConfig]]
    optimizers: Sequence[Optimizer]

    def fresh_batch(self, index: int) -> Any:
        """Return the `index`-th fresh batch, with `.indices` of its samples, shape (batch,)."""

    def refresh(self, batch: Any, visit: int) -> Any:
        """Return the same samples under a new augmentation, for visit 1, 2, ..."""

    def step(self, batch: Any, report: Callable[[torch.Tensor], None]) -> None:
        """Make ONE complete update, with any number of optimizers.

        Calls `report` once with the 0-d driver loss, as soon as its forward is done.
        """

    def evaluate(self, split: str) -> dict[str, float]:
        """Return the metrics on "train" (a fixed subset), "validation" or "test"."""

    def state_dict(self) -> dict[str, Any]:
        """Return models and optimizers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
