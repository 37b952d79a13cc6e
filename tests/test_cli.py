"""The command line as a user meets it: messages, exit status, nothing half-written."""

from __future__ import annotations

import subprocess
import sys

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
        f"Error: {path}: parameters.study: max_updates: "
        "Input should be greater than or equal to 1, not 0\n"
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
        ({"method": "{mapping: {name: linear, t: .nan}}"}, "mapping.t: must be a finite number or"),
        ({"updates": "0"}, "max_updates: Input should be greater than or equal to 1, not 0"),
        ({"updates": "10\n    extra: 1"}, "extra: unknown key"),
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
    (tmp_path / "runs").write_text("a file is in the way")
    code, _, err = repeatlab("run", _write(tmp_path))
    assert code == 2
    assert err.startswith("Error: the run directory runs cannot be written: ")


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


def test_an_unknown_profile(repeatlab):
    code, _, err = repeatlab("figures", "--profile", "quik")
    assert code == 2
    assert "did you mean 'quick'?" in err


def test_help_does_not_wait_for_torch(tmp_path):
    code = "import sys, repeatlab.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
