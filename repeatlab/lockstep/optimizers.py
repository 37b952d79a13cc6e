"""The optimizer's step of all arms at once, each at its own learning rate.

The arithmetic is torch's own: its fused kernels take the weights of as many arms as have the same
rate at once. The state is the arms' own, too, so that a checkpoint is that of a run alone.
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
        gradients: Each arm's, in the order of its parameters.

    Raises:
        ValueError: they are of another kind.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], gradients: Sequence[Sequence[Tensor]]
    ) -> None:
        if not isinstance(optimizers[0], (SGD, Adam)):
            raise ValueError(f"no lock-step for {type(optimizers[0]).__name__}")
        self._groups = [optimizer.param_groups[0] for optimizer in optimizers]
        self._move = _sgd if isinstance(optimizers[0], SGD) else _adam
        self._known: dict[tuple[int, ...], list[list[Tensor]]] = {}
        names = _state_names(optimizers[0])
        self._columns = [
            [group["params"], list(found), *(_states(optimizer, name) for name in names)]
            for group, optimizer, found in zip(self._groups, optimizers, gradients, strict=True)
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Make one update of every arm."""
        at_rate: dict[float, list[int]] = {}
        for arm, group in enumerate(self._groups):
            at_rate.setdefault(group["lr"], []).append(arm)
        for rate, arms in at_rate.items():
            self._move(self._groups[0], rate, *self._joined(tuple(arms)))

    def _joined(self, arms: tuple[int, ...]) -> list[list[Tensor]]:
        """Return the columns of these arms end to end; which arms have one rate seldom changes."""
        if arms not in self._known:
            if len(self._known) > len(self._groups):
                self._known.clear()
            columns = zip(*(self._columns[arm] for arm in arms), strict=True)
            self._known[arms] = [[t for part in column for t in part] for column in columns]
        return self._known[arms]


def _state_names(optimizer: Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()
    return "exp_avg", "exp_avg_sq", "step"


def _states(optimizer: Optimizer, name: str) -> list[Tensor]:
    """Return a part of the state of each parameter; before the first update that is zeros."""
    found = []
    for parameter in optimizer.param_groups[0]["params"]:
        state = optimizer.state[parameter]
        if state.get(name) is None:
            like = torch.zeros((), device=parameter.device) if name == "step" else parameter.data
            state[name] = torch.zeros_like(like)
        found.append(state[name])
    return found


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
