"""A live picture of a study while it trains: loss, N and metric of the runs under way.

It reads what runs have written to the store, in a thread of the notebook's process, so that it
follows runs in other processes too, and costs them nothing; where nobody asks for it, nothing runs.
Never imports torch.

    with live(runs, "quick-supervised", metric="accuracy"):
        run_study(study, runs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repeatlab.core.files import StoreError
from repeatlab.figures.look import colour, label, line, panels, png, style
from repeatlab.figures.trace import binned
from repeatlab.store.records import Run, Store

MOST_LINES = 4
POINTS = 200  # of a line
# A picture may take this share of the thread's time: on a busy machine there are fewer.
SHARE = 0.05


@dataclass(frozen=True)
class Curve:
    """What one run has recorded so far.

    Attributes:
        name: What the picture calls it.
        method: Its method.
        updates: Its rows; empty before the first block.
        evals: Its evaluations; empty before the first.
    """

    name: str
    method: str
    updates: pd.DataFrame
    evals: pd.DataFrame


@dataclass(frozen=True)
class Progress:
    """A study at one moment.

    Attributes:
        planned: How many runs it has.
        done: How many of them are done.
        curves: The runs that processes are at; where there are none, those that ended last.
    """

    planned: int = 0
    done: int = 0
    curves: list[Curve] = field(default_factory=list)


def progress(store: Store, study: str, *, most: int = MOST_LINES) -> Progress:
    """Return how far a study is; one that the store does not have yet has no runs.

    Args:
        store: The run store.
        study: The study's name.
        most: How many runs are read, those that have written last.
    """
    try:
        planned = store.read_study(study)["runs"]
    except StoreError:
        return Progress()
    runs = {(p["task"], p["method"], p["seed"]): store.run(*p["run"]) for p in planned}
    done = sum(run.done for run in runs.values())
    under_way = {key: run for key, run in runs.items() if not run.done and store.is_locked(run)}
    chosen = under_way or {key: run for key, run in runs.items() if run.done}
    latest = sorted(chosen, key=lambda key: _written(chosen[key]), reverse=True)[:most]
    several = len({task for task, _, _ in runs}) > 1
    curves = [
        Curve(
            f"{task}: {label(method)}, seed {seed}" if several else f"{label(method)}, seed {seed}",
            method,
            _rows(chosen[task, method, seed], "updates"),
            _rows(chosen[task, method, seed], "evals"),
        )
        for task, method, seed in sorted(latest, key=str)
    ]
    return Progress(len(planned), done, curves)


def _written(run: Run) -> float:
    times = []
    for path in run.path.glob("*"):
        with suppress(OSError):  # streams are unlinked when a run ends
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def _rows(run: Run, table: str) -> pd.DataFrame:
    # A run that ends while it is read has moved its tables.
    with suppress(StoreError, OSError):
        return getattr(run, table)
    return pd.DataFrame()


def picture(found: Progress, metric: str) -> Figure:
    """Draw loss and N over updates, and the metric where it was evaluated.

    Args:
        found: The study at this moment.
        metric: Its name among the evaluations, on the validation split.
    """
    with style():
        figure, (row,) = panels(1, 3, height=2.2, sharex=True)
        for curve in found.curves:
            _draw(row, curve, metric)
        for axes, ylabel in zip(row, ("loss", "N", f"validation {label(metric)}"), strict=True):
            axes.set_ylabel(ylabel)
            axes.set_xlabel("update")
        row[1].locator_params(axis="y", integer=True)
        if any(len(curve.updates) for curve in found.curves):
            figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        row[0].set_title(f"{found.done} of {found.planned} runs done", loc="left")
    return figure


def _draw(row: np.ndarray, curve: Curve, metric: str) -> None:
    loss, repeats, evaluated = row
    if len(curve.updates):
        for axes, column in ((loss, "loss"), (repeats, "repeats")):
            # The rows of a stream are the updates in their order, from the first.
            edges, means = binned(curve.updates[column].to_numpy(dtype=float), POINTS)
            middles = (edges[:-1] + edges[1:] - 1) / 2
            axes.plot(middles, means, label=curve.name, **line(curve.method))
    if len(curve.evals):
        of = (curve.evals["split"] == "validation") & (curve.evals["metric"] == metric)
        rows = curve.evals[of]
        evaluated.plot(rows["update"], rows["value"], "o-", ms=2, color=colour(curve.method))


@contextmanager
def live(
    runs: str | Path,
    study: str,
    *,
    metric: str,
    every: float | None = 2.0,
    show: Callable[[Figure], None] | None = None,
) -> Iterator[None]:
    """Show a picture of a study that is trained in here, and keep it up to date.

    The last one shows how it ended, also where an error ends it.

    Args:
        runs: The run store.
        study: The study's name.
        metric: Which metric to show.
        every: Seconds from one picture to the next; more where drawing takes more than a twentieth
            of that. None shows none at all.
        show: What is done with a picture; by default the cell's output is replaced by it.
    """
    if every is None:
        yield
        return
    store, left, show = Store(runs), Event(), show or _display()

    def follow() -> None:
        took = 0.0
        while not left.wait(max(every, took / SHARE)):
            start = perf_counter()
            show(picture(progress(store, study), metric))
            took = perf_counter() - start

    # Outputs find their cell through the context.
    thread = Thread(target=copy_context().run, args=(follow,), name="live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        show(picture(progress(store, study), metric))


def _display() -> Callable[[Figure], None]:
    """Return what shows a picture in the place of the one before."""
    from IPython.display import DisplayHandle, Image

    handle, shown = DisplayHandle(), False

    def show(figure: Figure) -> None:
        nonlocal shown
        (handle.update if shown else handle.display)(Image(png(figure)))
        shown = True

    return show
