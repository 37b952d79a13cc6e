"""The kinds of learning that the method is compared on.

A task is one file: its configuration, its model, and one complete update, in the terms of its
field. To add one: write the file and name its class in `TASKS`.
"""

from __future__ import annotations

from repeatlab import require_lab

require_lab()

import hashlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field

from repeatlab.core.schema import Model

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.optim import Optimizer

    from repeatlab.tasks.optimization import OptimizerStep

TASKS: dict[str, str] = {
    "supervised": "repeatlab.tasks.supervised:Supervised",
    "semisupervised": "repeatlab.tasks.semisupervised:SemiSupervised",
    "selfsupervised": "repeatlab.tasks.selfsupervised:SelfSupervised",
    "reinforcement": "repeatlab.tasks.reinforcement:Reinforcement",
    "unsupervised": "repeatlab.tasks.unsupervised:Unsupervised",
    "generative": "repeatlab.tasks.generative:Generative",
    # Where passes over one batch are the method itself.
    "ppo": "repeatlab.tasks.ppo:PPO",
    # Beyond the six: what repetition does where a network has to keep, or to doubt, what it learns.
    "continual": "repeatlab.tasks.continual:Continual",
    "noisy_labels": "repeatlab.tasks.noisy_labels:NoisyLabels",
    # On which it is known beforehand what there is to find.
    "single_index": "repeatlab.tasks.single_index:SingleIndex",
    # Where data may be seen once, or again and again.
    "language": "repeatlab.tasks.language:Language",
    # `repeatlab new task` writes a line here.
}


# Part of the identity of every run of these tasks: raised when a task's code means something else.
VERSIONS = dict.fromkeys(TASKS, 1)
# `repeatlab new task` leaves one out here.


def version(name: str) -> int | str:
    """Return what the runs of a task are told apart by when its code is another one.

    For tasks in `VERSIONS` it is the number there, since their code changes in many ways that leave
    every record as it was. Any other is known by its code: the beginning of the SHA-256 of its
    module's source, as it was when the class was first asked for. After a change of it the store
    has none of its runs. What the module imports is not part of it.

    Raises:
        ValueError: the source cannot be read, as that of a class typed into Python's prompt.
    """
    return VERSIONS.get(name) or _digest(load_task(TASKS[name]))


@cache
def _digest(task: type[Task]) -> str:
    try:
        module = inspect.getmodule(task)
        # What a notebook defines is in no file, but in its cells.
        in_file = getattr(module, "__file__", None) is not None
        parts = [module] if in_file else [task, task.Config]
        text = "\n".join(inspect.getsource(part) for part in parts)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"task: the source of {task.__qualname__} must be readable, since it tells its runs "
            f"apart: write it into a file ({error})"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_task(target: str) -> type[Task]:
    """Return the class that an entry of `TASKS` names, importing its file only now."""
    module, name = target.split(":")
    return getattr(import_module(module), name)


class TaskConfig(Model):
    """Base of every task's configuration; a task gives its own defaults and adds its fields."""

    most: ClassVar = dict.fromkeys(("width", "latent", "hidden", "projection"), 10_000) | {
        "batch_size": 10**6,
        "capacity": 10**7,
        "fid_samples": 10**6,
    }

    name: str
    lr: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=1)]

    def prepare(self) -> None:
        """Fetch and check the files that the task needs, and the sizes that only they can refuse.

        By default there are none.

        Raises:
            DataError: files are missing or damaged, and what to do about it.
            ConfigError: a size does not fit the data: its field, and what would be right.
        """

    def refusals(self) -> dict[str, str]:
        """Return the parts of a method that mean nothing on this task, each with the reason.

        Parts are the names of samplers, "weighted" and "unweighted" (hard mining), "gradient_norm"
        (scores), "step_size", "fresh_samples", "proximal", "fresh_views", "spaced" and "prefetch".
        """
        return {}


# What an update calls with the driver loss; with weights, with each sample's and its bound, too.
Report = Callable[..., None]


class Task(Protocol):
    """What `making.train` needs of a task; constructed as `Task(config, seed=..., device=...)`.

    Initial weights and every draw that concerns a fresh batch are functions of (seed, index), so
    that all arms of one seed start equal and see the same k-th fresh batch.

    Attributes:
        Config: The task's configuration model.
        optimizers: Every optimizer of the task; the loop sets their learning rates.
        optimizer_steps: What moves weights with them, each with a `lap` for who times an update.
        batch_size: b, the samples of a fresh batch.
        device: Where batches are.
        forward_samples: Samples that go forward in one update.
        backward_samples: Samples that go backward in one update.
        scoring_samples: Samples that go forward for a batch's `sample_losses`.
        bound_samples: Samples that go forward for a batch's `gradient_bounds`.
        environment_steps: Steps made in a simulator so far; 0 for tasks on a data set.
    """

    Config: ClassVar[type[TaskConfig]]
    optimizers: Sequence[Optimizer]
    optimizer_steps: Sequence[OptimizerStep]
    batch_size: int
    device: Any
    forward_samples: int
    backward_samples: int
    scoring_samples: int
    bound_samples: int
    environment_steps: int

    def fresh_batch(self, index: int) -> Any:
        """Return the `index`-th fresh batch, with `.indices` of its samples, shape (batch,)."""

    def refresh(self, batch: Any, visit: int) -> Any:
        """Return the same samples under a new augmentation, for visit 1, 2, ..."""

    def resample(self, batch: Any, visit: int) -> Any:
        """Return other samples in place of the batch's; not where `fresh_samples` is refused."""

    def population(self, index: int) -> range:
        """Return the numbers of the samples that fresh batch `index` can hold."""

    def candidates(self, index: int, block: int) -> Any:
        """Return b samples that a sampler may choose fresh batch `index` from.

        Block 0, 1, 2, ... of the whole run; block `index` is `fresh_batch(index)`.
        """

    def batch_of(self, indices: Tensor, index: int) -> Any:
        """Return the fresh batch `index`, made of the samples that a sampler has chosen.

        `indices` is int64, (batch,), of numbers in `population(index)`, with repeats or not.
        """

    def pick(self, blocks: Sequence[Any], picks: Tensor, index: int) -> Any:
        """Return the samples `picks`, int64, (batch,), of batches laid end to end, as they are."""

    def step(self, batch: Any, report: Report, weights: Tensor | None = None) -> None:
        """Make ONE complete update, with any number of optimizers.

        Calls `report` once with the 0-d driver loss, as soon as its forward is done. Where
        `weights`, shape (batch,), are given, the mean over samples is weighted with them, the
        driver loss is not, and `report` is also given the samples' losses and, where the task has
        them, gradient bounds, both (batch,).
        """

    def sample_losses(self, batch: Any) -> Tensor:
        """Return the driver loss of every sample, shape (batch,), without gradient or side effect.

        Models are in evaluation mode, so that BatchNorm and dropout are untouched.
        """

    def gradient_bounds(self, batch: Any) -> Tensor:
        """Return an upper bound of every sample's gradient norm, up to a factor, as above.

        The norm of the loss's gradient at the last pre-activation (Katharopoulos and Fleuret 2018,
        arXiv 1803.00942). Not on tasks that refuse `gradient_norm`.
        """

    def evaluate(self, split: str) -> dict[str, float]:
        """Return the metrics on "train" (a fixed subset), "validation" or "test"."""

    def pictures(self) -> dict[str, np.ndarray]:
        """Return what is worth looking at: uint8 images (n, height, width[, 3]), or nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later updates depend on: models, optimizers, random generators."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
