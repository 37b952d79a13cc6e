"""What a run store holds: how far its studies are, and which runs are damaged. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from repeatlab.core.files import StoreError, read_json
from repeatlab.store.records import Run, Store
from repeatlab.studies.diagnostics.prediction import with_prediction

# In the order of a table: what is there, what is on its way, what is not.
STATES = ("complete", "diverged", "running", "interrupted", "failed", "missing")


class Damage(NamedTuple):
    """A run that says it is done and is not whole, or a study whose file is not.

    Attributes:
        path: The run's directory, or the study's file.
        reason: What is wrong; it names the file.
    """

    path: Path
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
    rows = study_states(store, name).assign(seconds=nan, lockstep=0)
    for row in rows[rows["state"].isin(["complete", "diverged"])].itertuples():
        run = Run(Path(row.run))
        try:
            run.check()
        except StoreError as error:
            rows.loc[row.Index, ["state", "reason"]] = "failed", str(error)
            continue
        rows.loc[row.Index, "seconds"] = run.summary["ledger"]["seconds"]
        rows.loc[row.Index, "lockstep"] = run.environment.get("lockstep", 0)
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
    if status["status"] == "running":  # nobody is at it: it was killed
        return "interrupted", "its process has died; the next start goes on from its checkpoint"
    return status["status"], status.get("error", "")


def summary_table(store: Store, names: list[str]) -> pd.DataFrame:
    """Return the number of runs in each state, one row per study."""
    counts = {name: study_states(store, name)["state"].value_counts() for name in names}
    table = pd.DataFrame(counts).T.reindex(columns=list(STATES)).fillna(0).astype(int)
    return table.rename_axis("study")


def damaged(store: Store) -> Iterator[Damage]:
    """Yield every run of the store that is done and not whole, and every damaged study."""
    for summary in sorted(store.root.glob("*/*/summary.json")):
        run = Run(summary.parent)
        try:
            run.check()
        except StoreError as error:
            yield Damage(run.path, str(error))
    for path in sorted((store.root / "studies").glob("*.json")):
        try:
            read_json(path, sealed=True)
        except StoreError as error:
            yield Damage(path, str(error))


def remove(store: Store, path: Path) -> None:
    """Delete a run or a study's file, so that the next start of the study makes it again.

    Of a run that is a link, the link: what it leads to is not the store's.

    Args:
        store: The store.
        path: As in `Damage`.

    Raises:
        StoreError: it cannot be deleted.
    """
    with store.locked(Run(path)):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            raise StoreError(f"{path} cannot be deleted: {error.strerror}") from None
