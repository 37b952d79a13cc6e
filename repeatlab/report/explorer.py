"""The run store in a notebook: one widget to filter, look at, compare and train runs.

    Explorer("../runs")
    Explorer("../runs", params="../params/quick/supervised.yaml")

The browser draws (`explorer.js`); here is read and computed, and only what was asked for: of a
study the ends of its runs, of runs that are clicked their curves, of arms that are compared their
evaluations. Every state is a trait, so that a script can click too: `explorer.arms = [...]`. Why
anywidget: see `repeatlab.figures.front_end`. Never imports torch.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import IO, Any

import anywidget
import numpy as np
import pandas as pd
import traitlets

from repeatlab.analysis.frames import AXES, Records, counted_axes, curves, load, mean_and_limits
from repeatlab.analysis.paired_differences import Endpoint, pairs
from repeatlab.core.files import StoreError
from repeatlab.core.schema import read_yaml
from repeatlab.figures.front_end import CSS, module
from repeatlab.figures.look import SOLID, label
from repeatlab.store.records import UPDATES, Run, Store, fresh_batches

POINTS = 500  # of a curve
REFRESH_SECONDS = 2.0
EVALS = ["update", "split", "metric", "value"]
PREFIX = "validation."  # the test split is to be read once, at the end


def _synced(kind: type[traitlets.TraitType], *default: Any) -> Any:
    return kind(*default).tag(sync=True)


class Explorer(anywidget.AnyWidget):
    """A store's studies, their runs, curves and paired differences, to click in.

    Args:
        runs: The run store.
        study: Which study to begin with; by default the fullest, of which most runs are done.
        params: A parameter file, as `repeatlab run` takes it: buttons start and stop its training.

    Attributes:
        study: The study whose runs `table` has.
        clicked: Ids of the runs whose curves are shown.
        task: Of which arms are compared.
        arms: Methods that are compared, the first is what the others are compared with.
        metric: Of the evaluations, on the validation split.
        axis: Over and at equal what, a key of `repeatlab.analysis.frames.AXES`.
        table: Column -> a value for each run; "values" has a column for each metric.
        curves: Of each clicked run its loss, N, metric and rate, thinned to `POINTS`.
        comparison: Of the arms their curves, and the pairs of runs with their differences.
        running: Whether the study of `params` is being trained from here.
        said: What was said last, by the training or of something that cannot be read.
    """

    _esm, _css = module(Path(__file__).with_suffix(".js")), CSS
    studies = _synced(traitlets.Dict)
    study = _synced(traitlets.Unicode)
    metrics = _synced(traitlets.List)
    metric = _synced(traitlets.Unicode)
    axis = _synced(traitlets.Unicode, "update")
    table = _synced(traitlets.Dict)
    clicked = _synced(traitlets.List)
    task = _synced(traitlets.Unicode)
    arms = _synced(traitlets.List)
    curves = _synced(traitlets.List)
    comparison = _synced(traitlets.Dict)
    params = _synced(traitlets.Unicode)
    running = _synced(traitlets.Bool, False)
    said = _synced(traitlets.Unicode)

    def __init__(
        self, runs: str | Path = "runs", *, study: str = "", params: str | Path = ""
    ) -> None:
        self._store, self._records = Store(runs), Records(pd.DataFrame())
        self._process: subprocess.Popen | None = None
        self._stopping = False
        super().__init__(params=str(params))
        self.studies = _done_of_planned(self._store)
        if not self.studies:
            self.said = f"{runs} holds no study; `repeatlab run` makes one"
        done = {name: int(said.split()[0]) for name, said in self.studies.items()}
        self.study = study or max(done, key=done.get, default="")
        self.observe(lambda change: self._show(), "study")
        self.observe(self._show_curves, ["clicked", "metric"])
        self.observe(self._show_comparison, ["task", "arms", "metric", "axis"])
        self.on_msg(self._obey)
        self._show()

    # --- what is shown ------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the store again."""
        self.studies = _done_of_planned(self._store)
        self._show(anew=not self.metrics)  # before a run was done there was nothing to choose

    def _show(self, *, anew: bool = True) -> None:
        """Show the study; anew: two arms of its first task and a run of the second."""
        if not self.study:
            return
        try:
            self._records = load(self._store.root, self.study)
        except StoreError as error:
            self.said = str(error)
            return
        runs, done = self._records.runs, self._records.done
        with self.hold_trait_notifications():
            self._show_table()
            if anew:
                self.task = runs["task"].iloc[0]
                methods = runs["method"][runs["task"] == self.task].unique()
                self.arms = [arm for arm in SOLID if arm in methods] or [*methods[:2]]
                self.clicked = [*done["id"][done["method"] == self.arms[-1]].iloc[:1]]
        self._show_curves()
        self._show_comparison()

    def _show_table(self) -> None:
        runs = self._records.runs
        names = [name for name in runs if name.startswith(PREFIX)]
        self.metrics = [name.removeprefix(PREFIX) for name in names]
        if self.metric not in self.metrics:
            self.metric = next((m for m in self.metrics if m != "loss"), "".join(self.metrics))
        table = {name: [*runs[name]] for name in ("task", "method", "seed", "status", "id")}
        if "updates" in runs:
            table["N"] = _plain(runs["updates"] / runs["fresh_batches"])
        table["values"] = {name.removeprefix(PREFIX): _plain(runs[name]) for name in names}
        self.table = table

    def _show_curves(self, change: Any = None) -> None:
        rows = self._records.runs
        chosen = rows[rows["id"].isin(self.clicked)].drop_duplicates("id")
        self.curves = [
            {"id": row.id, "name": f"{row.task}, {label(row.method)}, seed {row.seed}"}
            | {"data": self._curves_of(Run(Path(row.path)))}
            for row in chosen.itertuples()
        ]

    def _curves_of(self, run: Run) -> dict[str, dict[str, list]]:
        found = {
            "updates": pd.DataFrame(columns=UPDATES.names),
            "evals": pd.DataFrame(columns=EVALS),
        }
        for name in found:
            try:
                found[name] = getattr(run, name)
            except (StoreError, OSError) as error:  # nothing yet, damaged, or it ends right now
                self.said = str(error)
        return run_curves(**found, metric=self.metric)

    def _show_comparison(self, change: Any = None) -> None:
        runs = self._records.runs
        chosen = Records(runs[(runs["task"] == self.task) & runs["method"].isin(self.arms)])
        if not len(chosen.done):
            self.comparison = {}
            return
        try:
            axes = [axis for axis in counted_axes(chosen.evals) if axis != "cost"]  # it needs a k
        except StoreError as error:
            self.said, self.comparison = str(error), {}
            return
        if self.axis not in axes:
            self.axis = "update"
        found = compare(chosen, self.arms, metric=self.metric, axis=self.axis)
        named = {axis: AXES[axis] for axis in axes}
        self.comparison = found | {"axis": self.axis, "axes": named}

    # --- training -----------------------------------------------------------------------------

    def _obey(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        asked = {"refresh": self.refresh, "start": self.start, "stop": self.stop}
        asked[content["do"]]()

    def start(self) -> None:
        """Train what the store lacks of `params`, as `repeatlab run` does, beside the kernel.

        What was begun goes on from its checkpoint. The training ends with the kernel's process
        group; an interrupt of the kernel stops it, too.

        Raises:
            ValueError: there are no `params`.
        """
        if not self.params:
            raise ValueError("params must be a parameter file for a study to be started")
        if self.running:
            return
        command = [sys.executable, "-m", "repeatlab", "run", self.params]
        output = TemporaryFile()  # noqa: SIM115  closed by what follows it
        self._process = subprocess.Popen(
            [*command, "--runs", str(self._store.root)], stdout=output, stderr=subprocess.STDOUT
        )
        self.running, self.said, self._stopping = True, "starting", False
        Thread(target=self._follow, args=(self._process, output), daemon=True).start()

    def stop(self) -> None:
        """Make the runs under way leave checkpoints and the training end."""
        if self._process:
            self.said, self._stopping = "stopping: the runs under way leave checkpoints", True
            # A kernel may ignore SIGINT between two cells, and so would what it has started then.
            self._process.send_signal(signal.SIGTERM)

    def _follow(self, process: subprocess.Popen, output: IO[bytes]) -> None:
        """Show what the training has made until it ends, and then what it said last."""
        name = (read_yaml(Path(self.params)).get("parameters") or {}).get("study", {}).get("name")
        ended = False
        while not ended:
            with suppress(subprocess.TimeoutExpired):
                process.wait(REFRESH_SECONDS)
            ended = process.poll() is not None
            self._show_trained(name)
            if name in self.studies and not self._stopping:
                self.said = f"training: {self.studies[name]} runs done"
        with output:
            output.seek(0)
            lines = output.read().decode(errors="replace").split("\n")
        self.said = next((line for line in reversed(lines) if line.strip()), "")
        self.running = False

    def _show_trained(self, name: str | None) -> None:
        self.studies = _done_of_planned(self._store)
        if name in self.studies and name != self.study:
            self.study = name
        else:
            self.refresh()


# --- what is read and computed --------------------------------------------------------------------


def _done_of_planned(store: Store) -> dict[str, str]:
    """Return study -> "3 of 8", runs done of those planned, without reading any run."""
    found = {}
    for name in store.studies():
        runs = [store.run(*planned["run"]) for planned in store.read_study(name)["runs"]]
        found[name] = f"{sum(run.done for run in runs)} of {len(runs)}"
    return found


def _plain(values: Iterable[float]) -> list[float | None]:
    """Return numbers that JSON has; what is not finite is None."""
    return [float(v) if np.isfinite(v) else None for v in np.asarray(values, dtype=float)]


def _points(x: Iterable[float], y: Iterable[float]) -> dict[str, list[float | None]]:
    """Return a curve as means of at most `POINTS` stretches, each at its first x."""
    x, y = np.asarray(x), np.asarray(y, dtype=float)
    if not len(x):
        return {"x": [], "y": []}
    starts = np.arange(0, len(y), -(-len(y) // POINTS))  # the last stretch takes the rest
    means = np.add.reduceat(y, starts) / np.diff(starts, append=len(y))
    return {"x": _plain(x[starts]), "y": _plain(means)}


def run_curves(
    updates: pd.DataFrame, evals: pd.DataFrame, *, metric: str
) -> dict[str, dict[str, list]]:
    """Return a run's loss, N and learning rate at first visits, and its metric, each over updates.

    Args:
        updates: The rows of the run, maybe none.
        evals: Its evaluations, maybe none.
        metric: Of the evaluations on the validation split.
    """
    batches = fresh_batches(updates) if len(updates) else updates
    named = {"loss": "loss", "N": "repeats", "rate": "lr"}
    rows = evals[(evals["metric"] == metric) & (evals["split"] == "validation")]
    found = {name: _points(batches["update"], batches[of]) for name, of in named.items()}
    return found | {"metric": _points(rows["update"], rows["value"])}


def compare(records: Records, arms: list[str], *, metric: str, axis: str) -> dict[str, list]:
    """Return curves of the arms of one task and the differences to the first of them, by seed.

    Args:
        records: Runs of one task.
        arms: Methods.
        metric: On the validation split.
        axis: Over and at equal what.

    Returns:
        `means` and `seeds`: curves. `pairs`: rows of `paired_differences.pairs`; `side` is the sign
        of a difference that is infinite. `differences`: of each other arm the mean over pairs
        without a diverged run, with its 95 % t-interval.
    """
    evals = records.measured(metric, "validation")
    means = [
        {"method": method, "x": _plain(rows[axis])}
        | {name: _plain(rows[of]) for name, of in (("y", "mean"), ("low", "low"), ("high", "high"))}
        for method, rows in curves(evals, metric, x=axis).groupby("method", sort=False)
    ]
    seeds = [
        {"method": method, "seed": int(seed)} | _points(rows[axis], rows["value"])
        for (method, seed), rows in evals.groupby(["method", "seed"], sort=False)
    ]
    (task,) = records.runs["task"].unique()
    asked = {"axis": axis, "against": arms[0], "methods": arms[1:]}
    table = pairs(records, {task: Endpoint(metric=metric)}, **asked)
    table["side"] = np.sign(table["difference"])
    plain = table.astype(object).where(table.notna() & ~table.isin([np.inf, -np.inf]), None)
    differences = []
    for method, rows in table.groupby("method", sort=False):
        found = rows["difference"][np.isfinite(rows["difference"])]
        limits = {name: _plain([x])[0] for name, x in mean_and_limits(found).items()}
        differences.append({"method": method, "n": len(found)} | limits)
    return {"means": means, "seeds": seeds, "pairs": plain.to_dict("records")} | {
        "differences": differences
    }
