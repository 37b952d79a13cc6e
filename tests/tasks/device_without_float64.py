"""A device in software: its numbers lie on the CPU, and it refuses float64, as Apple's GPUs do.

It calls itself "meta", a type of device that torch knows in every build. Inside `device()` tensors
can be moved to it and back; what mixes it with the CPU is refused, as on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "meta"


class OnDevice(torch.Tensor):
    """A tensor on the device, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        if inner.dtype is torch.float64:
            raise TypeError("the device has no float64")
        outer = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=NAME,
        )
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None) -> Any:
        return dispatched(operation, arguments, options or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"


def dispatched(operation, arguments: tuple, options: dict[str, Any]) -> Any:
    """Make an operation on the CPU, and put the result where it belongs."""
    given: list[torch.Tensor] = []
    tree_map(lambda part: given.append(part) if isinstance(part, torch.Tensor) else None, arguments)
    tree_map(lambda part: given.append(part) if isinstance(part, torch.Tensor) else None, options)
    on_device = [part for part in given if isinstance(part, OnDevice)]
    moves = operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    indexes = "index" in operation.__name__
    for part in given:
        lies_elsewhere = on_device and not isinstance(part, OnDevice) and part.ndim
        if lies_elsewhere and not moves and not indexes:
            raise RuntimeError(f"{operation}: a tensor on the CPU among those of the device")
    target = options.get("device")
    goes = (
        bool(on_device) if target is None else torch.device(target).type == torch.device(NAME).type
    )
    if target is not None:
        options = options | {"device": torch.device("cpu")}
    held = {id(part.inner): part for part in on_device}

    def inside(part: Any) -> Any:
        return part.inner if isinstance(part, OnDevice) else part

    result = operation(*tree_map(inside, arguments), **tree_map(inside, options))

    def outside(part: Any) -> Any:
        if not isinstance(part, torch.Tensor):
            return part
        if id(part) in held:  # an operation in place
            return held[id(part)]
        return OnDevice(part) if goes else part

    return tree_map(outside, result)


class Moves(TorchDispatchMode):
    """Lets tensors of the CPU be moved to the device, and be made there."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None) -> Any:
        return dispatched(operation, arguments, options or {})


class Reads(TorchFunctionMode):
    """What passes by torch's dispatcher: making tensors of numbers, and reading them."""

    def __torch_function__(self, function, types, arguments=(), options=None) -> Any:
        options = dict(options or {})
        if function in (torch.tensor, torch.as_tensor):
            target = options.pop("device", None)
            made = function(*arguments, **options)
            return made if target is None else made.to(target)
        if function is torch.Tensor.tolist:
            return function(arguments[0].cpu())
        return function(*arguments, **options)


@contextmanager
def device() -> Iterator[str]:
    """Have the device for a while; gives its name."""
    with Reads(), Moves():
        yield NAME
