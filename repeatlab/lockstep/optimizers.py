"""The optimizer's step of all arms at once, each at its own learning rate.

The arithmetic is torch's own: its fused kernels take the weights of as many arms as have the same
rate at once; with Adam, neighbours end to end as one parameter. The state is the arms' own, too, so
that a checkpoint is that of a run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class StackedOptimizer:
    """One step of many optimizers that are equal but for the learning rate.

    Args:
        optimizers: Of the arms, SGD or Adam (AdamW is one), each with one parameter group.
        weights: (arms, numbers); an arm's parameters are views of its row, in their order.
        gradients: (arms, numbers), likewise.

    Raises:
        ValueError: they are of another kind.
    """

    def __init__(self, optimizers: Sequence[Optimizer], weights: Tensor, gradients: Tensor) -> None:
        if not isinstance(optimizers[0], (SGD, Adam)):
            raise ValueError(f"no lock-step for {type(optimizers[0]).__name__}")
        self._groups = [optimizer.param_groups[0] for optimizer in optimizers]
        self._move = _sgd if isinstance(optimizers[0], SGD) else _adam
        self._known: dict[tuple[int, ...], list[list[Tensor]]] = {}
        self._matrices = [weights, gradients]
        for name in _state_names(optimizers[0]):
            self._matrices.append(_states(optimizers, name, weights))
        # Neighbours can be one parameter if they have made as many steps; from now on all make as
        # many. SGD rounds a parameter's last numbers otherwise than the others: there none can.
        self._like = list(range(len(optimizers)))
        if self._move is _adam:
            self._matrices.append(_steps(optimizers, weights))
            self._like = self._matrices[-1].tolist()

    def step(self) -> None:
        """Make one update of every arm."""
        at_rate: dict[float, list[int]] = {}
        for arm, group in enumerate(self._groups):
            at_rate.setdefault(group["lr"], []).append(arm)
        for rate, arms in at_rate.items():
            self._move(self._groups[0], rate, *self._joined(tuple(arms)))

    def _joined(self, arms: tuple[int, ...]) -> list[list[Tensor]]:
        """Return the rows of these arms, neighbours as one; which have one rate seldom changes."""
        if arms not in self._known:
            if len(self._known) > len(self._groups):
                self._known.clear()
            parts: list[slice] = []
            for arm in arms:
                if parts and parts[-1].stop == arm and self._like[arm] == self._like[arm - 1]:
                    parts[-1] = slice(parts[-1].start, arm + 1)
                else:
                    parts.append(slice(arm, arm + 1))
            self._known[arms] = [[matrix[part] for part in parts] for matrix in self._matrices]
        return self._known[arms]


def _state_names(optimizer: Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()
    return "exp_avg", "exp_avg_sq"


def _states(optimizers: Sequence[Optimizer], name: str, weights: Tensor) -> Tensor:
    """Return a part of every parameter's state in the places of `weights`; at first zeros."""
    rows = torch.zeros_like(weights)
    for row, optimizer in zip(rows, optimizers, strict=True):
        parameters = optimizer.param_groups[0]["params"]
        parts = row.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            state, view = optimizer.state[parameter], part.view_as(parameter)
            if state.get(name) is not None:
                view.copy_(state[name])
            state[name] = view
    return rows


def _steps(optimizers: Sequence[Optimizer], weights: Tensor) -> Tensor:
    """Return every arm's count of steps, (arms,), which its parameters have in common."""
    steps = torch.zeros(len(optimizers), device=weights.device)
    for count, optimizer in zip(steps, optimizers, strict=True):
        for parameter in optimizer.param_groups[0]["params"]:
            state = optimizer.state[parameter]
            count.copy_(state.get("step", count))
            state["step"] = count
    return steps


def _sgd(
    group: dict[str, Any], rate: float, weights: list, gradients: list, momenta: Sequence = ()
) -> None:
    settings = ("weight_decay", "momentum", "dampening", "nesterov", "maximize", "fused")
    chosen = {name: group[name] for name in settings}
    sgd(weights, gradients, list(momenta) or [None] * len(weights), lr=rate, **chosen)


def _adam(
    group: dict[str, Any],
    rate: float,
    weights: list,
    gradients: list,
    means: list,
    squares: list,
    steps: list,
) -> None:
    settings = ("weight_decay", "eps", "maximize", "decoupled_weight_decay", "fused")
    chosen = {name: group[name] for name in settings}
    first, second = group["betas"]
    counts = [step[0] for step in steps]
    adam(
        weights,
        gradients,
        means,
        squares,
        [],
        counts,
        amsgrad=False,
        beta1=first,
        beta2=second,
        lr=rate,
        **chosen,
    )
    for step, count in zip(steps, counts, strict=True):  # neighbours' have gone up as one
        step.fill_(count)
