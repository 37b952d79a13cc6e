"""How a task's networks follow their gradients: the optimizers, and one update with any of them.

All but Schedule-Free are torch's, with the learning rate `lr` of the task, which the schedules
scale; the classes here hold their other settings. Weight decay is an L2 penalty on the loss, except
in AdamW and Muon, where it pulls the weights at the learning rate, apart from the gradient
(Loshchilov and Hutter 2019, arXiv 1711.05101). L-BFGS is not among them: it evaluates the loss
several times in a step, and such forward and backward passes would not count against T.

`clip_norm` scales an optimizer's gradients down to that norm where it is larger (Pascanu et al.
2013, arXiv 1211.5063): the norm of all its weights together, for each optimizer of a task alone.

`ema_decay` evaluates an exponential moving average of the weights in place of the weights. It moves
once per update, and so N times on a batch repeated N times; BatchNorm's statistics are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import inf, nextafter
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from repeatlab.core.schema import Choice, choices, named
from repeatlab.tasks.precision import PrecisionConfig

N = TypeVar("N", bound=nn.Module)


# Of each setting, where it begins and what it stays below.
RANGES = {
    "weight_decay": (0.0, inf),
    "momentum": (0.0, 1.0),
    "betas": (0.0, 1.0),
    "eps": (nextafter(0.0, 1.0), inf),
}


class TorchOptimizer:
    """Base of the optimizers' settings: each a frozen dataclass with torch's names of its fields.

    Class attributes:
        kind: torch's optimizer.
        fixed: Its settings that are no field.
        fused: On which types of device torch has it in one kernel; None if on no one.
    """

    kind: ClassVar[type[Optimizer]]
    fixed: ClassVar[Mapping[str, Any]] = {}
    fused: ClassVar[tuple[str, ...] | None] = ("cpu", "cuda")

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            low, below = RANGES[field]
            for number in value if isinstance(value, tuple) else (value,):
                if not low <= number < below:
                    least = "positive and finite" if field == "eps" else f"at least {low:g}"
                    upper = "" if below == inf else f" and below {below:g}"
                    raise ValueError(f"{field} must be {least}{upper}, not {number!r}")

    def make(self, weights: Iterable[Tensor], *, lr: float, device: str) -> Optimizer:
        """Return torch's optimizer of these weights."""
        settings = asdict(self) | self.fixed
        if self.fused is not None:
            settings["fused"] = torch.device(device).type in self.fused
        return self.kind(weights, lr=lr, **settings)


@dataclass(frozen=True)
class SGD(TorchOptimizer):
    """w -= lr g."""

    weight_decay: float = 0.0

    kind = torch.optim.SGD


@dataclass(frozen=True)
class Momentum(TorchOptimizer):
    """v = momentum v + g; w -= lr v."""

    momentum: float = 0.9
    weight_decay: float = 0.0

    kind = torch.optim.SGD


@dataclass(frozen=True)
class Nesterov(Momentum):
    """v = momentum v + g; w -= lr (g + momentum v) (Sutskever et al. 2013)."""

    fixed = MappingProxyType({"nesterov": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.momentum:
            raise ValueError("momentum must be above 0 for nesterov")


@dataclass(frozen=True)
class Adam(TorchOptimizer):
    """m and s as running means of g and g^2; w -= lr m / (sqrt(s) + eps), without their bias.

    Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    kind = torch.optim.Adam


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam, and w -= lr weight_decay w beside it."""

    weight_decay: float = 0.01

    kind = torch.optim.AdamW


class Together:
    """Optimizers, each of weights of its own, as one."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Move all weights."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        for part, its in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its)


@dataclass(frozen=True)
class Muon(TorchOptimizer):
    """Momentum whose step is made orthogonal, for matrices; AdamW for all other weights.

    Jordan 2024 (kellerjordan.github.io/posts/muon); as torch's documentation has it, "other" means
    not of two dimensions, so that convolutions are. Steps are scaled as AdamW's are (Liu et al.
    2025, arXiv 2502.16982, section 2.2), so that both have one rate and one decay.
    """

    momentum: float = 0.95
    weight_decay: float = 0.1

    def make(self, weights: Iterable[Tensor], *, lr: float, device: str) -> Any:
        """See `TorchOptimizer`."""
        weights = list(weights)
        matrices = [weight for weight in weights if weight.ndim == 2]
        others = [weight for weight in weights if weight.ndim != 2]
        scaled = asdict(self) | {"lr": lr, "adjust_lr_fn": "match_rms_adamw"}
        parts = [torch.optim.Muon(matrices, **scaled)] if matrices else []
        if others:
            parts.append(AdamW(weight_decay=self.weight_decay).make(others, lr=lr, device=device))
        return Together(parts)


class ScheduleFreeSGD(Optimizer):
    """z -= lr g(y); x += c (z - x); y = momentum x + (1 - momentum) z, with y what is trained.

    Of all updates so far c is this one's share, each counted by the square of the largest rate.
    """

    def __init__(self, weights: Any, *, lr: float, momentum: float, weight_decay: float) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(weights, settings | {"lr_max": 0.0, "counted": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move all weights that have a gradient."""
        for group in self.param_groups:
            group["lr_max"] = max(group["lr_max"], group["lr"])
            group["counted"] += group["lr_max"] ** 2
            share = group["lr_max"] ** 2 / group["counted"]
            for y in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[y]
                if not state:
                    state["x"], state["z"] = y.clone(), y.clone()
                gradient = y.grad.add(y, alpha=group["weight_decay"])
                state["z"].sub_(gradient, alpha=group["lr"])
                state["x"].lerp_(state["z"], share)
                y.copy_(state["z"].lerp(state["x"], group["momentum"]))


@dataclass(frozen=True)
class ScheduleFree(TorchOptimizer):
    """SGD at a rate that stays, of which an average x is evaluated (Defazio et al. 2024).

    arXiv 2405.15682, equations 3 to 5; meant for a method without a schedule. x takes the place of
    `ema_decay`'s average. An agent acts, and is judged, with y.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0

    kind = ScheduleFreeSGD
    fused = None


OPTIMIZERS: dict[str, type] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adam": Adam,
    "adamw": AdamW,
    "muon": Muon,
    "schedule_free": ScheduleFree,
}
_MODELS = choices(OPTIMIZERS)


OptimizerChoice = named("optimizer", _MODELS)


def chosen(name: str, **settings: Any) -> Choice:
    """Return an optimizer's configuration, for a task's default."""
    return _MODELS[name](name=name, **settings)


class OptimizationConfig(PrecisionConfig):
    """Fields of a task that say how its networks are trained; a task gives a default optimizer."""

    optimizer: OptimizerChoice
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of an optimizer's gradients; null leaves them as they are."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the average of the weights that is evaluated; 0 evaluates the weights themselves."""

    @model_validator(mode="after")
    def _has_one_average(self) -> Self:
        if self.ema_decay and self.optimizer.name == "schedule_free":
            raise ValueError("ema_decay must be 0 with schedule_free, whose own average it is")
        return self


def _nobody(part: str) -> None:
    """Stand for somebody who asks what takes the time."""


class OptimizerStep:
    """One update of some weights for each call with their loss.

    Args:
        weights: What is trained.
        config: A task's `OptimizationConfig`, with its `lr`.
        device: Where the weights are.

    Attributes:
        optimizer: Of these weights.
        lap: Called with "forward", "optimizer" or "backward" at the end of each of these parts.
    """

    def __init__(self, weights: Iterable[Tensor], config: Any, *, device: str) -> None:
        self.lap: Callable[[str], None] = _nobody
        settings = config.optimizer.build()
        self.optimizer: Optimizer = settings.make(weights, lr=config.lr, device=device)
        self._clip_norm = config.clip_norm
        self._watchers: list[Callable[[Any], None]] = []

    def watch(self, see: Callable[[Any], None]) -> None:
        """Have `see` called with the optimizer at every update, between backward and clipping."""
        self._watchers.append(see)

    def __call__(self, loss: Tensor) -> None:
        """Go backward from the 0-d loss, clip, and move the weights."""
        self.lap("forward")
        self.optimizer.zero_grad()
        self.lap("optimizer")
        loss.backward()
        self.lap("backward")
        for see in self._watchers:
            see(self.optimizer)
        if self._clip_norm is not None:
            weights = [w for group in self.optimizer.param_groups for w in group["params"]]
            nn.utils.clip_grad_norm_(weights, self._clip_norm)
        self.optimizer.step()
        self.lap("optimizer")

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.optimizer.load_state_dict(state)


def averaged(network: N, decay: float | bool) -> N | None:
    """Return a copy of the network for the average of its weights; None where none is kept."""
    return deepcopy(network).requires_grad_(False).eval() if decay else None


@torch.no_grad()
def move_average(
    average: nn.Module | None, network: nn.Module, decay: float, optimizer: Any = None
) -> None:
    """Move an average to decay average + (1 - decay) network, with a copy of its buffers.

    Of weights that `optimizer` averages by itself it takes those averages.
    """
    if average is None:
        return
    weights = list(network.parameters())
    if isinstance(optimizer, ScheduleFreeSGD):
        weights = [optimizer.state.get(weight, {}).get("x", weight) for weight in weights]
    torch._foreach_lerp_(list(average.parameters()), weights, 1 - decay)
    for copy, buffer in zip(average.buffers(), network.buffers(), strict=True):
        copy.copy_(buffer)
