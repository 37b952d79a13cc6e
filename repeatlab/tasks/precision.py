"""In which number format and memory layout networks run, and whether they are compiled.

Under `bfloat16` networks run under autocast: weights, optimizer and losses stay float32, as does
everything that leaves a network. There is no `float16`: its gradients underflow unless losses are
scaled, which skips updates (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

Channels last lays images out with the channel as the fastest index, as convolutions under autocast
want them. Compilation is in place: the names in a network's state stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from repeatlab.core.schema import Model


class PrecisionConfig(Model):
    """Fields of a task that say how its networks are computed."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """In which number format networks are computed."""
    channels_last: bool = False
    """Whether images are laid out with the channel as the fastest index."""
    compile: bool = False
    """Whether networks are compiled; where no compiler works, they run as they are, with a
    warning."""


@dataclass(frozen=True)
class Precision:
    """Runs networks in a number format: `precision(network, *inputs)` gives float32 outputs.

    Without a `dtype` the network runs as it is, in the format of its weights and inputs.
    """

    dtype: torch.dtype | None = None
    device: str = "cpu"

    @classmethod
    def of(cls, config: PrecisionConfig, device: str | torch.device) -> Precision:
        """Return what `config` asks for on this device."""
        low = config.precision == "bfloat16"
        return cls(torch.bfloat16 if low else None, torch.device(device).type)

    def __call__(self, network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.dtype is None:
            return network(*inputs)
        with torch.autocast(self.device, self.dtype):
            outputs = network(*inputs)
        return outputs.float()


def place(network: nn.Module, config: PrecisionConfig, device: str) -> nn.Module:
    """Move a network to the device in the layout that `config` asks for, compile it, return it."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    network.to(device, memory_format=layout)
    if config.compile:
        reason = cannot_compile(torch.device(device).type)
        if reason is None:
            network.compile()
        else:
            warnings.warn(f"compile: nothing is compiled here: {reason}", stacklevel=2)
    return network


@cache
def cannot_compile(device: str) -> str | None:
    """Return why torch.compile does not work on this type of device, None if it does.

    It is tried once in a process, on two numbers, which takes some seconds.
    """
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None
