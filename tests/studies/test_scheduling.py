"""Studies go on when workers die, hang or are told to stop: real processes, real signals."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from repeatlab.core.files import StoreError
from repeatlab.core.signals import SIGNALS, Stop
from repeatlab.store.records import Store
from repeatlab.studies import cluster, processes, scheduling
from repeatlab.studies.cluster import Places, gpu_names, gpu_of
from repeatlab.studies.lockstep import train_group
from repeatlab.studies.processes import LIBRARIES, LocalWorkers
from repeatlab.studies.scheduling import Outcome, open_trainer, train_runs, with_needs
from repeatlab.studies.study import Study, StudyError, run_studies
from repeatlab.tasks.supervised import Supervised
from repeatlab.training import checkpoint, making
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

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


def ended(process: psutil.Process) -> bool:
    """Return whether a process is over, waited for or not; its id may be another's by now."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition, process=None, *, seconds: float = 180):
    """Wait for something that another process does and return what the condition gives.

    A test that waits in vain fails.
    """
    end = time.monotonic() + seconds
    other = psutil.Process(process.pid) if process is not None else None
    while not (found := condition()):
        assert other is None or not ended(other), "the other process has ended"
        assert time.monotonic() < end, "the other process did not get there"
        time.sleep(0.02)
    return found


def parameter_file(study: Study, folder: Path) -> Path:
    """Write the study as a file that `repeatlab run` reads."""
    file = folder / "params" / "test" / "small.yaml"
    file.parent.mkdir(parents=True)
    fields = study.model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump({"notebook": "10_supervised", "parameters": {"study": fields}}))
    return file


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


@contextmanager
def in_a_copy(function):
    """Yield a copy of this process, without its second threads, that calls the function."""

    def call() -> None:
        torch.set_num_threads(1)
        function()

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            for child in (*psutil.Process(process.pid).children(recursive=True), process):
                child.kill()
            process.join()


def _timeless(run):
    return run.updates.drop(columns="seconds")


def test_a_study_survives_a_worker_killed_in_the_middle_of_a_run(tmp_path):
    slow = study(loader=SLOW)
    run = only_run(slow, tmp_path / "killed")

    def execute():
        report = run_studies([slow], tmp_path / "killed", places=Places(workers=1))
        assert report.retried == {run.path.name: 2}

    with in_a_copy(execute) as process:
        until(lambda: recorded(run) >= 10, process)
        worker = until(lambda: holder(run), process)
        until(lambda: recorded(run) >= 20, process)
        worker.send_signal(signal.SIGKILL)
        process.join(300)
        assert process.exitcode == 0
    run_studies([slow], tmp_path / "unbroken", workers=0)
    assert _timeless(run).equals(_timeless(only_run(slow, tmp_path / "unbroken")))


def test_a_copy_of_a_process_that_has_made_a_study_makes_another(tmp_path):
    """It cannot use the process whose copies are the workers of the one it was copied from."""
    small = study(updates=3)
    run_studies([small], tmp_path / "first", places=Places(workers=1))

    def execute():
        run_studies([small], tmp_path / "second", places=Places(workers=1))

    with in_a_copy(execute) as process:
        process.join(300)
        assert process.exitcode == 0


def test_a_run_that_hangs_ends_at_the_time_limit_and_takes_no_other_down(tmp_path, monkeypatch):
    """With one worker, runs wait behind the one that hangs, and are not blamed for its deaths."""
    others = study(updates=3, seeds=2)
    hanging = study(name="hanging", updates=3, loader={"delay_ms": 60_000})
    monkeypatch.setattr(processes, "DEATHS", 2)
    with pytest.raises(StudyError, match="1 of 3 runs failed") as error:
        run_studies([hanging, others], tmp_path, places=Places(workers=1, time_limit=8))
    assert "time limit" in str(error.value)
    assert only_run(hanging, tmp_path).status["error"] == "took longer than the time limit of 8 s"
    assert sorted(error.value.report.status.values()) == ["complete", "complete", "failed"]


def test_two_processes_that_make_one_study_train_each_run_once(tmp_path):
    """And each says what it has trained itself."""
    slow = study(updates=20, loader=SLOW, seeds=2)
    context = multiprocessing.get_context("fork")
    both, reports = context.Barrier(2), context.SimpleQueue()

    def execute():
        both.wait(60)
        reports.put(run_studies([slow], tmp_path, workers=0))

    with in_a_copy(execute) as one, in_a_copy(execute) as other:
        for process in (one, other):
            process.join(300)
            assert process.exitcode == 0
    first, second = reports.get(), reports.get()
    assert first.trained + second.trained == 2
    assert f"({first.trained} trained now, {2 - first.trained} in the store)" in str(first)
    for run_id, config in planned(slow).items():
        run = Store(tmp_path).run(config.task.name, run_id)
        assert run.environment["attempts"] == 1
        assert len(run.updates) == 20


def command(file: Path, store: Path, *more: str) -> list[str]:
    """Return the words of `repeatlab run`."""
    return [sys.executable, "-m", "repeatlab", "run", str(file), "--runs", str(store), *more]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return the slow study's run as it is where nothing stops it."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_studies([study(loader=SLOW)], folder, workers=0)
    return only_run(study(loader=SLOW), folder)


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, True)],
    ids=["Ctrl-C to all", "SIGTERM to one", "SIGHUP to all"],
)
def test_a_signal_leaves_a_checkpoint_and_nothing_else(tmp_path, unbroken, number, to_all):
    """A terminal's reaches all processes of a command; a supervisor's the first alone, or all.

    The next call goes on from there.
    """
    slow, store, temporary = study(loader=SLOW), tmp_path / "runs", tmp_path / "temporary"
    temporary.mkdir()
    run = only_run(slow, store)
    words = command(parameter_file(slow, tmp_path), store, "--workers", "1")
    environment = os.environ | {"TMPDIR": str(temporary)}
    streams = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(words, env=environment, **streams)
    until(lambda: recorded(run) >= 10, process)
    every = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in every if to_all else every[:1]:
        one.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    said = "Stopped: 0 of 1 runs done, 1 has a checkpoint; run this again to go on."
    assert errors.splitlines()[-1] == said
    assert "Traceback" not in errors
    assert run.status["status"] == "interrupted", errors
    left = recorded(run)
    assert 10 <= left < 100
    assert next(checkpoint.load(run.path))["rows"]["updates"]["rows"] == left
    until(lambda: all(map(ended, every[1:])))
    assert list(temporary.iterdir()) == []
    run_studies([slow], store, workers=0)
    assert run.environment["attempts"] == 2
    assert _timeless(run).equals(_timeless(unbroken))
    assert run.summary["state_sha256"] == unbroken.summary["state_sha256"]


def test_ctrl_c_while_workers_start_is_one_sentence_and_leaves_none_behind(tmp_path):
    slow = study(loader=SLOW)
    words = command(parameter_file(slow, tmp_path), tmp_path / "runs", "--workers", "2")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    def started() -> list[psutil.Process]:
        found = []
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it may be a question to git, and over by now
                found += [child] if "processes" in " ".join(child.cmdline()) else []
        return found

    children = until(started, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    assert errors.splitlines()[-1].startswith("Stopped: 0 of 1 runs done")
    assert "Traceback" not in errors
    until(lambda: all(map(ended, children)))


def test_workers_end_with_the_process_that_they_work_for(tmp_path):
    slow = study(loader=SLOW)
    run = only_run(slow, tmp_path / "runs")
    words = command(parameter_file(slow, tmp_path), tmp_path / "runs", "--workers", "1")
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    until(lambda: recorded(run) >= 5, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.kill()
    process.wait()
    until(lambda: all(map(ended, children)))


def test_a_notebook_shows_one_sentence_of_a_study_that_was_stopped():
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    with capture_output() as shown:
        code = "from repeatlab.core.signals import Stopped\nraise Stopped('2 of 8 runs done')"
        InteractiveShell().run_cell(code)
    assert shown.stdout.strip() == "2 of 8 runs done"
    assert shown.stderr == ""


def test_a_script_that_cannot_be_imported_makes_a_study_with_workers(tmp_path):
    """Without `if __name__ == "__main__"`; and with a TMPDIR too long for a socket's name."""
    long = tmp_path / ("long" * 30)
    long.mkdir()
    fields = study(updates=3).model_dump(mode="json", exclude_unset=True)
    script = tmp_path / "script.py"
    script.write_text(
        "from repeatlab.studies.study import run_study\n"
        f"print(run_study({fields!r}, {str(tmp_path / 'runs')!r}, workers=2))\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TMPDIR": str(long)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "1 run: 1 complete (1 trained now, 0 in the store)\n"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_when_a_run_is_all_but_over_stops_no_later_one(tmp_path, monkeypatch, presses):
    """It comes too late for the run's updates: the study ends, and the process can train on."""
    evaluate = Supervised.evaluate

    def pressed(task, split):
        if split == "test":
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
        return evaluate(task, split)

    two = study(updates=3, seeds=2, evaluation={"every": 3, "splits": ["train"], "test": True})
    with monkeypatch.context() as patch:
        patch.setattr(Supervised, "evaluate", pressed)
        with pytest.raises(KeyboardInterrupt):
            run_studies([two], tmp_path, workers=0)
    assert only_run(two, tmp_path).done == (presses == 1)
    assert set(run_studies([two], tmp_path, workers=0).status.values()) == {"complete"}


def test_who_holds_a_run_never_waits_for_what_it_needs(tmp_path, monkeypatch):
    """Else two processes wait for each other: each holds what the other one needs."""
    locked, held, waited = Store.locked, [], []

    @contextmanager
    def noted(store, run, **how):
        waited.append((list(held), run.path.name))
        with locked(store, run, **how):
            held.append(run.path.name)
            yield
            held.remove(run.path.name)

    monkeypatch.setattr(Store, "locked", noted)
    mlp = {"name": "supervised", "model": "mlp", "width": 8, "batch_size": 16}
    arms = planned(study(methods=CONTROLLED, seeds=2, updates=6, tasks={"digits": mlp}))
    group = [config for config in arms.values() if config.method.mapping.name != "constant"]
    train_group(group, tmp_path / "together")
    for config in arms.values():
        train(config, tmp_path / "alone")
    ids = sorted(config.run_id for config in group)
    for holding, run_id in waited:
        if holding:  # a group alone holds several, and takes them in the order of their ids
            assert [*holding, run_id] == ids[: len(holding) + 1]
    assert max(len(holding) for holding, _ in waited) == len(ids) - 1


@pytest.fixture
def held(tmp_path, monkeypatch):
    """Hold a run's lock, and call the function in the list whenever somebody waits for it."""
    config = study().planned()[0].config
    wait, calls, release = making.leave_if_stopped, [], threading.Event()

    def waiting(stop):
        calls[0]()
        wait(stop)

    def hold():
        store = Store(tmp_path)
        with store.locked(store.run(config.task.name, config.run_id)):
            begun.set()
            release.wait()

    begun = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(60)
    monkeypatch.setattr(making, "leave_if_stopped", waiting)
    yield calls
    release.set()
    holder.join()


def test_ctrl_c_ends_waiting_for_another_process(tmp_path, held):
    held.append(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_studies([study()], tmp_path, workers=0)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_worker_that_waits_for_another_process_leaves_with_its_study(tmp_path, held, seeds):
    stop = Stop()
    held.append(stop.set)
    configs = planned(study(seeds=seeds))
    jobs = [config.to_json() for config in configs.values()]
    outcomes = train_runs(jobs, str(tmp_path), stop=stop)
    assert outcomes == dict.fromkeys(configs, Outcome("interrupted", trained=False))


def test_the_time_limit_begins_when_no_other_process_is_at_the_run(tmp_path):
    config = study(updates=3).planned()[0].config
    store, begun = Store(tmp_path), threading.Event()

    @contextmanager
    def watch(configs):
        assert configs == [config]
        begun.set()
        yield

    waiting = threading.Thread(target=train, args=(config, store), kwargs={"watch": watch})
    with store.locked(store.run(config.task.name, config.run_id)):
        waiting.start()
        assert not begun.wait(2)
    waiting.join(60)
    assert begun.is_set()
    assert only_run(study(updates=3), tmp_path).done


def ask(workers: LocalWorkers, function, *args):
    """Return what a worker says to a question."""
    job, answers = workers.submit(function, *args), {}
    while job not in answers:
        answers = workers.wait([job], 60)
    return answers[job]


def handlers(*, stop: Stop) -> list:
    return [signal.getsignal(number) for number in SIGNALS]


def test_signals_end_no_local_worker():
    with LocalWorkers([{}]) as workers:
        assert ask(workers, handlers) == [signal.SIG_IGN] * 3


def reachable(process: psutil.Process) -> set:
    """Return where others can connect to: addresses on a network, and files."""
    return {
        end.laddr
        for end in process.net_connections(kind="all")
        if end.laddr and (end.status == "LISTEN" or isinstance(end.laddr, str))
    }


def test_nobody_can_connect_to_a_study_s_workers():
    """Whoever could would make them run code as the one who has started the study.

    Not of all processes below this one: those of an earlier test may be about to end.
    """
    before = reachable(psutil.Process())
    with LocalWorkers([{}]) as one, LocalWorkers([{}] * 2) as two:
        ids = {ask(one, process_id)}
        asked = [two.submit(process_id) for _ in range(2)]  # each goes to a worker that is free
        while asked:
            answers = two.wait(asked, 60)
            ids |= set(answers.values())
            asked = [job for job in asked if job not in answers]
        workers = [psutil.Process(number) for number in ids]
        assert len(workers) == 3
        for process in (workers[0].parent(), *workers):
            assert reachable(process) == set()
        assert reachable(psutil.Process()) <= before


@contextmanager
def started_cluster(
    folder: Path, *, workers: int, protocol: str = "tcp", threads: int = 1, pids=None
):
    """Yield the address of a Dask scheduler with workers, all processes of their own.

    Their ids come into `pids`, the scheduler's first.
    """
    address = folder / "scheduler.json"
    options = ["--scheduler-file", str(address), "--no-dashboard", "--protocol", protocol]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m"]
    command = [*dask, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    children = [subprocess.Popen([*command, *options], **silent)]
    try:
        until(lambda: address.exists() and address.read_text().endswith("}"), children[0])
        worker = [*dask, "distributed.cli.dask_worker", "--nthreads", str(threads), "--no-nanny"]
        children += [subprocess.Popen([*worker, *options], **silent) for _ in range(workers)]
        if pids is not None:
            pids += [child.pid for child in children]
        yield json.loads(address.read_text())["address"]
    finally:
        for child in children:
            child.kill()
            child.wait()


def certificate(folder: Path) -> dict[str, str]:
    """Return environment variables that make Dask speak TLS, and nothing else, with a new key."""
    if shutil.which("openssl") is None:
        pytest.skip("a certificate is made with openssl, which is not installed")
    names = {"key": str(folder / "key.pem"), "cert": str(folder / "cert.pem")}
    made = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=repeatlab"]
    made += ["-keyout", names["key"], "-out", names["cert"]]
    subprocess.run(["openssl", "req", "-x509", *made], check=True, capture_output=True)
    comm = "DASK_DISTRIBUTED__COMM__"
    parts = {
        f"{comm}TLS__{role}__{part.upper()}": file
        for role in ("SCHEDULER", "WORKER", "CLIENT")
        for part, file in names.items()
    }
    encrypted = {f"{comm}REQUIRE_ENCRYPTION": "true", f"{comm}TLS__CA_FILE": names["cert"]}
    return parts | encrypted


@pytest.mark.parametrize("protocol", ["tcp", "tls"])
def test_a_study_goes_on_when_one_of_a_scheduler_s_workers_is_killed(
    tmp_path, monkeypatch, protocol
):
    if protocol == "tls":
        for name, value in certificate(tmp_path).items():
            monkeypatch.setenv(name, value)
    slow = study(loader=SLOW)
    file, store = parameter_file(slow, tmp_path), tmp_path / "runs"
    run = only_run(slow, store)
    with started_cluster(tmp_path, workers=2, protocol=protocol) as address:
        assert address.startswith(f"{protocol}://")
        command = [sys.executable, "-m", "repeatlab", "run", str(file), "--runs", str(store)]
        process = subprocess.Popen([*command, "--scheduler", address], stdout=subprocess.PIPE)
        until(lambda: recorded(run) >= 10, process)
        until(lambda: holder(run), process).send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert b"1 complete (1 trained now, 0 in the store); 1 took more than one attempt" in output
    assert run.status == {"status": "complete"}
    assert run.environment["attempts"] == 2
    assert len(run.updates) == 100


def test_a_worker_of_many_threads_makes_one_run_at_a_time(tmp_path):
    """Runs of one process share torch's random state."""
    many = study(updates=5, seeds=6, loader=SLOW)
    with started_cluster(tmp_path, workers=1, threads=4) as address:
        run_studies([many], tmp_path / "cluster", places=Places(scheduler=address))
    run_studies([many], tmp_path / "here", workers=0)
    for run_id, config in planned(many).items():
        found, alone = (
            Store(tmp_path / place).run(config.task.name, run_id) for place in ("cluster", "here")
        )
        assert found.summary["state_sha256"] == alone.summary["state_sha256"]


def test_two_stores_on_one_scheduler_both_get_the_run(tmp_path):
    small = study(updates=30, loader=SLOW)
    file = parameter_file(small, tmp_path)
    with started_cluster(tmp_path, workers=2) as address:
        command = [sys.executable, "-m", "repeatlab", "run", str(file), "--scheduler", address]
        studies = [
            subprocess.Popen([*command, "--runs", str(tmp_path / name)], stdout=subprocess.DEVNULL)
            for name in ("one", "other")
        ]
        assert [process.wait(300) for process in studies] == [0, 0]
    for name in ("one", "other"):
        assert len(only_run(small, tmp_path / name).updates) == 30


def test_a_study_that_was_left_leaves_the_scheduler_s_workers_to_others(tmp_path):
    """Ctrl-C twice: its run has no time to leave. Another study's goes on, and so does a third."""
    slow, other, third = (study(updates=n, loader=SLOW) for n in (2000, 150, 5))
    file = parameter_file(slow, tmp_path)
    with started_cluster(tmp_path, workers=2) as address:
        command = [sys.executable, "-m", "repeatlab", "run", str(file), "--scheduler", address]
        left = subprocess.Popen(
            [*command, "--runs", str(tmp_path / "runs")], stderr=subprocess.PIPE, text=True
        )
        until(lambda: recorded(only_run(slow, tmp_path / "runs")) >= 5, left)
        there = Places(scheduler=address)
        going_on = threading.Thread(
            target=run_studies, args=([other], tmp_path / "runs"), kwargs={"places": there}
        )
        going_on.start()
        until(lambda: recorded(only_run(other, tmp_path / "runs")) >= 5)
        for _ in range(2):
            left.send_signal(signal.SIGINT)
        left.communicate(timeout=300)
        assert left.returncode != 0
        run_studies([third], tmp_path / "runs", places=there)
        going_on.join(300)
        assert not going_on.is_alive()
    for made in (other, third):
        run = only_run(made, tmp_path / "runs")
        assert run.status == {"status": "complete"}
        assert run.environment["attempts"] == 1


def test_a_scheduler_that_ends_in_the_middle_of_a_study_is_named(tmp_path):
    slow, pids = study(updates=2000, loader=SLOW), []
    file = parameter_file(slow, tmp_path)
    with started_cluster(tmp_path, workers=1, pids=pids) as address:
        command = [sys.executable, "-m", "repeatlab", "run", str(file), "--scheduler", address]
        # Else it would look for the scheduler for half a minute.
        settings = os.environ | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}
        process = subprocess.Popen(
            [*command, "--runs", str(tmp_path / "runs")],
            stderr=subprocess.PIPE,
            text=True,
            env=settings,
        )
        until(lambda: recorded(only_run(slow, tmp_path / "runs")) >= 5, process)
        os.kill(pids[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("Error: scheduler: it has ended")


def run_on(address: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Return what the command does on a scheduler, with these environment variables added."""
    command = [sys.executable, "-m", "repeatlab", "run", str(folder / "params/test/small.yaml")]
    return subprocess.run(
        [*command, "--runs", str(folder / "runs"), "--scheduler", address],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_scheduler_that_cannot_be_spoken_to_is_named(tmp_path):
    parameter_file(study(), tmp_path)
    settings = certificate(tmp_path)
    nobody = "tcp://127.0.0.1:1"
    waiting = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}
    for found, address in (
        (run_on(nobody, tmp_path, **waiting), nobody),
        (run_on("tls://127.0.0.1:1", tmp_path, **waiting), "tls://127.0.0.1:1"),
        (run_on(nobody, tmp_path, **settings), nobody),
        (run_on("nonsense://", tmp_path, **waiting), "nonsense://"),
    ):
        assert found.returncode == 2
        message = found.stderr.splitlines()[-1]
        assert message.startswith(f"Error: scheduler: no connection to {address}: ")
        assert "tcp://HOST:8786" in message
        assert "Traceback" not in found.stderr
    assert not (tmp_path / "runs" / "supervised").exists()


def limit_memory(size: int, *, stop: Stop) -> int:
    """Let a worker's memory grow by so many bytes, and return its id."""
    import resource

    limit = psutil.Process().memory_info().vms + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return os.getpid()


def process_id(*, stop: Stop) -> int:
    return os.getpid()


def trained_by(workers, configs: dict, root: Path, monkeypatch) -> dict[str, Outcome]:
    """Return how runs end that these workers make."""
    monkeypatch.setattr(scheduling, "open_workers", lambda *args, **how: nullcontext(workers))
    with open_trainer(Store(root), Places(lockstep=False)) as train:
        return dict(train(configs))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system sets no such limit")
def test_a_run_that_finds_no_memory_fails_and_its_worker_trains_the_next(tmp_path, monkeypatch):
    """An allocation that the system refuses: of weights, in a worker that may have 1 GB."""
    small = {"name": "supervised", "width": 2, "batch_size": 16}
    large = small | {"model": "mlp", "width": 10_000}
    configs = planned(study(tasks={"large": large, "small": small}, updates=2))
    with LocalWorkers([{}]) as workers:
        worker = ask(workers, limit_memory, 2**30)
        refused, made = trained_by(workers, configs, tmp_path, monkeypatch).values()
        assert ask(workers, process_id) == worker
    assert "allocate memory" in refused.failure
    assert made == Outcome(trained=True)
    assert [Store(tmp_path).run("supervised", i).status["status"] for i in configs] == [
        "failed",
        "complete",
    ]


def state(name: str, *, stop: Stop) -> dict:
    """Return what a worker is, and an environment variable of its own."""
    return {
        "threads": [os.environ[variable] for variable in processes.ONE_THREAD],
        "loaded": list(sys.modules),
        "frozen": gc.get_freeze_count(),
        "collects": gc.isenabled(),
        "value": os.environ.get(name),
    }


def test_workers_begin_with_the_libraries_and_the_environment_of_now(monkeypatch):
    for name in processes.ONE_THREAD:
        monkeypatch.delenv(name, raising=False)
    for value in ("before", "after"):  # the second time the process that is copied is there
        monkeypatch.setenv("REPEATLAB_DATA", value)
        with LocalWorkers([{"OWN": "mine"}]) as workers:
            found = ask(workers, state, "REPEATLAB_DATA")
            assert ask(workers, state, "OWN")["value"] == "mine"
        assert found["value"] == value
        assert found["threads"] == ["1", "1", "1"]
        assert set(LIBRARIES) <= set(found["loaded"])
        # Their objects are left out by a collector that is at work again.
        assert found["frozen"] > 100_000 or sys.platform != "linux"
        assert found["collects"]


def test_workers_are_made_anew_when_what_they_are_copies_of_has_been_killed():
    with LocalWorkers([{}]) as workers:
        first = ask(workers, process_id)
        (nursery,) = (p for p in psutil.Process().children() if psutil.Process(first).parent() == p)
    nursery.kill()
    until(lambda: ended(nursery))
    with LocalWorkers([{}]) as workers:
        assert ask(workers, process_id) != first


def test_processes_of_a_study_end_without_a_word():
    """Libraries complain at the end of a process of objects that its last collection leaves."""
    code = "from repeatlab.studies.processes import *\nwith LocalWorkers([{}]): pass"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("", "")


def test_the_time_limit_begins_after_the_imports_of_a_process_s_first_run(tmp_path):
    """In a fresh process: what its first run loads while the watch runs is next to nothing."""
    code = """
import json, sys
from repeatlab.studies import scheduling

class Watch(scheduling.Timer):
    def start(self):
        self.loaded = set(sys.modules)
        super().start()

    def cancel(self):
        print(json.dumps(sorted(sys.modules.keys() - self.loaded)))
        super().cancel()

scheduling.Timer = Watch
scheduling.train_runs([json.loads(sys.argv[1])], sys.argv[2], 600, stop=scheduling.Stop())
"""
    config = json.dumps(study(updates=2).planned()[0].config.to_json())
    command = [sys.executable, "-c", code, config, str(tmp_path)]
    loaded = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert len(loaded) < 50, loaded  # of the libraries it is a thousand
    assert not {"sympy", "scipy", "sklearn", "torch._dynamo"} & set(loaded)


# --- what is made when, without processes -------------------------------------------------------


class Instant:
    """Two workers that make at once what they are given; runs named in `failing` fail."""

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing, self.order, self.most = failing, [], 0

    def count(self) -> int:
        return 2

    def submit(self, function, configs, root, limit):
        (config,) = configs
        self.order.append(RunConfig.from_json(config).run_id)
        return self.order[-1]

    def wait(self, jobs, seconds):
        self.most = max(self.most, len(jobs))
        return {i: {i: Outcome("broken" if i in self.failing else None)} for i in jobs}

    def stop(self, jobs):
        raise AssertionError("nobody asked")


CONTROLLED = {
    "fixed": {"mapping": {"name": "constant", "repeats": 2}},
    "replayed": {"mapping": {"name": "trace", "of": "fixed", "control": "permuted"}},
    "calibrated": {"mapping": {"name": "linear", "t": "auto"}},
}


def planned(study: Study) -> dict:
    return {p.config.run_id: p.config for p in study.planned()}


def test_runs_come_after_those_they_need_and_never_more_than_there_are_workers(monkeypatch):
    configs, workers = planned(study(methods=CONTROLLED, seeds=3)), Instant()
    made = trained_by(workers, configs, Path("runs"), monkeypatch)
    assert made == dict.fromkeys(configs, Outcome())
    needed = with_needs(configs.values())
    assert sorted(workers.order) == sorted(needed)
    assert len(needed) == 3 * (3 + 1)  # with a calibration run for each seed
    for run_id, config in needed.items():
        for before in scheduling.prerequisites(config):
            assert workers.order.index(before.run_id) < workers.order.index(run_id)
    assert workers.most == 2


@pytest.mark.parametrize("looks", [scheduling.ALONE_SECONDS - 1, scheduling.ALONE_SECONDS + 2])
def test_a_scheduler_that_stays_without_a_worker_is_told_of(monkeypatch, looks):
    class Alone(Instant):
        """Its worker comes back after so many looks, each of which takes a second."""

        seconds = 0

        def count(self):
            return int(self.seconds in (0, looks))

        def wait(self, jobs, seconds):
            self.seconds += 1
            return super().wait(jobs, seconds) if self.seconds == looks else {}

    workers, configs = Alone(), planned(study())
    monkeypatch.setattr(scheduling, "monotonic", lambda: workers.seconds)
    told = pytest.warns(UserWarning, match="no worker is left: the study waits for one")
    silent = warnings.catch_warnings(action="error")
    with told if looks > scheduling.ALONE_SECONDS else silent:
        trained_by(workers, configs, Path("runs"), monkeypatch)


def test_a_run_that_needs_a_failed_one_says_which(monkeypatch):
    configs = planned(study(methods=CONTROLLED))
    fixed, replayed, calibrated = configs
    workers = Instant(failing=(fixed,))
    assert trained_by(workers, configs, Path("runs"), monkeypatch) == {
        fixed: Outcome("broken"),
        replayed: Outcome(f"the run {fixed} that it needs failed: broken"),
        calibrated: Outcome(),
    }
    assert replayed not in workers.order


def test_workers_share_the_gpus(monkeypatch):
    """Six workers on three GPUs: in pairs of neighbours, under the names this process sees."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_names() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a,7")
    assert gpu_names() == ["5", "GPU-a", "7"]
    pairs = [gpu_of(worker, gpu_names(), 2) for worker in range(7)]
    assert pairs == ["5", "5", "GPU-a", "GPU-a", "7", "7", "5"]
    assert [gpu_of(worker, ["0", "1"], 1) for worker in range(4)] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("device", "asked", "shared"),
    [
        ("auto", Places(runs_per_gpu=2), ["0", "0", "1", "1"]),
        ("auto", Places(workers=3, runs_per_gpu=2), ["0", "0", "1"]),
        ("auto", Places(workers=9), ["0", "1", "0", "1", "0"]),  # no more than there are runs
        ("cpu", Places(runs_per_gpu=2), [None] * 5),
    ],
)
def test_as_many_workers_as_the_gpus_take(monkeypatch, device, asked, shared):
    found = []

    def fake(shares):
        found.append([share.get("CUDA_VISIBLE_DEVICES") for share in shares])
        return nullcontext(Instant())

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cluster, "LocalWorkers", fake)
    configs = planned(study(seeds=5, device=device))
    with open_trainer(Store("runs"), replace(asked, lockstep=False)) as train:
        assert len(dict(train(configs))) == 5
    assert found == [shared]


def test_the_time_limit_ends_a_process_that_cannot_say_so(tmp_path, monkeypatch):
    """Where the disk is full, too."""
    ended = threading.Event()
    monkeypatch.setattr("repeatlab.store.records.write_json", _full)
    monkeypatch.setattr(scheduling.os, "_exit", lambda code: ended.set())
    config = study().planned()[0].config
    with scheduling._ending_after(0.001, str(tmp_path), [config]):
        assert ended.wait(60)


def _full(path, data):
    raise StoreError(f"{path} cannot be written: No space left on device")


def test_a_run_whose_place_is_taken_fails_alone(tmp_path):
    """In a worker: the run's directory cannot be made, the others are not stopped by it."""
    three = study(updates=3, seeds=3)
    broken = only_run(three, tmp_path)
    broken.path.parent.mkdir(parents=True)
    broken.path.write_text("in the way")
    with pytest.raises(StudyError, match="1 of 3 runs failed") as error:
        run_studies([three], tmp_path, places=Places(workers=2))
    assert f"{broken.path}: StoreError: {broken.path.resolve()} cannot be written" in str(
        error.value
    )
    assert sorted(error.value.report.status.values()) == ["complete", "complete", "missing"]
