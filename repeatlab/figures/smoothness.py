"""How smoothly does the loss fall? Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from repeatlab.analysis.mechanism import over_seeds
from repeatlab.figures.intervals import interval_rows
from repeatlab.figures.look import in_order, panels, said_n, style, zero_line


@style()
def roughness_of_tasks(frame: pd.DataFrame, *, tasks: Sequence[str], window: int) -> Figure:
    """Draw mean and interval of the roughness for each method, a panel per task.

    Args:
        frame: What `analysis.roughness.roughness` returns.
        tasks: Which, from left to right.
        window: What it was made with.
    """
    methods = in_order(frame["method"])
    height = 1.1 + 0.155 * max(3, len(methods))
    figure, (row,) = panels(1, len(tasks), height=height, sharey=True)
    for axes, task in zip(row, tasks, strict=True):
        of_task = frame[frame["task"] == task]
        means = over_seeds(of_task, ["method"], "roughness").rename(columns={"mean": "estimate"})
        interval_rows(axes, means, methods)
        for standard in means.loc[means["method"] == "standard", "estimate"]:
            zero_line(axes, standard)
        text = f"{of_task['batches'].max()} batches\n{said_n(means['n'])}" if len(means) else ""
        axes.set_title(f"{task}\n{text}", loc="left", fontsize=7, va="bottom")
    figure.supxlabel(
        f"total variation over range of the first-visit loss, means of {window} fresh batches "
        "(1: it only falls); mean, 95 % t-interval",
        fontsize=7,
    )
    return figure
