"""The optimizer's step of all arms at once, each at its own learning rate.

The arithmetic is torch's own: its fused kernels take the weights of as many arms as have the same
rate at once, each arm's end to end. The state is the arms' own, too, so that a checkpoint is that
of a run alone.
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
        matrices = [weights, gradients]
        matrices += [_states(optimizers, name, weights) for name in _state_names(optimizers[0])]
        if self._move is _adam:
            matrices.append(_steps(optimizers, weights))
        self._columns = [list(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self) -> None:
        """Make one update of every arm."""
        at_rate: dict[float, list[int]] = {}
        for arm, group in enumerate(self._groups):
            at_rate.setdefault(group["lr"], []).append(arm)
        for rate, arms in at_rate.items():
            self._move(self._groups[0], rate, *self._joined(tuple(arms)))

    def _joined(self, arms: tuple[int, ...]) -> list[list[Tensor]]:
        """Return the columns of these arms; which arms have one rate seldom changes."""
        if arms not in self._known:
            if len(self._known) > len(self._groups):
                self._known.clear()
            self._known[arms] = [[column[arm] for arm in arms] for column in self._columns]
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
    adam(
        weights,
        gradients,
        means,
        squares,
        [],
        steps,
        amsgrad=False,
        beta1=first,
        beta2=second,
        lr=rate,
        **chosen,
    )
