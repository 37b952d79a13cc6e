"""What a step of all arms is on each task that can go in lock-step.

A stack holds the networks of some arms of one task, and the batches that they are at. To let
another task go in lock-step, say in `plan` what may differ among its runs; where its update is
more than a step along `LearningTask.losses`, or where arms need another one's speed, write one and
name it in `STACKS`. Its `task` is the class that each arm trains; None for the task's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from repeatlab.data import Batch
from repeatlab.studies.lockstep.functional import FunctionalStack
from repeatlab.studies.lockstep.network import StackedMLP
from repeatlab.studies.lockstep.optimizers import StackedOptimizer
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.reinforcement import (
    Played,
    Reinforcement,
    double_q_targets,
    play_greedily,
    taken,
)
from repeatlab.tasks.replay_buffer import Transitions, in_columns
from repeatlab.tasks.single_index import SingleIndex, SingleIndexBatch
from repeatlab.tasks.supervised import Supervised

# In the places of a batch's columns that are not read.
NOTHING = (torch.empty(0),) * 5


class SupervisedStack:
    """Classifiers: the mean cross-entropy of each arm's minibatch.

    Args:
        tasks: The arms' tasks, each with an MLP.
    """

    task = Supervised

    def __init__(self, tasks: Sequence[Supervised]) -> None:
        self._network = StackedMLP([task.model for task in tasks])
        self._optimizer = StackedOptimizer(
            [task.optimizer for task in tasks], self._network.weights, self._network.gradients
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
        self._outputs = self._log_shares = self._gradient

    def stage(self, arm: int, batch: Batch) -> None:
        """Put a batch in the place of the one that an arm was at."""
        images, gradient = self._places[arm]
        images.copy_(batch.images.view_as(images))
        torch.index_select(self._of_label, 0, batch.labels, out=gradient)
        self._targets[arm] = batch.labels

    def losses(self) -> list[float]:
        """Go forward on every arm's batch, and return their driver losses."""
        self._outputs = self._network(self._images).requires_grad_()
        self._log_shares = self._outputs.log_softmax(2)
        # One by one: torch's mean over a batch, and so every N, is that of a run alone to the bit.
        pairs = zip(self._log_shares.detach(), self._targets, strict=True)
        return torch.stack([functional.nll_loss(*pair) for pair in pairs]).tolist()

    def step(self) -> None:
        """Go backward from these losses, and make one update of every arm."""
        (gradient,) = torch.autograd.grad(self._log_shares, self._outputs, self._gradient)
        self._network.backward(gradient)
        self._optimizer.step()


class SingleIndexStack:
    """Students of single-index targets: the mean squared error of each arm's batch.

    Args:
        tasks: The arms' tasks.
    """

    task = SingleIndex

    def __init__(self, tasks: Sequence[SingleIndex]) -> None:
        self._network = StackedMLP([task.model for task in tasks])
        self._optimizer = StackedOptimizer(
            [task.optimizer for task in tasks], self._network.weights, self._network.gradients
        )
        shape, device = (len(tasks), tasks[0].batch_size), tasks[0].device
        self._inputs = torch.zeros(*shape, tasks[0].config.inputs, device=device)
        self._targets = torch.zeros(*shape, device=device)
        self._errors = self._targets

    def stage(self, arm: int, batch: SingleIndexBatch) -> None:
        """See `SupervisedStack`."""
        self._inputs[arm].copy_(batch.inputs)
        self._targets[arm].copy_(batch.targets)

    def losses(self) -> list[float]:
        """See `SupervisedStack`."""
        self._errors = self._network(self._inputs).squeeze(2) - self._targets
        return torch.stack([errors.square().mean() for errors in self._errors]).tolist()

    def step(self) -> None:
        """See `SupervisedStack`."""
        self._network.backward((self._errors * (2 / self._errors.shape[1])).unsqueeze(2))
        self._optimizer.step()


class AgentInStep(Reinforcement):
    """An agent that asks the networks of all arms, where one of its own would ask its own.

    Attributes:
        stack: These networks; None before they are stacked.
        arm: Its number among them.
    """

    stack: ReinforcementStack | None = None
    arm = 0

    def fetch(self, indices: Tensor, index: int) -> Transitions:
        """Return a batch that is read from the buffer only when it is staged."""
        return Transitions(*NOTHING, indices, index)

    def play(self, split: str) -> Played:
        """See `Reinforcement`."""
        played = self.stack.play(self.arm, split) if self.stack else None
        return played or super().play(split)


class ReinforcementStack:
    """DQN agents: the mean Huber loss of each arm's TD errors.

    Each arm lives in its own environment and has its own replay buffer. The episodes of an
    evaluation, which arms in step come to after the same update, are played by all at once.

    Args:
        tasks: The arms' tasks.
    """

    task = AgentInStep

    def __init__(self, tasks: Sequence[AgentInStep]) -> None:
        self._tasks = tasks
        self._agents = StackedMLP([task.model for task in tasks])
        self._targets = StackedMLP([task.target for task in tasks])
        self._optimizer = StackedOptimizer(
            [task.optimizer for task in tasks], self._agents.weights, self._agents.gradients
        )
        self._by_error = tasks[0].config.driver == "td_error"
        shape, device = (len(tasks), tasks[0].batch_size), tasks[0].device
        self._rows = torch.zeros(*shape, tasks[0].buffer.width)
        self._places = list(self._rows.numpy())
        self._actions = torch.empty(0)
        self._gradient = torch.zeros(*shape, 2, device=device)
        self._errors = torch.empty(0)
        # Of the weights as they are until the next step.
        self._episodes: dict[str, tuple[list[Played], list[Tensor]]] = {}
        for arm, task in enumerate(tasks):
            task.stack, task.arm = self, arm

    def stage(self, arm: int, batch: Transitions) -> None:
        """See `SupervisedStack`."""
        self._tasks[arm].buffer.copy_rows(batch.indices, self._places[arm])

    def losses(self) -> list[float]:
        """See `SupervisedStack`."""
        rows = self._rows.to(self._gradient.device, non_blocking=True)
        batches = in_columns(rows, torch.empty(0), 0)
        next_values = self._agents(batches.next_observations)
        goals = double_q_targets(batches, next_values, self._targets(batches.next_observations))
        self._actions = batches.actions.unsqueeze(2)
        values = taken(self._agents(batches.observations), batches)
        self._errors = values - goals
        if self._by_error:
            return self._errors.abs().mean(1).tolist()
        return functional.smooth_l1_loss(values, goals, reduction="none").mean(1).tolist()

    def step(self) -> None:
        """See `SupervisedStack`."""
        slopes = self._errors.clamp_(-1, 1).mul_(1 / self._errors.shape[1]).unsqueeze(2)
        self._gradient.zero_().scatter_(2, self._actions, slopes)
        self._agents.backward(self._gradient)
        self._optimizer.step()
        self._episodes.clear()
        for task in self._tasks:
            task.count_update()

    def play(self, arm: int, split: str) -> Played | None:
        """Return an arm's episodes of a split; None where its weights are no longer these."""
        weights = self._agents.weights
        if split not in self._episodes:
            self._episodes[split] = self._play_all(split), [stack.clone() for stack in weights]
        played, by = self._episodes[split]
        same = all(torch.equal(now[arm], then[arm]) for now, then in zip(weights, by, strict=True))
        return played[arm] if same else None

    def _play_all(self, split: str) -> list[Played]:
        arms, config = len(self._tasks), self._tasks[0].config

        def values(seen: Tensor) -> Tensor:
            return self._agents(seen.view(arms, -1, 4)).flatten(0, 1)

        device = self._gradient.device
        return play_greedily(config, split, values, device=device, agents=arms)


STACKS: dict[str, Any] = {
    "supervised": SupervisedStack,
    "reinforcement": ReinforcementStack,
    "single_index": SingleIndexStack,
}


def stack_of(task: TaskConfig, device: str) -> Any:
    """Return the stack of such tasks: one of `STACKS`, or the general one where it is better."""
    if getattr(task, "model", "mlp") == "mlp" and (task.name != "supervised" or device != "cuda"):
        return STACKS.get(task.name, FunctionalStack)
    return FunctionalStack  # its calls are those of a CUDA graph
