"""Does a method hold from task to task? Never imports torch.

Improvements are standardised: paired differences to the standard arm in the standard deviation
within arms (`analysis.effects.spread`), positive where the method is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from repeatlab.figures.intervals import interval_rows, is_decided, least_words
from repeatlab.figures.look import (
    caption,
    colour,
    in_order,
    label,
    line,
    line_legend,
    logarithmic,
    marker,
    panels,
    rows_of,
    said_n,
    say,
    spans_decades,
    style,
    zero_line,
)

FAR = 3.0  # standard deviations at which the colours end
SHADES = "PuOr"  # violet is better, orange worse: colour-blind safe


@style()
def heat_map(table: pd.DataFrame, pooled: pd.DataFrame) -> Figure:
    """Draw the standardised improvement and its interval, method by task; to the right over tasks.

    A frame marks what is decided.

    Args:
        table: What `comparison.comparison_table` returns, of several tasks.
        pooled: What `comparison.over_tasks` returns.
    """
    methods, tasks = in_order(table["method"]), list(table["task"].unique())
    figure, ((axes,),) = panels(1, 1, height=0.85 + 0.27 * max(3, len(methods)))
    rows_of(axes, [label(method) for method in methods])
    columns = {task: x for x, task in enumerate(tasks)}
    last = len(tasks) + 0.15
    for row, framed in zip(table.itertuples(), is_decided(table), strict=True):
        limits = (row.standardised_low, row.standardised_high)
        place = (columns[row.task], methods.index(row.method))
        _cell(axes, place, row.standardised, limits, n=row.n, framed=framed)
    for row in pooled.itertuples():
        place = (last, methods.index(row.method))
        _cell(axes, place, row.iqm, (row.low, row.high), n=row.n, nothing="none")
    axes.set_xlim(-0.5, len(tasks) + 0.65)
    axes.set_ylim(max(1, len(methods)) - 0.5, -0.5)
    heads = [f"{task}\n{said_n(n[n > 0])}" for task, n in table.groupby("task", sort=False)["n"]]
    axes.set_xticks([*range(len(tasks)), last], [*heads, f"IQM over\n{_tasks(pooled)}"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    decided = least_words([table], "framed: decided after Holm over tasks and methods")
    figure.supxlabel(
        "improvement on standard in sd within arms, [95 % interval]; positive is better\n"
        f"{decided}; blank: not planned",
        fontsize=7,
    )
    return figure


def _cell(
    axes: Axes,
    place: tuple[float, float],
    value: float,
    limits: tuple[float, float],
    *,
    n: int,
    framed: bool = False,
    nothing: str = "no pair",
) -> None:
    x, y = place
    box = (x - 0.48, y - 0.45)
    if np.isnan(value):
        axes.add_patch(Rectangle(box, 0.96, 0.9, facecolor="white", edgecolor="#DDDDDD", lw=0.5))
        words = {0: nothing, 1: "n = 1"}.get(n, "no spread")
        axes.text(x, y, words, ha="center", va="center", fontsize=5.5, color="#999999")
        return
    shade = mpl.colormaps[SHADES](Normalize(-FAR, FAR, clip=True)(value))
    frame = {"edgecolor": "black", "lw": 1.3, "zorder": 3} if framed else {"edgecolor": "none"}
    axes.add_patch(Rectangle(box, 0.96, 0.9, facecolor=shade, **frame))
    ink = "white" if np.dot(shade[:3], (0.3, 0.59, 0.11)) < 0.5 else "black"
    drawn = {"ha": "center", "color": ink, "zorder": 4}
    bounded = bool(np.isfinite(limits).any())
    heavy = {"fontsize": 7, "weight": "bold" if framed else "normal"}
    axes.text(x, y, _short(value), va="bottom" if bounded else "center", **heavy, **drawn)
    if bounded:
        words = "[{}, {}]".format(*map(_short, limits))
        axes.text(x, y + 0.03, words, va="top", fontsize=5.5, **drawn)


def _short(value: float) -> str:
    """Return two digits with a sign, none behind the point from 10 on."""
    if np.isinf(value):
        return "+\u221e" if value > 0 else "\u2212\u221e"
    digits = 0 if abs(value) >= 9.95 else 1 if abs(value) >= 0.095 else 2
    text = f"{value:+.{digits}f}" if abs(value) >= 0.005 else "0"
    return text.replace("-", "\u2212")


@style()
def over_all_tasks(pooled: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Draw each method's interquartile mean over tasks, and the probability that it is better.

    Args:
        pooled: What `comparison.over_tasks` returns.
        table: What `comparison.comparison_table` returns of the same pairs: its probabilities are
            the ticks, one per task.
    """
    methods = in_order(pooled["method"])
    height = 1.0 + 0.165 * max(4, len(methods))
    figure, ((left, right),) = panels(1, 2, height=height, sharey=True)
    found = pooled.rename(columns={"iqm": "estimate"})
    interval_rows(left, found, methods, missing="no estimate")
    zero_line(left)
    left.set_xlabel("interquartile mean of the improvement,\nin sd within arms; 95 % bootstrap")
    zero_line(right, 0.5)
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
    caption(figure, f"over {_tasks(pooled)}, {said_n(some['n'])} pairs")
    return figure


def _tasks(pooled: pd.DataFrame) -> str:
    counts = pooled.loc[pooled["tasks"] > 0, "tasks"]
    return f"{said_n(counts).removeprefix('n = ')} tasks" if len(counts) else "no task"


@style()
def distributions(frame: pd.DataFrame, *, tasks: Sequence[str], methods: Sequence[str]) -> Figure:
    """Draw how losses and N are distributed: a column per task, all seeds together.

    Losses are on a logarithmic axis where they span a decade, in bins that methods share.

    Args:
        frame: Rows of `mechanism.visited_batches` with task, method and seed.
        tasks: From left to right.
        methods: Which.
    """
    figure, grid = panels(2, len(tasks), height=3.1, sharey="row")
    most = int(frame["repeats"].max()) if len(frame) else 1
    for (top, bottom), task in zip(grid.T, tasks, strict=True):
        of_task = frame[frame["task"] == task]
        seeds = of_task.groupby("method")["seed"].nunique()
        top.set_title(f"{task}\n{said_n(seeds)}" if len(of_task) else task, loc="left")
        if not len(of_task):
            say(top, bare=True)
            say(bottom, bare=True)
            continue
        losses = of_task["loss"].to_numpy(float)
        on_log = spans_decades(losses)
        edges = _bins(losses, on_log)
        for method in [m for m in methods if (of_task["method"] == m).any()]:
            mine = of_task[of_task["method"] == method]
            counts, _ = np.histogram(mine["loss"], edges)
            top.stairs(counts / len(mine), edges, lw=1.1, **line(method))
            shares = mine["repeats"].value_counts(normalize=True).sort_index()
            bottom.plot(shares.index, shares, ms=3, marker=marker(method), **line(method))
        if on_log:
            logarithmic(top, "x")
        bottom.set_xlim(0.7, most + 0.3)
        bottom.set_xticks(range(1, most + 1))
        bottom.set_yscale("log")
        top.set_xlabel("first loss")
        bottom.set_xlabel("N")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of\nfresh batches")
    line_legend(figure, methods)
    return figure


def _bins(losses: np.ndarray, on_log: bool, count: int = 30) -> np.ndarray:
    low, high = losses.min(), losses.max()
    if low == high:
        return np.array([low - 0.5, low + 0.5])
    return (np.geomspace if on_log else np.linspace)(low, high, count)
