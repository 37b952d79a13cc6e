"""BatchRepeater in gloo process groups; run as a script, this file is the ranks."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from repeatlab.repetition.mappings import Linear
from repeatlab.repetition.repeater import BatchRepeater, NonFiniteLoss

UPDATES = 14
# Multiples of 1/4, so that sums and means are exact in float32. One row per rank, one column per
# batch; a mean over two or over three ranks differs from every rank's own loss often enough.
LOSSES = np.array(
    [
        [0.25, 4.0, 1.0, 3.0, 0.5, 2.0, 1.75],
        [3.75, 1.0, 1.5, 3.5, 2.0, 0.25, 1.25],
        [2.0, 4.0, 0.5, 5.5, 3.5, 0.75, 3.0],
    ]
)
TIMEOUT = 120  # seconds, for all ranks together; a hang fails


# --- One rank -------------------------------------------------------------------------------------


def record(rank, *, wrap=torch.tensor, **options):
    """Run the loop with this rank's losses and return its rows as lists."""
    repeater = BatchRepeater(range(7), repeats=Linear(t=1.0), max_updates=UPDATES, **options)
    for batch in repeater:
        repeater.report(wrap(float(LOSSES[rank, batch])))
        # As a gradient all-reduce would: ranks that differ in their number of updates would hang.
        dist.all_reduce(torch.ones(1))
    return {name: column.tolist() for name, column in repeater.drain().items()}


def maximum(loss):
    loss = loss.clone()
    dist.all_reduce(loss, op=dist.ReduceOp.MAX)
    return loss


def non_finite(rank):
    """Rank 1 alone meets a NaN on fresh batch 2: which error does each rank see?"""
    repeater = BatchRepeater(range(7), repeats=Linear(t=1.0), max_updates=UPDATES)
    try:
        for batch in repeater:
            bad = rank == 1 and batch == 2
            repeater.report(torch.tensor(float("nan") if bad else 2.0))
    except NonFiniteLoss as error:
        return {"update": error.update, "fresh_batch": error.fresh_batch}
    return None


def train(rank):
    """Train data-parallel, with averaged gradients; return the weights and the counts."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    parameters = list(model.parameters())
    data = torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(rank))
    repeater = BatchRepeater(data, repeats=Linear(t=0.3), max_updates=UPDATES)
    for inputs in repeater:
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        repeater.report(loss)
        # Plain gradient descent by hand: torch.optim takes seconds to import, on every rank.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            dist.all_reduce(gradient)
            parameter.data -= 0.05 * gradient / dist.get_world_size()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"weights": weights.tolist(), "repeats": repeater.drain()["repeats"].tolist()}


def run_rank(rank, world_size, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT / 4),
    )
    answers = {
        "mean": record(rank),
        "mean of floats": record(rank, wrap=float),
        "mean of float64": record(rank, wrap=lambda x: torch.tensor(x, dtype=torch.float64)),
        # T visits on every rank, so the collective of every update still has its partners.
        "local": record(rank, reduce=lambda loss: loss),
        "maximum": record(rank, reduce=maximum),
        "non-finite": non_finite(rank),
        "train": train(rank),
    }
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(answers))


def main(world_size, folder):
    """Fork the ranks, so that torch is imported once for all of them."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    arguments = [(rank, world_size, folder) for rank in range(world_size)]
    ranks = [context.Process(target=run_rank, args=a, daemon=True) for a in arguments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode) for rank in ranks)


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers_of(tmp_path_factory):
    """What every rank answered, by world size."""
    folders = {n: tmp_path_factory.mktemp(f"gloo{n}") for n in (2, 3)}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    arguments = [str(a) for item in folders.items() for a in item]
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a hanging rank must not outlive the test
    assert process.returncode == 0, errors
    return {
        n: [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]
        for n, folder in folders.items()
    }


@pytest.fixture(params=[2, 3], ids="{} ranks".format)
def ranks(request, answers_of):
    return answers_of[request.param]


def expected_rows(decide):
    """The rows of a plain loop in which batch i asks for floor(decide[i]) updates, 1 to 5."""
    rows, fresh_batch = [], 0
    while len(rows) < UPDATES:
        wanted = int(np.clip(np.floor(decide[fresh_batch % 7]), 1, 5))
        count = min(wanted, UPDATES - len(rows))
        rows += [(fresh_batch, repeat, count) for repeat in range(count)]
        fresh_batch += 1
    return rows


def rows_of(answer):
    return list(zip(answer["fresh_batch"], answer["repeat"], answer["repeats"], strict=True))


@pytest.mark.parametrize("losses", ["mean", "mean of floats", "mean of float64"])
def test_all_ranks_decide_by_the_mean_loss(ranks, losses):
    world_size = len(ranks)
    mean = LOSSES[:world_size].mean(axis=0)
    expected = expected_rows(mean)
    assert any(expected != expected_rows(LOSSES[rank]) for rank in range(world_size))
    for rank, answers in enumerate(ranks):
        assert rows_of(answers[losses]) == expected
        # The mean decides and is recorded; a repeat's loss is this rank's own.
        assert answers[losses]["loss"] == pytest.approx(
            [
                (LOSSES[rank] if repeat else mean)[fresh_batch % 7]
                for fresh_batch, repeat, _ in expected
            ],
            rel=1e-6,
        )


def test_reduce_replaces_the_mean(ranks):
    expected = expected_rows(LOSSES[: len(ranks)].max(axis=0))
    assert [rows_of(answers["maximum"]) for answers in ranks] == [expected] * len(ranks)


def test_without_reduction_decisions_are_rank_local(ranks):
    seen = [rows_of(answers["local"]) for answers in ranks]
    assert seen == [expected_rows(LOSSES[rank]) for rank in range(len(ranks))]
    assert seen[0] != seen[1]


def test_all_ranks_meet_a_nan_together(ranks):
    # Losses of 2 ask for two updates each, so fresh batch 2 begins at update 4.
    assert [answers["non-finite"] for answers in ranks] == [{"update": 4, "fresh_batch": 2}] * len(
        ranks
    )


def test_ranks_of_a_data_parallel_model_stay_equal(ranks):
    first, *others = [answers["train"] for answers in ranks]
    assert all(other == first for other in others)
    assert len(first["repeats"]) == UPDATES
    assert len(set(first["repeats"])) > 1


if __name__ == "__main__":
    pairs = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    sys.exit(max(main(int(world_size), Path(folder)) for world_size, folder in pairs))
