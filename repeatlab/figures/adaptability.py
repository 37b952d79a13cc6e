"""Does a method hold from task to task? Never imports torch.

Effects are per cent of updates saved, as `analysis.plan_tables` has them.
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

from repeatlab.figures import look
from repeatlab.figures.intervals import interval_rows

FAR = 50.0  # per cent of updates saved at which the colours end
SHADES = "PuOr"  # violet is better, orange worse: colour-blind safe
SHARES = ["saved", "low", "high", "mean", "new_low", "new_high"]


@look.style()
def heat_map(arms: pd.DataFrame, pooled: pd.DataFrame) -> Figure:
    """Draw the updates saved and their interval, arm by task; to the right over these tasks.

    A frame marks what is decided; what the budgets leave wholly open, and what was not tested, is
    grey.

    Args:
        arms: The table "arms" of `plan_tables`.
        pooled: The table "over_tasks".
    """
    methods, tasks = look.in_order(pooled["arm"]), list(arms["task"].unique())
    figure, ((axes,),) = look.panels(1, 1, height=0.85 + 0.27 * max(3, len(methods)))
    look.rows_of(axes, [look.label(method) for method in methods])
    columns = {task: x for x, task in enumerate(tasks)}
    last = len(tasks) + 0.15
    rows = pd.concat([arms, pooled.assign(task="")])
    for row in _in_per_cent(rows).itertuples():
        place = (columns.get(row.task, last), methods.index(row.arm))
        framed = row.state in ("better", "worse")
        nothing = row.state == "not tested" or (np.isinf(row.low) and row.high == 100)
        _cell(axes, place, row.saved, (row.low, row.high), framed=framed, nothing=nothing)
    axes.set_xlim(-0.5, len(tasks) + 0.65)
    axes.set_ylim(max(1, len(methods)) - 0.5, -0.5)
    heads = [f"{task}\n{look.said_n(n)}" for task, n in arms.groupby("task", sort=False)["seeds"]]
    axes.set_xticks([*range(len(tasks)), last], [*heads, "these tasks\ntogether"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.supxlabel(
        "% of updates saved against standard, [95 % interval]; positive is better\n"
        "\u221e: beyond every budget that was tried; framed: decided after Holm; "
        "grey: wholly open, or not tested",
        fontsize=7,
    )
    return figure


def _in_per_cent(table: pd.DataFrame) -> pd.DataFrame:
    known = [name for name in SHARES if name in table]
    return table.assign(**{name: 100 * table[name].astype(float) for name in known})


def _cell(
    axes: Axes,
    place: tuple[float, float],
    value: float,
    limits: tuple[float, float],
    *,
    framed: bool,
    nothing: bool,
) -> None:
    x, y = place
    box = (x - 0.48, y - 0.45)
    shade = mpl.colormaps[SHADES](Normalize(-FAR, FAR, clip=True)(value))
    shade = mpl.colors.to_rgba("0.93") if nothing and not framed else shade
    frame = {"edgecolor": "black", "lw": 1.3, "zorder": 3} if framed else {"edgecolor": "none"}
    axes.add_patch(Rectangle(box, 0.96, 0.9, facecolor=shade, **frame))
    ink = "white" if np.dot(shade[:3], (0.3, 0.59, 0.11)) < 0.5 else "black"
    drawn = {"ha": "center", "color": ink, "zorder": 4}
    heavy = {"fontsize": 7, "weight": "bold" if framed else "normal"}
    axes.text(x, y, _short(value), va="bottom", **heavy, **drawn)
    words = "[{}, {}]".format(*map(_short, limits))
    axes.text(x, y + 0.03, words, va="top", fontsize=5.5, **drawn)


def _short(value: float) -> str:
    """Return whole per cent with a sign; all is saved where no budget would have been enough."""
    if np.isinf(value) or value == 100:
        return "+\u221e" if value > 0 else "\u2212\u221e"
    return f"{value:+.0f}".replace("-", "\u2212") if abs(value) >= 0.5 else "0"


@look.style()
def over_all_tasks(pooled: pd.DataFrame) -> Figure:
    """Draw each arm's effect on these tasks, and what a new task of the kind would show.

    Args:
        pooled: The table "over_tasks" of `plan_tables`.
    """
    methods = look.in_order(pooled["arm"])
    height = 1.0 + 0.165 * max(4, len(methods))
    figure, (row,) = look.panels(1, 2, height=height, sharey=True)
    table = _in_per_cent(pooled).rename(columns={"arm": "method"})
    decided = set(table.loc[table["state"].isin(["better", "worse"]), "method"])
    shown = {
        "on these tasks; filled: decided after Holm": ("saved", "low", "high", decided),
        "on tasks like them: mean, and\nwhere a new one would lie (95 %)": (
            "mean",
            "new_low",
            "new_high",
            None,
        ),
    }
    for axes, (said, (middle, low, high, solid)) in zip(row, shown.items(), strict=True):
        found = table[["method", middle, low, high]].set_axis(
            ["method", "estimate", "low", "high"], axis=1
        )
        interval_rows(axes, found, methods, solid=solid, missing="no estimate")
        look.zero_line(axes)
        axes.set_xlabel(f"% of updates saved\n{said}")
    row[1].tick_params(axis="y", length=0)
    look.caption(figure, f"against standard, {look.said_n(pooled['tasks'])} tasks")
    return figure


@look.style()
def distributions(frame: pd.DataFrame, *, tasks: Sequence[str], methods: Sequence[str]) -> Figure:
    """Draw how losses and N are distributed: a column per task, all seeds together.

    Losses are on a logarithmic axis where they span a decade, in bins that methods share.

    Args:
        frame: Rows of `mechanism.visited_batches` with task, method and seed.
        tasks: From left to right.
        methods: Which.
    """
    figure, grid = look.panels(2, len(tasks), height=3.1, sharey="row")
    most = int(frame["repeats"].max()) if len(frame) else 1
    for (top, bottom), task in zip(grid.T, tasks, strict=True):
        of_task = frame[frame["task"] == task]
        seeds = of_task.groupby("method")["seed"].nunique()
        top.set_title(f"{task}\n{look.said_n(seeds)}" if len(of_task) else task, loc="left")
        if not len(of_task):
            look.say(top, bare=True)
            look.say(bottom, bare=True)
            continue
        losses = of_task["loss"].to_numpy(float)
        on_log = look.spans_decades(losses)
        edges = _bins(losses, on_log)
        for method in [m for m in methods if (of_task["method"] == m).any()]:
            mine = of_task[of_task["method"] == method]
            counts, _ = np.histogram(mine["loss"], edges)
            top.stairs(counts / len(mine), edges, lw=1.1, **look.line(method))
            shares = mine["repeats"].value_counts(normalize=True).sort_index()
            bottom.plot(shares.index, shares, ms=3, marker=look.marker(method), **look.line(method))
        if on_log:
            look.logarithmic(top, "x")
        bottom.set_xlim(0.7, most + 0.3)
        bottom.set_xticks(range(1, most + 1))
        bottom.set_yscale("log")
        top.set_xlabel("first loss")
        bottom.set_xlabel("N")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of\nfresh batches")
    look.line_legend(figure, methods)
    return figure


def _bins(losses: np.ndarray, on_log: bool, count: int = 30) -> np.ndarray:
    low, high = losses.min(), losses.max()
    if low == high:
        return np.array([low - 0.5, low + 0.5])
    return (np.geomspace if on_log else np.linspace)(low, high, count)
