"""The optimizer's step of all arms at once, each at its own learning rate.

The arithmetic is torch's own: one call of a fused kernel moves every parameter of the arms that
have the same rate. Each stays a parameter of its own, since the kernels round a parameter's last
numbers otherwise than the others: those that do not fill a vector of the processor. The state is
the arms' own, too, so that a checkpoint is that of a run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class StackedOptimizer:
    """One step of many optimizers that are equal but for the learning rate.

    Args:
        optimizers: Of the arms, SGD or Adam (AdamW is one), fused, each with one parameter group.
        weights: Of each parameter, in order, a stack, (arms, *shape), whose views are the arms'.
        gradients: Likewise.

    Raises:
        ValueError: they are of another kind.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> None:
        self._groups = [optimizer.param_groups[0] for optimizer in optimizers]
        if not isinstance(optimizers[0], (SGD, Adam)) or not self._groups[0].get("fused"):
            raise ValueError(f"no lock-step for {type(optimizers[0]).__name__}, or not fused")
        self._move = _sgd if isinstance(optimizers[0], SGD) else _adam
        states = [_owned(optimizers, name, weights) for name in _state_names(optimizers[0])]
        # Of weights, gradients and each part of the state, arm by arm, those of its parameters.
        self._parts = [
            list(zip(*(stack.unbind() for stack in stacks), strict=True))
            for stacks in (weights, gradients, *states)
        ]
        self._known: dict[tuple[int, ...], list[list[Tensor]]] = {}

    def step(self) -> None:
        """Make one update of every arm."""
        at_rate: dict[float, list[int]] = {}
        for arm, group in enumerate(self._groups):
            at_rate.setdefault(group["lr"], []).append(arm)
        for rate, arms in at_rate.items():
            self._move(self._groups[0], rate, *self._of(tuple(arms)))

    def _of(self, arms: tuple[int, ...]) -> list[list[Tensor]]:
        """Return the parts of these arms; which have one rate seldom changes."""
        if arms not in self._known:
            if len(self._known) > len(self._groups):
                self._known.clear()
            self._known[arms] = [
                [part for arm in arms for part in parts[arm]] for parts in self._parts
            ]
        return self._known[arms]


def _state_names(optimizer: Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()
    return "step", "exp_avg", "exp_avg_sq"  # in torch's order, by which the digest of a state goes


def _owned(optimizers: Sequence[Optimizer], name: str, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return stacks of that part of the state of each parameter, of which the arms' are views."""
    stacks = [stack.new_zeros(len(stack) if name == "step" else stack.shape) for stack in weights]
    for arm, optimizer in enumerate(optimizers):
        for parameter, stack in zip(optimizer.param_groups[0]["params"], stacks, strict=True):
            state, view = optimizer.state[parameter], stack[arm]
            if state.get(name) is not None:
                view.copy_(state[name])
            state[name] = view
    return stacks


def _sgd(
    group: dict[str, Any], rate: float, weights: list, gradients: list, momenta: Sequence = ()
) -> None:
    settings = ("weight_decay", "momentum", "dampening", "nesterov", "maximize")
    chosen = {name: group[name] for name in settings}
    momenta = list(momenta) or [None] * len(weights)
    sgd(weights, gradients, momenta, lr=rate, fused=True, **chosen)


def _adam(
    group: dict[str, Any],
    rate: float,
    weights: list,
    gradients: list,
    steps: list,
    means: list,
    squares: list,
) -> None:
    first, second = group["betas"]
    settings = ("weight_decay", "eps", "maximize", "amsgrad", "decoupled_weight_decay")
    chosen = {name: group[name] for name in settings}
    lists = (weights, gradients, means, squares, [], steps)
    adam(*lists, lr=rate, beta1=first, beta2=second, fused=True, **chosen)
