"""How every benchmark measures: one thread, both sides in turn, tables that keep what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import process_time

import pandas as pd
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interleaved() -> Callable[..., float]:
    """Return a function: the median over rounds of the ratio of two sides' processor times."""

    def ratio(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> float:
        ratios = []
        for turn in range(rounds + 1):
            times = {}
            for side in (ours, theirs) if turn % 2 else (theirs, ours):
                start = process_time()
                side()
                times[side] = process_time() - start
            ratios.append(times[ours] / times[theirs])
        return median(ratios[1:])  # the first round warms up

    return ratio


@pytest.fixture
def record() -> Callable[[Path, list[dict]], None]:
    """Return a function that puts rows into a table, in the place of those they are new for."""

    def write(path: Path, rows: list[dict]) -> None:
        keys = ["task", "data", "scale", "arm", "metric"]
        path.parent.mkdir(exist_ok=True)
        table = pd.DataFrame(rows)
        if path.exists():
            table = pd.concat([pd.read_csv(path), table]).drop_duplicates(keys, keep="last")
        table.to_csv(path, index=False)

    return write
