"""Frames to axes, and axes to files. Never imports torch.

One colour per method throughout; bands and bars are 95 % Student-t intervals over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repeatlab.analysis import AXES, Records
from repeatlab.environment import commit
from repeatlab.records import safe_name, write_json

# Okabe and Ito's colours, safe for colour-blind readers; grey levels differ too.
COLOURS = {
    "standard": "#555555",
    "cosine": "#0072B2",
    "step": "#56B4E9",
    "exponential": "#0072B2",
    "inverse_time": "#56B4E9",
    "fixed2": "#E69F00",
    "fixed3": "#B07500",
    "random": "#CC79A7",
    "threshold": "#009E73",
    "linear": "#D55E00",
    "control_limit": "#7A4EA8",
}
FULL_WIDTH = 7.0  # inches: the text width of a two-column page
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "svg.hashsalt": "repeatlab",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the package's style, and leave matplotlib's settings as they were."""
    with mpl.rc_context(STYLE):
        yield


def colour(method: str) -> Any:
    """Return the method's colour; a method that has none of its own gets one from its name."""
    if method in COLOURS:
        return COLOURS[method]
    from seaborn import husl_palette

    return husl_palette(12, l=0.5)[sum(method.encode()) % 12]


def label(name: str) -> str:
    """Return a name as it is printed: `control_limit` as "control limit"."""
    return name.replace("_", " ")


def curves_against_standard(
    frame: pd.DataFrame, *, x: str, ylabel: str, log: bool = False, columns: int = 4
) -> Figure:
    """Draw one small panel per method, each over the standard arm in grey.

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


def _caption(frame: pd.DataFrame) -> str:
    """Say what is drawn: task, statistic, and over how many seeds."""
    counts = sorted(frame["n"].unique())
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    tasks = ", ".join(frame["task"].unique())
    return f"{tasks}: mean and 95 % t-interval over {n} seeds; grey: standard"


def time_to_target(frame: pd.DataFrame, *, x: str, target: str) -> Figure:
    """Draw when each run first reached the target: a dot per seed, its median as a bar.

    Runs that missed it are open triangles at their last evaluation; a median is drawn only where
    more than half of the runs reached the target before it.

    Args:
        frame: What `analysis.to_target` returns, of one task.
        x: Its x column, a key of `analysis.AXES`.
        target: What was to be reached, in words.
    """
    methods = list(frame["method"].unique())
    with style():
        figure, axes = plt.subplots(figsize=(FULL_WIDTH * 0.6, 0.7 + 0.24 * len(methods)))
        for row, method in enumerate(methods):
            runs = frame[frame["method"] == method]
            hit, missed = runs[runs["reached"]], runs[~runs["reached"]]
            for dots, marker, face in ((hit, "o", colour(method)), (missed, ">", "none")):
                # Seeds side by side: several may reach the target at the same evaluation.
                heights = row + np.linspace(-0.22, 0.22, len(runs))[: len(dots)]
                axes.plot(dots[x], heights, marker, ms=3, mfc=face, mec=colour(method))
            if len(hit) > len(runs) / 2:
                # Censored runs count as infinite, so the median of all runs is one of the hits.
                times = np.sort(np.where(runs["reached"], runs[x], np.inf))
                axes.plot([np.median(times)] * 2, [row - 0.3, row + 0.3], color=colour(method))
            axes.annotate(
                f"{len(hit)}/{len(runs)}",
                (1.01, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7,
            )
        axes.set_yticks(range(len(methods)), [label(method) for method in methods])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{AXES[x]} until {target}")
        axes.set_title("dots: seeds; bar: median; right: runs that reached it", loc="left")
    return figure


def repeats_over_time(updates: pd.DataFrame) -> Figure:
    """Draw loss and N of every fresh batch of one run, in the order they came.

    Args:
        updates: Rows with `fresh_batch`, `repeat`, `repeats` and `loss`.
    """
    fresh = updates[updates["repeat"] == 0]
    with style():
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(FULL_WIDTH * 0.6, 2.6), sharex=True, height_ratios=[2, 1]
        )
        top.plot(fresh["fresh_batch"], fresh["loss"], lw=0.7, color=COLOURS["linear"])
        top.set_yscale("log")
        top.set_ylabel("first loss")
        bottom.vlines(fresh["fresh_batch"], 0, fresh["repeats"], lw=0.7, color="#555555")
        bottom.set_ylabel("N")
        bottom.set_xlabel("fresh batch")
    return figure


def tau_over_time(
    samplers: Mapping[str, pd.DataFrame], *, thresholds: Mapping[str, float]
) -> Figure:
    """Draw tau of importance sampling against the threshold that switches it on, a panel a run.

    Args:
        samplers: Panel title to what `records.Run.sampler` holds of such a run.
        thresholds: Panel title to the run's tau_th.
    """
    with style():
        figure, grid = plt.subplots(
            1, len(samplers), figsize=(FULL_WIDTH, 2.3), sharey=True, squeeze=False
        )
        for axes, (title, rows) in zip(grid[0], samplers.items(), strict=True):
            x = rows["fresh_batch"]
            band = {"transform": axes.get_xaxis_transform(), "color": "#F0E442", "lw": 0}
            on = rows["presampled"].astype(bool)
            axes.fill_between(x, 0, 1, where=on, step="mid", alpha=0.5, label="on", **band)
            axes.plot(x, rows["tau"], lw=0.4, color="#AAAAAA", label="one batch")
            axes.plot(x, rows["tau_average"], color=COLOURS["cosine"], label="moving average")
            axes.axhline(thresholds[title], ls="--", lw=0.8, color="black", label="threshold")
            axes.set_title(title, loc="left")
        grid[0, 0].set_ylabel("tau")
        figure.supxlabel("fresh batch", fontsize=8)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return figure


def picture_grid(pictures: Mapping[str, np.ndarray], *, columns: int = 16) -> Figure:
    """Draw a run's pictures, one block of rows for each kind.

    Args:
        pictures: What `records.Run.pictures` holds: name to uint8 images (n, height, width[, 3]).
        columns: Images in a row.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not pictures:
        raise ValueError("the run has left no pictures: it is not complete, or its task makes none")
    sheets = {name: _sheet(images, columns) for name, images in pictures.items()}
    # Blocks as wide as the page: the height follows from each sheet's own proportions.
    heights = [FULL_WIDTH * sheet.shape[0] / sheet.shape[1] for sheet in sheets.values()]
    with style():
        figure, axes = plt.subplots(
            len(sheets),
            1,
            figsize=(FULL_WIDTH, sum(heights) + 0.25 * len(sheets)),
            height_ratios=heights,
            squeeze=False,
        )
        for block, (name, sheet) in zip(axes[:, 0], sheets.items(), strict=True):
            block.imshow(sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            block.set_title(label(name), loc="left")
            block.axis("off")
    return figure


def _sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Return images side by side in rows of `columns`, a white pixel between them."""
    rows = -(-len(images) // columns)
    height, width = images.shape[1] + 1, images.shape[2] + 1
    sheet = np.full((rows * height - 1, columns * width - 1, *images.shape[3:]), 255, np.uint8)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        sheet[row * height :, column * width :][: image.shape[0], : image.shape[1]] = image
    return sheet


def save_figure(
    figure: Figure,
    name: str,
    directory: str | Path,
    *,
    notebook: str,
    records: Records,
    parameters: Mapping[str, Any],
) -> Figure:
    """Write `figure` as PDF and PNG and enter it in the directory's manifest.json.

    The manifest ties each figure to notebook, parameters, run ids and commit.

    Returns:
        The figure, so that a notebook's cell can end on this call and show it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safe_name("figure name", name)
    with style():
        # One layout for all formats, and for the notebook that shows the figure.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        # Without dates, the same figure is the same file.
        figure.savefig(directory / f"{name}.pdf", metadata={"CreationDate": None})
        figure.savefig(directory / f"{name}.png", metadata={"Software": None})
    manifest = read_manifest(directory)
    manifest[name] = {
        "files": [f"{name}.pdf", f"{name}.png"],
        "notebook": notebook,
        "parameters": dict(parameters),
        "runs": records.run_ids,
        "missing_runs": len(records.missing),
        "commit": commit(),
    }
    write_json(directory / "manifest.json", dict(sorted(manifest.items())))
    plt.close(figure)
    return figure


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return the manifest of a figure directory: figure name to its entry."""
    path = Path(directory) / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
