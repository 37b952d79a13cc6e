"""Estimates with their limits, one method below the other. Never imports torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from repeatlab.figures.look import GREY, colour, label, rows_of, say


def interval_rows(
    axes: Axes,
    found: pd.DataFrame,
    methods: Sequence[str],
    *,
    solid: Collection[str] | None = None,
    missing: str = "no run",
) -> None:
    """Draw an estimate with its limits for each method, one below the other.

    An interval that leaves the axis ends in an arrow, one without any limit is not drawn. An
    estimate beyond the axis is a number at its edge, so that one far arm does not flatten the
    others.

    Args:
        axes: Where; its y axis gets the methods.
        found: Rows with `method`, `estimate`, `low`, `high`; none of them is an empty panel.
        methods: Which, from top to bottom.
        solid: Methods with a filled dot, by default all.
        missing: What is said where there is no estimate.
    """
    rows = found.set_index("method").reindex(methods)
    left, right = _range(rows)
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    rows_of(axes, [label(method) for method in methods])
    if rows["estimate"].isna().all():
        axes.set_xticks([])
        say(axes, missing)
        return
    for place, (method, row) in enumerate(rows.iterrows()):
        shade = colour(method)
        if np.isnan(row["estimate"]):
            _beside(axes, 0.02, place, missing, GREY, "left")
            continue
        face = shade if solid is None or method in solid else "white"
        if np.isfinite([row["low"], row["high"]]).any():
            ends = np.clip([row["low"], row["high"]], left, right)
            axes.plot(ends, [place] * 2, color=shade, lw=1.0, solid_capstyle="butt")
            for end, sign, cut in (
                (left, "<", row["low"] < left),
                (right, ">", row["high"] > right),
            ):
                if cut:
                    axes.plot(end, place, sign, ms=3, color=shade, clip_on=False)
        if left <= row["estimate"] <= right:
            axes.plot(row["estimate"], place, "o", ms=3.6, mfc=face, mec=shade, mew=0.9, zorder=3)
        else:
            below = row["estimate"] < left
            edge, side = (0.03, "left") if below else (0.97, "right")
            _beside(axes, edge, place, f"{row['estimate']:.3g}", shade, side)


def _beside(axes: Axes, x: float, y: float, text: str, shade: Any, side: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    place = {"xycoords": ("axes fraction", "data"), "ha": side, "va": "center", "zorder": 4}
    axes.annotate(text, (x, y), fontsize=6, color=shade, bbox=box, **place)


def _range(rows: pd.DataFrame) -> tuple[float, float]:
    """Return limits around the bulk of the estimates, with room for half of the intervals."""
    estimates = rows["estimate"].to_numpy(float)
    estimates = estimates[np.isfinite(estimates)]
    if not len(estimates):
        return -1.0, 1.0
    half = (rows["high"] - rows["low"]).to_numpy(float) / 2
    half = half[np.isfinite(half)]
    room = float(np.median(half)) if len(half) else 0.0
    centre = float(np.median(estimates))
    far = 6 * float(np.median(np.abs(estimates - centre))) + room or abs(centre) or 1.0
    kept = estimates[np.abs(estimates - centre) <= far]
    low, high = kept.min() - 1.3 * room, kept.max() + 1.3 * room
    pad = 0.05 * (high - low) or 0.1 * far
    return low - pad, high + pad


def is_decided(table: pd.DataFrame) -> pd.Series:
    """Return which rows of `comparison.comparison_table` are decided."""
    return table["decision"].isin(["better", "worse"])


def least_words(tables: Iterable[pd.DataFrame], decided: str) -> str:
    """Return `decided`, or that so few seeds could not have decided any of the comparisons."""
    least = min((table["least_p_adjusted"].min() for table in tables), default=np.nan)
    return decided if least < 0.05 else "none can be decided: too few seeds for so many comparisons"
