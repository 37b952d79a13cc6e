"""Small pieces of HTML by which objects show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

WIDTH, HEIGHT = 260, 44  # of a curve, in pixels


def rows_table(rows: Mapping[str, Any]) -> str:
    """Return a table of two columns; a number has six digits at most."""
    cells = (
        f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
        f"<td>{escape(f'{value:.6g}' if isinstance(value, float) else str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def small_curve(title: str, values: Iterable[float]) -> str:
    """Return a curve of `values` in their order, with their first and last one as text.

    An SVG of at most as many points as it is wide, each a mean over consecutive values. What is not
    finite is left out; nothing is returned where nothing is left.
    """
    kept = np.asarray(list(values), dtype=float)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return ""
    means = np.array([part.mean() for part in np.array_split(kept, min(len(kept), WIDTH))])
    low, span = means.min(), np.ptp(means) or 1.0
    x = np.linspace(1, WIDTH - 1, len(means))
    y = HEIGHT - 2 - (means - low) / span * (HEIGHT - 4)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f"<div>{escape(title)}: {kept[0]:.4g} to {kept[-1]:.4g}<br>"
        f"<svg width='{WIDTH}' height='{HEIGHT}'><polyline points='{points}' fill='none' "
        "stroke='#E25303'/></svg></div>"
    )
