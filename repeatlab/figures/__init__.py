"""Frames to axes, and axes to files. Never imports torch.

One colour per method throughout; bands and bars are 95 % Student-t intervals over seeds. Here is
what every figure shares and what pictures one run; each viewpoint has a module of its own.
"""

from __future__ import annotations

from repeatlab import require_lab

require_lab()

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from repeatlab.analysis.frames import Records
from repeatlab.core.environment import commit
from repeatlab.core.files import replacing, safe_name, write_json
from repeatlab.core.locks import hold

# A hue for each family of methods, from light to dark within it: hues that colour-blind readers
# tell apart, and shades that stay apart in grey. With so many methods line style and marker differ
# within a family too.
FAMILIES: dict[str, dict[str, str]] = {
    "baseline": {"standard": "#555555"},
    "learning-rate schedule": {
        "step": "#F8B528",
        "cosine": "#BD8700",
        "exponential": "#835C00",
        "inverse_time": "#4D3500",
        "constant_lr": "#2B1D00",
    },
    "choice of samples": {
        "online": "#FFB8D7",
        "selective": "#FF90C4",
        "importance": "#E760A5",
        "hard_mining": "#BE3880",
        "rho_loss": "#840052",
    },
    "repetition without the loss": {
        "fixed2": "#8FD0FF",
        "random": "#29A3E0",
        "fixed3": "#0072B2",
        "cosine_repeats": "#003D5A",
    },
    "repetition by the loss": {
        "until": "#FEC3A6",
        "quantile": "#FE9A66",
        "linear": "#E25303",
        "control_limit": "#B84000",
        "threshold": "#7F2900",
        "linear_cosine": "#4A1800",
    },
    "control of linear": {
        "permuted": "#7FE6C2",
        "spaced": "#4FCFA3",
        "time_only": "#2DBB8D",
        "windowed": "#009E73",
        "falling_cosine": "#00875F",
        "anti_hard": "#00704F",
        "step_size": "#005A40",
        "fresh_views": "#004531",
        "fresh_samples": "#002F21",
    },
}
COLOURS = {name: shade for family in FAMILIES.values() for name, shade in family.items()}
_DASHES = ("-", (0, (4, 1.2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (2, 1)))
_MARKERS = "osD^vP<X>"
# What is drawn for itself, in front of the others: it is never dashed.
SOLID = ("standard", "linear")
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
    """Return the method's colour; a method that has none of its own gets one from its name.

    A comparison with it at equal data (`mechanism.SAME_DATA`) has the same.
    """
    method = method.removesuffix("_same_data")
    if method in COLOURS:
        return COLOURS[method]
    from seaborn import husl_palette

    return husl_palette(12, l=0.5)[sum(method.encode()) % 12]


def line(method: str) -> dict[str, Any]:
    """Return colour and line style of the method's curves."""
    dashes = "-" if method in SOLID else _DASHES[_place(method) % len(_DASHES)]
    return {"color": colour(method), "linestyle": dashes}


def marker(method: str) -> str:
    """Return the method's marker, its own within its family."""
    return _MARKERS[_place(method) % len(_MARKERS)]


def _place(method: str) -> int:
    for family in FAMILIES.values():
        if method in family:
            return list(family).index(method)
    return sum(method.encode())


def in_order(methods: Iterable[str]) -> list[str]:
    """Return methods family by family, those without one behind them as they came."""
    present = dict.fromkeys(methods)
    return [*(m for m in COLOURS if m in present), *(m for m in present if m not in COLOURS)]


def said_n(counts: Iterable[int]) -> str:
    """Return over how many seeds something is: "n = 5", "n = 3 to 5"; "no run" if there is none."""
    found = sorted({int(count) for count in counts})
    if not found or found == [0]:
        return "no run"
    return f"n = {found[0]}" if len(found) == 1 else f"n = {found[0]} to {found[-1]}"


def label(name: str) -> str:
    """Return a name as it is printed: `control_limit` as "control limit"."""
    return name.replace("_", " ")


def line_legend(figure: Figure, methods: Sequence[str]) -> None:
    """Name the lines of the methods above the panels."""
    handles = [Line2D([], [], label=label(method), **line(method)) for method in methods]
    columns = min(len(methods), 7)
    spacing = {"handlelength": 2.2, "columnspacing": 1.2, "handletextpad": 0.5}
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=7, **spacing)


def say_no_run(axes: Axes) -> None:
    """Leave a panel empty but for saying that there is nothing to draw."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no run", transform=axes.transAxes, ha="center", color="#777777")


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
        bottom.locator_params(axis="y", integer=True)
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
            axes.plot(x, rows["tau_average"], color=COLOURS["importance"], label="moving average")
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


@dataclass(frozen=True)
class SavedFigure:
    """A figure on the disk. A notebook shows that file: drawing it anew would take as long again.

    Attributes:
        png: The file.
    """

    png: Path

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        data = self.png.read_bytes()
        # Width and height stand in the first chunk of every PNG.
        pixels = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
        scale = STYLE["figure.dpi"] / STYLE["savefig.dpi"]
        size = (round(scale * length) for length in pixels)
        return data, dict(zip(("width", "height"), size, strict=True))


def save_figure(
    figure: Figure,
    name: str,
    directory: str | Path,
    *,
    notebook: str,
    records: Records,
    parameters: Mapping[str, Any],
) -> SavedFigure:
    """Write `figure` as PDF and PNG and enter it in the directory's manifest.json.

    The manifest ties each figure to notebook, parameters, run ids and commit.

    Returns:
        What was saved, so that a notebook's cell can end on this call and show it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safe_name("figure name", name)
    with style():
        # One layout for all formats, and for the notebook that shows the figure.
        figure.draw_without_rendering()
        with mpl.rc_context({"figure.constrained_layout.use": False}):
            # Not "none", whose place holder makes every format draw twice.
            figure.set_layout_engine(None)
            # Without dates, the same figure is the same file.
            for kind, undated in (("pdf", "CreationDate"), ("png", "Software")):
                # A link in the figure's place is replaced, not followed.
                with replacing(directory / f"{name}.{kind}") as file:
                    figure.savefig(file, format=kind, metadata={undated: None})
    entry = {
        "files": [f"{name}.pdf", f"{name}.png"],
        "notebook": notebook,
        "parameters": dict(parameters),
        "runs": records.run_ids,
        "missing_runs": len(records.missing),
        "commit": commit(),
    }
    # Another notebook may be entering its own at the same time.
    with hold(directory / ".manifest.lock"):
        manifest = read_manifest(directory) | {name: entry}
        write_json(directory / "manifest.json", dict(sorted(manifest.items())))
    plt.close(figure)
    return SavedFigure(directory / f"{name}.png")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return the manifest of a figure directory: figure name to its entry."""
    path = Path(directory) / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
