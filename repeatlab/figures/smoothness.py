"""How smoothly does the loss fall? Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repeatlab.analysis.frames import Records, mean_interval
from repeatlab.figures import COLOURS, FULL_WIDTH, in_order, said_n, style
from repeatlab.figures.intervals import interval_rows
from repeatlab.store.records import Run


def roughness(records: Records, *, window: int = 20) -> pd.DataFrame:
    """Return how far the loss goes up and down on its way, for each run.

    Of a task's fresh batches, in the order they came and up to as many as each of its complete runs
    has seen, the losses at the first visit are averaged over blocks of `window`. Roughness is the
    total variation of these means over their range: 1 is a monotone fall, and a scale of the loss
    does not matter. All arms of a seed see the same batches, but for those whose sampler chooses
    them.

    Args:
        records: The runs; they are read one by one.
        window: Fresh batches in a block.

    Returns:
        Rows (task, method, seed, batches, roughness); a diverged run has NaN.
    """
    pieces = []
    for _, group in records.done.groupby("task", sort=False):
        first: dict[int, np.ndarray] = {}
        for row in group[group["status"] == "complete"].itertuples():
            updates = Run(Path(row.path)).updates
            first[row.Index] = updates.loc[updates["repeat"] == 0, "loss"].to_numpy(float)
        shared = min(map(len, first.values()), default=0) // window * window
        found = {
            at: total_variation(losses[:shared].reshape(-1, window).mean(axis=1))
            for at, losses in first.items()
        }
        columns = {"batches": shared, "roughness": group.index.map(found).astype(float)}
        pieces.append(group[["task", "method", "seed"]].assign(**columns))
    columns = ["task", "method", "seed", "batches", "roughness"]
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=columns)


def total_variation(values: np.ndarray) -> float:
    """Return the sum of the steps of `values` (n,) over their range; NaN where that is 0.

    >>> total_variation(np.array([3.0, 1.0, 2.0, 0.0]))
    1.6666666666666667
    """
    values = np.asarray(values, dtype=float)
    span = np.ptp(values) if len(values) > 1 else 0.0
    return float(np.abs(np.diff(values)).sum() / span) if span > 0 else np.nan


def roughness_of_tasks(frame: pd.DataFrame, *, tasks: Sequence[str], window: int) -> Figure:
    """Draw mean and interval of the roughness for each method, a panel per task.

    Args:
        frame: What `roughness` returns.
        tasks: Which, from left to right.
        window: What it was made with.
    """
    methods = in_order(frame["method"])
    with style():
        figure, grid = plt.subplots(
            1,
            len(tasks),
            figsize=(FULL_WIDTH, 1.1 + 0.155 * max(3, len(methods))),
            sharey=True,
            squeeze=False,
        )
        for axes, task in zip(grid[0], tasks, strict=True):
            of_task = frame[frame["task"] == task].dropna(subset="roughness")
            rows = []
            for method, runs in of_task.groupby("method", sort=False):
                limits = mean_interval(runs["roughness"].to_numpy(float))
                columns = zip(("estimate", "low", "high"), map(float, limits), strict=True)
                rows.append({"method": method, **dict(columns)})
            found = pd.DataFrame(rows, columns=["method", "estimate", "low", "high"])
            interval_rows(axes, found, methods)
            for standard in found.loc[found["method"] == "standard", "estimate"]:
                axes.axvline(standard, lw=0.7, color=COLOURS["standard"], zorder=0)
            told = ""
            if len(of_task):
                counts = of_task.groupby("method").size()
                told = f"{of_task['batches'].max()} batches\n{said_n(counts)}"
            axes.set_title(f"{task}\n{told}", loc="left", fontsize=7, va="bottom")
        figure.supxlabel(
            f"total variation over range of the first-visit loss, means of {window} fresh batches "
            "(1: it only falls); mean, 95 % t-interval",
            fontsize=7,
        )
    return figure
