"""What a step of all arms is on each task that can go in lock-step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional

from repeatlab.data import Batch
from repeatlab.lockstep.network import StackedMLP
from repeatlab.lockstep.optimizers import StackedOptimizer
from repeatlab.replay import Transitions
from repeatlab.tasks.reinforcement import Reinforcement
from repeatlab.tasks.supervised import Supervised


class Stack(Protocol):
    """The networks of some arms of one task, and the batches that they are at."""

    def stage(self, arm: int, batch: Any) -> None:
        """Put a batch in the place of the one that an arm was at."""

    def losses(self) -> list[float]:
        """Go forward on every arm's batch, and return their driver losses."""

    def step(self) -> None:
        """Go backward from these losses, and make one update of every arm."""


class SupervisedStack:
    """Classifiers: the mean cross-entropy of each arm's minibatch.

    Args:
        tasks: The arms' tasks, each with an MLP.
    """

    def __init__(self, tasks: Sequence[Supervised]) -> None:
        self._network = StackedMLP([task.model for task in tasks])
        self._optimizer = StackedOptimizer(
            [task.optimizer for task in tasks], self._network.gradients
        )
        arms, size, device = len(tasks), tasks[0].batch_size, tasks[0].device
        features = tasks[0].data.train.images[0].numel()
        classes = tasks[0].data.classes
        self._images = torch.zeros(arms, size, features, device=device)
        # The mean cross-entropy's gradient at the logarithms of the classes' shares.
        self._gradient = torch.zeros(arms, size, classes, device=device)
        self._of_label = torch.eye(classes, device=device) * (-1 / size)
        self._places = list(zip(self._images, self._gradient, strict=True))
        self._targets = list(torch.zeros(arms, size, dtype=torch.int64, device=device))
        self._log_shares = self._gradient

    def stage(self, arm: int, batch: Batch) -> None:
        """See `Stack`."""
        images, gradient = self._places[arm]
        images.copy_(batch.images.view_as(images))
        torch.index_select(self._of_label, 0, batch.labels, out=gradient)
        self._targets[arm] = batch.labels

    @torch.no_grad()
    def losses(self) -> list[float]:
        """See `Stack`."""
        self._log_shares = self._network(self._images).log_softmax(2)
        # One by one: torch's mean over a batch, and so every N, is that of a run alone to the bit.
        pairs = zip(self._log_shares, self._targets, strict=True)
        return torch.stack([functional.nll_loss(*pair) for pair in pairs]).tolist()

    @torch.no_grad()
    def step(self) -> None:
        """See `Stack`."""
        shares = self._log_shares
        backward = torch.ops.aten._log_softmax_backward_data
        self._network.backward(backward(self._gradient, shares, 2, shares.dtype))
        self._optimizer.step()


class ReinforcementStack:
    """DQN agents: the mean Huber loss of each arm's TD errors.

    Each arm acts alone, in its own environment with its own network, when its batch is made.

    Args:
        tasks: The arms' tasks.
    """

    def __init__(self, tasks: Sequence[Reinforcement]) -> None:
        self._tasks = tasks
        self._agents = StackedMLP([task.model for task in tasks])
        self._targets = StackedMLP([task.target for task in tasks])
        self._optimizer = StackedOptimizer(
            [task.optimizer for task in tasks], self._agents.gradients
        )
        self._by_error = tasks[0].config.driver == "td_error"
        shape, device = (len(tasks), tasks[0].batch_size), tasks[0].device
        self._batches = Transitions(
            observations=torch.zeros(*shape, 4, device=device),
            actions=torch.zeros(shape, dtype=torch.int64, device=device),
            returns=torch.zeros(shape, device=device),
            discounts=torch.zeros(shape, device=device),
            next_observations=torch.zeros(*shape, 4, device=device),
            indices=torch.zeros(shape, dtype=torch.int64, device=device),
            index=0,
        )
        self._places = list(zip(*self._batches[:-1], strict=True))
        self._gradient = torch.zeros(*shape, 2, device=device)
        self._errors = torch.empty(0)

    def stage(self, arm: int, batch: Transitions) -> None:
        """See `Stack`."""
        torch._foreach_copy_(self._places[arm], batch[:-1])

    @torch.no_grad()
    def losses(self) -> list[float]:
        """See `Stack`."""
        batches = self._batches
        best = self._agents(batches.next_observations).argmax(2, keepdim=True)
        later = self._targets(batches.next_observations).gather(2, best).squeeze(2)
        goals = batches.returns + batches.discounts * later
        values = self._agents(batches.observations)
        values = values.gather(2, batches.actions.unsqueeze(2)).squeeze(2)
        self._errors = values - goals
        if self._by_error:
            return torch.stack([error.abs().mean() for error in self._errors]).tolist()
        pairs = zip(values, goals, strict=True)
        return torch.stack([functional.smooth_l1_loss(*pair) for pair in pairs]).tolist()

    @torch.no_grad()
    def step(self) -> None:
        """See `Stack`."""
        slopes = self._errors.clamp_(-1, 1).mul_(1 / self._errors.shape[1]).unsqueeze(2)
        self._gradient.zero_().scatter_(2, self._batches.actions.unsqueeze(2), slopes)
        self._agents.backward(self._gradient)
        self._optimizer.step()
        for task in self._tasks:
            task.count_update()


STACKS: dict[str, type[Stack]] = {
    "supervised": SupervisedStack,
    "reinforcement": ReinforcementStack,
}
