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
    import numpy as np
    from torch import Tensor
    from torch.optim import Optimizer

TASKS: dict[str, str] = {
    "supervised": "repeatlab.tasks.supervised:Supervised",
    "semisupervised": "repeatlab.tasks.semisupervised:SemiSupervised",
    "selfsupervised": "repeatlab.tasks.selfsupervised:SelfSupervised",
    "reinforcement": "repeatlab.tasks.reinforcement:Reinforcement",
    "unsupervised": "repeatlab.tasks.unsupervised:Unsupervised",
    "generative": "repeatlab.tasks.generative:Generative",
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
        forward_samples: Samples that go forward in one update.
        backward_samples: Samples that go backward in one update.
        environment_steps: Steps made in a simulator so far; 0 for tasks on a data set.
    """

    Config: ClassVar[type[TaskConfig]]
    optimizers: Sequence[Optimizer]
    forward_samples: int
    backward_samples: int
    environment_steps: int

    def fresh_batch(self, index: int) -> Any:
        """Return the `index`-th fresh batch, with `.indices` of its samples, shape (batch,)."""

    def refresh(self, batch: Any, visit: int) -> Any:
        """Return the same samples under a new augmentation, for visit 1, 2, ..."""

    def step(
        self, batch: Any, report: Callable[[Tensor], None], weights: Tensor | None = None
    ) -> None:
        """Make ONE complete update, with any number of optimizers.

        Calls `report` once with the 0-d driver loss, as soon as its forward is done. The mean over
        samples is weighted with `weights`, shape (batch,), where they are given; the driver loss is
        not.
        """

    def sample_losses(self, batch: Any) -> Tensor:
        """Return the driver loss of every sample, shape (batch,), without gradient or side effect.

        Models are in evaluation mode, so that BatchNorm and dropout are untouched.
        """

    def evaluate(self, split: str) -> dict[str, float]:
        """Return the metrics on "train" (a fixed subset), "validation" or "test"."""

    def pictures(self) -> dict[str, np.ndarray]:
        """Return what is worth looking at: uint8 images (n, height, width[, 3]), or nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later updates depend on: models, optimizers, random generators."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
