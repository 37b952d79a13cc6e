"""What updates cost by the cost model, and what they were measured to cost. Never imports torch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repeatlab.analysis.echo import LOADERS
from repeatlab.cost import (
    CostModel,
    break_even_keep,
    break_even_presample,
    cost_ratio,
    tau_threshold,
)
from repeatlab.figures.look import COLOURS, FULL_WIDTH, dots, label, panels, style

MOST_REPEATS = 8
_LOADER_COLOURS = {"in turn": "#E25303", "prefetched": "#0072B2"}


@style()
def echo_times(model: CostModel, measured: pd.DataFrame) -> Figure:
    """Draw the time of an update over N, as the model has it and as it was measured.

    Args:
        model: With the data time of the loader that was used.
        measured: Rows with `loader` (of `LOADERS`), `repeats` (N) and `seconds` (of an update).
    """
    figure, ((axes,),) = panels(1, 1, width=FULL_WIDTH * 0.6, height=2.4)
    for name in LOADERS:
        rows = measured[measured["loader"] == name]
        points = {"color": _LOADER_COLOURS[name], "mfc": "none", "ls": "none"}
        axes.plot(rows["repeats"], 1000 * rows["seconds"], "o", **points)
    _echo(axes, model)
    axes.set_title("lines: predicted; circles: measured", loc="left")
    return figure


@style()
def cost_curves(model: CostModel, *, presample: float) -> Figure:
    """Draw what repetition, importance sampling and selective backprop cost on such hardware.

    Args:
        model: The hardware's times.
        presample: p to mark.
    """
    k = model.backward_ratio
    size = {"width": FULL_WIDTH * 1.2, "height": 2.4}
    figure, ((echo, importance, selective),) = panels(1, 3, **size)
    _echo(echo, model)
    p = np.linspace(1, 10, 91)
    against = {"label": "tau_th: an update / a uniform one", "color": COLOURS["hard_mining"]}
    importance.plot(p, tau_threshold(p, k), **against)
    _ratio(importance, p, cost_ratio(p, k), break_even_presample(k))
    importance.plot(presample, cost_ratio(presample, k), "o", color="black")
    importance.set_xlabel("presample p (batches)")
    importance.legend(fontsize=6)
    keep = np.linspace(0.05, 1, 96)
    # All samples forward to select; those kept forward and backward.
    _ratio(selective, keep, (1 + keep * (1 + k)) / (1 + k), break_even_keep(k))
    selective.set_xlabel("share kept by selective backprop")
    figure.suptitle(
        f"an update {_ms(model.update)}, a fresh batch {_ms(model.data)}, k = {k:.2f}: "
        f"R = {model.free_repeats():.3g} updates a batch are free",
        fontsize=8,
    )
    return figure


@style()
def predictions(runs: pd.DataFrame) -> Figure:
    """Draw measured against predicted training time, a point for each run.

    Args:
        runs: Rows with `method`, `seconds` and `predicted_seconds`, as `with_prediction` of
            `repeatlab.studies.diagnostics.prediction` returns them; without one, no point.
    """
    rows = runs.dropna(subset=["seconds", "predicted_seconds"])
    figure, ((axes,),) = panels(1, 1, width=FULL_WIDTH * 0.5, height=2.8)
    for method, own in rows.groupby("method", sort=False):
        points = dots(method, mfc="none", label=label(method))
        axes.plot(own["predicted_seconds"], own["seconds"], **points)
    if len(rows):
        times = rows[["seconds", "predicted_seconds"]]
        ends = [times.min().min() * 0.8, times.max().max() * 1.25]
        axes.plot(ends, ends, lw=0.8, color="black", zorder=0)
        if ends[1] > 20 * ends[0]:
            axes.loglog()
        axes.legend(fontsize=7)
    axes.set_xlabel("predicted seconds")
    axes.set_ylabel("measured seconds")
    return figure


def _echo(axes: Axes, model: CostModel) -> None:
    """Draw the predicted time of an update over N."""
    repeats = np.linspace(1, MOST_REPEATS, 141)
    for name, prefetch in LOADERS.items():
        times = [model.fresh_batch(n, prefetch=prefetch) / n for n in repeats]
        axes.plot(repeats, 1000 * np.array(times), color=_LOADER_COLOURS[name], label=name)
    axes.axhline(1000 * model.update, lw=0.8, ls="--", color="black")
    free = model.free_repeats()
    if 1 < free < MOST_REPEATS:
        axes.axvline(free, lw=0.8, ls=":", color="black")
        axes.text(free, 0.97, " R", transform=axes.get_xaxis_transform(), va="top")
    axes.set_xlabel("updates per fresh batch N")
    axes.set_ylabel("ms per update")
    axes.set_ylim(bottom=0)
    axes.legend(title="data made")


def _ratio(axes: Axes, x: np.ndarray, ratios: np.ndarray, break_even: float) -> None:
    """Draw the cost against training on all samples, and from where on it is below 1."""
    axes.plot(x, ratios, color=COLOURS["importance"], label="u: against training on all")
    axes.axhline(1, lw=0.8, ls="--", color="black")
    if x[0] <= break_even <= x[-1]:
        axes.axvline(break_even, lw=0.8, ls=":", color="black")
    axes.set_ylabel("cost ratio")
    axes.set_ylim(bottom=0)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
