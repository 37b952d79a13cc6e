"""Losses that decide travel with the gradients of a model under torch's DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor
    from torch.futures import Future
    from torch.nn.parallel import DistributedDataParallel


class JoinedLosses:
    """Makes a `BatchRepeater`'s losses the means over all processes; see `losses_with_gradients`.

    A loss on the CPU that is to decide N travels with the gradients of its update. One on CUDA has
    a message of its own: it is there while backward still runs.
    """

    def __init__(self) -> None:
        self._weight = 1 / dist.get_world_size()
        self._waiting: Tensor | None = None  # for the next gradients
        self._summed: Tensor | None = None
        self._work: Any = None

    def start(self, loss: Tensor) -> Callable[[], float]:
        """Begin to sum a 0-d loss; the function returned waits for the sum."""
        self._waiting = loss.to(torch.float32).reshape(1)
        if loss.is_cuda:
            self._send()
        return self._wait

    def _send(self) -> None:
        self._summed, self._waiting = self._waiting * self._weight, None
        self._work = dist.all_reduce(self._summed, async_op=True)

    def _wait(self) -> float:
        if self._waiting is not None:  # no gradients came since
            self._send()
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._summed.item()

    def begin_sum_with(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Begin the mean over all processes of a bucket of DDP's gradients, flat."""
        gradients, passenger, self._waiting = bucket.buffer(), self._waiting, None
        if passenger is None:
            flat = gradients.mul_(self._weight)
        else:
            flat = torch.cat([gradients, passenger.to(gradients)]).mul_(self._weight)
            self._summed = flat[-1:]
        sent = dist.all_reduce(flat, async_op=True).get_future()
        return sent.then(lambda done: done.value()[0][: len(gradients)])

    def join(self, losses: Tensor) -> Tensor:
        """Return the means over all processes of `losses`, (n,)."""
        joined = losses.to(torch.float32) * self._weight
        dist.all_reduce(joined)
        return joined


def losses_with_gradients(model: DistributedDataParallel) -> JoinedLosses:
    """Make the losses of a loop of your own travel with the gradients of its DDP model.

        model = DistributedDataParallel(model)
        losses = losses_with_gradients(model)
        repeater = BatchRepeater(loader, mapping, max_updates=T, reduce=losses.start)

    Otherwise a loss that is to decide has an all-reduce of its own, which for a small network takes
    a good part of an update's time. Every process is to have a batch of the same size. With
    `join=losses.join` the recorded losses of repeats are means over all processes, too.

    Args:
        model: The model; it gets a communication hook, of which it can have one.

    Raises:
        RuntimeError: it has one already.
    """
    losses = JoinedLosses()
    # Without annotations, which torch would look at, and here are but text.
    model.register_comm_hook(losses, lambda losses, bucket: losses.begin_sum_with(bucket))
    return losses
