"""Results that travel: the runs of studies as a few Parquet files, and back into a store.

    DIR/
        runs.parquet      one row per run: task, id, configuration, environment, summary (JSON)
        updates.parquet   one row per update of every run, or of the runs of some studies alone;
                          seconds to the microsecond
        evals.parquet     one row per evaluated metric
        sampler.parquet, pictures.parquet   where runs have such
        studies.json      the studies: which runs they consist of; plans.json likewise
        digests.json      SHA-256 of each of these files, written last

An import makes the runs the store's own, done: nothing is trained, and every table, figure and
verdict is what it was where they were made. A run that the store already has stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from repeatlab.core.files import (
    StoreError,
    digest_of,
    make_directory,
    not_whole,
    read_json,
    replacing,
    write_json,
)
from repeatlab.store.records import Run, Store

FORMAT = 1
TABLES = ("updates", "evals", "sampler")
DIGESTS = ("files", "sha256")  # of a run's summary: made anew where it is put back
BLOCK = 250  # runs that are held at once
VISITS = ("updates", "sampler")  # a row per update or fresh batch: nearly all of an export
COMPRESSION = {"compression": "zstd", "compression_level": 12}
GROWING = ("update", "fresh_batch", "seconds")  # in updates.parquet: stored as differences
MICROSECONDS = 1e6


def export(
    store: Store, studies: Sequence[str], to: str | Path, *, visits: Collection[str] | None = None
) -> int:
    """Write the runs of `studies` that are done, with their plans, into `to`; return how many.

    Args:
        store: The store.
        studies: Names of studies.
        to: A directory, made if need be.
        visits: Those of whose runs every update is written; by default all. Of the others what a
            run came to is left, with its evaluations.

    Raises:
        StoreError: a study is not in the store, a run is damaged, or the directory cannot be
            written; the message names it.
    """
    to = Path(to)
    manifests = {name: store.read_study(name) for name in studies}
    make_directory(to)
    ids = dict.fromkeys(tuple(run["run"]) for study in manifests.values() for run in study["runs"])
    runs = [run for key in ids if (run := store.run(*key)).done]
    chosen = manifests if visits is None else visits
    visited = {tuple(run["run"])[1] for name in chosen for run in store.read_study(name)["runs"]}
    written = [_write(to / "runs.parquet", (_described(block) for block in _blocks(runs)))]
    for name in TABLES:
        whose = visited if name in VISITS else {run.path.name for run in runs}
        tables = (_stacked(name, b, i * BLOCK, whose) for i, b in enumerate(_blocks(runs)))
        written.append(_write(to / f"{name}.parquet", tables))
    written.append(_write(to / "pictures.parquet", (_pictures(b) for b in _blocks(runs))))
    names = {study.get("study", {}).get("plan") for study in manifests.values()} - {None}
    plans = {n: p for n, p in store.plans().items() if p["digest"] in names}
    for name, content in (("studies", manifests), ("plans", plans)):
        for one in content.values():
            one.pop("sha256", None)
        write_json(to / f"{name}.json", content)
        written.append(to / f"{name}.json")
    digests = {path.name: digest_of(path) for path in written if path is not None}
    write_json(to / "digests.json", {"format": FORMAT, "runs": len(runs), "files": digests})
    return len(runs)


def _blocks(runs: list[Run]) -> Iterator[list[Run]]:
    for first in range(0, len(runs), BLOCK):
        yield runs[first : first + BLOCK]


def _described(runs: Iterable[Run]) -> pa.Table:
    rows = [
        {
            "task": run.path.parent.name,
            "run": run.path.name,
            "config": json.dumps(run.config),
            "environment": json.dumps(run.environment),
            "summary": json.dumps({k: v for k, v in run.summary.items() if k not in DIGESTS}),
        }
        for run in runs
    ]
    return pa.Table.from_pylist(rows)


def _stacked(name: str, runs: list[Run], first: int, whose: Collection[str]) -> pa.Table | None:
    """Return one table of several runs, those of `whose` alone, with the run's number in front."""
    tables = []
    for number, run in enumerate(runs, first):
        if run.path.name in whose and f"{name}.parquet" in run.summary["files"]:
            table = run.table(name)
            if name == "updates":
                table = _in_microseconds(table)
            column = pa.array([number] * len(table), pa.int32())
            tables.append(table.add_column(0, "run", column))
    return pa.concat_tables(tables, promote_options="permissive") if tables else None


def _in_microseconds(updates: pa.Table) -> pa.Table:
    whole = pc.round(pc.multiply(updates["seconds"], MICROSECONDS)).cast(pa.int64())
    return updates.set_column(updates.column_names.index("seconds"), "seconds", whole)


def _in_seconds(updates: pa.Table) -> pa.Table:
    seconds = pc.divide(updates["seconds"].cast(pa.float64()), MICROSECONDS)
    return updates.set_column(updates.column_names.index("seconds"), "seconds", seconds)


def _pictures(runs: list[Run]) -> pa.Table | None:
    rows = [
        {"run": run.path.name, "pictures": (run.path / "pictures.npz").read_bytes()}
        for run in runs
        if "pictures.npz" in run.summary["files"]
    ]
    return pa.Table.from_pylist(rows) if rows else None


def _write(path: Path, tables: Iterable[pa.Table | None]) -> Path | None:
    """Write tables one after the other as one file; return its path, None without any."""
    filled = [table for table in tables if table is not None and len(table)]
    if not filled:
        return None
    table = pa.concat_tables(filled, promote_options="permissive")
    encoded = {"loss": "BYTE_STREAM_SPLIT"} | dict.fromkeys(GROWING, "DELTA_BINARY_PACKED")
    encoded = encoded if path.stem == "updates" else {}
    shared = [name for name in table.column_names if name not in encoded]
    options = COMPRESSION | {"use_dictionary": shared, "column_encoding": encoded}
    with replacing(path) as temporary:
        pq.write_table(table, temporary, **options)
    return path


# --- back -------------------------------------------------------------------------------------


def import_runs(store: Store, source: str | Path) -> int:
    """Put the runs of an export into `store`, done; return how many it did not have.

    Raises:
        StoreError: the directory is no export, a file of it is damaged, or the store has a plan of
            this name with other content; nothing is imported then, and the message says which.
    """
    source = Path(source)
    _check(source)
    plans = {name: _joined(store, name, p) for name, p in read_json(source / "plans.json").items()}
    store.check_writable()
    described = pq.read_table(source / "runs.parquet").to_pylist()
    files = {name: source / f"{name}.parquet" for name in (*TABLES, "pictures")}
    tables = {name: pq.read_table(file) for name, file in files.items() if file.exists()}
    pictures = tables.pop("pictures").to_pylist() if "pictures" in tables else []
    images = {row["run"]: row["pictures"] for row in pictures}
    # The rows of a run stand together, run by run.
    bounds = {
        name: np.searchsorted(table["run"], range(len(described) + 1))
        for name, table in tables.items()
    }
    new = 0
    for number, row in enumerate(described):
        run = store.run(row["task"], row["run"])
        with store.locked(run):
            if run.done:
                continue
            parts = {}
            for name, table in tables.items():
                begin, end = bounds[name][number : number + 2]
                if end > begin:
                    rows = _without_empty(table.slice(begin, end - begin))
                    parts[name] = _in_seconds(rows) if name == "updates" else rows
            _restore(store, run, row, parts, images.get(row["run"]))
            new += 1
    for name, study in read_json(source / "studies.json").items():
        store.write_study(name, study)
    for name, plan in plans.items():
        store.write_plan(name, plan)
    return new


def _joined(store: Store, name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Return a plan with the rates that the store has of other tasks of it."""
    known = store.read_plan(name) or plan
    if known["digest"] != plan["digest"]:
        raise StoreError(
            f"plan {name}: must be {known['digest']}, as it is registered in {store.root}; not "
            f"{plan['digest']}: import it into a store of its own"
        )
    return plan | {"rates": known.get("rates", {}) | plan.get("rates", {})}


def _check(source: Path) -> None:
    """Raise unless `source` is a whole export."""
    path = source / "digests.json"
    if not path.exists():
        raise StoreError(f"{path} is missing: {source} is no export, or one that was cut short")
    content = read_json(path)
    if content.get("format") != FORMAT:
        said = content.get("format")
        raise StoreError(f"{path}: format must be {FORMAT}; not {said!r}")
    for name, digest in content["files"].items():
        file = source / name
        if not file.exists():
            raise StoreError(f"{file} is missing")
        if digest_of(file) != digest:
            raise not_whole(file)


def _without_empty(table: pa.Table) -> pa.Table:
    """Return one run's rows without the columns that only other runs have."""
    kept = [
        name for name in table.column_names if name != "run" and table[name].null_count < len(table)
    ]
    return table.select(kept)


def _restore(
    store: Store, run: Run, row: dict[str, Any], parts: dict[str, pa.Table], images: bytes | None
) -> None:
    writer = store.begin(run, json.loads(row["config"]), {})
    write_json(run.path / "environment.json", json.loads(row["environment"]))
    if images is not None:
        (run.path / "pictures.npz").write_bytes(images)
    for name, table in parts.items():
        writer.rewrite(name, table)
    summary = json.loads(row["summary"])
    writer.finish(summary.pop("status"), summary)
