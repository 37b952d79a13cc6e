"""What a store says of its runs is what lies in it."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import process_time

import pandas as pd
import pytest
from click.testing import CliRunner

from repeatlab.analysis.frames import load
from repeatlab.cli import cli, main
from repeatlab.core.files import StoreError, write_json
from repeatlab.store.records import Store
from repeatlab.studies.study import run_study
from repeatlab.studies.verification import damaged, remove, study_states, summary_table

STUDY = {
    "name": "small",
    "tasks": {"digits": {"name": "supervised", "width": 2, "batch_size": 16}},
    "methods": {"standard": {}, "fixed2": {"mapping": {"name": "constant", "repeats": 2}}},
    "seeds": 1,
    "max_updates": 4,
    "evaluation": {"every": 2, "splits": ["train"], "test": False, "keep": 1},
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


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of a file, by default in its middle."""
    content = bytearray(path.read_bytes())
    content[place if place >= 0 else len(content) // 2] ^= 4
    path.write_bytes(content)


def test_the_states_of_ten_thousand_runs_take_less_than_five_seconds(store):
    """Of this process, told from three hundred: the machine may have other things to do."""
    planned = store.read_study("small")["runs"][0]
    number, kind = 300, planned["run"][0]
    for copy in range(number):
        shutil.copytree(first(store).path, store.run(kind, f"copy{copy}").path)
    runs = [planned | {"run": [kind, f"copy{copy}"]} for copy in range(number)]
    store.write_study("many", {"runs": runs})
    begin = process_time()
    assert summary_table(store, ["many"])["complete"].tolist() == [number]
    assert (process_time() - begin) / number * 10_000 < 5


def test_a_whole_store_has_no_damage(store):
    assert reasons(store) == []


def test_a_flip_in_any_file_of_a_run_or_study_is_found_and_nothing_else(store):
    run = first(store)
    files = [*run.path.iterdir(), store.root / "studies" / "small.json"]
    assert sorted(path.name for path in files) == [
        "config.json",
        "environment.json",
        "evals.parquet",
        "small.json",
        "summary.json",
        "updates.parquet",
        "weights-000000004.pt",
    ]
    for path in files:
        whole = path.read_bytes()
        flip(path)
        (found,) = damaged(store)
        assert found.path == (path if path.name == "small.json" else run.path)
        assert str(path) in found.reason
        path.write_bytes(whole)
    assert reasons(store) == []


def test_a_run_under_another_s_name_is_found(store):
    run = first(store)
    run.path.rename(run.path.with_name("0123456789abcdef"))
    (found,) = reasons(store)
    assert found.endswith(f"0123456789abcdef/summary.json is of the run {run.path.name}")


def test_a_configuration_that_was_damaged_before_the_run_s_end_is_found(store):
    """Then its digest in the summary is that of the damaged file."""
    run = first(store)
    writer = store.begin(run, {"seed": 3}, {})
    flip(run.path / "config.json")
    writer.finish("complete", {})
    (found,) = reasons(store)
    assert "config.json is damaged" in found


def test_what_is_damaged_is_made_again_once_it_is_removed(store):
    before = first(store).updates.drop(columns="seconds")
    flip(first(store).path / "updates.parquet")
    flip(store.root / "studies" / "small.json")
    for damage in list(damaged(store)):
        remove(store, damage.path)
    assert reasons(store) == []
    assert run_study(STUDY, store.root, workers=0).trained == 1
    assert reasons(store) == []
    assert study_states(store, "small")["state"].tolist() == ["complete", "complete"]
    pd.testing.assert_frame_equal(first(store).updates.drop(columns="seconds"), before)


SUMMARY = ["summary.json"]
FILES = ["config.json", "environment.json", "evals.parquet", "weights-000000004.pt", *SUMMARY]


@pytest.mark.parametrize(
    ("command", "read"), [("status", SUMMARY), ("status --all", FILES), ("verify", FILES)]
)
def test_commands_name_a_damaged_file_that_they_read_in_one_line(store, monkeypatch, command, read):
    monkeypatch.setattr("sys.argv", ["repeatlab", *command.split(), "--runs", str(store.root)])
    for name in FILES:
        path = first(store).path / name
        whole = path.read_bytes()
        flip(path)
        code, out, err = spoken(main)
        assert (code, err) == (int(command == "verify"), "")
        said = [line for line in out.splitlines() if str(path) in line]
        assert len(said) == (name in read)
        path.write_bytes(whole)


def test_records_with_a_damaged_file_are_not_read(store):
    path = first(store).path / "evals.parquet"
    flip(path)
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        _ = load(store.root, "small").evals


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_handle_that_leads_out_of_the_store_is_named(store, monkeypatch, command):
    path = store.root / "studies" / "small.json"
    study = store.read_study("small")
    study["runs"][0]["run"][1] = "../x"
    write_json(path, study)
    monkeypatch.setattr("sys.argv", ["repeatlab", command, "--runs", str(store.root)])
    code, out, err = spoken(main)
    assert code == (1 if command == "verify" else 2)
    (line,) = [line for line in (out + err).splitlines() if str(path) in line]
    assert "has no digest" in line


def spoken(command) -> tuple[int, str, str]:
    """Return the exit status of a command of this process, and what it says."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def test_of_a_run_that_is_a_link_the_link_is_removed(store, tmp_path_factory):
    run, elsewhere = first(store), tmp_path_factory.mktemp("elsewhere") / "run"
    run.path.rename(elsewhere)
    run.path.symlink_to(elsewhere)
    flip(elsewhere / "updates.parquet")
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
        remove(store, first(store).path)


def test_every_state_is_told(store):
    run = first(store)
    assert study_states(store, "small")["state"].tolist() == ["complete", "complete"]
    (run.path / "summary.json").unlink()
    row = study_states(store, "small").iloc[0]
    assert (row.state, row.task, row.method, row.seed) == ("interrupted", "digits", "standard", 0)
    run.note("failed", error="MemoryError: too little")
    assert study_states(store, "small").iloc[0].reason == "MemoryError: too little"
    with store.locked(run):
        assert study_states(store, "small").iloc[0].state == "running"
    assert study_states(store, "small").iloc[0].state == "failed"
    store.begin(run, run.config, {}).finish("diverged", {}, reason="the loss is nan")
    row = study_states(store, "small").iloc[0]
    assert (row.state, row.reason) == ("diverged", "the loss is nan")
    table = json.loads(summary_table(store, ["small"]).to_json(orient="index"))
    counts = {"complete": 1, "diverged": 1, "running": 0, "interrupted": 0, "failed": 0}
    assert table == {"small": counts | {"missing": 0}}
