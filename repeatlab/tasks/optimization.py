"""How a task's networks follow their gradients: the optimizers, and one update with any of them.

All are torch's, with the learning rate `lr` of the task, which the schedules scale; the classes
here hold their other settings. Weight decay is an L2 penalty on the loss, except in AdamW, where it
pulls the weights at the learning rate, apart from the gradient (Loshchilov and Hutter 2019, arXiv
1711.05101). L-BFGS is not among them: it evaluates the loss several times in a step, and such
forward and backward passes would not count against T.

`clip_norm` scales an optimizer's gradients down to that norm where it is larger (Pascanu et al.
2013, arXiv 1211.5063): the norm of all its weights together, for each optimizer of a task alone.

Under float16 an update whose gradients overflow is skipped, and the scale of the losses halved. It
counts against T all the same: the forward and backward passes were made, and the batch keeps its N.
The ledger says how many there were (`skipped_steps`). RMSprop's step, and Adagrad's on CUDA, make
the host wait then, since torch has no fused form of them that leaves itself out.

`ema_decay` evaluates an exponential moving average of the weights in place of the weights. It moves
once per update, and so N times on a batch repeated N times; BatchNorm's statistics are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import inf, nextafter
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from repeatlab.core.schema import Choice, choices, named
from repeatlab.tasks.precision import Precision, PrecisionConfig

N = TypeVar("N", bound=nn.Module)


# Of each setting, where it begins and what it stays below.
RANGES = {
    "weight_decay": (0.0, inf),
    "momentum": (0.0, 1.0),
    "alpha": (0.0, 1.0),
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
class Adagrad(TorchOptimizer):
    """s += g^2; w -= lr g / (sqrt(s) + eps) (Duchi et al. 2011)."""

    eps: float = 1e-10
    weight_decay: float = 0.0

    kind = torch.optim.Adagrad
    fused = ("cpu",)


@dataclass(frozen=True)
class RMSprop(TorchOptimizer):
    """s = alpha s + (1 - alpha) g^2; w -= lr g / (sqrt(s) + eps) (Tieleman and Hinton 2012).

    With a momentum, that of v = momentum v + g / (sqrt(s) + eps).
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0

    kind = torch.optim.RMSprop
    fused = None


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


OPTIMIZERS: dict[str, type] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adam": Adam,
    "adamw": AdamW,
}
_MODELS = choices(OPTIMIZERS)


OptimizerChoice = named("optimizer", _MODELS, lambda model: model)


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


def _nobody(part: str) -> None:
    """Stand for somebody who asks what takes the time."""


class OptimizerStep:
    """One update of some weights for each call with their loss.

    Args:
        weights: What is trained.
        config: A task's `OptimizationConfig`, with its `lr`.
        precision: In which the losses are computed.
        device: Where the weights are.

    Attributes:
        optimizer: Of these weights.
        lap: Called with "forward", "optimizer" or "backward" at the end of each of these parts.
    """

    def __init__(
        self, weights: Iterable[Tensor], config: Any, precision: Precision, *, device: str
    ) -> None:
        self.lap: Callable[[str], None] = _nobody
        settings = config.optimizer.build()
        self.optimizer: Optimizer = settings.make(weights, lr=config.lr, device=device)
        self._clip_norm = config.clip_norm
        self._scaler = precision.scaler()
        self._one = torch.ones((), device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def skipped(self) -> int:
        """How many updates were skipped so far because gradients overflowed; waits for them."""
        return int(self._skipped) if self._scaler else 0

    def __call__(self, loss: Tensor) -> None:
        """Go backward from the 0-d loss, clip, and move the weights."""
        self.lap("forward")
        self.optimizer.zero_grad()
        self.lap("optimizer")
        if self._scaler is None:
            loss.backward()
            self.lap("backward")
            self._clip()
            self.optimizer.step()
        else:
            self._scaled(loss, self._scaler)
        self.lap("optimizer")

    def _scaled(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        scaler.scale(loss).backward()
        self.lap("backward")
        if self._clip_norm is not None:
            scaler.unscale_(self.optimizer)
            self._clip()
        before = scaler.scale(self._one)
        scaler.step(self.optimizer)
        scaler.update()
        # The scale falls if, and only if, the step was skipped; the host does not wait to see it.
        self._skipped += scaler.scale(self._one) < before

    def _clip(self) -> None:
        if self._clip_norm is not None:
            weights = [w for group in self.optimizer.param_groups for w in group["params"]]
            nn.utils.clip_grad_norm_(weights, self._clip_norm)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, with the scale of the losses where there is one."""
        state = self.optimizer.state_dict()
        if self._scaler is not None:
            state["scaler"] = self._scaler.state_dict()
            state["skipped"] = self.skipped
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.optimizer.load_state_dict(state)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
            self._skipped.fill_(state["skipped"])


def averaged(network: N, decay: float) -> N | None:
    """Return a copy of the network for the average of its weights; None where none is kept."""
    return deepcopy(network).requires_grad_(False).eval() if decay else None


@torch.no_grad()
def move_average(average: nn.Module | None, network: nn.Module, decay: float) -> None:
    """Move an average to decay average + (1 - decay) network, with a copy of its buffers."""
    if average is None:
        return
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for copy, buffer in zip(average.buffers(), network.buffers(), strict=True):
        copy.copy_(buffer)
