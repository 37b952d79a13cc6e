"""What a run store holds: how far its studies are, and which runs are damaged. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from repeatlab.core.files import StoreError
from repeatlab.store.records import UPDATES, Run, Store
from repeatlab.studies.diagnostics.prediction import with_prediction

# In the order of a table: what is there, what is on its way, what is not.
STATES = ("complete", "diverged", "running", "interrupted", "failed", "missing")


class Damage(NamedTuple):
    """A run that says it is done and is not whole."""

    run: Run
    reason: str


def study_states(store: Store, name: str) -> pd.DataFrame:
    """Return one row per run of a study: task, method, seed, run, state and reason.

    The state is one of `STATES`; `running` means that a process holds the run now.

    Raises:
        StoreError: there is no such study.
    """
    rows = []
    for planned in store.read_study(name)["runs"]:
        run = store.run(*planned["run"])
        state, reason = run_state(store, run)
        kept = {key: planned[key] for key in ("task", "method", "seed")}
        rows.append(kept | {"run": str(run.path), "state": state, "reason": reason})
    return pd.DataFrame(rows)


def timed_states(store: Store, name: str) -> pd.DataFrame:
    """Return `study_states` with the columns `seconds`, `predicted_seconds` and `lockstep`.

    Of training; NaN where a run is not done and, of the prediction, as
    `repeatlab.studies.diagnostics.prediction.with_prediction` says. `lockstep` is how many
    runs shared the time of this one, 0 where it trained alone.

    Raises:
        StoreError: there is no such study, or a measurement is of another version.
    """
    rows = study_states(store, name)
    done = rows["state"].isin(["complete", "diverged"])
    rows["seconds"] = [
        Run(Path(run)).summary["ledger"]["seconds"] if finished else nan
        for run, finished in zip(rows["run"], done, strict=True)
    ]
    rows["lockstep"] = [Run(Path(run)).environment.get("lockstep", 0) for run in rows["run"]]
    timed = with_prediction(rows.rename(columns={"run": "path", "state": "status"}), store)
    return timed.rename(columns={"path": "run", "status": "state"})


def run_state(store: Store, run: Run) -> tuple[str, str]:
    """Return a run's state, and the reason where it has one."""
    try:
        status = run.status
    except StoreError as error:
        return "failed", str(error)
    if run.done:
        return status["status"], status.get("reason", "")
    if store.is_locked(run):
        return "running", ""
    if status["status"] in ("running", "complete", "diverged"):
        # It was killed: whatever it says, nobody is at it and it is not done.
        return "interrupted", "its process has died; the next start goes on from its checkpoint"
    return status["status"], status.get("error", "")


def summary_table(store: Store, names: list[str]) -> pd.DataFrame:
    """Return the number of runs in each state, one row per study."""
    counts = {name: study_states(store, name)["state"].value_counts() for name in names}
    table = pd.DataFrame(counts).T.reindex(columns=list(STATES)).fillna(0).astype(int)
    return table.rename_axis("study")


def damaged(store: Store) -> Iterator[Damage]:
    """Yield every run of the store that is done by its files and not whole."""
    for summary in sorted(store.root.glob("*/*/summary.json")):
        run = Run(summary.parent)
        try:
            reason = _fault(run)
        except (StoreError, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            yield Damage(run, reason)


def _fault(run: Run) -> str | None:
    """Return what is wrong with a run that is done, or None."""
    updates, summary = run.updates, run.summary
    if summary["status"] != run.status["status"]:
        return f"status.json says {run.status['status']}, summary.json {summary['status']}"
    if list(updates) != UPDATES.names:
        return f"updates.parquet has the columns {list(updates)}"
    if updates["update"].tolist() != list(range(len(updates))):
        return "updates.parquet does not hold every update once, in order"
    made = summary["ledger"]["updates"]
    finite = int(np.isfinite(updates["loss"]).sum())
    if finite != made:
        return f"updates.parquet holds {finite} updates, the ledger {made}"
    if summary["status"] == "complete" and finite != len(updates):
        return "a complete run has losses that are not finite"
    if run.config.get("max_updates", 0) < made:
        return f"the ledger holds {made} updates, the configuration allows fewer"
    if run.config["evaluation"]["splits"] and not len(run.evals):
        return "evals.parquet holds no evaluation"
    return None


def remove(store: Store, run: Run) -> None:
    """Delete a run, so that the next start of its study makes it again.

    Of a run that is a link, the link: what it leads to is not the store's.

    Raises:
        StoreError: it cannot be deleted.
    """
    with store.locked(run):
        try:
            if run.path.is_symlink():
                run.path.unlink()
            else:
                shutil.rmtree(run.path)
        except OSError as error:
            raise StoreError(f"{run.path} cannot be deleted: {error.strerror}") from None
