"""What repetition did inside the runs: N and the loss, what a repeat changes, what time explains.

Never imports torch. The frames come from `repeatlab.analysis.mechanism`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repeatlab.figures import look
from repeatlab.figures.intervals import interval_rows, is_decided

ByTask = Mapping[str, Mapping[str, pd.DataFrame]]
# What a control takes away from the real run.
WITHOUT = {
    "permuted": "without time trend and hardness",
    "windowed": "without hardness",
    "time_only": "without hardness and dispersion",
    "falling_cosine": "by the clock alone",
    "anti_hard": "easiest instead of hardest",
    "spaced": "repeats come later",
    "step_size": "one larger step, more data",
    "step_size_same_data": "one larger step, equal data",
}


# --- N and the loss ---------------------------------------------------------------------------


@look.style()
def loss_against_repeats(batches: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Draw N of every fresh batch against its first loss, one panel per method.

    Dots, spread within their N and coloured by how much of the run had passed.

    Args:
        batches: Rows of `mechanism.visited_batches` with `method` and `seed`, of one task.
        methods: Which, in their order; one without a run says so.
    """
    most = int(batches["repeats"].max()) if len(batches) else 1
    on_log = look.spans_decades(batches["loss"])
    drawn, random = None, np.random.default_rng(0)
    figure, grid = look.tiles(len(methods), columns=4, height=1.45, sharex=True, sharey=True)
    for axes, method in zip(grid, methods, strict=True):
        rows = batches[batches["method"] == method]
        axes.set_title(look.label(method), loc="left", fontweight="bold")
        if not len(rows):
            look.say(axes)
            continue
        axes.set_title(look.said_n([rows["seed"].nunique()]), loc="right", fontsize=7)
        heights = rows["repeats"] + random.uniform(-0.25, 0.25, len(rows))
        passed = rows["update"] / max(1, rows["update"].max())
        shape = {"cmap": "cividis", "vmin": 0, "vmax": 1, "s": 3, "lw": 0, "rasterized": True}
        drawn = axes.scatter(rows["loss"], heights, c=passed, **shape)
        if on_log:
            look.logarithmic(axes, "x")
    grid[0].set_ylim(0.4, most + 0.6)
    grid[0].set_yticks(range(1, most + 1))
    if drawn is not None:
        bar = {"label": "share of the run that had passed", "fraction": 0.03, "pad": 0.01}
        figure.colorbar(drawn, ax=grid, aspect=30, **bar)
    figure.supxlabel("first loss", fontsize=8)
    figure.supylabel("N (updates on the batch)", fontsize=8)
    return figure


@look.style()
def repeats_distribution(
    shares: pd.DataFrame, timeline: pd.DataFrame, methods: Sequence[str]
) -> Figure:
    """Draw how often each N occurred, and mean N over training.

    Args:
        shares: Rows with `method`, `repeats`, `mean` (share of fresh batches) and `n` (seeds).
        timeline: Rows with `method`, `update`, `mean` (of N), `low` and `high`.
        methods: Which, from top to bottom.
    """
    methods = look.in_order(methods)
    height = 1.1 + 0.17 * len(methods)
    figure, ((left, right),) = look.panels(1, 2, height=height, width_ratios=[1, 1.25])
    most = int(shares["repeats"].max()) if len(shares) else 1
    for place, method in enumerate(methods):
        row = shares[shares["method"] == method].sort_values("repeats")
        _stacked(left, place, row, most)
        curve = timeline[timeline["method"] == method].sort_values("update")
        if len(curve):
            _curve(right, curve, method)
    left.text(1.02, -0.9, "mean N", fontsize=7, va="center")
    look.rows_of(left, [look.label(method) for method in methods])
    left.set_xlim(0, 1)
    left.set_xlabel("share of fresh batches with each N")
    right.set_ylim(bottom=0.9)
    right.set_xlim(left=0)
    right.set_xlabel("gradient updates")
    right.set_ylabel("mean N of the fresh batches")
    look.counts_axis(right)
    if len(timeline):
        figure.legend(*right.get_legend_handles_labels(), loc="outside right upper")
    look.caption(figure, f"Mean over seeds, {look.said_n(shares['n'])}; bands: 95 % t-intervals")
    return figure


def _stacked(axes: Axes, place: int, row: pd.DataFrame, most: int) -> None:
    """Draw the shares of each N as a bar of pieces, its mean beside it."""
    if not len(row):
        axes.text(0.02, place, "no run", va="center", fontsize=6, color=look.GREY)
        return
    start, shade = 0.0, mpl.colormaps["Greys"]
    inside = {"ha": "center", "va": "center", "fontsize": 6}
    for n, share in zip(row["repeats"], row["mean"], strict=True):
        dark = (n - 1) / max(1, most - 1)
        axes.barh(place, share, 0.72, start, color=shade(0.15 + 0.8 * dark), ec="white", lw=0.4)
        if share > 0.07:
            ink = "white" if dark > 0.5 else "black"
            axes.text(start + share / 2, place, int(n), color=ink, **inside)
        start += share
    mean = (row["repeats"] * row["mean"]).sum() / row["mean"].sum()
    axes.text(1.02, place, f"{mean:.2f}", va="center", fontsize=7)


# --- what a repeat does -----------------------------------------------------------------------


@look.style()
def loss_ratios(ratios: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Draw the loss at each visit relative to the first, a line for each N, a panel per method.

    Args:
        ratios: Rows with `method`, `repeats` (N), `repeat`, `mean` (ratio), `low`, `high`, `n`.
        methods: Which; one without a batch that was repeated says so.
    """
    most = int(ratios["repeats"].max()) if len(ratios) else 2
    figure, grid = look.tiles(len(methods), columns=5, height=1.5, sharex=True, sharey=True)
    drawn: dict[int, Any] = {}
    for axes, method in zip(grid, methods, strict=True):
        rows = ratios[ratios["method"] == method]
        axes.set_title(look.label(method), loc="left", fontweight="bold")
        axes.axhline(1, lw=0.6, color=look.GREY)
        if not len(rows):
            look.say(axes, "no run, or no repeat")
        for n, curve in rows.groupby("repeats"):
            # Side by side, so that the limits of one N do not hide those of another.
            beside = 0.05 * (n - (most + 2) / 2)
            shade = mpl.colormaps["cividis_r"](0.1 + 0.9 * (n - 2) / max(1, most - 2))
            spread = np.abs([curve["mean"] - curve["low"], curve["high"] - curve["mean"]])
            shape = {"color": shade, "marker": "o", "ms": 2.5, "elinewidth": 0.6, "lw": 1}
            drawn[int(n)] = axes.errorbar(
                curve["repeat"] + beside, curve["mean"], yerr=spread, **shape
            )
    grid[0].set_xticks(range(most))
    names = [f"N = {n}" for n in sorted(drawn)]
    handles = [drawn[n] for n in sorted(drawn)]
    figure.legend(handles, names, loc="outside upper right", ncols=max(1, len(names)))
    figure.supxlabel("updates made on the batch", fontsize=8)
    figure.supylabel("its loss / its first loss", fontsize=8)
    look.caption(figure, f"Mean and 95 % t-interval over seeds, {look.said_n(ratios['n'])}")
    return figure


@look.style()
def sharpness_over_updates(sharpness: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Draw batch sharpness times the rate over training, beside the 2 below which a repeat helps.

    Args:
        sharpness: Rows with `method`, `update`, `mean` (of `mechanism.batch_sharpness`), `low`,
            `high` and `n`.
        methods: Which; one without a row is left out.
    """
    figure, ((axes,),) = look.panels(1, 1, width=look.FULL_WIDTH * 0.6, height=2.4)
    axes.axhline(2, lw=0.6, color=look.GREY)
    for method in look.in_order(methods):
        curve = sharpness[sharpness["method"] == method].sort_values("update")
        if len(curve):
            _curve(axes, curve, method)
    axes.set_xlabel("gradient updates")
    axes.set_ylabel("batch sharpness x learning rate")
    look.counts_axis(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    if not len(sharpness):
        look.say(axes, "no run with gradient_norms")
    look.caption(figure, f"Mean and 95 % t-interval over seeds, {look.said_n(sharpness['n'])}")
    return figure


def _curve(axes: Axes, curve: pd.DataFrame, method: str) -> None:
    """Draw a method's mean over updates, with its limits as a band."""
    axes.plot(curve["update"], curve["mean"], label=look.label(method), **look.line(method))
    limits = {"color": look.colour(method), "alpha": 0.15, "lw": 0}
    axes.fill_between(curve["update"], curve["low"], curve["high"], **limits)


@look.style()
def transfer_rows(found: ByTask, methods: Sequence[str]) -> Figure:
    """Draw how far an extra update lowers its own batch's loss and that of the next fresh batch.

    The latter is a cause only where N is drawn at random; `found` should hold it for such arms.

    Args:
        found: Task -> {"own": rows, "other": rows}, both with `method`, `mean`, `low`, `high`, `n`.
        methods: Which, from top to bottom.
    """
    kinds = {"own": "the batch itself", "other": "the next fresh batch"}
    figure, _ = _two_quantities(found, methods, kinds, absent="no run, or no repeat")
    figure.supxlabel("fall of the loss for each extra update, in its unit", fontsize=8)
    return figure


@look.style()
def time_share_rows(found: ByTask, methods: Sequence[str]) -> Figure:
    """Draw the share of Var(N) and of the first losses' variance that training time explains.

    Args:
        found: Task -> {"repeats": rows, "loss": rows}, as in `transfer_rows`.
        methods: Which, from top to bottom.
    """
    kinds = {"repeats": "N", "loss": "first loss of a batch"}
    figure, grid = _two_quantities(found, methods, kinds, absent="no run, or nothing varies")
    for axes in grid:
        axes.set_xlim(-0.1, 1.02)
    figure.supxlabel("share of the variance that training time explains", fontsize=8)
    return figure


def _two_quantities(
    found: ByTask, methods: Sequence[str], kinds: Mapping[str, str], *, absent: str
) -> tuple[Figure, list[Axes]]:
    """Draw two estimates with limits for each method, the second with open dots below the first."""
    methods = look.in_order(methods)
    figure, grid = look.tiles(len(found), columns=3, height=0.4 + 0.2 * len(methods))
    counts: list[int] = []
    for axes, (task, frames) in zip(grid, found.items(), strict=True):
        axes.set_title(look.label(task), loc="left", fontweight="bold")
        drawn = set()
        for (kind, name), below in zip(kinds.items(), (False, True), strict=True):
            face = "white" if below else "#333333"
            axes.plot([], [], "o", ms=3.6, mec="#333333", mfc=face, label=name)
            for row in frames[kind].itertuples():
                if row.method in methods:
                    _dot(axes, row, methods.index(row.method), below)
                    drawn.add(row.method)
                    counts.append(row.n)
        for place, method in enumerate(methods):
            if method not in drawn:
                shape = {"fontsize": 6, "va": "center", "color": look.GREY}
                axes.text(0.02, place, absent, transform=axes.get_yaxis_transform(), **shape)
        look.zero_line(axes)
        look.rows_of(axes, [look.label(method) for method in methods])
    if grid:
        handles = grid[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper right", ncols=2)
    look.caption(figure, f"Mean and 95 % t-interval over seeds, {look.said_n(counts)}")
    return figure, grid


def _dot(axes: Axes, row: Any, place: int, below: bool) -> None:
    shade, height = look.colour(row.method), place + (0.15 if below else -0.15)
    if row.low <= row.high:
        axes.plot([row.low, row.high], [height] * 2, color=shade, lw=1.0)
    face = "white" if below else shade
    axes.plot(row.mean, height, "o", ms=3.4, mec=shade, mfc=face, mew=0.9, zorder=3)


# --- the real run against its controls --------------------------------------------------------


@look.style()
def control_rows(table: pd.DataFrame, *, real: str, units: Mapping[str, str]) -> Figure:
    """Draw the paired difference of the real arm to each of its controls, a panel per task.

    Args:
        table: What `mechanism.against_controls` returns.
        real: The real arm's name.
        units: Task -> what its differences are of.
    """
    tasks, controls = list(table["task"].unique()), list(table["against"].unique())
    names = [f"{look.label(c)}\n{WITHOUT[c]}" if c in WITHOUT else look.label(c) for c in controls]
    figure, grid = look.tiles(len(tasks), columns=3, height=0.45 + 0.33 * len(controls))
    for axes, task in zip(grid, tasks, strict=True):
        rows = table[table["task"] == task].assign(method=table["against"])
        found = rows.rename(columns={"difference": "estimate"})
        interval_rows(axes, found, controls, solid=set(rows.loc[is_decided(rows), "method"]))
        look.rows_of(axes, names, fontsize=6)
        look.zero_line(axes)
        left, right = axes.get_xlim()
        axes.set_xlim(min(left, -0.05 * right), max(right, -0.05 * left))
        counts = rows.set_index("method")["n"].reindex(controls, fill_value=0)
        beside = {"fontsize": 6, "va": "center", "xycoords": ("axes fraction", "data")}
        for place, n in enumerate(counts):
            axes.annotate(f"{n}", (1.03, place), **beside)
        axes.set_title(look.label(task), loc="left", fontweight="bold")
        axes.set_title("n", loc="right", fontsize=6)
        axes.set_xlabel(f"advantage in {units[task]}")
    look.caption(
        figure,
        f"{look.label(real)} minus control at equal updates, paired by seed, 95 % interval; "
        f"right of 0: {look.label(real)} is better; filled: decided after Holm",
    )
    return figure


# --- label noise ------------------------------------------------------------------------------


@look.style()
def noise_visits(shares: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Draw which share of extra visits went to corrupted samples, by their share in the data.

    Args:
        shares: What `mechanism.noise_shares` returns.
        methods: Which; one that made no extra visit says so.
    """
    methods = look.in_order(methods)
    figure, ((axes,),) = look.panels(1, 1, width=look.FULL_WIDTH * 0.6, height=2.6)
    levels = sorted(shares["corrupted"].round(2).unique())
    axes.axhline(1, lw=0.6, color=look.GREY)
    for place, method in enumerate(methods):
        runs = shares[shares["method"] == method].dropna(subset="corrupted_extra_visits")
        name = look.label(method) if len(runs) else f"{look.label(method)}: no extra visits"
        shape = look.dots(method, ms=3.5)
        axes.plot([], [], label=name, **shape)
        for level, group in runs.groupby(runs["corrupted"].round(2)):
            x = levels.index(level) + (place - (len(methods) - 1) / 2) * 0.14
            ratio = group["corrupted_extra_visits"] / group["corrupted"]
            x += np.linspace(-0.03, 0.03, len(ratio))
            axes.plot(x, ratio, **shape)
            axes.plot([x[0] - 0.02, x[-1] + 0.02], [ratio.mean()] * 2, color=look.colour(method))
    axes.set_xticks(range(len(levels)), [f"{level:.0%}" for level in levels])
    axes.set_xlim(-0.5, max(0, len(levels) - 1) + 0.5)
    axes.set_xlabel("training labels that are wrong")
    axes.set_ylabel("their share of extra visits\n/ their share of the data")
    figure.legend(loc="outside lower center", ncols=len(methods))
    look.caption(figure, "A marker per seed, a bar at their mean; 1: no matter which")
    return figure
