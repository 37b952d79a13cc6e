"""Does a method learn sooner? Learning curves and times to a target.

Never imports torch. Limits are 95 % intervals: Student's of the mean of a curve, Kaplan and Meier's
with log-log limits of a share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repeatlab.analysis.frames import AXES
from repeatlab.figures import look


@look.style()
def curves_against_standard(
    frame: pd.DataFrame, *, x: str, ylabel: str, log: bool = False
) -> Figure:
    """Draw one small panel per method, each over the standard arm in grey.

    A curve over runs of which some diverged, which ends with the first of them, ends in a cross.

    Args:
        frame: What `analysis.curves` returns, of one task.
        x: Its x column, a key of `analysis.AXES`.
        ylabel: Label of the metric, with its unit.
        log: Whether the metric's axis is logarithmic.
    """
    methods = [method for method in frame["method"].unique() if method != "standard"]
    figure, grid = look.tiles(
        len(methods), columns=4, height=1.45, head=0.35, sharex=True, sharey=True
    )
    for axes, method in zip(grid, methods, strict=True):
        for name in ("standard", method):
            curve = frame[frame["method"] == name]
            axes.plot(curve[x], curve["mean"], color=look.colour(name), zorder=3)
            low = _above_zero(curve) if log else curve["low"]
            band = {"color": look.colour(name), "alpha": 0.2, "lw": 0}
            axes.fill_between(curve[x], low, curve["high"], **band)
            _cross(axes, curve, x, name)
        axes.set_title(look.label(method), color=look.colour(method), loc="left", fontweight="bold")
        if log:
            look.logarithmic(axes, "y")
        look.counts_axis(axes)
    figure.supxlabel(AXES[x], fontsize=8)
    figure.supylabel(ylabel, fontsize=8)
    crosses = "; x: a run diverged" if frame["diverged"].any() else ""
    tasks, seeds = ", ".join(frame["task"].unique()), look.said_n(frame["n"])
    look.caption(
        figure, f"{tasks}: mean and 95 % t-interval over {seeds} seeds; grey: standard{crosses}"
    )
    return figure


def _above_zero(curve: pd.DataFrame) -> pd.Series:
    """Return lower limits that a logarithmic axis has: a t-interval is cut at a tenth."""
    return np.maximum(curve["low"], curve["mean"] * 0.1)


def _cross(axes: Axes, curve: pd.DataFrame, x: str, method: str) -> None:
    """Mark the end of a curve that ends because a run diverged."""
    if curve["diverged"].any():
        end = curve.iloc[-1]
        axes.plot(end[x], end["mean"], "x", ms=5, mew=1.4, color=look.colour(method), zorder=4)


@look.style()
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
    methods = look.in_order(frame["method"])
    shown = [x] if isinstance(x, str) else list(x)
    size = {"width": look.FULL_WIDTH * (0.6 if len(shown) == 1 else 1.0)}
    size |= {"height": 0.95 + 0.17 * max(3, len(methods))}
    figure, (row,) = look.panels(1, len(shown), sharey=True, **size)
    for axes, name in zip(row, shown, strict=True):
        for place, method in enumerate(methods):
            _dots(axes, frame[frame["method"] == method], name, place)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{AXES[name]} until {target}")
        look.counts_axis(axes)
    for place, method in enumerate(methods):
        runs = frame[frame["method"] == method]
        hits = f"{int(runs['reached'].sum())}/{len(runs)}"
        beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 6}
        row[-1].annotate(hits, (1.01, place), **beside)
    look.rows_of(row[0], [look.label(method) for method in methods])
    look.caption(
        figure,
        "dots: seeds; bar: median; triangles: missed by then;\nright: how many reached the target",
    )
    return figure


def _dots(axes: Axes, runs: pd.DataFrame, x: str, row: int) -> None:
    shade = look.colour(runs["method"].iloc[0])
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


@look.style()
def curves_over_tasks(
    frame: pd.DataFrame,
    *,
    x: str,
    methods: Sequence[str],
    ylabels: Mapping[str, str],
    log: Collection[str] = (),
) -> Figure:
    """Draw one panel per task with the mean curves of few methods.

    Limits are thin lines, of the standard arm and the last of the methods. The metric's axis
    follows the means from the second evaluation on, what is beyond it is cut. A curve over runs of
    which some diverged, which ends with the first of them, ends in a cross.

    Args:
        frame: What `analysis.curves` returns, of several tasks.
        x: Its x column, a key of `analysis.AXES`.
        methods: Which, the last in front.
        ylabels: Task to the label of its metric, in the order of the panels.
        log: Tasks whose metric's axis is logarithmic, where it spans a decade.
    """
    figure, grid = look.tiles(len(ylabels), columns=3, height=1.75, head=0.75)
    for axes, (task, ylabel) in zip(grid, ylabels.items(), strict=True):
        of_task = frame[(frame["task"] == task) & frame["method"].isin(methods)]
        axes.set_title(f"{task}, {look.said_n(of_task['n'])}" if len(of_task) else task, loc="left")
        axes.set_ylabel(ylabel)
        if not len(of_task):
            look.say(axes, bare=True)
            continue
        started = of_task[of_task.groupby("method").cumcount() > 0]
        means = (started if len(started) else of_task)["mean"].to_numpy(float)
        on_log = task in log and look.spans_decades(means)
        if on_log:
            look.logarithmic(axes, "y")
        for method in methods:
            curve = of_task[of_task["method"] == method]
            if not len(curve):
                continue
            axes.plot(curve[x], curve["mean"], zorder=3, **look.line(method))
            if method in ("standard", methods[-1]):
                low = _above_zero(curve) if on_log else curve["low"]
                for limit in (low, curve["high"]):
                    axes.plot(curve[x], limit, lw=0.5, color=look.colour(method), alpha=0.7)
            _cross(axes, curve, x, method)
        _follow(axes, means, on_log)
        look.counts_axis(axes)
    figure.supxlabel(
        f"{AXES[x]}; mean over n seeds; thin: 95 % t-interval of standard, "
        f"{look.label(methods[-1])}",
        fontsize=8,
    )
    look.line_legend(figure, methods)
    return figure


def _follow(axes: Axes, means: np.ndarray, on_log: bool) -> None:
    means = means[np.isfinite(means)]
    if not len(means):
        return
    low, high = means.min(), means.max()
    if on_log:
        low, high = np.log(low), np.log(high)
    pad = 0.12 * (high - low) or 0.1
    limits = np.array([low - pad, high + pad])
    axes.set_ylim(*np.exp(limits) if on_log else limits)


@look.style()
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
    height = 0.75 + 1.15 * len(targets)
    figure, grid = look.panels(len(targets), len(others), height=height, sharex="row", sharey=True)
    for place, (row, task) in enumerate(zip(grid, targets, strict=True)):
        of_task = times[times["task"] == task]
        shown = of_task[of_task["method"].isin(methods)]
        end = 1.05 * shown[x].max() if len(shown) else 1.0
        for axes, method in zip(row, others, strict=True):
            hits = {}
            for name in ("standard", method):
                runs = of_task[of_task["method"] == name]
                hits[name] = f"{int(runs['reached'].sum())}/{len(runs)}" if len(runs) else "no run"
                if len(runs):
                    _reached(axes, survival[task, name], runs, x, end, name)
            title = f"{hits[method]} ({hits['standard']})" if len(of_task) else "no run"
            if not place:
                title = f"{look.label(method)}\n{title}"
            axes.set_title(title, fontsize=7, pad=2, color=look.colour(method))
            axes.set_ylim(-0.05, 1.05)
            axes.set_xlim(left=0)
            look.counts_axis(axes)
            if not len(of_task):
                axes.set_xticks([])
        row[0].set_ylabel(f"{task}:\n{targets[task]}", fontsize=7)
    figure.supxlabel(AXES[x], fontsize=8)
    look.caption(
        figure,
        "share of runs that reached the target, with 95 % limits; above: runs that did (in "
        "brackets, grey: standard)",
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
    shade = look.colour(method)
    # The wider line shows on both sides of one that lies over it.
    width = 2.2 if method == "standard" else 1.2
    axes.step(at, share, where="post", color=shade, lw=width, zorder=3, solid_capstyle="butt")
    axes.fill_between(at, low, high, step="post", color=shade, alpha=0.15, lw=0)
    missed = runs.loc[~runs["reached"], x].to_numpy(float)
    heights = np.interp(missed, at, share)
    axes.plot(missed, heights, "|", ms=5, mew=1, color=shade, zorder=4)
