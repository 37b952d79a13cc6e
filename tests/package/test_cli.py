"""The command line as a user meets it: messages, exit status, nothing half-written."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile

import pytest

from repeatlab.cli import main

STUDY = """
notebook: 10_supervised
parameters:
  study:
    name: tiny
    tasks: {{digits: {task}}}
    max_updates: {updates}
    seeds: 1
    evaluation: {{every: 5}}
    methods: {{arm: {method}}}
"""
TASK = "{name: supervised, lr: 5e-2}"


@pytest.fixture
def repeatlab(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command line in an empty directory, in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["repeatlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    return call


def _write(directory, *, task=TASK, updates="10", method="{}"):
    path = directory / "tiny.yaml"
    path.write_text(STUDY.format(task=task, updates=updates, method=method))
    return path


def test_run_trains_and_says_what_it_did(tmp_path, repeatlab):
    path = _write(tmp_path, method="{mapping: {name: linear, t: 1e-1}}")
    for trained, stored in ((1, 0), (0, 1)):
        code, out, _ = repeatlab("run", path, "--workers", 0)
        assert code == 0
        assert out == f"1 run: 1 complete ({trained} trained now, {stored} in the store)\n"


def test_a_process_of_its_own_ends_with_status_2_and_one_message(tmp_path):
    path = _write(tmp_path, updates="0")
    command = [sys.executable, "-m", "repeatlab", "run", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: {path}: parameters.study: max_updates: must be greater than or equal to 1; not 0\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "{name: superviced}"}, "tasks.digits: unknown task 'superviced'; did you mean"),
        ({"task": "{name: supervised, dataset: cifar}"}, "dataset: unknown dataset 'cifar'; did"),
        (
            {"task": "{name: supervised, lrr: 1}"},
            "tasks.digits.lrr: unknown key; did you mean 'lr'",
        ),
        (
            {"method": "{mapping: {name: lineer}}"},
            "mapping: unknown mapping 'lineer'; did you mean",
        ),
        (
            {"method": "{mapping: {name: linear, t: 0}}"},
            "t must be a positive, finite number, not 0",
        ),
        (
            {"method": "{mapping: {name: linear, t: .nan}}"},
            "mapping.t: must be a finite number; not nan",
        ),
        ({"updates": "0"}, "max_updates: must be greater than or equal to 1; not 0"),
        ({"updates": "10\n    extra: 1"}, "extra: unknown key"),
        (
            {"task": "{name: supervised, lr: '1e-3'}"},
            "tasks.digits.lr: must be a valid number; not '1e-3'",
        ),
        (
            {"method": "linear"},
            "methods.arm: must be a mapping with keys among apply, fresh_views",
        ),
        (
            {"method": "{mapping: {name: quantile, levels: auto}}"},
            "methods.arm.mapping.levels: must be a valid list; not 'auto'",
        ),
    ],
)
def test_bad_input_names_file_and_field_and_writes_nothing(tmp_path, repeatlab, changes, message):
    path = _write(tmp_path, **changes)
    code, out, err = repeatlab("run", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {path}: parameters.study: ")
    assert message in err
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_run_directory_that_cannot_be_written(tmp_path, repeatlab):
    code, _, err = repeatlab("run", _write(tmp_path), "--runs", tmp_path / "tiny.yaml" / "runs")
    assert code == 2
    place = tmp_path / "tiny.yaml" / "runs"
    assert err.startswith(f"Error: the run directory {place} cannot be written: ")


@pytest.mark.parametrize("command", ["run tiny.yaml", "export --to q", "status", "verify"])
def test_a_store_that_is_a_file(tmp_path, repeatlab, command):
    _write(tmp_path)
    code, out, err = repeatlab(*command.split(), "--runs", "tiny.yaml")
    assert (code, out) == (2, "")
    assert err.endswith("Error: Invalid value for '--runs': Directory 'tiny.yaml' is a file.\n")


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_an_export_of_no_study_or_to_no_directory_names_it(tmp_path, repeatlab, form):
    export = ["export", "--as", form, "--to"]
    code, out, err = repeatlab(*export, "q", "--runs", "nope")
    assert (code, out) == (2, "")
    assert err == "Error: nope holds no study; `repeatlab run` makes one\n"
    assert repeatlab("run", _write(tmp_path), "--workers", 0)[0] == 0
    assert repeatlab(*export, "q", "other")[0] == 2
    code, _, err = repeatlab(*export, "q", "--plan", "other")
    assert (code, err) == (2, "Error: runs holds no study of a plan 'other'\n")
    assert not (tmp_path / "q").exists()
    code, _, err = repeatlab(*export, "tiny.yaml")
    assert code == 2
    assert err.startswith("Error: tiny.yaml")
    assert "cannot be written: " in err
    assert "Errno" not in err
    assert repeatlab(*export, "q") == (0, "1 run written into q\n", "")
    if form == "parquet":
        done = "q: 0 runs new in runs\n"
        assert repeatlab("import", "q") == (0, done, "")


def test_an_export_into_a_directory_that_is_read_only(tmp_path, repeatlab, monkeypatch):
    assert repeatlab("run", _write(tmp_path), "--workers", 0)[0] == 0

    def refuse(**_):  # as to all but root
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    said = "Error: q cannot be written: Permission denied\n"
    assert repeatlab("export", "--to", "q") == (2, "", said)


def test_a_study_at_a_file_s_top_is_sent_to_its_place(tmp_path, repeatlab):
    (tmp_path / "mine.yaml").write_text("name: mine\ntasks: {}\nmethods: {}\n")
    said = "Error: mine.yaml: tasks: a study must stand under `parameters: study:`\n"
    assert repeatlab("run", "mine.yaml") == (2, "", said)


def test_a_corrupt_data_file_is_named_and_nothing_is_written(tmp_path, repeatlab, monkeypatch):
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (batches / name).write_bytes(b"not what it should be")
    monkeypatch.setenv("REPEATLAB_DATA", str(tmp_path / "data"))
    code, _, err = repeatlab("run", _write(tmp_path, task="{name: supervised, dataset: cifar10}"))
    assert code == 2
    assert str(batches / "data_batch_1") in err
    assert not list(tmp_path.glob("runs/supervised/*"))


def test_a_missing_parameter_file(repeatlab):
    code, _, err = repeatlab("run", "absent.yaml")
    assert (code, err) == (2, "Error: absent.yaml: cannot be read: No such file or directory\n")


@pytest.mark.parametrize("command", ["figures", "paper"])
def test_an_unknown_profile(command, repeatlab):
    code, _, err = repeatlab(command, "--profile", "quik")
    assert code == 2
    assert "did you mean 'quick'?" in err


def test_a_profile_without_a_paper(repeatlab):
    code, _, err = repeatlab("paper", "--profile", "tuning")
    assert code == 2
    assert "the profile 'tuning' has no paper.yaml" in err


def test_verify_of_a_store_that_is_not_there(repeatlab):
    code, _, err = repeatlab("verify", "--runs", "nowhere")
    assert (code, err) == (2, "Error: nowhere is not there: name the run store with --runs\n")


def test_help_does_not_wait_for_torch(tmp_path):
    code = "import sys, repeatlab.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_status_counts_the_states_of_every_study_and_says_why(tmp_path, repeatlab):
    assert repeatlab("run", _write(tmp_path), "--workers", 0)[0] == 0
    code, out, _ = repeatlab("status")
    assert code == 0
    header, _, row = out.splitlines()
    assert dict(zip(header.split()[-6:], row.split()[1:], strict=True)) == {
        "complete": "1",
        **dict.fromkeys(["diverged", "running", "interrupted", "failed", "missing"], "0"),
    }
    (run,) = (tmp_path / "runs" / "supervised").glob("[!.]*")
    (run / "summary.json").unlink()
    (run / "status.json").write_text('{"status": "failed", "error": "MemoryError: too little"}')
    code, out, _ = repeatlab("status", "tiny")
    assert code == 0
    place = run.relative_to(tmp_path)
    line = f"failed digits arm seed 0 ({place}): MemoryError: too little"
    assert out.splitlines()[-1] == line
    (run / "status.json").write_text('{"sta')
    code, out, _ = repeatlab("status")
    assert code == 0
    assert f"failed digits arm seed 0 ({place}): {place / 'status.json'} is damaged: " in out


def test_status_without_a_study(repeatlab):
    assert repeatlab("status") == (
        2,
        "",
        "Error: runs holds no study; `repeatlab run` makes one\n",
    )
    code, _, err = repeatlab("status", "other")
    assert code == 2
    assert "holds no study 'other' (it holds: none)" in err


def test_verify_names_a_damaged_run_and_remove_makes_room_for_it(tmp_path, repeatlab):
    path = _write(tmp_path)
    assert repeatlab("run", path, "--workers", 0)[0] == 0
    assert repeatlab("verify") == (0, "1 run read, 0 damaged\n", "")
    (run,) = (tmp_path / "runs" / "supervised").glob("[!.]*")
    (run / "updates.parquet").write_bytes(b"PAR1")
    code, out, _ = repeatlab("verify")
    assert code == 1
    damaged, counts = out.splitlines()
    file = run.relative_to(tmp_path) / "updates.parquet"
    assert damaged == f"damaged: {file} is damaged: its content does not fit its digest"
    assert counts == "1 run read, 1 damaged"
    code, out, _ = repeatlab("verify", "--remove")
    assert (code, out.splitlines()[1]) == (0, "1 run read, 1 damaged and removed")
    assert not run.exists()
    code, out, _ = repeatlab("run", path, "--workers", 0)
    assert (code, out) == (0, "1 run: 1 complete (1 trained now, 0 in the store)\n")
    assert repeatlab("verify") == (0, "1 run read, 0 damaged\n", "")
