"""Equal networks of any layers trained as one: a task's own losses, mapped over stacked parameters.

`torch.func` makes of the layers' arithmetic that of all arms: grouped convolutions, batched
products. On CUDA a round is three CUDA graphs, forward, backward and the optimizer's step, whatever
each arm's N is: between two rounds only what lies in the places of batches, noise and rates
changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from repeatlab.studies.lockstep.network import stack_parameters
from repeatlab.studies.lockstep.optimizers import ColumnOptimizer, StackedOptimizer
from repeatlab.tasks.learner import LearningTask


class FunctionalStack:
    """Arms whose update is one step along the mean of `LearningTask.losses` of one network.

    Args:
        tasks: The arms' tasks; their networks have no buffers.
        graphs: Whether rounds on CUDA are graphs; where they cannot be captured, they are not.

    Raises:
        ValueError: a network has buffers, or an optimizer is none of `StackedOptimizer`'s.
    """

    task = None  # each arm trains the class that it trains alone

    def __init__(self, tasks: Sequence[LearningTask], *, graphs: bool = True) -> None:
        if next(tasks[0].model.buffers(), None) is not None:
            raise ValueError("no lock-step for networks with buffers, such as BatchNorm's")
        self._tasks, arms, device = tasks, len(tasks), tasks[0].device
        self._cuda = device.type == "cuda"
        self._graphs = graphs and self._cuda
        self._network = _Losses(tasks[0])
        self._weights = stack_parameters([task.model for task in tasks])
        self._leaves = [stack.detach().requires_grad_() for stack in self._weights]
        self._named = dict(zip(dict(self._network.named_parameters()), self._leaves, strict=True))
        self._gradients = [torch.zeros_like(stack) for stack in self._weights]
        kind = ColumnOptimizer if self._cuda else StackedOptimizer
        self._optimizer = kind([t.optimizer for t in tasks], self._weights, self._gradients)
        # Of each tensor of a batch, and of what an update draws, those of all arms.
        self._batches: list[Any] = [None] * arms
        self._columns: dict[str, Tensor] = {}
        self._drawn: list[Tensor] = []
        self._told = torch.zeros(arms, pin_memory=self._cuda)
        self._drivers = self._total = torch.empty(0)
        self._parts = self._forward, self._backward, self._optimizer.step
        self._replayed: Sequence[Callable[[], None]] = ()

    def stage(self, arm: int, batch: Any) -> None:
        """Put a batch, a named tuple, in the place of the one that an arm was at."""
        self._batches[arm] = batch
        if not self._columns:
            columns = {n: c for n, c in batch._asdict().items() if isinstance(c, Tensor)}
            columns.pop("indices", None)  # losses are a function of the others
            self._columns = {n: _places(len(self._tasks), c) for n, c in columns.items()}
        for name, stack in self._columns.items():
            stack[arm].copy_(getattr(batch, name))

    def losses(self) -> list[float]:
        """Go forward on every arm's batch and backward, and return their driver losses."""
        self._draw()
        if not self._replayed:
            self._replayed = self._captured() if self._graphs else self._parts
        forward, backward, _ = self._replayed
        forward()
        self._told.copy_(self._drivers, non_blocking=True)
        read = torch.cuda.current_stream().record_event() if self._cuda else None
        backward()  # goes on while the host deals with the losses
        if read is not None:
            read.synchronize()
        return self._told.tolist()

    def step(self) -> None:
        """Make one update of every arm."""
        self._optimizer.set_rates()
        self._replayed[2]()

    def _draw(self) -> None:
        """Have every arm draw from its own generator what its update needs."""
        for arm, (task, batch) in enumerate(zip(self._tasks, self._batches, strict=True)):
            drawn = task.draw(batch)
            if len(self._drawn) < len(drawn):
                self._drawn = [_places(len(self._tasks), d, device=task.device) for d in drawn]
            for stack, value in zip(self._drawn, drawn, strict=True):
                stack[arm].copy_(value, non_blocking=True)

    def _forward(self) -> None:
        def of_one(weights: Any, columns: Any, drawn: Any) -> tuple[Tensor, Tensor]:
            batch = self._batches[0]._replace(**columns)
            return functional_call(self._network, weights, (batch, *drawn))

        # Other kernels of attention are not all mapped.
        with sdpa_kernel(SDPBackend.MATH):
            drivers, losses = vmap(of_one)(self._named, self._columns, self._drawn)
        self._drivers, self._total = drivers.detach(), losses.sum()

    def _backward(self) -> None:
        # Nothing of autograd's is to outlive this: its nodes know the stream they were made on.
        total, self._total = self._total, self._drivers
        torch._foreach_copy_(self._gradients, torch.autograd.grad(total, self._leaves))

    def _captured(self) -> Sequence[Callable[[], None]]:
        """Return what replays each part as a CUDA graph; the parts themselves where that fails."""
        moved = sum(self._optimizer.states, self._weights)
        before = [stack.clone() for stack in moved]
        side, pool, replays = torch.cuda.Stream(), None, []
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for part in self._parts * 3:  # as torch.cuda.make_graphed_callables has it
                    part()
            torch.cuda.current_stream().wait_stream(side)
            for part in self._parts:
                graph = torch.cuda.CUDAGraph()
                # One pool for all: they are replayed in the order in which they are captured.
                with torch.cuda.graph(graph, pool=pool):
                    part()
                pool = graph.pool()
                replays.append(graph.replay)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graphs in lock-step: {error}", stacklevel=2)
            return self._parts
        finally:
            torch.cuda.synchronize()
            for stack, value in zip(moved, before, strict=True):
                stack.copy_(value)
        return replays


def _places(count: int, like: Tensor, **options: Any) -> Tensor:
    return like.new_zeros(count, *like.shape, **options)


class _Losses(nn.Module):
    """A task's driver loss and loss on a batch, 0-d each, as a function of its network's weights.

    The task's own functions call its network, whose weights are exchanged during a call.
    """

    def __init__(self, task: LearningTask) -> None:
        super().__init__()
        self.network, self._task = task.model, task

    def forward(self, batch: Any, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        drivers, losses = self._task.losses(self._task.outputs(batch, *drawn), batch)
        return drivers.mean(), losses.mean()
