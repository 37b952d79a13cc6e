"""One look for all figures: a colour, line and marker for each method, panels, captions, words.

Never imports torch, nor pyplot: a figure here belongs to nobody but who asked for it, so that no
backend is chosen in the middle of drawing, and none is left open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from repeatlab.core.schema import read_yaml

FAMILIES: dict[str, dict[str, str]] = read_yaml(Path(__file__).parent / "colours.yaml")
COLOURS = {name: shade for family in FAMILIES.values() for name, shade in family.items()}
_DASHES = ("-", (0, (4, 1.2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (2, 1)))
_MARKERS = "osD^vP<X>"
# What is drawn for itself, in front of the others: it is never dashed.
SOLID = ("standard", "linear")
GREY = "#777777"
CAPTION = 8  # points
FULL_WIDTH = 7.0  # inches: the text width of a two-column page
_FILE = Path(__file__).parent / "repeatlab.mplstyle"
STYLE = dict(mpl.rc_params_from_file(_FILE, use_default_template=False))


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """Draw in the package's style, and put back what it changes of matplotlib's settings.

    Of these only: a backend that is chosen meanwhile changes others, which are to stay.

    Args:
        more: Settings above those of the style.
    """
    with_more = STYLE | more
    before = {name: mpl.rcParams[name] for name in with_more}
    mpl.rcParams.update(with_more)
    try:
        yield
    finally:
        mpl.rcParams.update(before)


class Picture(Figure):
    """A figure that a notebook shows where it is the value of a cell, or is displayed: once."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with style():
            self.savefig(buffer, format="png", dpi=STYLE["figure.dpi"])
        return buffer.getvalue()


def panels(
    rows: int, columns: int, *, height: float, width: float = FULL_WIDTH, **layout: Any
) -> tuple[Picture, np.ndarray]:
    """Return a figure and its axes (rows, columns), in inches; `layout` is that of `subplots`."""
    figure = Picture(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def tiles(
    count: int, *, columns: int, height: float, head: float = 0.45, **sharing: bool
) -> tuple[Picture, list[Axes]]:
    """Return a figure as wide as the page with `count` panels, at most `columns` in a row.

    Args:
        count: How many.
        columns: In a row.
        height: Of a row, in inches.
        head: Height of what stands above and below the panels.
        sharing: `sharex` and `sharey`.
    """
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure, grid = panels(rows, columns, height=height * rows + head, **sharing)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < count)
        if sharing.get("sharex"):
            # Where the panel below is empty, the one above it carries the numbers.
            axes.tick_params(labelbottom=place + columns >= count)
    return figure, list(grid.flat)[:count]


def caption(figure: Figure, text: str) -> None:
    """Say above the panels what is drawn, in as many lines as the figure's width asks for."""
    points = 72 * figure.get_figwidth()
    text = fill(text, int(points / (0.55 * CAPTION)))  # a letter is some 0.55 of its size wide
    figure.suptitle(text, fontsize=CAPTION, x=0.01, ha="left")


def say(axes: Axes, text: str = "no run", *, bare: bool = False) -> None:
    """Say in a panel why nothing is drawn in it; a bare one has no axes either."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    if bare:
        axes.set_axis_off()


def rows_of(axes: Axes, names: Sequence[str], **text: Any) -> None:
    """Give the y axis a row for each name, from the top; named in the first column only."""
    axes.set_yticks(range(len(names)), names, **text)
    axes.tick_params(axis="y", length=0, labelleft=axes.get_subplotspec().is_first_col())
    axes.set_ylim(max(1, len(names)) - 0.4, -0.6)


def zero_line(axes: Axes) -> None:
    """Draw the vertical line of the standard arm."""
    axes.axvline(0, lw=0.7, color=COLOURS["standard"], zorder=0)


def counts_axis(axes: Axes) -> None:
    """Write large numbers of an x axis short: 20k."""
    if max(np.abs(axes.get_xlim())) >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def logarithmic(axes: Axes, which: str) -> None:
    """Make the x or y axis logarithmic, with plain numbers at its ticks: 0.2, not 2 x 10^-1."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def spans_decades(values: np.ndarray) -> bool:
    """Return whether a logarithmic axis has ticks to show: positive values, a decade apart."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    return len(values) > 0 and 0 < 10 * values.min() <= values.max()


def line_legend(figure: Figure, methods: Sequence[str], *, marked: bool = False) -> None:
    """Name the lines of the methods, or their markers, above the panels."""
    look = {m: dots(m, ms=4) if marked else line(m) for m in methods}
    handles = [Line2D([], [], label=label(m), **look[m]) for m in methods]
    columns = min(len(methods), 6 if marked else 7)
    spacing = {"handlelength": 2.2, "columnspacing": 1.2, "handletextpad": 0.5}
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=7, **spacing)


# --- a look for each method -------------------------------------------------------------------


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


def dots(method: str, **more: Any) -> dict[str, Any]:
    """Return colour and marker of the method's points, which no line joins."""
    return {"color": colour(method), "marker": marker(method), "ls": "none"} | more


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
    return f"n = {said}" if (said := extent(counts)) != "none" else "no run"


def extent(counts: Iterable[int]) -> str:
    """Return the least and the largest count: "5", "3 to 8"; "none" if there are but zeros."""
    found = sorted({int(count) for count in counts})
    if not any(found):
        return "none"
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def label(name: str) -> str:
    """Return a name as it is printed: `control_limit` as "control limit"."""
    return name.replace("_", " ")
