"""What a store says of its runs is what lies in it."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from repeatlab.cli import cli
from repeatlab.core.files import StoreError
from repeatlab.store.records import Store
from repeatlab.studies.study import run_study
from repeatlab.studies.verification import damaged, remove, study_states, summary_table

STUDY = {
    "name": "small",
    "tasks": {"digits": {"name": "supervised", "width": 2, "batch_size": 16}},
    "methods": {"standard": {}, "fixed2": {"mapping": {"name": "constant", "repeats": 2}}},
    "seeds": 1,
    "max_updates": 4,
    "evaluation": {"every": 2, "splits": ["train"], "test": False},
}


@pytest.fixture
def store(tmp_path):
    """Return a store that holds a whole study of two runs."""
    run_study(STUDY, tmp_path, workers=0)
    return Store(tmp_path)


def first(store):
    """Return the study's first run."""
    return store.run(*store.read_study("small")["runs"][0]["run"])


def reasons(store) -> list[str]:
    return [damage.reason for damage in damaged(store)]


def rewrite(run, change) -> None:
    """Write the updates of a run anew, changed."""
    path = run.path / "updates.parquet"
    pq.write_table(pa.Table.from_pandas(change(pd.read_parquet(path)), preserve_index=False), path)


def test_a_whole_store_has_no_damage(store):
    assert reasons(store) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda u: u.iloc[:-1], "holds 3 updates, the ledger 4"),
        (lambda u: pd.concat([u, u.iloc[-1:]]), "every update once, in order"),
        (lambda u: u.iloc[::-1], "every update once, in order"),
        (lambda u: u.drop(columns="lr"), "columns"),
        (lambda u: u.assign(loss=[1.0, float("nan"), 1.0, 1.0]), "3 updates, the ledger 4"),
    ],
)
def test_changed_updates_are_found(store, change, reason):
    rewrite(first(store), change)
    (found,) = reasons(store)
    assert reason in found


def test_torn_and_contradictory_files_are_found(store):
    run = first(store)
    content = (run.path / "updates.parquet").read_bytes()
    for name, spoilt in (
        ("updates.parquet", content[: len(content) // 2]),
        ("status.json", b'{"status": "diverged"}'),
        ("summary.json", b'{"status": "compl'),
    ):
        whole = (run.path / name).read_bytes()
        (run.path / name).write_bytes(spoilt)
        assert len(reasons(store)) == 1
        (run.path / name).write_bytes(whole)
    (run.path / "evals.parquet").unlink()
    assert len(reasons(store)) == 1


def test_a_damaged_run_that_is_removed_is_made_again(store):
    before = first(store).updates.drop(columns="seconds")
    rewrite(first(store), lambda u: u.iloc[:-1])
    for damage in damaged(store):
        remove(store, damage.run)
    assert study_states(store, "small")["state"].tolist() == ["missing", "complete"]
    assert run_study(STUDY, store.root, workers=0).trained == 1
    assert reasons(store) == []
    pd.testing.assert_frame_equal(first(store).updates.drop(columns="seconds"), before)


def test_of_a_run_that_is_a_link_the_link_is_removed(store, tmp_path_factory):
    run, elsewhere = first(store), tmp_path_factory.mktemp("elsewhere") / "run"
    run.path.rename(elsewhere)
    run.path.symlink_to(elsewhere)
    rewrite(run, lambda u: u.iloc[:-1])
    done = CliRunner().invoke(cli, ["verify", "--runs", str(store.root), "--remove"])
    assert (done.exit_code, done.exception) == (0, None)
    assert "2 runs read, 1 damaged and removed" in done.output
    assert not run.path.is_symlink()
    assert (elsewhere / "updates.parquet").exists()
    assert run_study(STUDY, store.root, workers=0).trained == 1


def test_a_run_that_cannot_be_deleted_is_said_to_be(store, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refused)
    with pytest.raises(StoreError, match=r"cannot be deleted: Permission denied"):
        remove(store, first(store))


def test_every_state_is_told(store):
    run = first(store)
    assert study_states(store, "small")["state"].tolist() == ["complete", "complete"]
    summary = (run.path / "summary.json").read_text()
    (run.path / "summary.json").unlink()
    row = study_states(store, "small").iloc[0]
    assert (row.state, row.task, row.method, row.seed) == ("interrupted", "digits", "standard", 0)
    run.note("failed", error="MemoryError: too little")
    assert study_states(store, "small").iloc[0].reason == "MemoryError: too little"
    with store.locked(run):
        assert study_states(store, "small").iloc[0].state == "running"
    assert study_states(store, "small").iloc[0].state == "failed"
    (run.path / "summary.json").write_text(summary)
    run.note("diverged", reason="the loss is nan")
    row = study_states(store, "small").iloc[0]
    assert (row.state, row.reason) == ("diverged", "the loss is nan")
    table = json.loads(summary_table(store, ["small"]).to_json(orient="index"))
    counts = {"complete": 1, "diverged": 1, "running": 0, "interrupted": 0, "failed": 0}
    assert table == {"small": counts | {"missing": 0}}
