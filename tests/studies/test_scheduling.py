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
from contextlib import contextmanager
from pathlib import Path

import dask
import distributed  # noqa: F401  its defaults must be there before any of them is set
import psutil
import pytest
import torch
import yaml

from repeatlab.core.files import StoreError
from repeatlab.store.records import Store
from repeatlab.studies import cluster, scheduling, warm_imports, worker
from repeatlab.studies.cluster import Places, gpu_of, local_client
from repeatlab.studies.lockstep import train_group
from repeatlab.studies.scheduling import execute, spread, with_needs
from repeatlab.studies.study import Study, StudyError, run_studies
from repeatlab.studies.warm_imports import LIBRARIES
from repeatlab.studies.worker import RunFailed
from repeatlab.tasks.supervised import Supervised
from repeatlab.training import checkpoint, loop
from repeatlab.training.loop import train

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


def until(condition, process=None, *, seconds: float = 180) -> None:
    """Wait for something that another process does; a test that waits in vain fails."""
    end = time.monotonic() + seconds
    while not condition():
        ended = process is not None and psutil.Process(process.pid).status() == "zombie"
        assert not ended, "the other process has ended"
        assert time.monotonic() < end, "the other process did not get there"
        time.sleep(0.02)


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
        until(lambda: recorded(run) >= 20, process)
        until(lambda: holder(run) is not None, process)
        holder(run).send_signal(signal.SIGKILL)
        process.join(300)
        assert process.exitcode == 0
    run_studies([slow], tmp_path / "unbroken", workers=0)
    assert _timeless(run).equals(_timeless(only_run(slow, tmp_path / "unbroken")))


def test_a_copy_of_a_process_that_has_made_a_study_makes_another(tmp_path):
    """Dask's scheduler has a pool of threads, which counts on those that were not copied."""
    small = study(updates=3)
    run_studies([small], tmp_path / "first", places=Places(workers=1))

    def execute():
        run_studies([small], tmp_path / "second", places=Places(workers=1))

    with in_a_copy(execute) as process:
        process.join(100)
        assert process.exitcode == 0


def test_a_run_that_hangs_ends_at_the_time_limit_and_takes_no_other_down(tmp_path):
    """With one worker, runs wait behind the one that hangs, and are not blamed for its deaths."""
    others = study(updates=3, seeds=2)
    hanging = study(name="hanging", updates=3, loader={"delay_ms": 600_000})
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        pytest.raises(StudyError, match="1 of 3 runs failed") as error,
    ):
        run_studies([hanging, others], tmp_path, places=Places(workers=1, time_limit=8))
    assert "time limit" in str(error.value)
    assert only_run(hanging, tmp_path).status["error"] == "took longer than the time limit of 8 s"
    assert sorted(error.value.report.status.values()) == ["complete", "complete", "failed"]


def test_two_processes_that_start_one_run_train_it_once(tmp_path):
    slow = study(updates=30, loader=SLOW)

    def execute():
        run_studies([slow], tmp_path, workers=0)

    with in_a_copy(execute) as one, in_a_copy(execute) as other:
        for process in (one, other):
            process.join(300)
            assert process.exitcode == 0
    run = only_run(slow, tmp_path)
    assert run.environment["attempts"] == 1
    assert len(run.updates) == 30


@pytest.mark.parametrize("to_all", [True, False], ids=["to all", "to one"])
def test_ctrl_c_leaves_a_checkpoint_and_the_next_call_goes_on(tmp_path, to_all):
    """From a terminal the signal reaches the workers, too; from a supervisor the parent alone."""
    slow = study(loader=SLOW)
    store = tmp_path / "runs"
    file = parameter_file(slow, tmp_path)
    command = [sys.executable, "-m", "repeatlab", "run", str(file), "--runs", str(store)]
    run = only_run(slow, store)
    process = subprocess.Popen(
        [*command, "--workers", "1"], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    until(lambda: recorded(run) >= 10, process)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert run.status["status"] == "interrupted", errors
    left = recorded(run)
    assert 10 <= left < 100
    assert next(checkpoint.load(run.path))["repeater"]["updates"] == left
    run_studies([slow], store, workers=0)
    assert run.environment["attempts"] == 2
    run_studies([slow], tmp_path / "unbroken", workers=0)
    other = only_run(slow, tmp_path / "unbroken")
    assert _timeless(run).equals(_timeless(other))
    assert run.summary["state_sha256"] == other.summary["state_sha256"]


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
    wait, calls, release = loop.leave_if_stopped, [], threading.Event()

    def waiting():
        calls[0]()
        wait()

    def hold():
        store = Store(tmp_path)
        with store.locked(store.run(config.task.name, config.run_id)):
            begun.set()
            release.wait()

    begun = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(60)
    monkeypatch.setattr(loop, "leave_if_stopped", waiting)
    yield calls
    release.set()
    holder.join()


def test_ctrl_c_ends_waiting_for_another_process(tmp_path, held):
    held.append(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_studies([study()], tmp_path, workers=0)


def test_a_worker_that_waits_for_another_process_leaves_with_its_study(tmp_path, held):
    held.append(lambda: worker.stop_training("mine"))
    config = study().planned()[0].config.to_json()
    assert worker.train_job(config, str(tmp_path), study="mine") == "interrupted"
    assert worker.group_job([config], str(tmp_path), study="mine") == {
        study().planned()[0].config.run_id: "interrupted"
    }
    # The next study's job is not stopped, nor by what comes too late for the last one.
    worker.stop_training("mine")
    held[0] = lambda: worker.stop_training("another")
    assert worker.train_job(config, str(tmp_path), study="another") == "interrupted"


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


def test_ctrl_c_while_workers_start_leaves_none_behind():
    """A notebook keeps hold of the traceback, and with it of what was being made."""
    begin = cluster._start_fork_server

    def pressed():
        forked = begin()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return forked

    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_start_fork_server", pressed)
        with pytest.raises(KeyboardInterrupt) as kept, local_client(1):
            threading.Event().wait(60)
    assert kept.tb is not None

    def workers() -> list[psutil.Process]:
        """Return who is new, but for the process whose copies become workers, and its like."""
        me = psutil.Process()
        return list(set(me.children(recursive=True)) - set(me.children()) - before)

    until(lambda: not workers(), seconds=30)


def test_ctrl_c_ends_no_local_worker():
    with local_client(1) as client:
        assert list(client.run(signal.getsignal, signal.SIGINT).values()) == [signal.SIG_IGN]


def test_two_studies_at_once_are_in_nobody_s_way_and_on_loopback_alone():
    with warnings.catch_warnings(action="error"), local_client(1), local_client(1):
        listening = [c for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    assert len(listening) >= 4
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


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
        until(address.exists, children[0])
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
        holder(run).send_signal(signal.SIGKILL)
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
        left.communicate(timeout=100)
        assert left.returncode != 0
        run_studies([third], tmp_path / "runs", places=there)
        going_on.join(100)
    for made in (other, third):
        run = only_run(made, tmp_path / "runs")
        assert run.status == {"status": "complete"}
        assert run.environment["attempts"] == 1


def test_a_scheduler_that_ends_in_the_middle_of_a_study_is_named(tmp_path):
    slow, pids = study(updates=2000, loader=SLOW), []
    file = parameter_file(slow, tmp_path)
    with started_cluster(tmp_path, workers=1, pids=pids) as address:
        command = [sys.executable, "-m", "repeatlab", "run", str(file), "--scheduler", address]
        settings = os.environ | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2s"}
        process = subprocess.Popen(
            [*command, "--runs", str(tmp_path / "runs")],
            stderr=subprocess.PIPE,
            text=True,
            env=settings,
        )
        until(lambda: recorded(only_run(slow, tmp_path / "runs")) >= 5, process)
        os.kill(pids[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=100)
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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system sets no such limit")
def test_a_run_that_finds_no_memory_fails_and_its_worker_trains_the_next(tmp_path):
    """An allocation that the system refuses: of 14 GB of weights, in a worker that may have 1."""

    def let_grow_by(size: int) -> None:
        import resource

        limit = psutil.Process().memory_info().vms + size
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    small = {"name": "supervised", "width": 2, "batch_size": 16}
    large = small | {"model": "mlp", "width": 60_000}
    configs = planned(study(tasks={"large": large, "small": small}, updates=2))
    with local_client(1) as client:
        client.run(let_grow_by, 2**30)
        worker = client.run(os.getpid)
        outcomes = dict(spread(configs, client, str(tmp_path)))
        assert client.run(os.getpid) == worker
    refused, made = outcomes.values()
    assert "allocate memory" in refused
    assert made is None
    assert [Store(tmp_path).run("supervised", i).status["status"] for i in configs] == [
        "failed",
        "complete",
    ]


def test_workers_have_one_thread_and_the_allocator_as_it_is(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    with local_client(1) as client:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")
        found = [client.submit(os.environ.get, name).result() for name in names]
    assert found == ["1", "1", None]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are no copies")
def test_workers_begin_with_the_libraries_and_the_environment_of_now(monkeypatch):
    for value in ("before", "after"):  # the second time the process that is copied is there
        monkeypatch.setenv("REPEATLAB_DATA", value)
        with local_client(1) as client:
            loaded = client.submit(eval, "list(__import__('sys').modules)").result()
            assert set(LIBRARIES) <= set(loaded)
            # Their objects are left out by a collector that is at work again.
            assert client.submit(eval, "__import__('gc').get_freeze_count()").result() > 100_000
            assert client.submit(eval, "__import__('gc').isenabled()").result()
            assert client.submit(os.environ.get, "REPEATLAB_DATA").result() == value


def test_processes_of_a_study_end_without_a_word():
    """Libraries complain at the end of a process of objects that its last collection leaves."""
    code = "from repeatlab.studies.cluster import local_client\nwith local_client(1): pass"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("", "")


@pytest.mark.parametrize("enabled", [True, False])
def test_importing_the_libraries_leaves_the_collector_as_it_was(monkeypatch, enabled):
    during = []
    monkeypatch.setattr(warm_imports, "import_module", lambda name: during.append(gc.isenabled()))
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        warm_imports.import_libraries()
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()
    assert during == [False] * len(LIBRARIES)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are no copies")
def test_no_copies_are_made_for_cuda_or_by_a_process_that_is_a_copy(monkeypatch):
    assert cluster._start_fork_server()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    copy = context.Process(target=lambda: answers.put(cluster._start_fork_server()))
    copy.start()
    copy.join(60)
    assert answers.get() is False
    monkeypatch.setattr(cluster, "_gpus", lambda: ["0"])
    assert not cluster._start_fork_server()


def test_the_time_limit_begins_after_the_imports_of_a_process_s_first_run(tmp_path):
    """In a fresh process: what its first run loads while the watch runs is next to nothing."""
    code = """
import json, sys
from repeatlab.studies import worker

class Watch(worker.Timer):
    def start(self):
        self.loaded = set(sys.modules)
        super().start()

    def cancel(self):
        print(json.dumps(sorted(sys.modules.keys() - self.loaded)))
        super().cancel()

worker.Timer = Watch
worker.run_job(json.loads(sys.argv[1]), sys.argv[2], limit=600)
"""
    config = json.dumps(study(updates=2).planned()[0].config.to_json())
    command = [sys.executable, "-c", code, config, str(tmp_path)]
    loaded = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert len(loaded) < 50, loaded  # of the libraries it is a thousand
    assert not {"sympy", "scipy", "sklearn", "torch._dynamo"} & set(loaded)


def test_a_cluster_that_was_told_to_stop_trains_the_next_study(tmp_path):
    """Ctrl-C stops the workers' runs, not the workers, which may be somebody else's."""
    slow = study(updates=50, loader=SLOW)
    run, configs = only_run(slow, tmp_path), planned(slow)
    with local_client(1) as client:
        outcomes = spread(configs, client, str(tmp_path))
        threading.Thread(
            target=lambda: (until(lambda: recorded(run) >= 10), os.kill(os.getpid(), signal.SIGINT))
        ).start()
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
        assert run.status["status"] == "interrupted"
        assert dict(spread(configs, client, str(tmp_path))) == {run.path.name: None}
    assert len(run.updates) == 50


# --- what is made when, without processes -------------------------------------------------------


class _Future:
    def __init__(self, failure: str | None) -> None:
        self.failure = failure
        self.status = "error" if failure else "finished"

    def done(self) -> bool:
        return True

    def exception(self) -> RunFailed | None:
        return self.failure and RunFailed(self.failure)


class _Client:
    """Two workers that train at once what they are given; runs named in `failing` fail."""

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing, self.order, self.rounds = failing, [], []

    def nthreads(self) -> dict[str, int]:
        self.rounds.append(0)
        return {"a": 1, "b": 1}

    def submit(self, function, config, root, *, limit, study, key):
        self.rounds[-1] += 1
        run_id = key.removeprefix("run-").removesuffix(f"-{study}")
        self.order.append(run_id)
        return _Future("broken" if run_id in self.failing else None)


CONTROLLED = {
    "fixed": {"mapping": {"name": "constant", "repeats": 2}},
    "replayed": {"mapping": {"name": "trace", "of": "fixed", "control": "permuted"}},
    "calibrated": {"mapping": {"name": "linear", "t": "auto"}},
}


@pytest.fixture
def at_once(monkeypatch):
    """Make runs end as soon as they are waited for."""
    monkeypatch.setattr("distributed.wait", lambda *args, **kwargs: None)


def planned(study: Study) -> dict:
    return {p.config.run_id: p.config for p in study.planned()}


def test_runs_come_after_those_they_need_and_never_more_than_there_are_workers(at_once):
    client = _Client()
    configs = planned(study(methods=CONTROLLED, seeds=3))
    assert dict(spread(configs, client, "runs")) == dict.fromkeys(configs)
    needed = with_needs(configs.values())
    assert sorted(client.order) == sorted(needed)
    assert len(needed) == 12  # with a calibration run for each seed
    for run_id, config in needed.items():
        for before in scheduling.prerequisites(config):
            assert client.order.index(before.run_id) < client.order.index(run_id)
    assert max(client.rounds) == 2


@pytest.mark.parametrize("counts", [scheduling.COUNTS_WITHOUT - 1, scheduling.COUNTS_WITHOUT])
def test_a_scheduler_that_stays_without_a_worker_is_told_of(monkeypatch, counts):
    waited = []
    monkeypatch.setattr("distributed.wait", lambda *args, **kwargs: waited.append(args))

    class Alone(_Client):
        def nthreads(self):
            return super().nthreads() if len(waited) > counts or not waited else {}

        def submit(self, *args, **how):
            future = super().submit(*args, **how)
            future.done = lambda: len(waited) > counts
            return future

    configs = planned(study())
    told = pytest.warns(UserWarning, match="no worker is left: the study waits for one")
    silent = warnings.catch_warnings(action="error")
    with told if counts == scheduling.COUNTS_WITHOUT else silent:
        assert dict(spread(configs, Alone(), "runs")) == dict.fromkeys(configs)


def test_a_run_that_needs_a_failed_one_says_which(at_once):
    configs = planned(study(methods=CONTROLLED))
    fixed, replayed, calibrated = configs
    client = _Client(failing=(fixed,))
    assert dict(spread(configs, client, "runs")) == {
        fixed: "broken",
        replayed: f"the run {fixed} that it needs failed: broken",
        calibrated: None,
    }
    assert replayed not in client.order


def test_workers_share_the_gpus(monkeypatch):
    """Six workers on three GPUs: in pairs of neighbours, under the names this process sees."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster._gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a,7")
    assert cluster._gpus() == ["5", "GPU-a", "7"]
    pairs = [gpu_of(worker, cluster._gpus(), 2) for worker in range(7)]
    assert pairs == ["5", "5", "GPU-a", "GPU-a", "7", "7", "5"]
    assert [gpu_of(worker, ["0", "1"], 1) for worker in range(4)] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("device", "asked", "started", "shared"),
    [
        ("auto", Places(runs_per_gpu=2), 4, True),
        ("auto", Places(workers=3, runs_per_gpu=2), 3, True),
        ("auto", Places(workers=9), 5, True),  # no more than there are runs
        ("cpu", Places(runs_per_gpu=2), 5, False),
    ],
)
def test_as_many_workers_as_the_gpus_take(monkeypatch, device, asked, started, shared):
    found = []

    @contextmanager
    def fake(workers):
        found.append(workers)
        yield None

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cluster, "local_client", fake)
    monkeypatch.setattr(cluster, "_share_gpus", lambda client, gpus, n: found.append(gpus))
    monkeypatch.setattr(scheduling, "spread", lambda *args, **kwargs: iter(()))
    configs = planned(study(seeds=5, device=device))
    assert list(execute(configs, Store("runs"), asked)) == []
    assert found == [started, ["0", "1"]] if shared else [started]


def test_the_time_limit_ends_a_process_that_cannot_say_so(tmp_path, monkeypatch):
    """Where the disk is full, too."""
    ended = threading.Event()
    monkeypatch.setattr("repeatlab.store.records.write_json", _full)
    monkeypatch.setattr(worker.os, "_exit", lambda code: ended.set())
    config = study().planned()[0].config
    with worker._ending_after(0.001, str(tmp_path), [config]):
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
