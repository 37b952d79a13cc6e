"""Pictures of one run: its loss and N, tau of importance sampling, the images that it left."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repeatlab.figures.look import COLOURS, FULL_WIDTH, label, panels, style


def repeats_over_time(updates: pd.DataFrame) -> Figure:
    """Draw loss and N of every fresh batch of one run, in the order they came.

    Args:
        updates: Rows with `fresh_batch`, `repeat`, `repeats` and `loss`.
    """
    fresh = updates[updates["repeat"] == 0]
    with style():
        size = {"width": FULL_WIDTH * 0.6, "height": 2.6, "height_ratios": [2, 1]}
        figure, ((top,), (bottom,)) = panels(2, 1, sharex=True, **size)
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
        figure, grid = panels(1, len(samplers), height=2.3, sharey=True)
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
        height = sum(heights) + 0.25 * len(sheets)
        figure, axes = panels(len(sheets), 1, height=height, height_ratios=heights)
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
