"""A run that was stopped or killed, and gone on with, is the run that never stopped."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from io import BytesIO
from pathlib import Path

import pytest
import torch
from every_method import METHODS, REFUSED, config, tried

from repeatlab.core.files import write_sealed
from repeatlab.store.records import Run, Store
from repeatlab.training import checkpoint, making
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.one_run import CheckpointPlan, Training
from repeatlab.training.prerequisites import prerequisites

EVERY_UPDATE = CheckpointPlan(updates=1)
# What each method has to carry over a stop, beside what all have.
STATEFUL = (
    "fixed3",
    "quantile",
    "until",
    "cosine_repeats",
    "linear_linear",
    "fresh_views",
    "hard_mining",
    "prioritized",
    "online",
    "importance_linear",
    "selective",
    "rho_loss",
    "step_size",
    "fresh_samples",
    "spaced",
    "isgd",
    "proximal",
    "multiplicity",
    "measured",
)


def evaluated(name: str, method: str | dict) -> RunConfig:
    """Return the run of a few updates, evaluated now and then."""
    run = config(name, method)
    evaluation = run.evaluation.model_copy(update={"splits": ("train",), "every": 3})
    return run.model_copy(update={"evaluation": evaluation})


def same_record(first: Run, second: Run) -> None:
    """Hold two runs to the same end, bit for bit, but for the time they took."""

    def timeless(frame):
        return frame[[name for name in frame if "seconds" not in name]]

    assert first.status == second.status
    assert first.summary["state_sha256"] == second.summary["state_sha256"]
    assert timeless(first.updates).equals(timeless(second.updates))
    assert timeless(first.evals).equals(timeless(second.evals))
    assert first.sampler.equals(second.sampler)
    ledgers = [
        {name: count for name, count in run.summary["ledger"].items() if "seconds" not in name}
        for run in (first, second)
    ]
    assert ledgers[0] == ledgers[1]
    assert first.summary["final"] == second.summary["final"]


@pytest.fixture
def stopping(monkeypatch):
    """Return a function that makes runs of this process stop after their next `updates` updates."""
    original = Training.visit
    left = [0]

    def visit(self):
        make = original(self)

        def counted(batch):
            make(batch)
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)

        return counted

    monkeypatch.setattr(Training, "visit", visit)
    return lambda updates: left.__setitem__(0, updates)


@pytest.mark.parametrize(("name", "method"), tried(STATEFUL))
def test_a_run_stopped_at_updates_is_the_unbroken_run(name, method, stopping, tmp_path):
    if (name, method) in REFUSED:
        return  # `test_tasks` holds the refusal to its reason
    run = evaluated(name, method)
    unbroken = train(run, tmp_path / "unbroken")
    for needed in prerequisites(run):
        train(needed, tmp_path / "stopped")
    for updates in (1, 2, 1):  # after update 1, 3 and 4: in mid-repeat and between batches
        stopping(updates)
        with pytest.raises(KeyboardInterrupt):
            train(run, tmp_path / "stopped")
        directory = Store(tmp_path / "stopped").run(name, run.run_id)
        assert directory.status == {"status": "interrupted"}
        assert not directory.done
    stopping(0)
    same_record(unbroken, train(run, tmp_path / "stopped"))


def test_every_stateful_method_is_a_method():
    assert set(STATEFUL) <= set(METHODS)


def _train_until_killed(data: dict, runs: Path, updates: int) -> None:
    """Train in a process of its own that SIGKILLs itself right after an update."""
    original = Training.visit
    left = [updates]

    def visit(self):
        make = original(self)

        def counted(batch):
            make(batch)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return counted

    Training.visit = visit
    train(RunConfig.from_json(data), runs, plan=EVERY_UPDATE)


def killed(run: RunConfig, runs: Path, updates: int) -> None:
    """Train `run` in another process and kill it after so many updates."""
    process = multiprocessing.get_context("fork").Process(
        target=_train_until_killed, args=(run.to_json(), runs, updates)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def killed_run(tmp_path):
    """Return a supervised run that was killed after five of its seven updates, and its handle."""
    run = evaluated("supervised", "fixed3")
    killed(run, tmp_path / "killed", 5)
    return run, Store(tmp_path / "killed").run("supervised", run.run_id)


def test_a_killed_run_goes_on_from_its_last_checkpoint(killed_run, tmp_path, monkeypatch):
    run, directory = killed_run
    assert directory.status == {"status": "running"}
    states = []
    original = Training.load_state_dict
    monkeypatch.setattr(
        Training,
        "load_state_dict",
        lambda self, state: (states.append(state), original(self, state))[1],
    )
    same_record(train(run, tmp_path / "unbroken"), train(run, tmp_path / "killed"))
    # The kill fell right after update 5, whose checkpoint had not begun.
    assert [state["updates"]["repeater"]["updates"] for state in states] == [4]
    assert not list(directory.path.glob("checkpoint*")) + list(directory.path.glob("*.arrow"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(killed_run, tmp_path, damage, caplog):
    run, directory = killed_run
    path = directory.path / checkpoint.CURRENT
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    spoilt = {"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(spoilt[damage])
    states = list(checkpoint.load(directory.path))
    assert [state["updates"]["repeater"]["updates"] for state in states] == [3]
    assert [str(path) in message for message in caplog.messages] == [True] * (damage != "missing")
    same_record(train(run, tmp_path / "unbroken"), train(run, tmp_path / "killed"))


def test_a_checkpoint_with_a_flipped_bit_is_passed_over(killed_run):
    """Whatever torch would make of it: it does not get to see it."""
    _, directory = killed_run
    path = directory.path / checkpoint.CURRENT
    whole = path.read_bytes()
    for place in range(0, len(whole), 1 + len(whole) // 150):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        (state,) = checkpoint.load(directory.path)
        assert state["updates"]["repeater"]["updates"] == 3


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04"])
def test_a_file_in_a_checkpoint_s_place_that_is_none_is_passed_over(killed_run, content):
    _, directory = killed_run
    path = directory.path / checkpoint.CURRENT
    write_sealed(path, content)  # whole, but nothing that torch can load
    (state,) = checkpoint.load(directory.path)
    assert state["updates"]["repeater"]["updates"] == 3
    path.unlink()
    path.mkdir()
    (state,) = checkpoint.load(directory.path)
    assert state["updates"]["repeater"]["updates"] == 3


def test_records_with_a_flipped_bit_fall_back_to_what_is_whole(killed_run, tmp_path):
    """In the last block: to the previous checkpoint. In the first: to a new start."""
    run, directory = killed_run
    stream = directory.path / "updates.arrow"
    content = bytearray(stream.read_bytes())
    for place in (-60, 200):
        content[place] ^= 1
        stream.write_bytes(content)
        same_record(
            train(run, tmp_path / "unbroken"),
            train(run, shutil.copytree(tmp_path / "killed", tmp_path / str(place))),
        )


def test_without_any_whole_checkpoint_the_run_begins_anew(killed_run, tmp_path):
    run, directory = killed_run
    for name in (checkpoint.CURRENT, checkpoint.PREVIOUS):
        (directory.path / name).write_bytes(b"no checkpoint")
    assert list(checkpoint.load(directory.path)) == []
    same_record(train(run, tmp_path / "unbroken"), train(run, tmp_path / "killed"))


def test_a_torn_last_block_falls_back_to_what_the_records_still_hold(killed_run, tmp_path):
    run, directory = killed_run
    stream = directory.path / "updates.arrow"
    stream.write_bytes(stream.read_bytes()[:-40])
    assert len(directory.updates) == 3  # the block of update 4 is gone
    same_record(train(run, tmp_path / "unbroken"), train(run, tmp_path / "killed"))


def test_rows_after_the_checkpoint_are_made_again_not_kept_twice(killed_run, tmp_path):
    run, directory = killed_run
    (directory.path / checkpoint.CURRENT).unlink()
    assert len(directory.updates) == 4
    same_record(train(run, tmp_path / "unbroken"), train(run, tmp_path / "killed"))


def test_another_version_s_checkpoint_is_not_gone_on_from(killed_run, tmp_path, monkeypatch):
    run, _ = killed_run
    described = making.describe
    monkeypatch.setattr(making, "describe", lambda device: described(device) | {"commit": "other"})
    monkeypatch.setattr(Training, "load_state_dict", lambda *_: pytest.fail("went on"))
    same_record(train(run, tmp_path / "unbroken"), train(run, tmp_path / "killed"))


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint ran code",))

    content = BytesIO()
    torch.save(Evil(), content)
    write_sealed(tmp_path / checkpoint.CURRENT, content.getvalue())
    assert list(checkpoint.load(tmp_path)) == []


def test_ctrl_c_leaves_a_checkpoint_and_the_handler_as_it_was(tmp_path, monkeypatch):
    run = evaluated("supervised", "fixed3")
    before = signal.getsignal(signal.SIGINT)
    updates = []
    step = Training.visit

    def visit(self):
        make = step(self)

        def interrupted(batch):
            make(batch)
            updates.append(batch.index)
            if len(updates) == 4:
                os.kill(os.getpid(), signal.SIGINT)

        return interrupted

    monkeypatch.setattr(Training, "visit", visit)
    with pytest.raises(KeyboardInterrupt, match="after update 4"):
        train(run, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is before
    same_record(train(run, tmp_path / "unbroken"), train(run, tmp_path / "stopped"))
    assert len(updates) == 4 + 7 + 3
