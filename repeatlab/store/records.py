"""The run store: what one run leaves behind, and how it is read again.

    runs/<task>/<run id>/
        config.json       the configuration, whose hash is the run id
        environment.json  versions, hardware, commit
        updates.parquet   one row per update (updates.arrow, a stream, while it trains)
        evals.parquet     one row per evaluated metric, with the ledger (evals.arrow meanwhile)
        sampler.parquet   one row per fresh batch, where the method's sampler has something to say
        pictures.npz      uint8 images (n, height, width[, 3]) by name, where a task makes any
        weights-*.pt      weights after so many updates, where they are kept
        status.json       running, interrupted or failed, until it is done
        summary.json      how it ended: final metrics, ledger, calibration, and the digest of every
                          other file; written last, so it marks *done*
    runs/studies/<name>.json  which runs a study consists of
    runs/plans/<name>.json    what a plan declared before its first run

A run without summary.json is not done. Its streams are readable up to their last whole block. The
files of one that is done are held to their digests whenever they are read; config.json,
summary.json and those of the studies carry their own.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from repeatlab.core.files import (
    StoreError,
    digest_of,
    make_directory,
    not_whole,
    read_bytes,
    read_json,
    remove_temporaries,
    replacing,
    safe_name,
    write_json,
    writing,
)
from repeatlab.core.locks import hold, is_held

UPDATES = pa.schema(
    {
        "update": pa.int64(),
        "fresh_batch": pa.int64(),
        "repeat": pa.int32(),
        "repeats": pa.int32(),
        "loss": pa.float64(),
        "lr": pa.float64(),
        "seconds": pa.float64(),
    }
)
# A column more, of runs whose method asks for `gradient_norms`: |g|^2.
MEASURED = pa.field("squared_gradient", pa.float64())
# What is left of a run that is done.
LASTING = ("config.json", "environment.json", "*.parquet", "pictures.npz", "weights-*.pt")


class Store:
    """All runs and studies below one directory.

    Args:
        root: The directory; it need not exist before something is written.
    """

    def __init__(self, root: str | Path = "runs") -> None:
        self.root = Path(root)

    def run(self, task: str, run_id: str) -> Run:
        """Return the handle of a run, whether it exists or not."""
        return Run(self.root / safe_name("task", task) / safe_name("run id", run_id))

    def begin(
        self, run: Run, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> RunWriter:
        """Make `run`'s directory, empty of earlier attempts, and return its writer.

        Raises:
            StoreError: the directory cannot be written.
        """
        self.check_writable()
        attempts = run.environment.get("attempts", 0) + 1
        shutil.rmtree(run.path, ignore_errors=True)
        with writing(run.path):
            run.path.mkdir(parents=True)
        write_json(run.path / "config.json", config, sealed=True)
        write_json(run.path / "environment.json", {**environment, "attempts": attempts})
        return RunWriter(run.path)

    def resume(self, run: Run, marks: Mapping[str, Mapping[str, Any]]) -> RunWriter | None:
        """Return a writer that goes on with `run`'s tables as they were at `marks`.

        Args:
            run: The run.
            marks: What `RunWriter.synced` returned.

        Returns:
            None where the tables do not hold that any more, which is named in the log: another
            checkpoint, or a new start, is needed.
        """
        tables = {}
        try:
            _ = run.config  # which stays as it is
            for name, mark in marks.items():
                path = run.path / f"{name}.arrow"
                content = read_bytes(path)[: mark["bytes"]]
                if sha256(content).hexdigest() != mark["sha256"]:
                    raise not_whole(path)
                tables[name] = pa.ipc.open_stream(content).read_all()
        except StoreError as error:
            logging.getLogger(__name__).warning("%s; the run goes on from what lies before", error)
            return None
        remove_temporaries(run.path)
        attempts = run.environment.get("attempts", 0) + 1
        write_json(run.path / "environment.json", {**run.environment, "attempts": attempts})
        writer = RunWriter(run.path)
        for stream in run.path.glob("*.arrow"):
            if stream.stem not in marks:  # begun after the checkpoint
                stream.unlink()
        for name, table in tables.items():
            writer.rewrite(name, table)
        return writer

    @contextmanager
    def locked(self, run: Run, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold `run` against other processes, waiting for one that does.

        The system lets go of the lock of a process that has died.

        Args:
            run: The run.
            waiting: Called again and again meanwhile; it may raise.

        Raises:
            StoreError: the lock cannot be made.
        """
        with hold(_lock_file(run), waiting=waiting):
            yield

    def is_locked(self, run: Run) -> bool:
        """Whether a process is at `run` now."""
        return is_held(_lock_file(run))

    def check_writable(self) -> None:
        """Make the root directory if needed.

        Raises:
            StoreError: it cannot be made or written to.
        """
        try:
            make_directory(self.root)
        except StoreError as error:
            raise StoreError(f"the run directory {error}; name another one with `runs`") from None

    def write_study(self, name: str, study: Mapping[str, Any]) -> None:
        """Record which runs a study consists of."""
        directory = self.root / "studies"
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / f"{safe_name('study', name)}.json", study, sealed=True)

    def read_study(self, name: str) -> dict[str, Any]:
        """Return what `write_study` wrote.

        Raises:
            StoreError: there is no such study, or its file is damaged.
        """
        path = self.root / "studies" / f"{safe_name('study', name)}.json"
        if not path.exists():
            known = sorted(p.stem for p in path.parent.glob("*.json"))
            raise StoreError(
                f"{self.root} holds no study '{name}' (it holds: {', '.join(known) or 'none'}); "
                "run the task's notebook, or `repeatlab run` with the parameters of that study"
            )
        return read_json(path, sealed=True)

    def studies(self) -> list[str]:
        """Return the names of all studies."""
        return sorted(path.stem for path in (self.root / "studies").glob("*.json"))

    def write_plan(self, name: str, plan: Mapping[str, Any]) -> None:
        """Register a plan, or what has become of it, under its name."""
        path = self._plan_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, plan, sealed=True)

    def read_plan(self, name: str) -> dict[str, Any] | None:
        """Return what `write_plan` wrote, None where no such plan is registered."""
        path = self._plan_file(name)
        return read_json(path, sealed=True) if path.exists() else None

    def plans(self) -> dict[str, dict[str, Any]]:
        """Return every registered plan by name."""
        paths = sorted((self.root / "plans").glob("*.json"))
        return {path.stem: read_json(path, sealed=True) for path in paths}

    def _plan_file(self, name: str) -> Path:
        return self.root / "plans" / f"{safe_name('plan', name)}.json"


def _lock_file(run: Run) -> Path:
    """Return the file of a run's lock, beside its directory, which a fresh attempt empties."""
    return run.path.with_name(f".{run.path.name}.lock")


@dataclass(frozen=True)
class Run:
    """One run's directory.

    What is read raises a `StoreError` that names the file where that is damaged.
    """

    path: Path

    @property
    def done(self) -> bool:
        """Whether it came to its end, complete or diverged."""
        return (self.path / "summary.json").exists()

    @property
    def status(self) -> dict[str, Any]:
        """Its `status`, and what else was said of that; "missing" where it was not begun.

        A run that is done has its summary's, whatever came to be written after it.
        """
        if self.done:
            summary = self.summary
            return {key: summary[key] for key in ("status", "update", "reason") if key in summary}
        found = self._json("status.json")
        if found and "status" not in found:
            raise StoreError(f"{self.path / 'status.json'} is damaged: it has no status")
        begun = (self.path / "config.json").exists()
        return found or {"status": "running" if begun else "missing"}

    @property
    def config(self) -> dict[str, Any]:
        path = self._file("config.json")
        return read_json(path, sealed=True) if path else {}

    @property
    def environment(self) -> dict[str, Any]:
        """On what it was made; empty where it was not begun or, before it is done, is damaged."""
        try:
            return self._json("environment.json")
        except StoreError:
            if self.done:
                raise
            return {}

    @property
    def summary(self) -> dict[str, Any]:
        """Final metrics, ledger and calibration; empty unless the run is done."""
        return read_json(self.path / "summary.json", sealed=True) if self.done else {}

    @property
    def updates(self) -> pd.DataFrame:
        """One row per update: the columns of `UPDATES`."""
        return self.table("updates").to_pandas()

    @property
    def fresh_batches(self) -> pd.DataFrame:
        """One row per fresh batch: the columns of the function `fresh_batches`."""
        return fresh_batches(self.updates)

    @property
    def evals(self) -> pd.DataFrame:
        """One row per (update, split, metric) with `value` and the ledger's columns."""
        return self.table("evals").to_pandas()

    @property
    def sampler(self) -> pd.DataFrame:
        """One row per fresh batch with `fresh_batch` and what the sampler recorded; maybe none."""
        try:
            return self.table("sampler").to_pandas()
        except StoreError:
            if self.done and self._file("sampler.parquet"):
                raise
            return pd.DataFrame()

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """Images by name, uint8 (n, height, width[, 3]); empty where the task makes none."""
        path = self._file("pictures.npz")
        if path is None:
            return {}
        with np.load(path, allow_pickle=False) as images:
            return dict(images)

    def note(self, status: str, **details: Any) -> None:
        """Write the run's status."""
        write_json(self.path / "status.json", {"status": status, **details})

    def table(self, name: str) -> pa.Table:
        """Return "updates", "evals" or "sampler" as an Arrow table.

        Raises:
            StoreError: the run has no such table, or it is damaged.
        """
        if not self.done:
            return read_stream(self.path / f"{name}.arrow")
        path = self._file(f"{name}.parquet")
        if path is None and name == "updates":  # an export has left them out
            return UPDATES.empty_table()
        if path is None:
            raise StoreError(f"{self.path / name}.parquet is missing: the run has recorded nothing")
        return pq.read_table(path)

    def check(self) -> None:
        """Hold every file of a run that is done to its digest, and the run to its name.

        Raises:
            StoreError: a file is damaged or not there, or of another run.
        """
        summary = self.summary
        if summary["run"] != self.path.name:
            raise StoreError(f"{self.path / 'summary.json'} is of the run {summary['run']}")
        for name in summary["files"]:
            self._file(name)
        _ = self.config  # it may have been damaged before the end

    def _file(self, name: str) -> Path | None:
        """Return where a file is, if it is there; of a run that is done, once it is found whole."""
        path = self.path / name
        if not self.done:
            return path if path.exists() else None
        digest = self.summary["files"].get(name)
        if digest is None:
            return None
        if digest_of(path) != digest:
            raise not_whole(path)
        return path

    def _json(self, name: str) -> dict[str, Any]:
        path = self._file(name)
        return read_json(path) if path else {}


def fresh_batches(updates: pd.DataFrame) -> pd.DataFrame:
    """Return what became of each fresh batch of a run, in the order in which they were drawn.

    Visits that lie apart are put together here.

    Args:
        updates: Rows of one run, with the columns of `UPDATES`.

    Returns:
        One row per fresh batch:

        - `fresh_batch`: its index, from 0;
        - `update`: the number of its first visit, from 0;
        - `repeats`: N, the visits planned for it; 0 where its loss was not finite;
        - `visits`: the updates made on it: fewer than N where the run ended before;
        - `loss`: at its first visit, before any update on it; maybe not finite, in the last row;
        - `last_loss`: before the last update on it: `loss` where there was one at most;
        - `lr`: the learning rate of the first visit;
        - `seconds`: of training, up to the end of the first visit.
    """
    batch = updates["fresh_batch"].to_numpy()
    order = np.lexsort((updates["repeat"].to_numpy(), batch))
    starts = np.flatnonzero(np.diff(batch[order], prepend=-1))
    losses = updates["loss"].to_numpy()[order]
    # A loss that is not finite ends a run: in a batch it is the last one.
    visits = np.add.reduceat(np.isfinite(losses).astype(np.int64), starts)
    first = updates.iloc[order[starts]].reset_index(drop=True)
    return pd.DataFrame(
        {
            **first[["fresh_batch", "update", "repeats"]],
            "visits": visits,
            "loss": first["loss"],
            "last_loss": losses[starts + np.maximum(visits, 1) - 1],
            **first[["lr", "seconds"]],
        }
    )


def read_stream(path: Path) -> pa.Table:
    """Return every whole block of an Arrow stream, also one that a kill has cut short."""
    if not path.exists():
        raise StoreError(f"{path} is missing: the run has recorded nothing yet")
    batches = []
    try:
        for batch in pa.ipc.open_stream(read_bytes(path)):
            batch.validate(full=True)
            _ = batch.schema.names  # which may be no text
            batches.append(batch)
    except (pa.ArrowException, ValueError, OSError):
        pass  # the torn end
    if not batches:
        raise StoreError(f"{path} holds no whole block yet")
    return pa.Table.from_batches(batches)


class RunWriter:
    """Writes one run: streams while it trains, Parquet and summary.json when it is done.

    What cannot be written raises a `StoreError`; what was written before stays readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: dict[str, pa.ipc.RecordBatchStreamWriter] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._rows: dict[str, int] = {}
        Run(path).note("running")

    def updates(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows: arrays of equal length for the columns of `UPDATES`, `MEASURED` or not."""
        schema = UPDATES.append(MEASURED) if MEASURED.name in columns else UPDATES
        self._append("updates", pa.table(dict(columns)).select(schema.names).cast(schema))

    def evals(
        self, update: int, metrics: Mapping[str, Mapping[str, float]], ledger: Mapping
    ) -> None:
        """Append one evaluation: `metrics[split][metric]`, with the ledger at that update."""
        counts = {name: count for name, count in ledger.items() if name != "updates"}
        rows = [
            {"update": update, "split": split, "metric": metric, "value": float(value)} | counts
            for split, values in metrics.items()
            for metric, value in values.items()
        ]
        self._append("evals", pa.Table.from_pylist(rows))

    def sampler(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append what the sampler says of its fresh batches: arrays of equal length, or nothing."""
        if columns and len(next(iter(columns.values()))):
            self._append("sampler", pa.table(dict(columns)))

    def pictures(self, pictures: Mapping[str, np.ndarray]) -> None:
        """Keep the images that a task shows at its end."""
        path = self.path / "pictures.npz"
        if pictures:
            with writing(path):
                np.savez_compressed(path, **pictures)

    def finish(self, status: str, summary: Mapping[str, Any], **details: Any) -> None:
        """End the run as `complete` or `diverged`; summary.json comes last and marks it done."""
        names = list(self._streams)
        for name in names:
            stream = self.path / f"{name}.arrow"
            with writing(stream):
                self._close(name)
            table = read_stream(stream)
            if len(table) != self._rows[name]:
                raise StoreError(
                    f"{stream} holds {len(table)} of the {self._rows[name]} rows written to it"
                )
            with replacing(self.path / f"{name}.parquet") as temporary:
                pq.write_table(table, temporary, compression="zstd")
        # Before the summary: nobody looks after a run that is done.
        remove_temporaries(self.path)
        lasting = sorted(path for pattern in LASTING for path in self.path.glob(pattern))
        files = {path.name: digest_of(path) for path in lasting}
        whole = {"run": self.path.name, "status": status, **details, **summary, "files": files}
        write_json(self.path / "summary.json", whole, sealed=True)
        # Only now: a kill before this line leaves what a resume needs.
        for name in ("status.json", *(f"{name}.arrow" for name in names)):
            (self.path / name).unlink(missing_ok=True)

    def synced(self) -> dict[str, dict[str, Any]]:
        """Make what was appended durable; return rows, bytes and digest of each table so far."""
        marks = {}
        for name, stream in self._files.items():
            path = self.path / f"{name}.arrow"
            with writing(path):
                os.fsync(stream.fileno())
            written = {"rows": self._rows[name], "bytes": stream.tell()}
            marks[name] = written | {"sha256": digest_of(path)}
        return marks

    def rewrite(self, name: str, table: pa.Table) -> None:
        """Begin a table anew with these rows, in one step."""
        with replacing(self.path / f"{name}.arrow") as temporary:
            self._open(name, table.schema, temporary)
            self._append(name, table)

    def fail(self, error: BaseException) -> None:
        """End the run as `failed`, keeping what was recorded, and the error, whatever is broken.

        One that is done stays as it is.
        """
        with suppress(StoreError):
            self.close("failed", error=f"{type(error).__name__}: {error}")

    def close(self, status: str, **details: Any) -> None:
        """Leave the run as it is, to be gone on with or begun anew; one that is done, untouched."""
        for name in list(self._streams):
            with suppress(OSError):  # what is lost so was not recorded
                self._close(name)
        run = Run(self.path)
        if not run.done:
            run.note(status, **details)

    def _append(self, name: str, table: pa.Table) -> None:
        with writing(self.path / f"{name}.arrow"):
            if name not in self._streams:
                self._open(name, table.schema, self.path / f"{name}.arrow")
            self._streams[name].write_table(table)
            # What is written survives this process.
            self._files[name].flush()
        self._rows[name] += len(table)

    def _open(self, name: str, schema: pa.Schema, path: Path) -> None:
        # Buffered: a raw file may take a part of a block and say nothing, where the disk is full.
        self._files[name] = path.open("wb")
        self._streams[name] = pa.ipc.new_stream(self._files[name], schema)
        self._rows[name] = 0

    def _close(self, name: str) -> None:
        stream, file = self._streams.pop(name), self._files.pop(name)
        with file:
            stream.close()
