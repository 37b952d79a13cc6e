"""What cannot be written is said clearly; what was written stays, and runs go on from it."""

from __future__ import annotations

import ast
import errno
import fcntl
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from every_method import config
from test_resume import same_record

import repeatlab
from repeatlab.core.files import StoreError, write_json
from repeatlab.core.locks import hold, is_held
from repeatlab.store.records import UPDATES, RunWriter, Store, read_stream
from repeatlab.studies.study import StudyError, run_study
from repeatlab.studies.verification import damaged, run_state, study_states
from repeatlab.training import checkpoint, making
from repeatlab.training.making import train
from repeatlab.training.one_run import CheckpointPlan, Training

EVERY_UPDATE = CheckpointPlan(updates=1)
FULL = OSError(errno.ENOSPC, "No space left on device")
STUDY = {
    "name": "small",
    "tasks": {"digits": {"name": "supervised", "width": 2, "batch_size": 16}},
    "methods": {"standard": {}},
    "seeds": 3,
    "max_updates": 4,
    "evaluation": {"every": 2, "splits": ["train"], "test": False},
}


def rows(first: int, count: int) -> dict[str, np.ndarray]:
    return {name: np.arange(first, first + count) for name in UPDATES.names}


def begin(root: Path):
    run = Store(root).run("task", "abc")
    return run, Store(root).begin(run, {}, {})


def supervised():
    run = config("supervised", "fixed3")
    return run.model_copy(
        update={"evaluation": run.evaluation.model_copy(update={"splits": ("train",), "every": 3})}
    )


def at_update(monkeypatch, number: int, act) -> None:
    """Make this process's trainings call `act` right after so many updates, once."""
    original, made = Training.visit, [0]

    def visit(self):
        make = original(self)

        def counted(batch):
            make(batch)
            made[0] += 1
            if made[0] == number:
                act()

        return counted

    monkeypatch.setattr(Training, "visit", visit)


# --- one run ------------------------------------------------------------------------------------


def _write_until_the_limit(root: Path, limit: int, found) -> None:
    """Write blocks until a file may not grow; in a process of its own, whose limit it is."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    _, writer = begin(root)
    blocks = 0
    try:
        while True:
            writer.updates(rows(4 * blocks, 4))
            blocks += 1
    except StoreError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        writer.fail(error)
        found.send((blocks, str(error)))


def test_at_a_full_disk_every_block_that_was_taken_is_there(tmp_path):
    """The limit falls on every kind of place: a header, the padding, the last bytes of a block."""
    context = multiprocessing.get_context("fork")
    for limit in range(2000, 3200, 53):
        ours, theirs = context.Pipe()
        root = tmp_path / str(limit)
        process = context.Process(target=_write_until_the_limit, args=(root, limit, theirs))
        process.start()
        assert ours.poll(30)
        blocks, error = ours.recv()
        process.join()
        run = Store(root).run("task", "abc")
        assert error == f"{run.path / 'updates.arrow'} cannot be written: File too large"
        # A block whose rest found room when the file was closed is whole, too.
        assert len(run.updates) in (4 * blocks, 4 * blocks + 4)
        assert run.updates["update"].tolist() == list(range(len(run.updates)))
        assert run.status["status"] == "failed"
        assert not run.done


def _train_up_to_the_limit(root: Path, limit: int, plan: CheckpointPlan | None, found) -> None:
    """Train with files that may not grow beyond a limit; in a process of its own."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run = supervised()
    evaluation = run.evaluation.model_copy(update={"keep": 1})
    try:
        train(run.model_copy(update={"evaluation": evaluation}), root, plan=plan)
    except StoreError as error:
        found.send(str(error))


@pytest.mark.parametrize(
    ("limit", "plan", "name"),
    [
        (100, None, "config.json"),
        (2000, None, "evals.arrow"),
        (10_000, EVERY_UPDATE, "checkpoint.pt"),
        (10_000, None, "weights-000000003.pt"),
    ],
)
def test_at_a_full_disk_the_file_is_named_and_the_reason_is_the_system_s(
    tmp_path, limit, plan, name
):
    """Also of what torch writes, whose own writer says something else."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_train_up_to_the_limit, args=(tmp_path, limit, plan, theirs))
    process.start()
    assert ours.poll(60)
    (run,) = (tmp_path / "supervised").glob("[!.]*")
    assert ours.recv() == f"{run / name} cannot be written: File too large"
    process.join()


def test_rows_that_did_not_arrive_are_no_complete_run(tmp_path, monkeypatch):
    run, writer = begin(tmp_path)
    writer.updates(rows(0, 4))
    writer.updates(rows(4, 4))
    monkeypatch.setattr("repeatlab.store.records.read_stream", lambda path: read_stream(path)[:4])
    with pytest.raises(StoreError, match="holds 4 of the 8 rows written to it"):
        writer.finish("complete", {})
    assert not run.done


@pytest.mark.parametrize("name", ["updates.parquet", "summary.json"])
def test_a_run_whose_end_cannot_be_written_is_not_done(tmp_path, monkeypatch, name):
    run, writer = begin(tmp_path)
    writer.updates(rows(0, 4))
    replace = Path.replace

    def full(self, target):
        if Path(target).name == name:
            raise FULL
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(StoreError) as error:
            writer.finish("complete", {})
    message = f"{run.path / name} cannot be written: No space left on device"
    assert str(error.value) == message
    assert not run.done
    assert run.updates["update"].tolist() == [0, 1, 2, 3]
    assert not list(run.path.glob(".*"))


def test_the_first_error_is_the_one_that_is_told(tmp_path, monkeypatch):
    """Where the directory vanished, the status cannot be written either."""
    run = Store(tmp_path).run("supervised", supervised().run_id)

    def break_down():
        shutil.rmtree(run.path)
        raise RuntimeError("the first error")

    at_update(monkeypatch, 3, break_down)
    with pytest.raises(RuntimeError, match="the first error"):
        train(supervised(), tmp_path)


def test_a_directory_that_vanishes_under_a_run_is_named_and_the_run_made_anew(
    tmp_path, monkeypatch
):
    run = Store(tmp_path / "store").run("supervised", supervised().run_id)
    with monkeypatch.context() as patch:
        at_update(patch, 4, lambda: shutil.rmtree(tmp_path / "store"))
        with pytest.raises(StoreError) as error:
            train(supervised(), tmp_path / "store", plan=EVERY_UPDATE)
    assert str(run.path) in str(error.value)
    assert not run.done
    made = train(supervised(), tmp_path / "store")
    same_record(train(supervised(), tmp_path / "unbroken"), made)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_the_last_one_goes_on(
    tmp_path, monkeypatch
):
    save, saved = making.checkpoint.save, []
    run = Store(tmp_path / "store").run("supervised", supervised().run_id)

    def full(directory, state):
        saved.append(state["updates"]["repeater"]["updates"])
        with monkeypatch.context() as patch:
            if len(saved) == 3:
                patch.setattr("os.fsync", _no_space)
            save(directory, state)

    with monkeypatch.context() as patch:
        patch.setattr("repeatlab.training.one_run.checkpoint.save", full)
        with pytest.raises(StoreError, match=r"checkpoint\.pt cannot be written: No space left"):
            train(supervised(), tmp_path / "store", plan=EVERY_UPDATE)
    assert run.status["status"] == "failed"
    assert "No space left" in run.status["error"]
    states = [state["updates"]["repeater"]["updates"] for state in checkpoint.load(run.path)]
    assert states == saved[-2:-4:-1]
    same_record(train(supervised(), tmp_path / "unbroken"), train(supervised(), tmp_path / "store"))


def _no_space(handle):
    raise FULL


def _train_until_killed_in_a_checkpoint(runs: Path) -> None:
    """Train in a process of its own that SIGKILLs itself where its second checkpoint is whole."""
    sync, synced = os.fsync, []

    def killed(handle):
        sync(handle)
        if Path(f"/proc/self/fd/{handle}").readlink().name.startswith(".checkpoint.pt"):
            synced.append(handle)
        if len(synced) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = killed
    train(supervised(), runs, plan=EVERY_UPDATE)


def test_a_run_that_was_killed_in_its_checkpoints_leaves_no_part_of_them(tmp_path):
    run = Store(tmp_path / "killed").run("supervised", supervised().run_id)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        process = context.Process(
            target=_train_until_killed_in_a_checkpoint, args=(tmp_path / "killed",)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(run.path.glob(".*"))) == 1  # this kill's own
    same_record(
        train(supervised(), tmp_path / "unbroken"), train(supervised(), tmp_path / "killed")
    )
    assert not list(run.path.glob(".*"))


def test_damaged_notes_of_a_run_do_not_keep_it_from_being_made(tmp_path):
    run = train(supervised(), tmp_path)
    for name in ("environment.json", "status.json", "config.json"):
        (run.path / "summary.json").unlink(missing_ok=True)
        (run.path / name).write_text('{"sta')
        assert train(supervised(), tmp_path).done
        assert list(damaged(Store(tmp_path))) == []


# --- a store ------------------------------------------------------------------------------------


def test_what_is_there_stays_readable_and_a_study_goes_on_where_space_returns(
    tmp_path, monkeypatch
):
    """The disk is full from the second run's first block on, and empty at the second call."""
    written = RunWriter.updates
    calls = []

    def full(self, columns):
        calls.append(self.path.name)
        if self.path.name != calls[0]:
            raise StoreError(f"{self.path / 'updates.arrow'} cannot be written: {FULL.strerror}")
        written(self, columns)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "updates", full)
        with pytest.raises(StudyError, match="2 of 3 runs failed") as error:
            run_study(STUDY, tmp_path, workers=0)
    assert str(error.value).count("No space left on device") == 2
    store = Store(tmp_path)
    assert study_states(store, "small")["state"].tolist() == ["complete", "failed", "failed"]
    assert list(damaged(store)) == []
    report = run_study(STUDY, tmp_path, workers=0)
    assert report.trained == 2
    assert set(report.status.values()) == {"complete"}
    assert list(damaged(store)) == []


@pytest.mark.parametrize("place", ["the root", "the studies", "a task", "a lock"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    """A file in the way: what a read-only directory is to those whom it stops."""
    store = tmp_path / "runs"
    run = Store(store).run("supervised", supervised().run_id)
    ways = {
        "the root": store,
        "the studies": store / "studies",
        "a task": store / "supervised",
        "a lock": run.path.with_name(f".{run.path.name}.lock"),
    }
    way = ways[place]
    way.parent.mkdir(parents=True, exist_ok=True)
    if place == "a lock":
        way.mkdir()
    else:
        way.write_text("in the way")
    start = (
        partial(run_study, STUDY, workers=0)
        if place == "the studies"
        else partial(train, supervised())
    )
    with pytest.raises(StoreError) as error:
        start(runs=store)
    assert str(way) in str(error.value)


def test_a_file_in_a_directory_that_refuses_it_is_named(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    refusal = PermissionError(errno.EROFS, "Read-only file system")

    def read_only(self, *args, **kwargs):
        raise refusal

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(StoreError) as error:
        write_json(path, {})
    assert str(error.value) == f"{path} cannot be written: Read-only file system"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(tmp_path):
    store = Store(tmp_path)
    run = store.run("task", "abc")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold():
        with store.locked(run):
            theirs.send("held")
            signal.pause()

    process = context.Process(target=hold)
    process.start()
    assert ours.poll(30)
    assert store.is_locked(run)
    process.kill()
    process.join()
    assert not store.is_locked(run)
    with store.locked(run):
        assert store.is_locked(run)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_of_a_lock_that_may_only_be_read_it_is_known_whether_it_is_held(
    tmp_path, monkeypatch, error
):
    store = Store(tmp_path)
    held, free = store.run("task", "held"), store.run("task", "free")
    with store.locked(free):
        pass
    with store.locked(held), monkeypatch.context() as patch:
        patch.setattr(os, "open", partial(_open_to_read, os.open, error))
        assert store.is_locked(held)
        assert not store.is_locked(free)
        patch.setattr(os, "open", _refused)
        assert not store.is_locked(held)


def _open_to_read(open_, error, path, flags, *args, **kwargs):
    if flags & (os.O_WRONLY | os.O_RDWR):
        raise OSError(error, os.strerror(error), str(path))
    return open_(path, flags, *args, **kwargs)


def _refused(path, *args, **kwargs):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_a_run_is_refused_at_once_and_none_is_called_running(
    tmp_path, monkeypatch, error
):
    """Also where a lock's file is left from before."""
    store = Store(tmp_path)
    run, _ = begin(tmp_path)
    with store.locked(run):
        pass

    def no_locks(handle, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert not store.is_locked(run)
    assert run_state(store, run)[0] == "interrupted"
    message = f"{run.path.with_name('.abc.lock')} cannot be locked: {os.strerror(error)}"
    with (
        pytest.raises(StoreError, match=re.escape(message)),
        store.locked(run, waiting=lambda: pytest.fail("waited")),
    ):
        pytest.fail("held what cannot be held")


def test_a_lock_is_waited_for_and_those_who_look_at_it_do_not_see_each_other(tmp_path):
    path = tmp_path / "lock"
    let_go = Event()

    def hold_it():
        with hold(path):
            held.set()
            let_go.wait()

    held = Event()
    thread = Thread(target=hold_it)
    thread.start()
    assert held.wait(30)
    with hold(path, waiting=let_go.set):  # called, so it waited
        assert let_go.is_set()
        assert is_held(path)
    thread.join()
    with path.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)  # as `is_held` does meanwhile
        assert not is_held(path)


def test_a_lock_is_free_again_though_a_process_that_was_forked_meanwhile_lives_on(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    with hold(tmp_path / "lock"):
        process.start()
    assert not is_held(tmp_path / "lock")
    process.kill()
    process.join()


def test_the_states_of_a_store_that_belongs_to_somebody_else_can_be_read():
    """Its files are there to be read; root, whom nothing stops, becomes nobody."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def look():
        if os.getuid() == 0:
            os.setuid(65534)
        theirs.send([run_state(store, each)[0] for each in (held, free)])

    with tempfile.TemporaryDirectory() as directory:
        store = Store(directory)
        held, free = (store.run("task", name) for name in ("held", "free"))
        for each in (held, free):
            with store.locked(each):
                store.begin(each, {}, {})
        with store.locked(held):
            paths = [Path(directory), *Path(directory).rglob("*")]
            for path in paths:
                path.chmod(0o555 if path.is_dir() else 0o444)
            process = context.Process(target=look)
            process.start()
            process.join()
            for path in paths:
                path.chmod(0o755)
    assert process.exitcode == 0
    assert ours.recv() == ["running", "interrupted"]


# --- input from outside -------------------------------------------------------------------------


PICKLERS = ("pickle", "joblib", "dill", "shelve", "marshal")
UNSAFE = ("eval", "exec", "yaml.unsafe_load", "yaml.full_load")


def loads(tree: ast.AST) -> list[str]:
    """Return every call that could run code that it reads: pickles, YAML, tensors and arrays."""
    found = []
    for node in ast.walk(tree):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        given = {word.arg: ast.unparse(word.value) for word in getattr(node, "keywords", [])}
        if name in ("torch.load", "np.load", "yaml.load"):
            safe = given.get("weights_only") == "True" or given.get("allow_pickle") == "False"
            found += [] if safe or given.get("Loader") == "_Loader" else [ast.unparse(node)]
        elif name in UNSAFE or name.partition(".")[0] in PICKLERS:
            found.append(ast.unparse(node))
    return found


def test_the_search_for_unsafe_reading_finds_it():
    unsafe = "torch.load(f)\ntorch.load(f, weights_only=False)\nnp.load(f, allow_pickle=True)\n"
    unsafe += "pickle.load(f)\nyaml.load(f, Loader=yaml.Loader)\neval(s)\nyaml.unsafe_load(f)"
    assert sorted(loads(ast.parse(unsafe))) == sorted(unsafe.split("\n"))
    safe = "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\njson.load(f)"
    assert loads(ast.parse(safe)) == []


def test_nothing_is_unpickled_but_cifar_s_checked_originals_and_a_study_s_own_messages():
    package = Path(repeatlab.__file__).parent
    found = {
        str(path.relative_to(package)): calls
        for path in sorted(package.rglob("*.py"))
        if (calls := loads(ast.parse(path.read_text(encoding="utf-8"))))
    }
    # `test_data` holds it to the checksum, which comes first; what workers say comes over a socket
    # without a name, which nobody else can reach (`test_scheduling`).
    assert list(found) == ["data/datasets.py", "studies/processes.py"]
    assert all("(folder / file).read_bytes()" in call for call in found["data/datasets.py"])
