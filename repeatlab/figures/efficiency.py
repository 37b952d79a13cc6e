"""What does a method give for what it costs? Never imports torch.

Differences are paired by seed and positive where the method is better, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repeatlab.analysis.frames import AXES, LOWER_IS_BETTER
from repeatlab.figures import look
from repeatlab.figures.intervals import interval_rows, is_decided, least_words

# Axis -> what is held equal, in a title's few words.
EQUAL = {
    "update": "equal updates",
    "cost": "equal cost",
    "fresh_batches": "equal fresh data",
    "environment_steps": "equal steps",
    "seconds": "equal seconds",
}


@look.style()
def differences(tables: Mapping[str, pd.DataFrame], *, metric: str) -> Figure:
    """Draw each method's difference to the standard arm, a panel for everything held equal.

    A filled dot is a difference that is decided.

    Args:
        tables: Axis, a key of `EQUAL`, to what `comparison.comparison_table` returns on it, of one
            task.
        metric: What differs.
    """
    methods = look.in_order(m for table in tables.values() for m in table["method"])
    height = 1.15 + 0.165 * max(4, len(methods))
    figure, (row,) = look.panels(1, len(tables), height=height, sharey=True)
    for axes, (axis, table) in zip(row, tables.items(), strict=True):
        found = table.rename(columns={"difference": "estimate"})
        solid = set(table.loc[is_decided(table), "method"])
        interval_rows(axes, found, methods, solid=solid, missing="no pair")
        look.zero_line(axes)
        # A range without 0 would hide on which side of the standard arm they all are.
        left, right = axes.get_xlim()
        axes.set_xlim(min(left, 0), max(right, 0))
        axes.set_title(f"{EQUAL[axis]}\n{look.said_n(table['n'][table['n'] > 0])}", loc="left")
    look.caption(figure, f"{metric}: paired difference to standard")
    decided = least_words(tables.values(), "filled: decided after Holm over tasks and methods")
    figure.supxlabel(f"positive is better; bars: 95 % interval; {decided}", fontsize=7)
    return figure


# --- cost -------------------------------------------------------------------------------------


@look.style()
def pareto(
    points: pd.DataFrame, *, x: str, metrics: Mapping[str, str], k: Mapping[str, float]
) -> Figure:
    """Draw what each method reached against what it spent, a panel per task.

    The line joins what no other method beats in both; its members and the standard arm have names
    and intervals.

    Args:
        points: What `analysis.frames.final_points` returns, of several tasks.
        x: Its x column, a key of `analysis.AXES`.
        metrics: Task to its metric, in the order of the panels.
        k: Task to its k, where x is the cost.
    """
    every = look.in_order(points["method"])
    head = 0.6 + 0.15 * -(-len(every) // 6)
    figure, grid = look.tiles(len(metrics), columns=3, height=1.9, head=head)
    for axes, (task, metric) in zip(grid, metrics.items(), strict=True):
        of_task = points[points["task"] == task]
        named = f"{task}, k = {k[task]:.2g}" if task in k else task
        title = f"{named}, {look.said_n(of_task['n'])}" if len(of_task) else named
        axes.set_title(title, loc="left")
        better = "less" if metric in LOWER_IS_BETTER else "more"
        axes.set_ylabel(f"{look.label(metric)} ({better} is better)", fontsize=7)
        if "standard" in set(of_task["method"]):
            _front(axes, of_task, x, -1 if metric in LOWER_IS_BETTER else 1)
        else:
            look.say(axes, bare=True)
    spent = AXES[x].partition(" (")[0]
    figure.supxlabel(f"{spent} in all, as multiple of the standard arm's", fontsize=8)
    look.line_legend(figure, every, marked=True)
    return figure


def _front(axes: Axes, points: pd.DataFrame, x: str, sign: int) -> None:
    spent = points[x] / points.loc[points["method"] == "standard", x].iloc[0]
    points = points.assign(spent=spent)
    known = points[np.isfinite(points["mean"])]
    best = efficient(known["spent"].to_numpy(float), sign * known["mean"].to_numpy(float))
    front = known[best].sort_values("spent")
    axes.step(front["spent"], front["mean"], where="post", lw=0.7, color="#999999", zorder=1)
    for row in known.itertuples():
        axes.plot(row.spent, row.mean, **look.dots(row.method, ms=4, zorder=3))
    named = known[best | (known["method"] == "standard")]
    for row in named.itertuples():
        limits = {"lw": 0.8, "color": look.colour(row.method), "zorder": 2}
        axes.plot([row.spent] * 2, [row.low, row.high], **limits)
    # The axis follows the means: an interval that is wider is cut.
    low, high = known["mean"].min(), known["mean"].max()
    pad = 0.2 * (high - low) or 0.1 * (abs(high) or 1.0)
    axes.set_ylim(low - pad, high + pad)
    axes.margins(x=0.2)
    _name(axes, named, sign, middle=known["spent"].min() + 0.5 * np.ptp(known["spent"]))
    if lost := [look.label(m) for m in points.loc[~np.isfinite(points["mean"]), "method"]]:
        axes.text(0.02, 0.02, "diverged: " + ", ".join(lost), fontsize=6, transform=axes.transAxes)


def _name(axes: Axes, named: pd.DataFrame, sign: int, *, middle: float) -> None:
    """Write the methods' names beside their points, one name for those that lie together."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = [
        ((named["spent"] - left) / (right - left) * 8).round(),
        ((named["mean"] - bottom) / (top - bottom) * 8).round(),
    ]
    for _, group in named.groupby(places, sort=False):
        names = [look.label(method) for method in group["method"]]
        text = ", ".join(names[:2]) + (f" + {len(names) - 2}" if len(names) > 2 else "")
        first = group.iloc[0]
        # Away from the nearer side of the panel, so that names stay in it.
        before = first["spent"] <= middle
        side = {"ha": "left" if before else "right", "va": "bottom" if sign > 0 else "top"}
        shift = {"textcoords": "offset points", "xytext": (4 if before else -4, 3 * sign)}
        at, shade = (first["spent"], first["mean"]), look.colour(first["method"])
        axes.annotate(text, at, fontsize=6, color=shade, zorder=4, **side, **shift)


def efficient(spent: np.ndarray, gained: np.ndarray) -> np.ndarray:
    """Return which of the points (n,) no other beats: none spends less and gains as much or more.

    >>> efficient(np.array([1, 2, 3, 3]), np.array([5, 4, 6, 7])).tolist()
    [True, False, False, True]
    """
    spent, gained = np.asarray(spent), np.asarray(gained)
    as_good = (spent[None] <= spent[:, None]) & (gained[None] >= gained[:, None])
    better = (spent[None] < spent[:, None]) | (gained[None] > gained[:, None])
    return ~(as_good & better).any(axis=1)
