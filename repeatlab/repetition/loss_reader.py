"""How the loss that decides N gets from the device to the host, waiting as little as possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_HAS_DISTRIBUTED = dist.is_available()  # asked once: `start` is on every fresh batch's path


class LossReader:
    """Reads a scalar per fresh batch: started after the forward, awaited before the next batch.

    On CUDA a side stream copies to pinned memory as soon as the forward is done, so that the wait
    ends while backward and step still run. In a process group the loss is averaged over the ranks
    first, without waiting, so that all ranks decide the same.

    Args:
        reduce: Replaces the average over ranks: takes a 0-d tensor and returns one, or a function
            that `wait` calls for the value.
    """

    def __init__(self, reduce: Callable[[torch.Tensor], Any] | None = None) -> None:
        self._reduce = reduce
        self._later: Callable[[], float] | None = None  # gives the value that was not there yet
        self._cuda: _PinnedCopy | None = None
        self.host_reads = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cuda": None, "_later": None}  # a process's own

    def start(self, loss: torch.Tensor | float) -> float | None:
        """Begin to read `loss`, a 0-d tensor or a float.

        Returns:
            The value, where the host has it already; else None, and `wait` returns it.
        """
        if self._reduce is not None:
            loss = self._reduce(torch.as_tensor(loss).detach())
        elif in_process_group():
            loss = self._mean_over_ranks(loss)
        if isinstance(loss, torch.Tensor) and not loss.is_cuda:
            return loss.item()
        if isinstance(loss, torch.Tensor):
            self._cuda = self._cuda or _PinnedCopy(loss.device)
            self._cuda.start(loss.detach())
            self._later = self._copied
        elif callable(loss):
            self._later = loss
        else:
            return loss
        return None

    def wait(self) -> float:
        """Return the loss that `start` could not, averaged over the ranks."""
        return self._later()

    def _copied(self) -> float:
        self.host_reads += 1
        return self._cuda.wait()

    def _mean_over_ranks(self, loss: torch.Tensor | float) -> Callable[[], float]:
        # A copy, since the sum is written in place; NCCL reduces only CUDA tensors.
        device = "cuda" if dist.get_backend() == "nccl" else None
        tensor = loss.detach().clone() if isinstance(loss, torch.Tensor) else torch.tensor(loss)
        tensor = tensor.to(device=device, dtype=torch.float32)
        work = dist.all_reduce(tensor, async_op=True)

        def mean() -> float:
            work.wait()
            self.host_reads += tensor.is_cuda
            return tensor.item() / dist.get_world_size()

        return mean


def in_process_group() -> bool:
    """Whether this process trains together with others under torch.distributed."""
    return _HAS_DISTRIBUTED and dist.is_initialized() and dist.get_world_size() > 1


class _PinnedCopy:
    """One reusable non-blocking copy of a CUDA scalar to pinned host memory."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.empty((), dtype=torch.float32, device=device)
        self._host = torch.empty((), dtype=torch.float32, pin_memory=True)
        self._stream = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event()

    def start(self, loss: torch.Tensor) -> None:
        # In the loss's own stream first: nothing that overwrites or frees the loss can overtake it.
        self._loss.copy_(loss)
        self._stream.wait_stream(torch.cuda.current_stream(loss.device))
        with torch.cuda.stream(self._stream):
            self._host.copy_(self._loss, non_blocking=True)
            self._copied.record(self._stream)

    def wait(self) -> float:
        self._copied.synchronize()
        return self._host.item()
