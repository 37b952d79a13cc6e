"""What repetition did inside the runs: N and the loss, what a repeat changes, what time explains.

Never imports torch. The frames come from `repeatlab.analysis.mechanism`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repeatlab.figures import FULL_WIDTH, colour, in_order, label, line, marker, said_n, style
from repeatlab.figures.intervals import interval_rows

SCATTER_UP_TO = 1500  # batches in a panel; above, hexagons count them
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


def _grid(count: int, *, columns: int, height: float, **sharing: bool) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as the page with `count` panels, those beyond it not visible."""
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure, grid = plt.subplots(
        rows, columns, figsize=(FULL_WIDTH, height * rows + 0.45), squeeze=False, **sharing
    )
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < count)
        if sharing.get("sharex"):
            # Where the panel below is empty, the one above it carries the numbers.
            axes.tick_params(labelbottom=place + columns >= count)
    return figure, list(grid.flat)[:count]


def _caption(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=8, x=0.01, ha="left")


def _absent(axes: Axes) -> None:
    axes.annotate(
        "no run", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="#777777"
    )


# --- N and the loss ---------------------------------------------------------------------------


def loss_against_repeats(
    batches: pd.DataFrame, methods: Sequence[str], *, xlabel: str = "first loss", columns: int = 4
) -> Figure:
    """Draw N of every fresh batch against its first loss, one panel per method.

    Dots, spread within their N and coloured by how much of the run had passed; where a panel would
    hold more than `SCATTER_UP_TO` of them, hexagons that count.

    Args:
        batches: Rows of `mechanism.fresh_batches` with `method` and `seed`, of one task.
        methods: Which, in their order; one without a run says so.
        xlabel: Name of the loss, with its unit.
        columns: Panels in a row.
    """
    most = int(batches["repeats"].max()) if len(batches) else 1
    positive = len(batches) and batches["loss"].min() > 0
    many = len(batches) and batches["method"].value_counts().max() > SCATTER_UP_TO
    draw, name = (
        (_hexagons, "fresh batches") if many else (_scatter, "share of the run that had passed")
    )
    drawn = None
    with style():
        figure, panels = _grid(len(methods), columns=columns, height=1.45, sharex=True, sharey=True)
        for axes, method in zip(panels, methods, strict=True):
            rows = batches[batches["method"] == method]
            axes.set_title(label(method), loc="left", fontweight="bold")
            if len(rows):
                axes.set_title(said_n([rows["seed"].nunique()]), loc="right", fontsize=7)
                drawn = draw(axes, rows, most, log=bool(positive))
            else:
                _absent(axes)
        panels[0].set_ylim(0.4, most + 0.6)
        panels[0].set_yticks(range(1, most + 1))
        if positive:
            panels[0].set_xscale("log")
        if drawn is not None:
            figure.colorbar(drawn, ax=panels, label=name, fraction=0.03, pad=0.01, aspect=30)
        figure.supxlabel(xlabel, fontsize=8)
        figure.supylabel("N (updates on the batch)", fontsize=8)
    return figure


def _scatter(axes: Axes, rows: pd.DataFrame, most: int, *, log: bool) -> mpl.cm.ScalarMappable:
    heights = rows["repeats"] + np.random.default_rng(0).uniform(-0.25, 0.25, len(rows))
    passed = rows["update"] / max(1, rows["update"].max())
    shades = {"cmap": "cividis", "vmin": 0, "vmax": 1}
    return axes.scatter(rows["loss"], heights, s=3, c=passed, lw=0, **shades)


def _hexagons(axes: Axes, rows: pd.DataFrame, most: int, *, log: bool) -> mpl.cm.ScalarMappable:
    loss = np.log10(rows["loss"]) if log else rows["loss"]
    # One row of hexagons for each N, none between: their centres lie on the integers.
    return axes.hexbin(
        rows["loss"],
        rows["repeats"],
        gridsize=(20, max(1, most - 1)),
        extent=(loss.min(), loss.max() + 1e-9, 1, max(2, most)),
        xscale="log" if log else "linear",
        bins="log",
        cmap="cividis_r",
        mincnt=1,
        lw=0,
    )


def repeats_distribution(
    shares: pd.DataFrame, timeline: pd.DataFrame, methods: Sequence[str]
) -> Figure:
    """Draw how often each N occurred, and mean N over training.

    Args:
        shares: Rows with `method`, `repeats`, `mean` (share of fresh batches) and `n` (seeds).
        timeline: Rows with `method`, `update`, `mean` (of N), `low` and `high`.
        methods: Which, from top to bottom.
    """
    methods = in_order(methods)
    most = int(shares["repeats"].max()) if len(shares) else 1
    shade = mpl.colormaps["Greys"]
    with style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(FULL_WIDTH, 1.1 + 0.17 * len(methods)), width_ratios=[1, 1.25]
        )
        for place, method in enumerate(methods):
            row = shares[shares["method"] == method].sort_values("repeats")
            if not len(row):
                left.text(0.02, place, "no run", va="center", fontsize=6, color="#777777")
                continue
            start = 0.0
            for n, share in zip(row["repeats"], row["mean"], strict=True):
                face = shade(0.15 + 0.8 * (n - 1) / max(1, most - 1))
                left.barh(place, share, 0.72, start, color=face, edgecolor="white", lw=0.4)
                if share > 0.07:
                    ink = "white" if n - 1 > 0.5 * (most - 1) else "black"
                    left.text(
                        start + share / 2, place, int(n), color=ink, ha="center", va="center",
                        fontsize=6,
                    )  # fmt: skip
                start += share
            mean = (row["repeats"] * row["mean"]).sum() / row["mean"].sum()
            left.text(1.02, place, f"{mean:.2f}", va="center", fontsize=7)
        left.text(1.02, -0.9, "mean N", fontsize=7, va="center")
        left.set_yticks(range(len(methods)), [label(method) for method in methods])
        left.tick_params(axis="y", length=0)
        left.set_ylim(len(methods) - 0.4, -0.6)
        left.set_xlim(0, 1)
        left.set_xlabel("share of fresh batches with each N")
        for method in methods:
            curve = timeline[timeline["method"] == method].sort_values("update")
            if len(curve):
                right.plot(curve["update"], curve["mean"], label=label(method), **line(method))
                limits = {"color": colour(method), "alpha": 0.15, "lw": 0}
                right.fill_between(curve["update"], curve["low"], curve["high"], **limits)
        right.set_ylim(bottom=0.9)
        right.set_xlim(left=0)
        right.set_xlabel("gradient updates")
        right.set_ylabel("mean N of the fresh batches")
        if len(timeline):
            figure.legend(*right.get_legend_handles_labels(), loc="outside right upper")
        _caption(figure, f"Mean over seeds, {said_n(shares['n'])}; bands: 95 % t-intervals")
    return figure


# --- what a repeat does -----------------------------------------------------------------------


def loss_ratios(ratios: pd.DataFrame, methods: Sequence[str], *, columns: int = 5) -> Figure:
    """Draw the loss at each visit relative to the first, a line for each N, a panel per method.

    Args:
        ratios: Rows with `method`, `repeats` (N), `repeat`, `mean` (ratio), `low`, `high`, `n`.
        methods: Which; one without a batch that was repeated says so.
        columns: Panels in a row.
    """
    most = int(ratios["repeats"].max()) if len(ratios) else 2
    with style():
        figure, panels = _grid(len(methods), columns=columns, height=1.5, sharex=True, sharey=True)
        for axes, method in zip(panels, methods, strict=True):
            rows = ratios[ratios["method"] == method]
            axes.set_title(label(method), loc="left", fontweight="bold")
            axes.axhline(1, lw=0.6, color="#777777")
            if not len(rows):
                _absent(axes)
            for n, curve in rows.groupby("repeats"):
                # Side by side, so that the limits of one N do not hide those of another.
                beside = 0.05 * (n - (most + 2) / 2)
                shade = mpl.colormaps["cividis_r"](0.1 + 0.9 * (n - 2) / max(1, most - 2))
                down, up = curve["mean"] - curve["low"], curve["high"] - curve["mean"]
                axes.errorbar(
                    curve["repeat"] + beside, curve["mean"], yerr=np.abs([down, up]), color=shade,
                    marker="o", ms=2.5, elinewidth=0.6, lw=1, label=f"N = {int(n)}",
                )  # fmt: skip
        panels[0].set_xticks(range(most))
        named = {}
        for axes in panels:
            handles, names = axes.get_legend_handles_labels()
            named |= dict(zip(names, handles, strict=True))
        names = sorted(named, key=lambda name: int(name.split()[-1]))
        figure.legend(
            [named[n] for n in names], names, loc="outside upper right", ncols=max(1, len(names))
        )
        figure.supxlabel("updates made on the batch", fontsize=8)
        figure.supylabel("its loss / its first loss", fontsize=8)
        _caption(figure, f"Mean and 95 % t-interval over seeds, {said_n(ratios['n'])}")
    return figure


def transfer_rows(
    found: Mapping[str, Mapping[str, pd.DataFrame]], methods: Sequence[str], *, columns: int = 3
) -> Figure:
    """Draw how far an extra update lowers its own batch's loss and that of the next fresh batch.

    The latter is a cause only where N is drawn at random; `found` should hold it for such arms.

    Args:
        found: Task -> {"own": rows, "other": rows}, both with `method`, `mean`, `low`, `high`, `n`.
        methods: Which, from top to bottom.
        columns: Panels in a row.
    """
    return _two_quantities(
        found,
        in_order(methods),
        {"own": ("the batch itself", True), "other": ("the next fresh batch", False)},
        "fall of the loss for each extra update, in its unit",
        columns=columns,
        absent="no run, or no repeat",
    )


def time_share_rows(
    found: Mapping[str, Mapping[str, pd.DataFrame]], methods: Sequence[str], *, columns: int = 3
) -> Figure:
    """Draw the share of Var(N) and of the first losses' variance that training time explains.

    Args:
        found: Task -> {"repeats": rows, "loss": rows}, as in `transfer_rows`.
        methods: Which, from top to bottom.
        columns: Panels in a row.
    """
    return _two_quantities(
        found,
        in_order(methods),
        {"repeats": ("N", True), "loss": ("first loss of a batch", False)},
        "share of the variance that training time explains",
        columns=columns,
        absent="no run, or nothing varies",
        bounded=True,
    )


def _two_quantities(
    found: Mapping[str, Mapping[str, pd.DataFrame]],
    methods: list[str],
    kinds: Mapping[str, tuple[str, bool]],
    xlabel: str,
    *,
    columns: int,
    absent: str,
    bounded: bool = False,
) -> Figure:
    """Draw two estimates with limits for each method, the second with open dots below the first."""
    with style():
        figure, panels = _grid(len(found), columns=columns, height=0.4 + 0.2 * len(methods))
        counts: list[int] = []
        for axes, (task, frames) in zip(panels, found.items(), strict=True):
            axes.set_title(label(task), loc="left", fontweight="bold")
            for (kind, (name, filled)), shift in zip(kinds.items(), (-0.15, 0.15), strict=True):
                rows = frames[kind].set_index("method")
                counts += list(rows["n"])
                for place, method in enumerate(methods):
                    if method in rows.index:
                        _dot(axes, rows.loc[method], place + shift, colour(method), filled=filled)
                axes.plot([], [], "o", ms=3.6, mec="#333333", color="#333333", label=name, lw=0,
                          mfc="#333333" if filled else "white")  # fmt: skip
            present = pd.concat([frame["method"] for frame in frames.values()])
            for place, method in enumerate(methods):
                if method not in set(present):
                    axes.text(
                        0.02, place, absent, fontsize=6, va="center", color="#777777",
                        transform=axes.get_yaxis_transform(),
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                    )  # fmt: skip
            axes.axvline(0, lw=0.6, color="#777777", zorder=0)
            axes.set_yticks(range(len(methods)), [label(method) for method in methods])
            axes.tick_params(axis="y", length=0, labelleft=axes.get_subplotspec().is_first_col())
            axes.set_ylim(len(methods) - 0.4, -0.6)
            if bounded:
                axes.set_xlim(-0.1, 1.02)
        figure.supxlabel(xlabel, fontsize=8)
        if panels:
            handles, names = panels[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside upper right", ncols=2)
        _caption(figure, f"Mean and 95 % t-interval over seeds, {said_n(counts)}")
    return figure


def _dot(axes: Axes, row: pd.Series, height: float, shade: str, *, filled: bool) -> None:
    if row["low"] <= row["high"]:
        axes.plot([row["low"], row["high"]], [height] * 2, color=shade, lw=1.0)
    face = shade if filled else "white"
    axes.plot(row["mean"], height, "o", ms=3.4, mec=shade, mfc=face, mew=0.9, zorder=3)


# --- the real run against its controls --------------------------------------------------------


def control_rows(
    table: pd.DataFrame, *, real: str, units: Mapping[str, str], columns: int = 3
) -> Figure:
    """Draw the paired difference of the real arm to each of its controls, a panel per task.

    Args:
        table: What `mechanism.against_controls` returns.
        real: The real arm's name.
        units: Task -> what its differences are of.
        columns: Panels in a row.
    """
    tasks, controls = list(table["task"].unique()), list(table["against"].unique())
    names = [f"{label(c)}\n{WITHOUT[c]}" if c in WITHOUT else label(c) for c in controls]
    with style():
        height = 0.45 + 0.33 * len(controls)
        figure, panels = _grid(len(tasks), columns=columns, height=height)
        for axes, task in zip(panels, tasks, strict=True):
            rows = table[table["task"] == task].set_index("against").reindex(controls)
            found = rows.reset_index().rename(
                columns={"method": "_", "against": "method", "difference": "estimate"}
            )
            interval_rows(axes, found, controls, solid=_decided(rows))
            axes.set_yticks(range(len(controls)), names, fontsize=6)
            axes.tick_params(axis="y", length=0, labelleft=axes.get_subplotspec().is_first_col())
            axes.axvline(0, lw=0.6, color="#777777", zorder=0)
            left, right = axes.get_xlim()
            axes.set_xlim(min(left, -0.05 * right), max(right, -0.05 * left))
            for place, n in enumerate(rows["n"]):
                axes.annotate(
                    f"{int(n) if n == n else 0}", (1.03, place), fontsize=6, va="center",
                    xycoords=("axes fraction", "data"),
                )  # fmt: skip
            axes.set_title(label(task), loc="left", fontweight="bold")
            axes.set_title("n", loc="right", fontsize=6)
            axes.set_xlabel(f"advantage in {units[task]}")
        _caption(
            figure,
            f"{label(real)} minus control at equal updates, paired by seed, 95 % interval; right "
            f"of 0: {label(real)} is better; filled: decided after Holm",
        )
    return figure


def _decided(rows: pd.DataFrame) -> list[str]:
    return list(rows.index[rows["decision"].isin(["better", "worse"])])


# --- label noise ------------------------------------------------------------------------------


def noise_visits(shares: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Draw which share of extra visits went to corrupted samples, by their share in the data.

    Args:
        shares: What `mechanism.noise_shares` returns.
        methods: Which; one that made no extra visit says so.
    """
    methods = in_order(methods)
    with style():
        figure, axes = plt.subplots(figsize=(FULL_WIDTH * 0.6, 2.6))
        levels = sorted(shares["corrupted"].round(2).unique())
        axes.axhline(1, lw=0.6, color="#777777")
        for place, method in enumerate(methods):
            runs = shares[shares["method"] == method].dropna(subset="corrupted_extra_visits")
            name = label(method) if len(runs) else f"{label(method)}: no extra visits"
            style_of = {"color": colour(method), "marker": marker(method), "ms": 3.5, "lw": 0}
            axes.plot([], [], label=name, **style_of)
            for level, group in runs.groupby(runs["corrupted"].round(2)):
                x = levels.index(level) + (place - (len(methods) - 1) / 2) * 0.14
                ratio = group["corrupted_extra_visits"] / group["corrupted"]
                x += np.linspace(-0.03, 0.03, len(ratio))
                axes.plot(x, ratio, **style_of)
                axes.plot([x[0] - 0.02, x[-1] + 0.02], [ratio.mean()] * 2, color=colour(method))
        axes.set_xticks(range(len(levels)), [f"{level:.0%}" for level in levels])
        axes.set_xlim(-0.5, max(0, len(levels) - 1) + 0.5)
        axes.set_xlabel("training labels that are wrong")
        axes.set_ylabel("their share of extra visits\n/ their share of the data")
        figure.legend(loc="outside lower center", ncols=len(methods))
        _caption(figure, "A marker per seed, a bar at their mean; 1: no matter which")
    return figure
