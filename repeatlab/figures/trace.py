"""A mapping's N over losses that a run has recorded, as a picture. Never imports torch."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from repeatlab.figures.look import COLOURS, FULL_WIDTH, panels, style

MOST_STEPS = 600  # what a screen can show


def binned(values: np.ndarray, most: int = MOST_STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Return edges (k + 1,) and means (k,) of at most `most` bins of consecutive `values`.

    All bins have the same size but the last, which takes the rest.
    """
    size = max(1, -(-len(values) // most))
    starts = np.arange(0, len(values), size)
    edges = np.append(starts, len(values))
    return edges, np.add.reduceat(values, starts) / np.diff(edges)


def repeats_on_trace(losses: np.ndarray, counts: np.ndarray, *, t: float | None = None) -> Figure:
    """Draw recorded losses above the N that a mapping gives to them.

    Args:
        losses: First losses of fresh batches, (n,).
        counts: N of the first of them, (m,) with 1 <= m <= n; a line marks where they end.
        t: A loss that the mapping compares with, drawn as a line.
    """
    spent = len(counts) < len(losses)
    with style():
        size = {"width": FULL_WIDTH * 0.8, "height": 2.8, "height_ratios": [2, 1]}
        figure, ((top,), (bottom,)) = panels(2, 1, sharex=True, **size)
        edges, means = binned(losses)
        top.stairs(means, edges, baseline=None, lw=0.7, color=COLOURS["linear"])
        if t is not None:
            top.axhline(t, lw=0.8, ls="--", color="black", label="t")
            top.legend(loc="upper right")
        if (means > 0).all():
            top.set_yscale("log")
        top.set_ylabel("first loss")
        edges, means = binned(counts)
        bottom.stairs(means, edges, fill=True, color="#555555")
        if spent:
            for axes in (top, bottom):
                axes.axvline(len(counts), lw=0.8, color="#0072B2")
        bottom.set_ylim(0, max(2, counts.max()) * 1.05)
        bottom.set_xlim(0, len(losses))
        bottom.set_ylabel("N")
        where = " (blue: the budget is spent)" if spent else ""
        bottom.set_xlabel(f"fresh batch{where}")
    return figure
