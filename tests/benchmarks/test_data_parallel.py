"""What the decision costs where two gloo processes train one network.

Both sides train the same small MLP on the same batches, with the gradients summed over the
processes at every update: one decides N by the joined loss of every fresh batch, the other replays
the same N and exchanges no loss. They go on in turns of a few updates (A B B A ...) in the same two
processes, each on a core of its own where the system allows that, so that whatever else the machine
does meets both alike: a number is the median over hundreds of such rounds of the ratio of process
0's times, by the wall and of its processor, with the interval that holds the median in 95 % of
bootstrap samples. The results are `results/data_parallel.csv`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from benchmarks.tables import record
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from repeatlab.core.environment import processor
from repeatlab.repetition.distributed import losses_with_gradients
from repeatlab.repetition.mappings import Linear, Mapping, Threshold, Trace
from repeatlab.repetition.repeater import BatchRepeater

RESULTS = Path(__file__).parent / "results" / "data_parallel.csv"
RANKS, ROUNDS, TURN = 2, 200, 10
# Each side has two turns in a round; the first rounds warm up.
WARM = 10
UPDATES = 2 * TURN * (WARM + ROUNDS)
# Of a whole update, where losses travel with the gradients.
MOST = 1.10
HOW = ("DistributedDataParallel", "DistributedDataParallel, losses with gradients")
RULES = {
    "Linear(t=0.35)": Linear(t=0.35),
    "N = 1, decided at every update": Threshold(t=1e9),
}


def updates(repeats: Mapping, batches: list, how: str, counts: list[int]) -> Iterator[None]:
    """Train 4-120-84-2 with Adam on batches of 32 a process, an update each time; note every N."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    model = DistributedDataParallel(model)
    ways = {} if how == HOW[0] else {"reduce": losses_with_gradients(model).start}
    repeater = BatchRepeater(batches, repeats, max_updates=UPDATES, **ways)
    for inputs, targets in repeater:
        loss = functional.mse_loss(model(inputs), targets)
        repeater.report(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield
    rows = repeater.drain()
    counts += rows["repeats"][rows["repeat"] == 0].tolist()


def turn(side: Iterator[None]) -> tuple[float, float]:
    """Make a few updates of a side; return the wall's and the processor's seconds."""
    wall, worked = perf_counter(), process_time()
    for _ in range(TURN):
        next(side)
    return perf_counter() - wall, process_time() - worked


def measure(rank: int, folder: Path, how: str, rule: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(100, 32, 4, generator=generator)
    targets = torch.randn(100, 32, 2, generator=generator)
    batches = list(zip(inputs, targets, strict=True))
    counts: list[int] = []
    for _ in updates(RULES[rule], batches, how, counts):
        pass
    made: tuple[list[int], list[int]] = ([], [])
    sides = (
        updates(RULES[rule], batches, how, made[0]),
        # Torch's own DDP, without a hook.
        updates(Trace(tuple(counts)), batches, how.partition(",")[0], made[1]),
    )
    times = torch.zeros(WARM + ROUNDS, 2, 2)  # round, side, clock
    for number in range(WARM + ROUNDS):
        for side in (0, 1, 1, 0):
            times[number, side] += torch.tensor(turn(sides[side]))
    for side in sides:
        assert next(side, None) is None
    assert made == (counts, counts)
    if rank == 0:
        torch.save([times[WARM:], UPDATES / len(counts)], folder / "answer.pt")
    dist.barrier()
    dist.destroy_process_group()


def median_with_interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Return the median and the 95 % interval of a bootstrap."""
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", HOW)
def test_what_the_decision_costs(how, rule, tmp_path, capsys):
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
        ratios = (times[:, 0, number] / times[:, 1, number]).numpy()
        middle, low, high = median_with_interval(ratios)
        rows.append(
            {
                "task": "data parallel",
                "data": "MLP of 10,934 parameters, Adam, batch 32 a process",
                "scale": f"{RANKS} gloo processes, {ROUNDS} rounds of {2 * TURN} updates a side",
                "arm": f"{how}, {rule}",
                "metric": f"{clock} time beside the same N replayed (median, 95 %)",
                "n": len(ratios),
                "mean": round(middle, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "mean N": round(mean_count, 2),
                "us an update, replayed": round(
                    times[:, 1, number].median().item() / (2 * TURN) * 1e6
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
    if how != HOW[0]:
        assert rows[0]["mean"] <= MOST
