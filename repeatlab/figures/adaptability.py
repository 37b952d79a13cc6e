"""Does a method hold from task to task? Never imports torch.

Improvements are standardised: paired differences to the standard arm in the standard deviation of
that arm over its seeds, positive where the method is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from repeatlab.analysis.frames import Records
from repeatlab.figures import (
    FULL_WIDTH,
    colour,
    in_order,
    label,
    line,
    line_legend,
    marker,
    said_n,
    say_no_run,
    style,
)
from repeatlab.figures.intervals import interval_rows
from repeatlab.store.records import Run

FAR = 3.0  # standard deviations at which the colours end
SHADES = "PuOr"  # violet is better, orange worse: colour-blind safe


def heat_map(table: pd.DataFrame, pooled: pd.DataFrame) -> Figure:
    """Draw the standardised improvement and its interval, method by task; to the right over tasks.

    A frame marks what is decided: the interval excludes 0 and the Holm-adjusted p is below 0.05.

    Args:
        table: What `comparison.comparison_table` returns, of several tasks.
        pooled: What `comparison.over_tasks` returns.
    """
    methods, tasks = in_order(table["method"]), list(table["task"].unique())
    cells = {(row.method, row.task): row for row in table.itertuples()}
    sums = {row.method: row for row in pooled.itertuples()}
    with style():
        figure, axes = plt.subplots(figsize=(FULL_WIDTH, 0.85 + 0.27 * max(3, len(methods))))
        for y, method in enumerate(methods):
            for x, task in enumerate(tasks):
                if (method, task) in cells:
                    row = cells[method, task]
                    limits = (row.standardised_low, row.standardised_high)
                    _cell(axes, x, y, row.standardised, *limits, n=row.n, framed=_decided(row))
            if method in sums:
                row = sums[method]
                _cell(
                    axes, len(tasks) + 0.15, y, row.iqm, row.low, row.high, n=row.n, nothing="none"
                )
        axes.set_xlim(-0.5, len(tasks) + 0.65)
        axes.set_ylim(max(1, len(methods)) - 0.5, -0.5)
        axes.set_yticks(range(len(methods)), [label(method) for method in methods])
        heads = [
            f"{task}\n{said_n(n[n > 0])}" for task, n in table.groupby("task", sort=False)["n"]
        ]
        axes.set_xticks(
            [*range(len(tasks)), len(tasks) + 0.15], [*heads, f"IQM over\n{_tasks(pooled)}"]
        )
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        least = table["least_p_adjusted"].min()
        framed = "framed: decided after Holm over tasks and methods"
        if not least < 0.05:
            framed = "none can be decided: too few seeds for so many comparisons"
        figure.supxlabel(
            "improvement on standard in its sd over seeds, [95 % interval]; positive is better\n"
            f"{framed}; blank: not planned",
            fontsize=7,
        )
    return figure


def _decided(row: tuple) -> bool:
    return row.decision in ("better", "worse")


def _cell(
    axes: Axes,
    x: float,
    y: float,
    value: float,
    low: float,
    high: float,
    *,
    n: int,
    framed: bool = False,
    nothing: str = "no pair",
) -> None:
    box = (x - 0.48, y - 0.45)
    if np.isnan(value):
        axes.add_patch(Rectangle(box, 0.96, 0.9, facecolor="white", edgecolor="#DDDDDD", lw=0.5))
        told = {0: nothing, 1: "n = 1"}.get(n, "no spread")
        axes.text(x, y, told, ha="center", va="center", fontsize=5.5, color="#999999")
        return
    shade = plt.get_cmap(SHADES)(Normalize(-FAR, FAR, clip=True)(value))
    frame = {"edgecolor": "black", "lw": 1.3, "zorder": 3} if framed else {"edgecolor": "none"}
    axes.add_patch(Rectangle(box, 0.96, 0.9, facecolor=shade, **frame))
    ink = "white" if np.dot(shade[:3], (0.3, 0.59, 0.11)) < 0.5 else "black"
    weight = "bold" if framed else "normal"
    place = {"ha": "center", "color": ink, "zorder": 4}
    if np.isnan(low):
        axes.text(x, y, _short(value), va="center", fontsize=7, weight=weight, **place)
        return
    axes.text(x, y, _short(value), va="bottom", fontsize=7, weight=weight, **place)
    limits = f"[{_short(low)}, {_short(high)}]"
    axes.text(x, y + 0.03, limits, va="top", fontsize=5.5, **place)


def _short(value: float) -> str:
    """Return two digits with a sign, none behind the point from 10 on."""
    if np.isinf(value):
        return "+\u221e" if value > 0 else "\u2212\u221e"
    told = f"{value:+.0f}" if abs(value) >= 9.95 else f"{value:+.1f}"
    return told.replace("-", "\u2212")


def over_all_tasks(pooled: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Draw each method's interquartile mean over tasks, and the probability that it is better.

    Args:
        pooled: What `comparison.over_tasks` returns.
        table: What `comparison.comparison_table` returns of the same pairs: its probabilities are
            the ticks, one per task.
    """
    methods = in_order(pooled["method"])
    with style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(FULL_WIDTH, 1.0 + 0.165 * max(4, len(methods))), sharey=True
        )
        interval_rows(
            left, pooled.rename(columns={"iqm": "estimate"}), methods, missing="no estimate"
        )
        left.axvline(0, lw=0.7, color=colour("standard"), zorder=0)
        left.set_xlabel("interquartile mean of the improvement,\nin sd of standard; 95 % bootstrap")
        right.axvline(0.5, lw=0.7, color=colour("standard"), zorder=0)
        for place, method in enumerate(methods):
            shade = colour(method)
            ticks = table.loc[table["method"] == method, "probability"].dropna()
            right.plot(ticks, [place] * len(ticks), "|", ms=5, mew=0.8, color=shade)
            mean = pooled.loc[pooled["method"] == method, "probability"]
            right.plot(mean, [place] * len(mean), marker(method), ms=4.5, color=shade)
        right.set_xlim(-0.02, 1.02)
        right.set_xlabel("probability that a run is better than one of standard\n(ticks: tasks)")
        right.tick_params(axis="y", length=0)
        some = pooled[pooled["tasks"] > 0]
        title = f"over {_tasks(pooled)}, {said_n(some['n'])} pairs"
        figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def _tasks(pooled: pd.DataFrame) -> str:
    counts = pooled.loc[pooled["tasks"] > 0, "tasks"]
    return f"{said_n(counts).removeprefix('n = ')} tasks" if len(counts) else "no task"


# --- what the method saw and did --------------------------------------------------------------


def visits(records: Records, *, methods: Sequence[str]) -> pd.DataFrame:
    """Return loss and N of every fresh batch at its first visit, of some methods.

    Returns:
        Rows (task, method, seed, loss, repeats); the runs are read one by one.
    """
    columns = ["task", "method", "seed", "loss", "repeats"]
    pieces = []
    for row in records.done[records.done["method"].isin(methods)].itertuples():
        updates = Run(Path(row.path)).updates
        first = updates.loc[updates["repeat"] == 0, ["loss", "repeats"]]
        pieces.append(first.assign(task=row.task, method=row.method, seed=row.seed)[columns])
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=columns)


def distributions(frame: pd.DataFrame, *, tasks: Sequence[str], methods: Sequence[str]) -> Figure:
    """Draw how losses and N are distributed: a column per task, all seeds together.

    Losses are on a logarithmic axis where they are positive, in bins that methods share.

    Args:
        frame: What `visits` returns.
        tasks: From left to right.
        methods: Which.
    """
    with style():
        figure, grid = plt.subplots(
            2, len(tasks), figsize=(FULL_WIDTH, 3.1), sharey="row", squeeze=False
        )
        most = int(frame["repeats"].max()) if len(frame) else 1
        for (top, bottom), task in zip(grid.T, tasks, strict=True):
            of_task = frame[frame["task"] == task]
            losses = of_task["loss"].to_numpy(float)
            losses = losses[np.isfinite(losses)]
            seeds = of_task.groupby("method")["seed"].nunique()
            top.set_title(f"{task}\n{said_n(seeds)}" if len(losses) else task, loc="left")
            if not len(losses):
                say_no_run(top)
                say_no_run(bottom)
                continue
            edges = _bins(losses)
            for method in [m for m in methods if (of_task["method"] == m).any()]:
                mine = of_task[of_task["method"] == method]
                counts, _ = np.histogram(mine["loss"], edges)
                top.stairs(counts / len(mine), edges, lw=1.1, **_stairs(method))
                shares = mine["repeats"].value_counts(normalize=True).sort_index()
                bottom.plot(shares.index, shares, ms=3, marker=marker(method), **line(method))
            if losses.min() > 0:
                top.set_xscale("log")
                ticks = [float(f"{tick:.0e}") for tick in np.quantile(edges, (0.07, 0.5, 0.93))]
                top.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                top.xaxis.set_minor_locator(NullLocator())
            bottom.set_xlim(0.7, most + 0.3)
            bottom.set_xticks(range(1, most + 1))
            bottom.set_yscale("log")
            top.set_xlabel("first loss")
            bottom.set_xlabel("N")
        grid[0, 0].set_ylabel("share of\nfresh batches")
        grid[1, 0].set_ylabel("share of\nfresh batches")
        line_legend(figure, methods)
    return figure


def _stairs(method: str) -> dict:
    drawn = line(method)
    return {"color": drawn["color"], "linestyle": drawn["linestyle"]}


def _bins(losses: np.ndarray, count: int = 30) -> np.ndarray:
    low, high = losses.min(), losses.max()
    if low == high:
        return np.array([low - 0.5, low + 0.5])
    return np.geomspace(low, high, count) if low > 0 else np.linspace(low, high, count)
