"""The optimizer's step of all arms at once, each at its own learning rate.

The arithmetic is torch's own: one call of a fused kernel moves every parameter of the arms that
have the same rate. Each stays a parameter of its own, since the kernels round a parameter's last
numbers otherwise than the others: those that do not fill a vector of the processor. The state is
the arms' own, too, so that a checkpoint is that of a run alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
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

    Attributes:
        states: Of each part of the state, such stacks; of Adam's numbers of steps, (arms,) each.

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
        self._stacks = list(weights), list(gradients)
        self.states = [_owned(optimizers, n, weights) for n in _state_names(optimizers[0])]
        # Of weights, gradients and each part of the state, arm by arm, those of its parameters.
        self._parts = [
            list(zip(*(stack.unbind() for stack in stacks), strict=True))
            for stacks in (*self._stacks, *self.states)
        ]
        self._known: dict[tuple[int, ...], list[list[Tensor]]] = {}

    def set_rates(self) -> None:
        """Take in the rates of the next update, where `step` does not."""

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


class ColumnOptimizer(StackedOptimizer):
    """The same step in a few calls for all arms, whose rates are a column on the device.

    For CUDA, where a fused kernel would take the arms' many small parameters some at a time, and a
    graph holds what rates are, not which arms have the same. The last digits are its own. Gradients
    are spent.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        weights, self._gradients = self._stacks
        self._rates = torch.zeros(len(self._groups), device=weights[0].device)
        self._weights = [(weight, (-1, *[1] * (weight.ndim - 1))) for weight in weights]

    def set_rates(self) -> None:
        """See `StackedOptimizer`."""
        rates = torch.tensor([group["lr"] for group in self._groups])
        self._rates.copy_(rates, non_blocking=True)

    def step(self) -> None:
        """See `StackedOptimizer`; its calls are always the same, as a graph's must be."""
        group, rates, decay = self._groups[0], self._rates, self._groups[0]["weight_decay"]
        if group.get("decoupled_weight_decay"):
            for weight, column in self._weights:
                weight.mul_(1 - decay * rates.view(column))
        elif decay:
            torch._foreach_add_(self._gradients, self._stacks[0], alpha=decay)
        if "betas" in group:
            moves: Iterable[Tensor] = self._adam(group, *self.states)
        else:
            moves = [torch.zeros_like(weight) for weight, _ in self._weights]
            _sgd(group | {"weight_decay": 0.0}, 1.0, moves, self._gradients, *self.states)
        for (weight, column), move in zip(self._weights, moves, strict=True):
            weight.addcmul_(move, rates.view(column))

    def _adam(self, group: dict, steps: list, means: list, squares: list) -> Iterator[Tensor]:
        first, second = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, self._gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, self._gradients, self._gradients, value=1 - second)
        made = steps[0].double()  # second ** step - 1 has few digits at first
        scales, roots = (first**made - 1).float(), (1 - second**made).sqrt().float()
        for (_, column), mean, square in zip(self._weights, means, squares, strict=True):
            bounds = square.sqrt().div_(roots.view(column)).add_(group["eps"])
            yield mean / bounds.mul_(scales.view(column))


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


def _adam(group: dict[str, Any], rate: float, *parts: list) -> None:
    weights, gradients, steps, means, squares = parts
    first, second = group["betas"]
    settings = ("weight_decay", "eps", "maximize", "amsgrad", "decoupled_weight_decay")
    chosen = {name: group[name] for name in settings}
    lists = (weights, gradients, means, squares, [], steps)
    adam(*lists, lr=rate, beta1=first, beta2=second, fused=True, **chosen)
