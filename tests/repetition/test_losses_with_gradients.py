"""Losses that travel with gradients, in forked gloo processes: the means over the ranks."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from repeatlab.repetition.distributed import JoinedLosses, losses_with_gradients
from repeatlab.repetition.mappings import Linear
from repeatlab.repetition.repeater import BatchRepeater, NonFiniteLoss

TIMEOUT = 60  # seconds until a hanging rank fails its test


def in_ranks(size: int, work: Callable, *arguments, folder: Path) -> tuple[list, list[int]]:
    """Call work(rank, *arguments) in `size` forked processes of one gloo group.

    Returns:
        What each returned, of tensors, numbers and lists; None where one did not return.
        The exit codes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, size, folder, work, arguments))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(TIMEOUT)
            assert rank.exitcode is not None, "a rank hangs"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    answers = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path) if path.exists() else None for path in answers], [
        rank.exitcode for rank in ranks
    ]


def _rank(rank: int, size: int, folder: Path, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    torch.save(work(rank, *arguments), folder / f"{rank}.pt")
    dist.barrier()  # a rank that leaves breaks the connections of those that still talk
    os._exit(0)


LOSSES = np.array([[0.5, 4.0, 1.0, 3.0], [3.5, 1.0, 1.5, 0.5]])


def report_joined(rank: int, nan_at: tuple[int, int] | None) -> dict:
    losses = JoinedLosses()
    ways = {"reduce": losses.start, "join": losses.join, "block": 3}
    repeater = BatchRepeater(range(4), repeats=Linear(t=1.0), max_updates=20, **ways)
    error = None
    try:
        for batch in repeater:
            loss = float(LOSSES[rank, batch]) + repeater.repeat
            if (rank, repeater.updates) == nan_at:
                loss = float("nan")
            repeater.report(torch.tensor(loss))
            dist.all_reduce(torch.ones(1))  # the gradients of this update
    except NonFiniteLoss as found:
        error = [found.update, found.fresh_batch]
    rows = repeater.drain()
    return {name: column.tolist() for name, column in rows.items()} | {"error": error}


def test_every_loss_is_the_mean_over_ranks(tmp_path):
    answers, codes = in_ranks(2, report_joined, None, folder=tmp_path)
    assert codes == [0, 0]
    joined = LOSSES.mean(0)  # quarters: exact
    expected, batch = [], 0
    while len(expected) < 20:
        count = min(5, max(1, int(joined[batch % 4])), 20 - len(expected))
        expected += [(batch, i, count, joined[batch % 4] + i) for i in range(count)]
        batch += 1
    for answer in answers:
        columns = (answer[name] for name in ("fresh_batch", "repeat", "repeats", "loss"))
        assert list(zip(*columns, strict=True)) == expected


def test_a_nan_of_one_rank_ends_all_at_the_same_update(tmp_path):
    # Joined losses of 2.75, 1.75: update 1 is a repeat of batch 0, whose loss is read later.
    answers, codes = in_ranks(2, report_joined, (1, 1), folder=tmp_path)
    assert codes == [0, 0]
    for answer in answers:
        assert answer["error"] == [1, 0]
        assert len(answer["loss"]) == 2
        assert np.isnan(answer["loss"][1])


def train_under_ddp(rank: int, way: str) -> dict:
    """Train a small network on batches of this rank's own; count the messages with a loss alone."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 1))
    # So that there are two buckets, and the loss has to find one.
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(rank))
    ways = {}
    if way == "with gradients":
        losses = losses_with_gradients(model)
        ways = {"reduce": losses.start, "join": losses.join}
    all_reduce, alone = dist.all_reduce, []

    def counted(tensor, *arguments, **options):
        alone.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    repeater = BatchRepeater(data, Linear(t=0.8), max_updates=24, **ways)
    for inputs in repeater:
        loss = functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
        repeater.report(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decisions = alone.count(1)
    rows = repeater.drain()
    dist.all_reduce = all_reduce
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    columns = {name: torch.from_numpy(column) for name, column in rows.items()}
    return columns | {"weights": weights, "decisions": decisions}


@pytest.mark.parametrize("size", [2, 3])
def test_under_ddp_losses_can_travel_with_the_gradients(size, tmp_path):
    """The run is the same as with messages of their own, but for how sums are rounded."""
    apart, codes = in_ranks(size, train_under_ddp, "apart", folder=tmp_path / "apart")
    joined, more = in_ranks(size, train_under_ddp, "with gradients", folder=tmp_path / "joined")
    assert codes == more == [0] * size
    first = (joined[0]["repeat"] == 0).numpy()
    assert 1 < joined[0]["repeats"].max() <= 5
    assert apart[0]["decisions"] == first.sum()
    for one, other in zip(apart, joined, strict=True):
        assert other["decisions"] == 0
        for name in ("update", "fresh_batch", "repeat", "repeats"):
            assert other[name].equal(one[name])
            assert other[name].equal(joined[0][name])
        torch.testing.assert_close(other["weights"], one["weights"])
        assert other["weights"].equal(joined[0]["weights"])
        torch.testing.assert_close(other["loss"][first], one["loss"][first])
    # Of repeats, too, the mean over the ranks: apart, each has recorded its own.
    mean = torch.stack([rank["loss"] for rank in apart]).mean(0)
    torch.testing.assert_close(joined[0]["loss"], mean)


def hook_twice(rank: int) -> str:
    model = DistributedDataParallel(nn.Linear(2, 1))
    losses_with_gradients(model)
    try:
        losses_with_gradients(model)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_ddp_model_takes_losses_along_once(tmp_path):
    answers, codes = in_ranks(1, hook_twice, folder=tmp_path)
    assert codes == [0]
    assert "register_comm_hook" in answers[0]
