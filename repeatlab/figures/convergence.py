"""Does a method learn sooner? Learning curves and times to a target.

Never imports torch. Bands are 95 % intervals: Student's of the mean of a curve, Kaplan and Meier's
with log-log limits of a share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from repeatlab.analysis.frames import AXES
from repeatlab.figures import (
    FULL_WIDTH,
    colour,
    in_order,
    label,
    line,
    line_legend,
    said_n,
    say_no_run,
    style,
)


def curves_against_standard(
    frame: pd.DataFrame, *, x: str, ylabel: str, log: bool = False, columns: int = 4
) -> Figure:
    """Draw one small panel per method, each over the standard arm in grey.

    A curve over runs of which some diverged, which ends with the first of them, ends in a cross.

    Args:
        frame: What `analysis.curves` returns, of one task.
        x: Its x column, a key of `analysis.AXES`.
        ylabel: Label of the metric, with its unit.
        log: Whether the metric's axis is logarithmic.
        columns: Panels in a row.
    """
    methods = [method for method in frame["method"].unique() if method != "standard"]
    rows = max(1, -(-len(methods) // columns))
    with style():
        figure, grid = plt.subplots(
            rows,
            min(columns, max(1, len(methods))),
            figsize=(FULL_WIDTH, 0.35 + 1.45 * rows),
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        for axes, method in zip(grid.flat, methods, strict=False):
            for name in ("standard", method):
                _curve(axes, frame[frame["method"] == name], x, name, log)
            axes.set_title(label(method), color=colour(method), loc="left", fontweight="bold")
        for place, axes in enumerate(grid.flat):
            axes.set_visible(place < len(methods))
            # Where the panel below is empty, the one above it carries the numbers.
            axes.tick_params(labelbottom=place + columns >= len(methods))
        if log:
            grid[0, 0].set_yscale("log")
        figure.supxlabel(AXES[x], fontsize=8)
        figure.supylabel(ylabel, fontsize=8)
        figure.suptitle(_caption(frame), fontsize=8, x=0.01, ha="left")
    return figure


def _curve(axes: Axes, curve: pd.DataFrame, x: str, method: str, log: bool) -> None:
    axes.plot(curve[x], curve["mean"], color=colour(method), zorder=3)
    low = curve["low"]
    if log:
        # A t-interval can reach below zero, where this axis has nothing: cut at a tenth.
        low = np.maximum(low, curve["mean"] * 0.1)
    axes.fill_between(curve[x], low, curve["high"], color=colour(method), alpha=0.2, lw=0)
    _cross(axes, curve, x, method)


def _cross(axes: Axes, curve: pd.DataFrame, x: str, method: str) -> None:
    """Mark the end of a curve that ends because a run diverged."""
    if curve["diverged"].any():
        end = curve.iloc[-1]
        axes.plot(end[x], end["mean"], "x", ms=5, mew=1.4, color=colour(method), zorder=4)


def _caption(frame: pd.DataFrame) -> str:
    """Say what is drawn: task, statistic, and over how many seeds."""
    counts = sorted(frame["n"].unique())
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    tasks = ", ".join(frame["task"].unique())
    crosses = "; x: a run diverged" if frame["diverged"].any() else ""
    return f"{tasks}: mean and 95 % t-interval over {n} seeds; grey: standard{crosses}"


def time_to_target(frame: pd.DataFrame, *, x: str | Sequence[str], target: str) -> Figure:
    """Draw when each run first reached the target: a dot per seed, its median as a bar.

    Runs that missed it are open triangles at their last evaluation, or at the largest x of all
    where they diverged; a median is drawn only where more than half of the runs reached the target
    before it.

    Args:
        frame: What `analysis.to_target` returns, of one task.
        x: Its x column, a key of `analysis.AXES`, or several for a panel each.
        target: What was to be reached, in words.
    """
    methods = in_order(frame["method"])
    shown = [x] if isinstance(x, str) else list(x)
    width = FULL_WIDTH * (0.6 if len(shown) == 1 else 1.0)
    with style():
        figure, grid = plt.subplots(
            1,
            len(shown),
            figsize=(width, 0.8 + 0.17 * max(3, len(methods))),
            sharey=True,
            squeeze=False,
        )
        for axes, name in zip(grid[0], shown, strict=True):
            for row, method in enumerate(methods):
                _dots(axes, frame[frame["method"] == method], name, row)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"{AXES[name]} until {target}")
        for row, method in enumerate(methods):
            runs = frame[frame["method"] == method]
            told = f"{int(runs['reached'].sum())}/{len(runs)}"
            place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 6}
            grid[0, -1].annotate(told, (1.01, row), **place)
        axes = grid[0, 0]
        axes.set_yticks(range(len(methods)), [label(method) for method in methods])
        axes.set_ylim(len(methods) - 0.4, -0.6)
        title = "dots: seeds; bar: median; triangles: missed by then; right: runs that reached it"
        figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def _dots(axes: Axes, runs: pd.DataFrame, x: str, row: int) -> None:
    shade = colour(runs["method"].iloc[0])
    hit, missed = runs[runs["reached"]], runs[~runs["reached"]]
    # Seeds side by side: several may reach the target at the same evaluation.
    heights = row + np.linspace(-0.22, 0.22, len(runs)) if len(runs) > 1 else np.array([row])
    axes.plot(hit[x], heights[: len(hit)], "o", ms=2.6, mfc=shade, mec=shade)
    axes.plot(missed[x], heights[len(hit) :], ">", ms=3, mfc="none", mec=shade)
    if len(hit) > len(runs) / 2:
        # Censored runs count as infinite, so the median of all runs is one of the hits.
        times = np.sort(np.where(runs["reached"], runs[x], np.inf))
        axes.plot([np.median(times)] * 2, [row - 0.38, row + 0.38], color=shade)


# --- several tasks ----------------------------------------------------------------------------


def curves_over_tasks(
    frame: pd.DataFrame,
    *,
    x: str,
    methods: Sequence[str],
    ylabels: Mapping[str, str],
    log: Collection[str] = (),
) -> Figure:
    """Draw one panel per task with the mean curves of few methods.

    The metric's axis follows the means: a band wider than the panel is cut. A curve over runs of
    which some diverged, which ends with the first of them, ends in a cross.

    Args:
        frame: What `analysis.curves` returns, of several tasks.
        x: Its x column, a key of `analysis.AXES`.
        methods: Which, the last in front.
        ylabels: Task to the label of its metric, in the order of the panels.
        log: Tasks whose metric's axis is logarithmic.
    """
    columns = min(3, len(ylabels))
    rows = -(-len(ylabels) // columns)
    with style():
        figure, grid = plt.subplots(
            rows, columns, figsize=(FULL_WIDTH, 0.75 + 1.75 * rows), squeeze=False
        )
        for axes in grid.flat[len(ylabels) :]:
            axes.set_visible(False)
        for axes, (task, ylabel) in zip(grid.flat, ylabels.items(), strict=False):
            of_task = frame[(frame["task"] == task) & frame["method"].isin(methods)]
            axes.set_title(f"{task}, {said_n(of_task['n'])}" if len(of_task) else task, loc="left")
            if not len(of_task):
                say_no_run(axes)
                continue
            if task in log:
                axes.set_yscale("log")
            for method in methods:
                curve = of_task[of_task["method"] == method]
                if len(curve):
                    _strong_curve(axes, curve, x, method, log=task in log)
            _follow_means(axes, of_task["mean"].to_numpy(float), task in log)
            axes.set_ylabel(ylabel)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.supxlabel(f"{AXES[x]}; mean and 95 % t-interval over n seeds", fontsize=8)
        line_legend(figure, methods)
    return figure


def _strong_curve(axes: Axes, curve: pd.DataFrame, x: str, method: str, *, log: bool) -> None:
    axes.plot(curve[x], curve["mean"], zorder=3, **line(method))
    low = np.maximum(curve["low"], curve["mean"] * 0.01) if log else curve["low"]
    axes.fill_between(curve[x], low, curve["high"], color=colour(method), alpha=0.1, lw=0)
    _cross(axes, curve, x, method)


def _follow_means(axes: Axes, means: np.ndarray, log: bool) -> None:
    means = means[np.isfinite(means) & ((means > 0) | (not log))]
    if not len(means):
        return
    low, high = (np.log(means.min()), np.log(means.max())) if log else (means.min(), means.max())
    pad = 0.12 * (high - low) or 0.1
    limits = (low - pad, high + pad)
    axes.set_ylim(*np.exp(limits) if log else limits)


def target_curves(
    times: pd.DataFrame,
    survival: Mapping[tuple[str, str], np.ndarray],
    *,
    x: str,
    methods: Sequence[str],
    targets: Mapping[str, str],
) -> Figure:
    """Draw the share of runs that reached the target: a row per task, a column per method.

    Every panel has the standard arm in grey. A tick is a run that was last looked at there without
    having reached it.

    Args:
        times: What `analysis.to_target` returns, of all tasks.
        survival: (task, method) to what `target_times.kaplan_meier` makes of them on `x`.
        x: A key of `analysis.AXES`.
        methods: Which, besides the standard arm.
        targets: Task to its target in words, in the order of the rows.
    """
    others = [method for method in methods if method != "standard"]
    with style():
        figure, grid = plt.subplots(
            len(targets),
            len(others),
            figsize=(FULL_WIDTH, 0.75 + 1.15 * len(targets)),
            sharex="row",
            sharey=True,
            squeeze=False,
        )
        for row, (task, words) in zip(grid, targets.items(), strict=True):
            of_task = times[times["task"] == task]
            shown = of_task[of_task["method"].isin(methods)]
            end = 1.05 * shown[x].max() if len(shown) else 1.0
            for axes, method in zip(row, others, strict=True):
                told = []
                for name in ("standard", method):
                    runs = of_task[of_task["method"] == name]
                    hits = int(runs["reached"].sum())
                    told.append(f"{hits}/{len(runs)}" if len(runs) else "no run")
                    if len(runs):
                        _reached(axes, survival[task, name], runs, x, end, name)
                axes.set_title(f"{told[1]} ({told[0]})", fontsize=7, pad=2)
                axes.set_ylim(-0.05, 1.05)
                axes.set_xlim(left=0)
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                if not len(of_task):
                    axes.set_title("no run", fontsize=7, pad=2)
                    axes.set_xticks([])
            row[0].set_ylabel(f"{task}:\n{words}", fontsize=7)
        for axes, method in zip(grid[0], others, strict=True):
            hits = axes.get_title()
            axes.set_title(f"{label(method)}\n{hits}", fontsize=7, pad=2, color=colour(method))
        figure.supxlabel(AXES[x], fontsize=8)
        figure.suptitle(
            "share of runs that reached the target, with 95 % limits; above: runs that did "
            "(in grey and brackets: standard)",
            fontsize=7,
            x=0.01,
            ha="left",
        )
    return figure


def _reached(
    axes: Axes, curve: np.ndarray, runs: pd.DataFrame, x: str, end: float, method: str
) -> None:
    """Draw 1 - the survival curve as steps from 0 to the last time that anything was seen."""
    at = np.concatenate([[0.0], curve[:, 0], [end]])
    share = np.concatenate([[0.0], 1 - curve[:, 1], 1 - curve[-1:, 1]])
    low = np.concatenate([[np.nan], 1 - curve[:, 3], 1 - curve[-1:, 3]])
    high = np.concatenate([[np.nan], 1 - curve[:, 2], 1 - curve[-1:, 2]])
    shade = colour(method)
    # The wider line shows on both sides of one that lies over it.
    width = 2.2 if method == "standard" else 1.2
    axes.step(at, share, where="post", color=shade, lw=width, zorder=3, solid_capstyle="butt")
    axes.fill_between(at, low, high, step="post", color=shade, alpha=0.15, lw=0)
    missed = runs.loc[~runs["reached"], x].to_numpy(float)
    heights = np.interp(missed, at, share)
    axes.plot(missed, heights, "|", ms=5, mew=1, color=shade, zorder=4)
