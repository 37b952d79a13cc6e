"""What the laboratory's own controls show, and what they must show. Never imports torch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repeatlab.analysis.controls import FOUND
from repeatlab.figures.look import caption, panels, rows_of, style, zero_line

PASSED, FAILED, GROUND = "#0072B2", "#D55E00", "#E3E3E3"


@style()
def control_rows(table: pd.DataFrame) -> Figure:
    """Draw every control: its effect with limits, on grey ground where these must lie or reach.

    Args:
        table: What `analysis.controls.controls_table` returns.
    """
    figure, ((axes,),) = panels(1, 1, height=0.9 + 0.25 * len(table))
    rows_of(axes, table["control"])
    zero_line(axes)
    for place, (_, row) in enumerate(table.iterrows()):
        shade = PASSED if row["passed"] else FAILED
        low, width = (0.0, 1.0) if row["must be"] == FOUND else (-0.015, 0.03)
        axes.barh(place, width, left=low, height=0.8, color=GROUND, zorder=-1)
        # No difference is beyond the whole way; few seeds have no limits.
        axes.plot(np.clip([row["low"], row["high"]], -1, 1), [place] * 2, color=shade)
        axes.plot(row["difference"], place, "o", ms=4, color=shade)
        reached = f" ({row['reached']})" if isinstance(row["reached"], str) else ""
        axes.annotate(f"{row['is']}{reached}", (1.04, place), va="center", color=shade, fontsize=7)
    axes.set(xlim=(-1, 1.35), xticks=[-1, -0.5, 0, 0.5, 1])
    axes.set_xlabel("arm - other, of the way to the target at T")
    caption(
        figure,
        "Mean and 95 % sign-flip interval, right of it what is found (seeds at the target, arm : "
        "other); grey:\nwhere the whole interval must lie (found), what it must hold (not found, "
        "equal); orange: failed",
    )
    return figure
