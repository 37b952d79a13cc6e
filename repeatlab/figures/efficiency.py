"""What does a method give for what it costs? Never imports torch.

Differences are paired by seed and positive where the method is better, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from repeatlab.analysis.frames import (
    AXES,
    LOWER_IS_BETTER,
    RUN_KEYS,
    Records,
    mean_interval,
    target_summary,
)
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

# Axis -> what is held equal, in a title's few words.
EQUAL = {
    "update": "equal updates",
    "cost": "equal cost",
    "fresh_batches": "equal fresh data",
    "environment_steps": "equal steps",
    "seconds": "equal seconds",
}


def differences(tables: Mapping[str, pd.DataFrame], *, metric: str) -> Figure:
    """Draw each method's difference to the standard arm, a panel for everything held equal.

    A filled dot is a difference that is decided: its interval excludes 0 and its Holm-adjusted p
    is below 0.05.

    Args:
        tables: Axis, a key of `EQUAL`, to what `comparison.comparison_table` returns on it, of one
            task.
        metric: What differs.
    """
    methods = in_order(m for table in tables.values() for m in table["method"])
    with style():
        figure, grid = plt.subplots(
            1,
            len(tables),
            figsize=(FULL_WIDTH, 1.15 + 0.165 * max(4, len(methods))),
            sharey=True,
            squeeze=False,
        )
        for axes, (axis, table) in zip(grid[0], tables.items(), strict=True):
            decided = table.loc[table["decision"].isin(["better", "worse"]), "method"]
            found = table.rename(columns={"difference": "estimate"})
            interval_rows(axes, found, methods, solid=set(decided), missing="no pair")
            axes.axvline(0, lw=0.7, color=colour("standard"), zorder=0)
            # A range without 0 would hide on which side of the standard arm they all are.
            left, right = axes.get_xlim()
            axes.set_xlim(min(left, 0), max(right, 0))
            axes.set_title(f"{EQUAL[axis]}\n{said_n(table['n'][table['n'] > 0])}", loc="left")
        figure.suptitle(f"{metric}: paired difference to standard", fontsize=8, x=0.01, ha="left")
        figure.supxlabel(
            f"positive is better; bars: 95 % interval; filled: decided {_least(tables)}", fontsize=7
        )
    return figure


def _least(tables: Mapping[str, pd.DataFrame]) -> str:
    """Say whether anything could have been decided with so many seeds and comparisons."""
    least = min((t["least_p_adjusted"].min() for t in tables.values()), default=np.nan)
    if not least < 0.05:
        return "(none can be: too few seeds for so many comparisons)"
    return "after Holm over tasks and methods"


# --- times to the target ----------------------------------------------------------------------


def median_times(times: pd.DataFrame, x: str) -> pd.DataFrame:
    """Return the median time to target (methods, tasks), infinite where half of the runs missed it.

    A method without a run on a task has not reached its target there.

    Args:
        times: What `analysis.to_target` returns, of several tasks.
        x: A key of `analysis.AXES`.
    """
    summary = target_summary(times)
    table = summary.pivot_table(index="method", columns="task", values=x, aggfunc="first")
    table = table.reindex(index=in_order(summary["method"]), columns=times["task"].unique())
    # A target that was met before the first update leaves no ratio to anything.
    return table.fillna(np.inf).clip(lower=1e-9)


def profiles(
    shares: Mapping[str, pd.DataFrame],
    scores: Mapping[str, pd.Series],
    *,
    methods: Sequence[str],
    tasks: Mapping[str, int],
    workloads: int,
) -> Figure:
    """Draw performance profiles of few methods, and the scores of all of them below.

    Args:
        shares: Axis to the shares of workloads solved (methods, ratios to the best).
        scores: Axis to the AlgoPerf scores by method.
        methods: Which have a profile.
        tasks: Method to the workloads on which it has runs.
        workloads: How many there are.
    """
    every = in_order(next(iter(scores.values())).index)
    with style():
        figure, grid = plt.subplots(
            2,
            len(shares),
            figsize=(FULL_WIDTH, 2.6 + 0.16 * len(every)),
            height_ratios=[1.6, 0.35 + 0.16 * len(every)],
            sharey="row",
            squeeze=False,
        )
        for (top, bottom), (x, share) in zip(grid.T, shares.items(), strict=True):
            for method in [m for m in methods if m in share.index]:
                top.step(share.columns, share.loc[method], where="post", **line(method))
            top.set_xscale("log", base=2)
            top.set_xticks([1, 2, 4], ["1", "2", "4"])
            top.set_ylim(-0.03, 1.03)
            top.set_title(AXES[x], loc="left")
            top.set_xlabel("median time over the best")
            for place, method in enumerate(every):
                score = scores[x][method]
                bottom.plot([0, score], [place] * 2, color=colour(method), lw=0.8)
                bottom.plot(score, place, marker(method), ms=3.6, color=colour(method))
            bottom.set_xlim(-0.03, 1.05)
            bottom.set_xlabel("AlgoPerf score")
        grid[0, 0].set_ylabel("share of workloads")
        names = [f"{label(m)} ({tasks.get(m, 0)}/{workloads})" for m in every]
        grid[1, 0].set_yticks(range(len(every)), names)
        grid[1, 0].set_ylim(len(every) - 0.4, -0.6)
        line_legend(figure, methods)
    return figure


# --- cost -------------------------------------------------------------------------------------


def final_points(evals: pd.DataFrame, metric: str, *, x: str) -> pd.DataFrame:
    """Return what each method reached in the end and what it had spent by then.

    Returns:
        Rows (task, method, x, mean, low, high, n) over the last evaluations on the validation
        split, with the interval of `mean_interval`; not finite where a run diverged.
    """
    chosen = evals[(evals["metric"] == metric) & (evals["split"] == "validation")]
    last = chosen.sort_values("update").groupby(RUN_KEYS, sort=False).tail(1)
    if "status" in last:
        last = last.assign(value=last["value"].where(last["status"] != "diverged"))
    rows = []
    for (task, method), runs in last.groupby(["task", "method"], sort=False):
        mean, low, high = map(float, mean_interval(runs["value"].to_numpy(float)))
        point = {"mean": mean, "low": low, "high": high, "n": len(runs)}
        rows.append({"task": task, "method": method, x: runs[x].mean(), **point})
    return pd.DataFrame(rows, columns=["task", "method", x, "mean", "low", "high", "n"])


def pareto(points: pd.DataFrame, *, x: str, metrics: Mapping[str, str]) -> Figure:
    """Draw what each method reached against what it spent, a panel per task.

    The line joins what no other method beats in both; its members and the standard arm have names
    and intervals.

    Args:
        points: What `final_points` returns, of several tasks.
        x: Its x column, a key of `analysis.AXES`.
        metrics: Task to its metric, in the order of the panels.
    """
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    every = in_order(points["method"])
    with style():
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(FULL_WIDTH, 0.6 + 1.9 * rows + 0.15 * -(-len(every) // 6)),
            squeeze=False,
        )
        for axes in grid.flat[len(metrics) :]:
            axes.set_visible(False)
        for axes, (task, metric) in zip(grid.flat, metrics.items(), strict=False):
            of_task = points[points["task"] == task]
            axes.set_title(f"{task}, {said_n(of_task['n'])}" if len(of_task) else task, loc="left")
            if "standard" not in set(of_task["method"]):
                say_no_run(axes)
                continue
            _panel(axes, of_task, x, -1 if metric in LOWER_IS_BETTER else 1)
            better = "less" if metric in LOWER_IS_BETTER else "more"
            axes.set_ylabel(f"{label(metric)} ({better} is better)", fontsize=7)
        spent = AXES[x].partition(" (")[0]
        figure.supxlabel(f"{spent} in all, as multiple of the standard arm's", fontsize=8)
        handles = [
            Line2D([], [], ls="", marker=marker(m), ms=4, color=colour(m), label=label(m))
            for m in every
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=7)
    return figure


def _panel(axes: Axes, points: pd.DataFrame, x: str, sign: int) -> None:
    spent = points[x] / points.loc[points["method"] == "standard", x].iloc[0]
    points = points.assign(spent=spent)
    known = points[np.isfinite(points["mean"])]
    best = efficient(known["spent"].to_numpy(float), sign * known["mean"].to_numpy(float))
    front = known[best].sort_values("spent")
    axes.step(front["spent"], front["mean"], where="post", lw=0.7, color="#999999", zorder=1)
    for row in known.itertuples():
        axes.plot(row.spent, row.mean, marker(row.method), ms=4, color=colour(row.method), zorder=3)
    named = known[best | (known["method"] == "standard")]
    for row in named.itertuples():
        axes.plot([row.spent] * 2, [row.low, row.high], lw=0.8, color=colour(row.method), zorder=2)
    # The axis follows the means: an interval that is wider is cut.
    low, high = known["mean"].min(), known["mean"].max()
    pad = 0.2 * (high - low) or 0.1 * (abs(high) or 1.0)
    axes.set_ylim(low - pad, high + pad)
    axes.margins(x=0.2)
    for (at, mean), group in named.groupby(["spent", "mean"], sort=False):
        names = [label(method) for method in group["method"]]
        told = ", ".join(names[:2]) + (f" + {len(names) - 2}" if len(names) > 2 else "")
        # Away from the nearer side of the panel, so that names stay in it.
        left = at <= known["spent"].min() + 0.5 * np.ptp(known["spent"])
        side = {"ha": "left" if left else "right", "va": "bottom" if sign > 0 else "top"}
        shift = {"textcoords": "offset points", "xytext": (4 if left else -4, 3 * sign)}
        shade = colour(group["method"].iloc[0])
        axes.annotate(told, (at, mean), fontsize=6, color=shade, zorder=4, **side, **shift)
    if lost := [label(m) for m in points.loc[~np.isfinite(points["mean"]), "method"]]:
        axes.text(0.02, 0.02, "diverged: " + ", ".join(lost), fontsize=6, transform=axes.transAxes)


def efficient(spent: np.ndarray, gained: np.ndarray) -> np.ndarray:
    """Return which of the points (n,) no other beats: none spends less and gains as much or more.

    >>> efficient(np.array([1, 2, 3, 3]), np.array([5, 4, 6, 7])).tolist()
    [True, False, False, True]
    """
    spent, gained = np.asarray(spent), np.asarray(gained)
    as_good = (spent[None] <= spent[:, None]) & (gained[None] >= gained[:, None])
    better = (spent[None] < spent[:, None]) | (gained[None] > gained[:, None])
    return ~(as_good & better).any(axis=1)


def peak_memory(records: Records) -> pd.DataFrame:
    """Return the peak device memory by task and method, of runs that recorded it (those on CUDA).

    Returns:
        Columns task, method, runs, recorded, MiB (mean of those recorded, NaN if none).
    """
    done = records.done
    found = [Run(Path(path)).summary.get("peak_memory_bytes") for path in done["path"]]
    frame = done[["task", "method"]].assign(MiB=np.array(found, dtype=float) / 2**20)
    groups = frame.groupby(["task", "method"], sort=False)["MiB"]
    columns = {"runs": "size", "recorded": "count", "MiB": "mean"}
    return groups.agg(**columns).reset_index()
