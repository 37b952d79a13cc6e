"""A task's own update, watched: its losses and gradients, without moving a weight.

`Task.step` is called as it is. A torch function mode sees the losses whose `backward` it calls, and
each optimizer's gradients are taken away before its step, which then has nothing to apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from repeatlab.studies.checks.expectations import QUIET, Expectations
from repeatlab.tasks import Task, TaskConfig
from repeatlab.training.weights import networks

BURN_IN = 20  # updates: at their first weights, networks are special (zeros, symmetries)
FEW = 8  # samples: the more there are, the more kinks


@dataclass(frozen=True)
class Subject:
    """What is checked: a task's configuration, and how to build it anew.

    Attributes:
        config: The task's configuration.
        kind: The task's class.
        expected: What theory says of it.
        seed: Of weights, order and everything drawn.
        device: Where it is checked.
    """

    config: TaskConfig
    kind: type[Task]
    expected: Expectations
    seed: int = 0
    device: str = "cpu"

    def build(self, changes: Mapping[str, Any] | None = None) -> Task:
        """Return a fresh task with these fields changed; fields that it has not are left out."""
        known = type(self.config).model_fields
        fields = {name: value for name, value in (changes or {}).items() if name in known}
        config = type(self.config).model_validate(dict(self.config) | fields)
        return self.kind(config, seed=self.seed, device=self.device)

    def quiet(self, samples: int, changes: Mapping[str, Any] | None = None) -> Task:
        """Return a fresh task with batches of few samples and nothing that adds noise to a loss.

        The driver is the default one: the loss that the update descends.
        """
        samples = min(samples, len(self.build().population(0)))
        fields = QUIET | {"batch_size": samples}
        driver = type(self.config).model_fields.get("driver")
        if driver is not None:
            fields["driver"] = driver.default
        optimizer = getattr(self.config, "optimizer", None)
        if optimizer is not None:
            fields["optimizer"] = optimizer.model_copy(update={"weight_decay": 0.0})
        return self.build(fields | dict(changes or {}))


@contextmanager
def double_precision(subject: Subject) -> Iterator[Probe]:
    """Give the update on a small batch in float64, after a short burn-in; draws are float64 too."""
    task = subject.quiet(FEW, subject.expected.differentiable)
    for index in range(BURN_IN):
        task.step(task.fresh_batch(index), lambda *losses: None)
    batch = task.fresh_batch(BURN_IN)
    for module in networks(task).values():
        module.double()
    doubled = {
        name: value.double()
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield Probe(task, batch._replace(**doubled))
    finally:
        torch.set_default_dtype(before)


def trained(task: Task) -> dict[str, Tensor]:
    """Return every weight of the networks that an optimizer has a part of, by name.

    A network of which no optimizer has a weight (a target, an average) is not trained.
    """
    held = {id(p) for o in task.optimizers for group in o.param_groups for p in group["params"]}
    return {
        f"{name}.{path}": weight
        for name, module in networks(task).items()
        if any(id(p) in held for p in module.parameters())
        for path, weight in module.named_parameters()
    }


class Evaluation(NamedTuple):
    """One update's losses, a number for each optimizer.

    Attributes:
        objectives: The loss that each optimizer descends.
        gradients: For each optimizer, the gradient of its objective by the weight's `id`.
    """

    objectives: list[float]
    gradients: list[dict[int, Tensor]]


class Probe:
    """A task, a batch, and the state in which every evaluation begins.

    Nothing random differs between evaluations: the task's generators are part of its state, torch's
    global one is seeded.
    """

    def __init__(self, task: Task, batch: Any) -> None:
        self.task, self.batch = task, batch
        self._state = deepcopy(task.state_dict())

    def evaluate(
        self, change: Callable[[], None] | None = None, *, gradients: bool = False
    ) -> Evaluation:
        """Return the losses in the first state, after `change` of its weights if there is one."""
        self.task.load_state_dict(deepcopy(self._state))
        if change is not None:
            with torch.no_grad():
                change()
        torch.manual_seed(0)
        watch = _Watch(gradients)
        hooks = [o.register_step_pre_hook(watch.before_step) for o in self.task.optimizers]
        try:
            with watch:
                self.task.step(self.batch, lambda *losses: None)
        finally:
            for hook in hooks:
                hook.remove()
        order = list(map(id, self.task.optimizers))
        losses = [float(watch.losses[key]) for key in order]
        return Evaluation(losses, [watch.gradients[key] for key in order])


class _Watch(TorchFunctionMode):
    """Notes what `backward` is called on, and takes away what an optimizer would apply.

    Attributes:
        losses: By the `id` of the optimizer whose step came after: the sum, where there were more.
        gradients: Likewise, by the `id` of the weight; empty unless asked for.
    """

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self._backward = backward
        self._pending: float | Tensor = 0.0
        self.losses: dict[int, float | Tensor] = {}
        self.gradients: dict[int, dict[int, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.backward:
            self._pending = self._pending + args[0].detach()
            if not self._backward:
                return None
        return func(*args, **(kwargs or {}))

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.losses[id(optimizer)], self._pending = self._pending, 0.0
        self.gradients[id(optimizer)] = found = {}
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if self._backward and weight.requires_grad:
                    grad = weight.grad
                    found[id(weight)] = torch.zeros_like(weight) if grad is None else grad.clone()
                weight.grad = None
