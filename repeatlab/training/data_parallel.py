"""One run over several processes: each trains on its share of every batch, and all decide alike.

Every process makes the whole k-th fresh batch, which is a function of (seed, k), and takes its
share: the joined batch is that of a single process, augmentation included. At the end of backward
the gradients are summed over the processes, each weighted with its share, which is the gradient of
the mean over the joined batch, also where shares differ by a sample; so are the losses. Sums are
rounded in another order than in one process, so a run's number of processes is part of its
identity. What is no mean over samples is another one under sharing: BatchNorm normalises every
share by its own statistics, as it does under `DistributedDataParallel`, and process 0's running
statistics are the ones evaluated.

Process 0 leads (`loop.together`): it alone reads and writes the store, evaluates and saves; the
others get from it what they train.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from repeatlab.core.signals import Interrupted
from repeatlab.repetition.loss_reader import in_process_group
from repeatlab.training.stand_ins import StandIn

if TYPE_CHECKING:
    from torch import Tensor
    from torch.futures import Future
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim import Optimizer

    from repeatlab.tasks import Task

# How long a process waits for the others. One that has died is noticed at once; process 0 may
# evaluate while the others wait.
TIMEOUT = timedelta(minutes=30)
# Updates between two times that all agree whether to stop.
AGREE_UPDATES = 32


class TeamBroken(RuntimeError):
    """A run failed in the middle of an update: its processes no longer go in step."""


class Alone:
    """A process that trains a run by itself: a `Team` of one, which waits for nobody."""

    rank, size, leads = 0, 1, True

    def any(self, flag: bool) -> bool:
        """See `Team`."""
        return flag

    def sometimes_any(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """See `Team`."""
        return flag

    def broadcast(self, value: Any = None) -> Any:
        """See `Team`."""
        return value

    def sharing(self, task: Task) -> tuple[Task, dict[str, Any]]:
        """See `Team`."""
        return task, {}

    def lead(self, run: Callable[[], None], job: Any) -> None:
        """See `Team`."""
        run()


@dataclass(frozen=True)
class Team:
    """The processes that train one run; what they agree on, they wait for each other for.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Return which samples of a batch are this process's, without waiting."""
        return slice(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any process."""
        vote = torch.tensor(float(flag))
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote)

    def sometimes_any(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Return a function to call once an update: `any` every so often, else False."""
        calls = 0

        def agreed() -> bool:
            nonlocal calls
            calls += 1
            return calls % AGREE_UPDATES == 0 and self.any(flag())

        return agreed

    def broadcast(self, value: Any = None) -> Any:
        """Return process 0's `value`: tensors, numbers, strings, lists and dicts of them."""
        content = torch.empty(0, dtype=torch.uint8)
        if self.leads:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        length = torch.tensor(len(content))
        dist.broadcast(length, 0)
        if not self.leads:
            content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0)
        if self.leads:
            return value
        received = io.BytesIO(content.numpy().tobytes())
        return torch.load(received, map_location="cpu", weights_only=True)

    def sharing(self, task: Task) -> tuple[Task, dict[str, Any]]:
        """Return what trains the task on this process's share, and how its losses are joined.

        The latter are arguments of `BatchRepeater`.
        """
        shared = SharedTask(task, self)
        return shared, {"reduce": shared.losses.start, "join": shared.losses.join}

    def lead(self, run: Callable[[], None], job: Any) -> None:
        """Run process 0's share of a job, which the others get to know of.

        Raises:
            Interrupted: all have stopped after the same update.
            TeamBroken: it failed.
        """
        self.broadcast(job)
        try:
            run()
        except Interrupted:
            raise
        except Exception as error:
            raise TeamBroken(f"{type(error).__name__}: {error}") from error


def current_team() -> Team | Alone:
    """Return the processes that this one trains together with."""
    return Team(dist.get_rank(), dist.get_world_size()) if in_process_group() else Alone()


@contextmanager
def process_group(timeout: timedelta = TIMEOUT) -> Iterator[Team | Alone]:
    """Join the processes that torchrun has started, on gloo, and on NCCL where there are GPUs.

    Every process takes the GPU of its local rank.
    """
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps the store when it starts all anew, and with it the addresses of before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    try:
        yield current_team()
    finally:
        dist.destroy_process_group()


class SharedTask(StandIn):
    """Trains a task on this process's share of every batch, with the joined batch's gradients.

    Args:
        task: The task; its `share` is set, and its optimizers' parameters get hooks.
        team: The processes.

    Attributes:
        losses: What makes its losses those of the joined batches.
    """

    def __init__(self, task: Task, team: Team) -> None:
        super().__init__(task)
        share = team.share(task.batch_size)
        self.losses = JoinedLosses((share.stop - share.start) / task.batch_size)
        self._picks = torch.arange(share.start, share.stop, device=task.device)
        self._whole: Any = None
        self._part: Any = None
        task.share = share
        for optimizer in task.optimizers:
            GradientSum(optimizer, self.losses)

    def step(self, batch: Any, report: Callable[..., None]) -> None:
        """Make one update, as `Task.step`, on the share of a whole batch."""
        if batch is not self._whole:  # a repeat has its share already
            self._whole = batch
            self._part = self.task.pick([batch], self._picks, batch.index)
        self.task.step(self._part, report)


class JoinedLosses:
    """Makes a `BatchRepeater`'s losses those of the joined batch: sums weighted with the shares.

    A loss on the CPU that is to decide N travels with the gradients of its update, and so costs no
    message of its own. One on CUDA does: it is there while backward still runs.

    Args:
        weight: This process's share of the samples, from 0 to 1.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._waiting: Tensor | None = None  # for the next gradients
        self._summed: Tensor | None = None
        self._work: Any = None

    def start(self, loss: Tensor) -> Callable[[], float]:
        """Begin to sum a 0-d loss; the function returned waits for the sum."""
        self._waiting = loss.to(torch.float32).reshape(1)
        if loss.is_cuda:
            self._send(asynchronously=True)
        return self._wait

    def _send(self, *, asynchronously: bool) -> None:
        self._summed, self._waiting = self._waiting * self.weight, None
        self._work = dist.all_reduce(self._summed, async_op=asynchronously)

    def _wait(self) -> float:
        if self._waiting is not None:  # no gradients came since
            self._send(asynchronously=False)
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._summed.item()

    def sum_with(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum over all processes of these gradients, flat, end to end."""
        parts = [g.flatten() for g in gradients]
        passenger, self._waiting = self._waiting, None
        if passenger is not None:
            parts.append(passenger)
        flat = torch.cat(parts).mul_(self.weight)
        dist.all_reduce(flat)
        if passenger is None:
            return flat
        self._summed = flat[-1:]
        return flat[:-1]

    def begin_sum_with(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Begin the weighted sum over all processes of a bucket of DDP's gradients, flat."""
        gradients, passenger, self._waiting = bucket.buffer(), self._waiting, None
        if passenger is None:
            flat = gradients.mul_(self.weight)
        else:
            flat = torch.cat([gradients, passenger.to(gradients)]).mul_(self.weight)
            self._summed = flat[-1:]
        sent = dist.all_reduce(flat, async_op=True).get_future()
        return sent.then(lambda done: done.value()[0][: len(gradients)])

    def join(self, losses: Tensor) -> Tensor:
        """Return the weighted sum over all processes of `losses`, (n,)."""
        joined = losses.to(torch.float32) * self.weight
        dist.all_reduce(joined)
        return joined


def losses_with_gradients(model: DistributedDataParallel) -> JoinedLosses:
    """Make the losses of a loop of your own travel with the gradients of its DDP model.

        model = DistributedDataParallel(model)
        losses = losses_with_gradients(model)
        repeater = BatchRepeater(loader, mapping, max_updates=T, reduce=losses.start)

    Otherwise a loss that is to decide has an all-reduce of its own, which for a small network takes
    a good part of an update's time. Every process is to have a batch of the same size.

    Args:
        model: The model; it gets a communication hook, of which it can have one.

    Raises:
        RuntimeError: it has one already.
    """
    losses = JoinedLosses(1 / dist.get_world_size())
    # Without annotations, which torch would look at, and here are but text.
    model.register_comm_hook(losses, lambda losses, bucket: losses.begin_sum_with(bucket))
    return losses


class GradientSum:
    """Sums the gradients of an optimizer's parameters over all processes at the end of backward.

    In one message: the last parameter to get its gradient sends all. So they are summed before
    they are clipped or unscaled.
    """

    def __init__(self, optimizer: Optimizer, losses: JoinedLosses) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._losses = losses
        self._arrived, self._summed = 0, False
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._arrive)
        optimizer.register_step_pre_hook(self._check)

    def _arrive(self, parameter: Tensor) -> None:
        self._arrived += 1
        if self._arrived < len(self._parameters):
            return
        gradients = [p.grad for p in self._parameters]
        parts = self._losses.sum_with(gradients).split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        self._arrived, self._summed = 0, True

    def _check(self, *_: Any) -> None:
        if not self._summed:
            raise RuntimeError(
                f"{self._arrived} of {len(self._parameters)} parameters have a gradient: over "
                "several processes an optimizer's step needs that of every one"
            )
        self._summed = False


class SilentWriter:
    """What a process that does not lead has in the place of a `RunWriter`: writes nothing."""

    path = None

    def updates(self, columns: Any) -> None:
        """Ignore rows."""

    def evals(self, update: int, metrics: Any, ledger: Any) -> None:
        """Ignore an evaluation."""

    def sampler(self, columns: Any) -> None:
        """Ignore what a sampler says."""
