"""Studies go on when workers die, hang or are told to stop: real processes, real signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from repeatlab.execution import Places
from repeatlab.records import Store
from repeatlab.study import Study, StudyError, run_studies

SLOW = {"delay_ms": 40}


def study(*, updates: int = 100, loader: dict | None = None, seeds: int = 1, **fields) -> Study:
    """Return a study of small runs that a slow loader stretches."""
    return Study.of(
        **{
            "name": "small",
            "tasks": {"digits": {"name": "supervised", "width": 2, "batch_size": 16}},
            "methods": {"standard": {}},
            "seeds": seeds,
            "max_updates": updates,
            "evaluation": {"every": 10, "splits": ["train"], "test": False},
            "loader": loader or {},
            **fields,
        }
    )


def only_run(study: Study, root: Path):
    """Return the study's first run in the store at `root`."""
    config = study.planned()[0].config
    return Store(root).run(config.task.name, config.run_id)


def until(condition, *, seconds: float = 180) -> None:
    """Wait for something that another process does; a test that waits in vain fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the other process did not get there"
        time.sleep(0.02)


def recorded(run) -> int:
    """Return how many updates a run under way has written."""
    try:
        return len(run.updates)
    except Exception:
        return 0


def holder(run) -> psutil.Process | None:
    """Return the process below this one that holds the run's lock."""
    lock = str(run.path.with_name(f".{run.path.name}.lock"))
    for process in psutil.Process().children(recursive=True):
        try:
            if any(file.path == lock for file in process.open_files()):
                return process
        except psutil.Error:
            continue
    return None


def _timeless(run):
    return run.updates.drop(columns="seconds")


def test_a_study_survives_a_worker_killed_in_the_middle_of_a_run(tmp_path):
    slow = study(loader=SLOW)
    run = only_run(slow, tmp_path / "killed")

    def execute():
        report = run_studies([slow], tmp_path / "killed", places=Places(workers=1))
        assert report.retried == {run.path.name: 2}

    context = multiprocessing.get_context("fork")
    process = context.Process(target=execute)
    process.start()
    until(lambda: recorded(run) >= 20)
    until(lambda: holder(run) is not None)
    holder(run).send_signal(signal.SIGKILL)
    process.join(120)
    assert process.exitcode == 0
    run_studies([slow], tmp_path / "unbroken", workers=0)
    assert _timeless(run).equals(_timeless(only_run(slow, tmp_path / "unbroken")))


def test_a_run_that_hangs_ends_at_the_time_limit_and_the_others_finish(tmp_path):
    both = study(updates=3, methods={"standard": {}, "cosine": {"schedule": {"name": "cosine"}}})
    run_studies([both], tmp_path, workers=0)
    hanging = study(
        updates=3, loader={"delay_ms": 600_000}, methods={"standard": {}}, name="hanging"
    )
    with pytest.raises(StudyError, match="1 of 3 runs failed") as error:
        run_studies([both, hanging], tmp_path, places=Places(workers=1, time_limit=2))
    assert "time limit" in str(error.value)
    assert only_run(hanging, tmp_path).status["error"] == "took longer than the time limit of 2 s"
    assert sorted(error.value.report.status.values()) == ["complete", "complete", "failed"]


def test_two_processes_that_start_one_run_train_it_once(tmp_path):
    slow = study(updates=30, loader=SLOW)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_studies, args=([slow], tmp_path), kwargs={"workers": 0})
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    run = only_run(slow, tmp_path)
    assert run.environment["attempts"] == 1
    assert len(run.updates) == 30


def test_ctrl_c_leaves_a_checkpoint_and_the_next_call_goes_on(tmp_path):
    slow = study(loader=SLOW)
    folder = tmp_path / "params" / "test"
    folder.mkdir(parents=True)
    fields = slow.model_dump(mode="json", exclude_unset=True)
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({"notebook": "10_supervised", "parameters": {"study": fields}}))
    store = tmp_path / "runs"
    command = [sys.executable, "-m", "repeatlab", "run", str(file), "--runs", str(store)]
    run = only_run(slow, store)
    process = subprocess.Popen(
        [*command, "--workers", "1"], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    until(lambda: recorded(run) >= 10)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert run.status["status"] == "interrupted", errors
    assert 10 <= recorded(run) < 100
    subprocess.run([*command, "--workers", "0"], check=True, timeout=120, capture_output=True)
    assert run.environment["attempts"] == 2
    run_studies([slow], tmp_path / "unbroken", workers=0)
    other = only_run(slow, tmp_path / "unbroken")
    assert _timeless(run).equals(_timeless(other))
    assert run.summary["state_sha256"] == other.summary["state_sha256"]


def test_a_study_goes_on_when_one_of_a_scheduler_s_workers_is_killed(tmp_path):
    address = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m"]
    options = ["--scheduler-file", str(address), "--no-dashboard"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen(
        [*dask, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", *options],
        **silent,
    )
    children = [scheduler]
    try:
        until(address.exists)
        worker = [*dask, "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", *options]
        children += [subprocess.Popen(worker, **silent) for _ in range(2)]
        slow = study(loader=SLOW)
        run = only_run(slow, tmp_path / "runs")
        places = Places(scheduler=json.loads(address.read_text())["address"])
        process = multiprocessing.get_context("spawn").Process(
            target=run_studies, args=([slow], tmp_path / "runs"), kwargs={"places": places}
        )
        process.start()
        until(lambda: recorded(run) >= 10)
        holder(run).send_signal(signal.SIGKILL)
        process.join(180)
        assert process.exitcode == 0
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert run.status == {"status": "complete"}
    assert run.environment["attempts"] == 2
    assert len(run.updates) == 100
