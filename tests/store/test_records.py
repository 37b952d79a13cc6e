"""The run store: what is written is read again, also after a kill at any moment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier, Thread

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repeatlab.core.files import StoreError, read_sealed, replacing, write_json, write_sealed
from repeatlab.store.records import UPDATES, Run, RunWriter, Store, fresh_batches, read_stream

LEDGER = {"updates": 5, "fresh_batches": 3, "seconds": 1.5}


def rows(first: int, count: int) -> dict[str, np.ndarray]:
    """Return `count` updates from `first` on, with different values in every cell."""
    update = np.arange(first, first + count)
    columns = {name: update * 10.0 + place for place, name in enumerate(UPDATES.names)}
    return columns | {
        "update": update,
        "fresh_batch": update // 2,
        "repeat": update % 2,
        "repeats": np.full(count, 2),
    }


def begin(store: Store, run_id: str = "abc") -> tuple[Run, RunWriter]:
    run = store.run("task", run_id)
    return run, store.begin(run, {"seed": 3}, {"python": "3"})


def frame(*blocks: dict[str, np.ndarray]) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(block) for block in blocks], ignore_index=True)


def same(found: pd.DataFrame, expected: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(found, expected[found.columns.tolist()], check_dtype=False)
    return found.columns.tolist() == UPDATES.names


# --- a run --------------------------------------------------------------------------------------


def test_a_finished_run_reads_back_as_written(tmp_path):
    run, writer = begin(Store(tmp_path))
    writer.evals(0, {"train": {"loss": 2.5, "accuracy": 0.1}}, LEDGER)
    writer.updates(rows(0, 5))
    writer.updates(rows(5, 2))
    writer.evals(7, {"train": {"loss": 1.5}, "test": {"loss": 1.75}}, LEDGER | {"seconds": 2.5})
    writer.finish("complete", {"final": {"test.loss": 1.75}, "ledger": LEDGER})

    assert run.done
    assert run.status == {"status": "complete"}
    assert run.config == {"seed": 3}
    summary = run.summary
    digests = summary.pop("files")
    final = {"final": {"test.loss": 1.75}, "ledger": LEDGER}
    assert summary == {"run": "abc", "status": "complete", **final}
    assert same(run.updates, frame(rows(0, 5), rows(5, 2)))
    assert run.evals.to_dict("list") == {
        "update": [0, 0, 7, 7],
        "split": ["train", "train", "train", "test"],
        "metric": ["loss", "accuracy", "loss", "loss"],
        "value": [2.5, 0.1, 1.5, 1.75],
        "fresh_batches": [3, 3, 3, 3],
        "seconds": [1.5, 1.5, 2.5, 2.5],
    }
    assert sorted(path.name for path in run.path.iterdir()) == [
        "config.json",
        "environment.json",
        "evals.parquet",
        "summary.json",
        "updates.parquet",
    ]
    for name, digest in digests.items():
        assert sha256((run.path / name).read_bytes()).hexdigest() == digest
    assert {*digests, "summary.json"} == {path.name for path in run.path.iterdir()}


def test_a_loss_that_is_not_finite_survives(tmp_path):
    run, writer = begin(Store(tmp_path))
    columns = rows(0, 3)
    columns["loss"] = np.array([1.0, np.inf, np.nan])
    writer.updates(columns)
    writer.finish("diverged", {}, update=2)
    assert np.array_equal(run.updates["loss"], columns["loss"], equal_nan=True)
    assert run.status == {"status": "diverged", "update": 2}


def test_a_running_run_can_be_read_block_by_block(tmp_path):
    run, writer = begin(Store(tmp_path))
    assert run.status == {"status": "running"}
    with pytest.raises(StoreError, match=r"updates\.arrow is missing"):
        _ = run.updates
    for block in range(3):
        writer.updates(rows(4 * block, 4))
        assert same(run.updates, frame(*(rows(4 * k, 4) for k in range(block + 1))))


@st.composite
def visited(draw) -> tuple[list[dict], pd.DataFrame]:
    """Return visits to batches in any order that keeps each batch's own, and their records."""
    counts = draw(st.lists(st.integers(1, 4), min_size=0, max_size=8))
    batches = draw(st.permutations([index for index, n in enumerate(counts) for _ in range(n)]))
    made = draw(st.integers(0, len(batches)))
    rows, visits = [], [0] * len(counts)
    for update, batch in enumerate(batches[:made]):
        loss = draw(st.floats(-10, 10))
        if update == made - 1 and draw(st.booleans()):
            loss = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        row = (update, batch, visits[batch], counts[batch], loss, 0.1 * update, 2.0 * update)
        rows.append(dict(zip(UPDATES.names, row, strict=True)))
        visits[batch] += 1
    return rows, pa.Table.from_pylist(rows, UPDATES).to_pandas()


@given(visited())
def test_fresh_batches_are_what_a_plain_loop_over_the_visits_finds(visits):
    rows, updates = visits
    expected = {}
    for row in rows:
        batch = expected.setdefault(row["fresh_batch"], row | {"visits": 0})
        if np.isfinite(row["loss"]):
            batch |= {"visits": batch["visits"] + 1, "last_loss": row["loss"]}
        batch.setdefault("last_loss", row["loss"])
    found = fresh_batches(updates)
    columns = ["fresh_batch", "update", "repeats", "visits", "loss", "last_loss", "lr", "seconds"]
    assert found.columns.tolist() == columns
    rows = [[expected[batch][name] for name in columns] for batch in sorted(expected)]
    assert np.array_equal(found.to_numpy(float), np.array(rows).reshape(-1, 8), equal_nan=True)


def test_columns_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    _, writer = begin(Store(tmp_path))
    columns = rows(0, 3)
    del columns["loss"]
    with pytest.raises(KeyError, match="loss"):
        writer.updates(columns)
    with pytest.raises(pa.ArrowInvalid):
        writer.updates(rows(0, 3) | {"repeat": np.array([0.5, 0.0, 0.0])})


def kill_before_the_summary(writer, monkeypatch) -> None:
    """End a run, as far as it comes before its last file is written."""

    def killed(path, data, **options):
        if path.name == "summary.json":
            raise KeyboardInterrupt
        write_json(path, data, **options)

    monkeypatch.setattr("repeatlab.store.records.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.finish("complete", {})


def test_only_the_summary_marks_a_run_as_done(tmp_path, monkeypatch):
    run, writer = begin(Store(tmp_path))
    assert not run.done
    writer.updates(rows(0, 3))
    writer.evals(3, {"train": {"loss": 1.0}}, LEDGER)
    kill_before_the_summary(writer, monkeypatch)
    assert run.status == {"status": "running"}
    assert not run.done
    assert run.summary == {}
    assert same(run.updates, frame(rows(0, 3)))


def test_a_kill_between_the_two_tables_leaves_both_readable(tmp_path, monkeypatch):
    run, writer = begin(Store(tmp_path))
    writer.updates(rows(0, 3))
    writer.evals(3, {"train": {"loss": 1.0}}, LEDGER)
    write_table = pa.parquet.write_table

    def killed_in_the_second(table, path, **options):
        if path.name.startswith(".evals."):
            raise KeyboardInterrupt
        write_table(table, path, **options)

    monkeypatch.setattr("repeatlab.store.records.pq.write_table", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        writer.finish("complete", {})
    assert not run.done
    assert same(run.updates, frame(rows(0, 3)))
    assert run.evals["value"].tolist() == [1.0]


def test_begin_clears_an_earlier_attempt(tmp_path):
    store = Store(tmp_path)
    run, writer = begin(store)
    writer.updates(rows(0, 3))
    writer.finish("complete", {})
    (run.path / "left over").write_text("x")
    other, _ = begin(store, "other")

    run, writer = begin(store)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "config.json",
        "environment.json",
        "status.json",
    ]
    assert not run.done
    assert run.status == {"status": "running"}
    assert other.config == {"seed": 3}


def test_a_failing_run_keeps_what_was_recorded(tmp_path):
    run, writer = begin(Store(tmp_path))
    writer.updates(rows(0, 4))
    writer.evals(4, {"train": {"loss": 1.0}}, LEDGER)
    writer.fail(OSError("the disk is full"))
    assert not run.done
    assert run.status == {"status": "failed", "error": "OSError: the disk is full"}
    assert same(run.updates, frame(rows(0, 4)))
    assert run.evals["value"].tolist() == [1.0]


def test_a_run_that_is_done_is_neither_interrupted_nor_failed_afterwards(tmp_path):
    run, writer = begin(Store(tmp_path))
    writer.updates(rows(0, 3))
    writer.finish("diverged", {}, update=2)
    writer.close("interrupted")
    writer.fail(RuntimeError("of another run"))
    assert run.status == {"status": "diverged", "update": 2}
    assert run.done


def test_what_is_noted_of_a_run_that_is_done_changes_nothing(tmp_path):
    """The watch of a time limit may wake in the instant in which the run ends."""
    run, writer = begin(Store(tmp_path))
    writer.finish("complete", {})
    run.note("failed", error="took longer than the time limit")
    assert run.status == {"status": "complete"}


def test_a_run_without_its_summary_is_still_interrupted(tmp_path, monkeypatch):
    run, writer = begin(Store(tmp_path))
    writer.updates(rows(0, 3))

    def pressed(table, path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("repeatlab.store.records.pq.write_table", pressed)
    with pytest.raises(KeyboardInterrupt):
        writer.finish("complete", {})
    writer.close("interrupted")
    assert run.status == {"status": "interrupted"}
    assert not list(run.path.glob(".*"))


# What processes that were killed have left.
LEFT = (".checkpoint.pt.00ff00ff00ff00ff.part", ".evals.parquet.0123456789abcdef.part")
KEPT = (".notes", ".nfs00000000018c5b8400000001", ".my.json.backup", "weights-000000005.pt")


def leave(run: Run) -> None:
    for name in LEFT + KEPT:
        (run.path / name).touch()


def test_what_was_left_half_written_goes_where_a_run_goes_on(tmp_path):
    store = Store(tmp_path)
    run, writer = begin(store)
    writer.updates(rows(0, 4))
    leave(run)
    with store.locked(run):
        assert store.resume(run, writer.synced()) is not None
    found = {path.name for path in run.path.iterdir()}
    assert found & {*LEFT, *KEPT} == set(KEPT)
    assert same(run.updates, frame(rows(0, 4)))


def test_what_was_left_half_written_is_gone_before_a_run_is_done(tmp_path, monkeypatch):
    run, writer = begin(Store(tmp_path))
    writer.updates(rows(0, 4))
    leave(run)
    kill_before_the_summary(writer, monkeypatch)
    found = {path.name for path in run.path.iterdir()}
    assert found & {*LEFT, *KEPT} == set(KEPT)


def test_the_locks_lie_beside_the_runs(tmp_path):
    store = Store(tmp_path)
    run, writer = begin(store)
    writer.updates(rows(0, 4))
    with store.locked(run):
        assert not list(run.path.glob(".*"))
        store.resume(run, writer.synced()).finish("complete", {})
        assert store.is_locked(run)


def test_a_run_that_does_not_exist_reads_as_missing(tmp_path):
    run = Store(tmp_path / "nowhere").run("task", "abc")
    assert not run.done
    assert run.status == {"status": "missing"}
    assert run.config == run.summary == {}
    assert not (tmp_path / "nowhere").exists()


# --- damage -------------------------------------------------------------------------------------


FEW = 7  # a bit of every byte at least, and all eight in turn


def finished(root: Path) -> Run:
    """Return a run that is done, with every kind of file that one can have."""
    run, writer = begin(Store(root))
    writer.updates(rows(0, 5))
    writer.evals(0, {"train": {"loss": 2.5}}, LEDGER)
    writer.sampler({"fresh_batch": np.arange(3), "tau": np.arange(3.0)})
    writer.pictures({"digits": np.zeros((2, 4, 4), np.uint8)})
    write_sealed(run.path / "weights-000000005.pt", bytes(range(100)))
    writer.finish("complete", {"ledger": LEDGER, "final": {"test.loss": 1.75}})
    return run


READ = {
    "config.json": lambda run: run.config,
    "environment.json": lambda run: run.environment,
    "summary.json": lambda run: run.status,
    "updates.parquet": lambda run: run.updates,
    "evals.parquet": lambda run: run.evals,
    "sampler.parquet": lambda run: run.sampler,
    "pictures.npz": lambda run: run.pictures,
    "weights-000000005.pt": lambda run: read_sealed(run.path / "weights-000000005.pt"),
}


def flips(content: bytes, *, every: int = 1):
    """Yield `content` with one bit flipped, for every `every`th bit."""
    for place in range(0, 8 * len(content), every):
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        yield spoilt


def test_a_flip_of_any_bit_of_the_summary_is_found(tmp_path):
    """Also of its digest, and of the spaces between."""
    run = finished(tmp_path)
    path = run.path / "summary.json"
    for spoilt in flips(path.read_bytes()):
        path.write_bytes(spoilt)
        with pytest.raises(StoreError, match=r"summary\.json (is damaged|has no digest)"):
            _ = run.summary


@pytest.mark.parametrize("name", READ)
def test_a_flip_in_any_byte_of_a_file_is_found_before_anything_is_read_of_it(tmp_path, name):
    run = finished(tmp_path)
    assert {path.name for path in run.path.iterdir()} == set(READ)
    run.check()
    path = run.path / name
    whole = path.read_bytes()
    for spoilt in flips(whole, every=FEW):
        path.write_bytes(spoilt)
        for read in (Run.check, READ[name]):
            with pytest.raises(StoreError, match=re.escape(str(path))):
                read(run)
    for cut in (b"", whole[:-1], whole + b"\n"):
        path.write_bytes(cut)
        with pytest.raises(StoreError, match=re.escape(str(path))):
            run.check()
    path.unlink()
    if name != "summary.json":  # without it a run is not done
        for read in (Run.check, READ[name]):
            with pytest.raises(StoreError, match=re.escape(str(path))):
                read(run)


def test_a_run_that_an_earlier_version_finished_is_said_to_be_one(tmp_path):
    run = finished(tmp_path)
    summary = run.summary
    write_json(run.path / "summary.json", summary)
    with pytest.raises(StoreError, match=r"summary\.json has no digest: .* an earlier version"):
        _ = run.status


@pytest.mark.parametrize("content", ["[]", "3", '"running"', '{"state": "running"}', "[" * 10**5])
def test_a_status_that_is_none_is_named(tmp_path, content):
    run, _ = begin(Store(tmp_path))
    (run.path / "status.json").write_text(content)
    with pytest.raises(StoreError, match=r"status\.json is damaged: "):
        _ = run.status


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_of_a_stream_with_any_bit_flipped_whole_blocks_are_read_or_none(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flipped") / "evals.arrow"
    content = bytearray(streamed())
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    try:
        table = read_stream(path)
    except StoreError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert len(table.to_pandas()) in (1, 2, 3)


@cache
def streamed() -> bytes:
    """Return three evaluations of an unfinished run, as they lie on disk."""
    with TemporaryDirectory() as root:
        run, writer = begin(Store(root))
        for update in range(3):
            writer.evals(update, {"train": {"loss": 2.5}}, LEDGER)
        return (run.path / "evals.arrow").read_bytes()


def test_a_run_with_a_damaged_configuration_begins_anew(tmp_path, caplog):
    store = Store(tmp_path)
    run, writer = begin(store)
    writer.updates(rows(0, 4))
    path = run.path / "config.json"
    path.write_text(path.read_text().replace("3", "2", 1))
    assert store.resume(run, writer.synced()) is None
    assert f"{path} is damaged" in caplog.messages[-1]


def test_a_run_does_not_go_on_from_records_in_which_a_bit_has_flipped(tmp_path, caplog):
    store = Store(tmp_path)
    run, writer = begin(store)
    writer.updates(rows(0, 4))
    marks = writer.synced()
    path = run.path / "updates.arrow"
    whole = path.read_bytes()
    writer.updates(rows(4, 4))
    for spoilt in flips(whole, every=FEW):
        path.write_bytes(spoilt)
        assert store.resume(run, marks) is None
        assert f"{path} is damaged" in caplog.messages[-1]
    path.write_bytes(whole)
    store.resume(run, marks).close("interrupted")
    assert same(run.updates, frame(rows(0, 4)))


# --- torn streams -------------------------------------------------------------------------------


def test_a_stream_cut_at_any_byte_gives_its_whole_blocks(tmp_path):
    """Cut everywhere from the schema on: a block counts from its last byte, never before."""
    _, writer = begin(Store(tmp_path / "store"))
    stream = next((tmp_path / "store").rglob("task/abc")) / "updates.arrow"
    sizes = []
    for block in range(3):
        writer.updates(rows(4 * block, 4))
        sizes.append(stream.stat().st_size)
    writer.fail(RuntimeError())  # closes the stream with its end marker
    whole = stream.read_bytes()
    assert sizes[-1] < len(whole)

    torn = tmp_path / "torn.arrow"
    for size in [*range(0, sizes[0], 7), *range(sizes[1] - 9, len(whole) + 1)]:
        torn.write_bytes(whole[:size])
        # Padding may follow a block's last value: it is whole a little before its last byte.
        certain = sum(size >= end for end in sizes)
        possible = sum(size > start for start in [0, *sizes[:-1]])
        try:
            table = read_stream(torn)
        except StoreError as error:
            assert str(torn) in str(error)  # noqa: PT017
            assert certain == 0
            continue
        blocks, rest = divmod(len(table), 4)
        assert rest == 0
        assert certain <= blocks <= possible
        assert same(table.to_pandas(), frame(*(rows(4 * k, 4) for k in range(blocks))))
    assert blocks == 3


def test_a_killed_process_leaves_every_block_it_wrote(tmp_path):
    code = """
import os, sys
import numpy as np
from repeatlab.store.records import UPDATES, Store
store = Store(sys.argv[1])
writer = store.begin(store.run("task", "abc"), {}, {})
for block in range(3):
    writer.updates({name: np.arange(4) + 4 * block for name in UPDATES.names})
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    run = Store(tmp_path).run("task", "abc")
    assert run.status == {"status": "running"}
    assert not run.done
    assert run.updates["update"].tolist() == list(range(12))


# --- single files -------------------------------------------------------------------------------


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json(path, {"status": "old"})

    def killed(self, target):
        # The new content is complete on disk at this moment, beside the old file.
        assert json.loads(self.read_text()) == {"status": "new"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"status": "new"})
    assert json.loads(path.read_text()) == {"status": "old"}

    with pytest.raises(TypeError):
        write_json(path, {"status": object()})
    assert json.loads(path.read_text()) == {"status": "old"}
    write_json(path, {"status": "new"})
    assert json.loads(path.read_text()) == {"status": "new"}


def test_two_that_write_one_file_at_once_write_two_files(tmp_path):
    """Two threads, or two processes that have one number in two containers."""
    path = tmp_path / "study.json"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_many_threads_find_one_root_writable(tmp_path):
    together, errors = Barrier(8), []

    def check():
        together.wait()
        for _ in range(1000):
            try:
                Store(tmp_path).check_writable()
            except StoreError as error:
                errors.append(error)

    threads = [Thread(target=check) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_root_that_cannot_be_written_is_named(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / below
    store = Store(root)
    for attempt in (store.check_writable, lambda: begin(store)):
        with pytest.raises(StoreError) as error:
            attempt()
        assert str(root) in str(error.value)
        assert "`runs`" in str(error.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_task_s_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "task").write_text("in the way")
    with pytest.raises(StoreError) as error:
        begin(Store(tmp_path))
    assert str(tmp_path / "task" / "abc") in str(error.value)


def test_a_writable_root_is_made_and_left_empty(tmp_path):
    Store(tmp_path / "new" / "root").check_writable()
    assert list((tmp_path / "new" / "root").iterdir()) == []


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../up", "/etc", "a b", "-x", "a\n", "a\0"])
def test_names_that_could_leave_the_directory_are_refused(tmp_path, name):
    store = Store(tmp_path / "runs")
    for use in (
        lambda: store.run(name, "abc"),
        lambda: store.run("task", name),
        lambda: store.write_study(name, {}),
        lambda: store.read_study(name),
    ):
        with pytest.raises(ValueError, match="must consist of letters, digits") as error:
            use()
        assert repr(name) in str(error.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_link_in_a_run_s_place_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    store = Store(tmp_path / "runs")
    run = store.run("task", "abc")
    run.path.parent.mkdir(parents=True)
    run.path.symlink_to(outside)
    with pytest.raises(StoreError, match="abc cannot be written"):
        store.begin(run, {}, {})
    assert [path.name for path in outside.iterdir()] == ["kept"]


# --- studies ------------------------------------------------------------------------------------


def test_a_study_reads_back_as_written(tmp_path):
    store = Store(tmp_path)
    store.write_study("first", {"runs": [1, 2]})
    store.write_study("first", {"runs": [3]})
    assert store.read_study("first") == {"runs": [3]}
    # Whoever reads it without this library finds plain JSON.
    text = (tmp_path / "studies" / "first.json").read_text()
    found = json.loads(text)
    assert found == {"runs": [3], "sha256": found["sha256"]}
    before, _, _ = text.partition(found["sha256"])
    assert sha256(before.encode()).hexdigest() == found["sha256"]


def test_an_unknown_study_is_answered_with_those_that_are_there(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="holds no study 'third' \\(it holds: none\\)"):
        store.read_study("third")
    for name in ("second", "first"):
        store.write_study(name, {})
    with pytest.raises(StoreError, match="no study 'third' \\(it holds: first, second\\)") as error:
        store.read_study("third")
    assert str(tmp_path) in str(error.value)


def test_reading_records_needs_no_torch():
    code = "import sys, repeatlab.store.records; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
