"""What the decision costs where two gloo processes train one network.

Both sides train the same small MLP on the same batches, with the gradients summed over the
processes at every update: one decides N by the joined loss of every fresh batch, the other replays
the same N and exchanges no loss. They run in turns (A B B A ...) in the same two processes, from
the same weights; a number is the median over the rounds of the ratio of process 0's times: by the
wall, and of its processor, which other load disturbs less and which leaves waiting out.
The results are `results/data_parallel.csv`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from statistics import quantiles
from time import perf_counter, process_time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from repeatlab.data_parallel import GradientSum, JoinedLosses
from repeatlab.environment import processor
from repeatlab.mappings import Linear, Mapping, Threshold, Trace
from repeatlab.repeater import BatchRepeater

RESULTS = Path(__file__).parent / "results" / "data_parallel.csv"
RANKS, UPDATES, ROUNDS = 2, 200, 15
RULES = {
    "Linear(t=0.35)": Linear(t=0.35),
    "N = 1, decided at every update": Threshold(t=1e9),
}


def train(repeats: Mapping, batches: list, how: str) -> tuple[tuple[float, float], list[int]]:
    """Train 4-120-84-2 with Adam on batches of 32 a process; return both times and every N."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    ways = {}
    if how == "DistributedDataParallel":
        model = DistributedDataParallel(model)
    else:
        losses = JoinedLosses(1 / RANKS)
        ways = {"reduce": losses.start, "join": losses.join}
        GradientSum(optimizer, losses)
    repeater = BatchRepeater(batches, repeats, max_updates=UPDATES, **ways)
    dist.barrier()
    wall, worked = perf_counter(), process_time()
    for inputs, targets in repeater:
        loss = functional.mse_loss(model(inputs), targets)
        repeater.report(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = repeater.drain()
    seconds = perf_counter() - wall, process_time() - worked
    return seconds, rows["repeats"][rows["repeat"] == 0].tolist()


def measure(rank: int, folder: Path, how: str, rule: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(100, 32, 4, generator=generator)
    targets = torch.randn(100, 32, 2, generator=generator)
    batches = list(zip(inputs, targets, strict=True))
    decide = RULES[rule]
    _, counts = train(decide, batches, how)
    sides = (decide, Trace(tuple(counts)))
    times = torch.empty(ROUNDS, 2, 2)  # round, side, clock
    for turn in range(ROUNDS):
        for side in (0, 1) if turn % 2 else (1, 0):
            seconds, made = train(sides[side], batches, how)
            assert made == counts
            times[turn, side] = torch.tensor(seconds)
    if rank == 0:
        torch.save([times, UPDATES / len(counts)], folder / "answer.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["DistributedDataParallel", "repeatlab"])
def test_what_the_decision_costs(how, rule, tmp_path, record, capsys):
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=measure, args=(rank, tmp_path, how, rule)) for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * RANKS
    times, mean_count = torch.load(tmp_path / "answer.pt")
    rows = []
    for number, clock in enumerate(("wall", "processor")):
        ratios = (times[:, 0, number] / times[:, 1, number]).tolist()
        low, middle, high = quantiles(ratios, n=4)
        rows.append(
            {
                "task": "data parallel",
                "data": "MLP of 10,934 parameters, Adam, batch 32 a process",
                "scale": f"{RANKS} gloo processes, {UPDATES} updates a side",
                "arm": f"{how}, {rule}",
                "metric": f"{clock} time beside the same N replayed (median, quartiles)",
                "n": len(ratios),
                "mean": round(middle, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "mean N": round(mean_count, 2),
                "us an update, replayed": round(
                    times[:, 1, number].median().item() / UPDATES * 1e6
                ),
                "load": round(os.getloadavg()[0], 1),
                "processor": f"{processor()}, {os.cpu_count()} cores",
            }
        )
    record(RESULTS, rows)
    with capsys.disabled():
        print(
            *({k: row[k] for k in ("arm", "metric", "mean", "low", "high")} for row in rows),
            sep="\n",
        )
