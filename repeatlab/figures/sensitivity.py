"""How results hang on settings: t, N_max, learning rate, batch size, label noise. No torch.

The frames come from `repeatlab.analysis.sensitivity` and `repeatlab.analysis.comparison`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repeatlab.analysis.frames import mean_interval
from repeatlab.figures import look


@look.style()
def over_settings(
    shown: Mapping[str, Mapping[str, Any]], *, ylabel: str, chance: float | None = None
) -> Figure:
    """Draw the metric at T over settings, one panel for each, a line per method.

    Dots with 95 % t-intervals over seeds; a cross at the upper edge where a run diverged.

    Args:
        shown: What `sensitivity.panels` returns. The values of x are drawn evenly, and each panel
            has its own y axis.
        ylabel: The metric, with its unit.
        chance: What a model that has learnt nothing has, if known.
    """
    figure, (across,) = look.panels(1, len(shown), height=2.6)
    handles: dict[str, Any] = {}
    counts: list[int] = []
    for axes, panel in zip(across, shown.values(), strict=True):
        summary = panel["summary"]
        values = _even(axes, summary["x"])
        if not len(summary):
            look.say(axes)
        methods = look.in_order(summary["method"].unique())
        # Side by side, so that one method's marks do not hide another's.
        shifts = dict(zip(methods, 0.16 * _centred(len(methods)), strict=True))
        for method in methods:
            rows = summary[summary["method"] == method]
            rows = rows.assign(place=np.searchsorted(values, rows["x"]) + shifts[method])
            handles.setdefault(method, _metric_line(axes, rows, method))
            counts += list(rows.loc[rows["n"] > 0, "n"])
        low, high = axes.get_ylim()
        if chance is not None and low <= chance <= high:
            axes.axhline(chance, color=look.GREY, lw=0.6, ls=":", zorder=0)
            axes.annotate(
                "chance", (0.01, chance), (0, 2), color=look.GREY, fontsize=6,
                xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            )  # fmt: skip
        axes.set_xlabel(panel["xlabel"])
    across[0].set_ylabel(ylabel)
    _legend_below(figure, handles)
    seeds = look.said_n(counts)
    look.caption(figure, f"Mean and 95 % t-interval, {seeds} seeds; cross: diverged runs")
    return figure


def _legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    names = [look.label(method) for method in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=max(1, len(names)))


def _even(axes: Axes, x: pd.Series) -> np.ndarray:
    """Give the axis a tick for each value of `x`, one apart, and return the values."""
    values = np.unique(x.dropna().to_numpy(float))
    size = 6 if len(values) > 4 else 7
    words = [f"{value:g}".replace("e+0", "e") for value in values]
    # More than a panel's width holds side by side.
    turned = {"rotation": 40} if sum(map(len, words)) > 18 else {}
    axes.set_xticks(range(len(values)), words, fontsize=size, **turned)
    axes.set_xlim(-0.6, max(0.6, len(values) - 0.4))
    return values


def _centred(count: int) -> np.ndarray:
    return np.arange(count) - (count - 1) / 2


def _metric_line(axes: Axes, rows: pd.DataFrame, method: str) -> Any:
    known = rows.dropna(subset="mean")
    spread = np.abs([known["mean"] - known["low"], known["high"] - known["mean"]])
    shape = look.line(method) | {"marker": look.marker(method), "ms": 3.5, "elinewidth": 0.7}
    drawn = axes.errorbar(known["place"], known["mean"], yerr=spread, capsize=0, **shape)
    for row in rows[rows["diverged"] > 0].itertuples():
        axes.plot(row.place, 0.97, "x", ms=5, mew=1.3, color=look.colour(method), clip_on=False,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    return drawn


@look.style()
def over_mean_repeats(frame: pd.DataFrame, *, ylabel: str) -> Figure:
    """Draw the metric at T against the mean N that came of it, mapping against mapping.

    A small dot per run, a large one at the mean of an arm with its 95 % t-interval, named by what
    was varied.

    Args:
        frame: What `sensitivity.arms` returns, of one task.
        ylabel: The metric, with its unit.
    """
    figure, ((axes,),) = look.panels(1, 1, width=look.FULL_WIDTH * 0.75, height=2.8)
    means: dict[str, list[tuple[float, float]]] = {}
    counts, absent = [], []
    order = frame.groupby("method", sort=False)["repeats"].mean().sort_values().index
    for method in order:
        rows = frame[frame["method"] == method]
        family, known = rows["family"].iloc[0], rows.dropna(subset="value")
        if not len(known):
            absent.append(method)
            continue
        mean, low, high = mean_interval(known["value"].to_numpy())
        x = known["repeats"].mean()
        axes.plot(known["repeats"], known["value"], ".", ms=2.5, color=look.colour(family))
        axes.plot([x, x], [low, high], lw=0.8, color=look.colour(family))
        axes.plot(x, mean, **look.dots(family, ms=4.5, mec="white", mew=0.5))
        above = len(counts) % 2
        axes.annotate(
            known["said"].iloc[0], (x, mean), (0, 14 if above else -14), fontsize=6,
            textcoords="offset points", ha="center", va="center", color=look.colour(family),
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8},
        )  # fmt: skip
        means.setdefault(family, []).append((x, float(mean)))
        counts.append(len(known))
    for family in look.in_order(means):
        points = np.array(sorted(means[family])).T
        shape = look.line(family) | {"lw": 0.8, "marker": look.marker(family), "ms": 4}
        axes.plot(*points, label=look.label(family), zorder=1, **shape)
    axes.set_xlabel("mean N that came of it (updates / fresh batches)")
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside right upper")
    missing = f"; no complete run: {', '.join(map(look.label, absent))}" if absent else ""
    look.caption(
        figure, f"Mean and 95 % t-interval, {look.said_n(counts)} seeds; dots: runs{missing}"
    )
    return figure


@look.style()
def advantages(shown: Mapping[str, pd.DataFrame], *, ylabel: str) -> Figure:
    """Draw the paired difference of each method to standard training over conditions.

    Args:
        shown: Study -> what `sensitivity.conditions` returns. The values of x are drawn evenly.
        ylabel: What the differences are of.
    """
    figure, (across,) = look.panels(1, len(shown), height=2.5)
    handles: dict[str, Any] = {}
    counts: list[int] = []
    for axes, rows in zip(across, shown.values(), strict=True):
        axes.axhline(0, color=look.GREY, lw=0.6, zorder=0)
        values, methods = _even(axes, rows["x"]), look.in_order(rows["method"].unique())
        for place, method in enumerate(methods):
            shift = 0.16 * _centred(len(methods))[place]
            for row in rows[rows["method"] == method].itertuples():
                if row.x == row.x:
                    at = float(np.searchsorted(values, row.x)) + shift
                    counts.append(row.n)
                    _advantage(axes, at, row, method)
            handles.setdefault(method, axes.plot([], [], **look.dots(method, ms=4))[0])
        axes.set_xlabel(rows["setting"].iloc[0] if len(rows) else "")
    across[0].set_ylabel(ylabel)
    _legend_below(figure, handles)
    look.caption(
        figure,
        f"Method minus standard, paired by seed, {look.said_n(counts)}; above 0: better; filled: "
        "decided after Holm; cross: a run diverged",
    )
    return figure


def _advantage(axes: Axes, x: float, row: Any, method: str) -> None:
    shade = look.colour(method)
    if row.n_diverged or not np.isfinite(row.difference):
        mark, said = ("x", f"{row.n_diverged} diverged") if row.n_diverged else ("_", "missing")
        across = axes.get_xaxis_transform()
        axes.plot(x, 0.95, mark, ms=5, mew=1.3, color=shade, transform=across, clip_on=False)
        axes.annotate(said, (x, 0.9), xycoords=across, fontsize=5, rotation=90, va="top",
                      ha="center", color=shade)  # fmt: skip
        return
    if np.isfinite([row.low, row.high]).all():
        axes.plot([x, x], [row.low, row.high], color=shade, lw=0.9)
    face = shade if row.decision in ("better", "worse") else "white"
    axes.plot(x, row.difference, look.marker(method), ms=4, mec=shade, mfc=face, zorder=3)
