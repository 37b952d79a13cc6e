"""Making a run: `train(config)` makes exactly T updates and leaves its record in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from repeatlab.core.environment import describe, pick_device
from repeatlab.core.seeding import derive
from repeatlab.core.signals import Interrupted, Stop, held_back
from repeatlab.cost import spent_on
from repeatlab.store.records import Run, RunWriter, Store
from repeatlab.tasks import TASKS, Task, load_task
from repeatlab.training import checkpoint
from repeatlab.training.calibration import calibrate, calibration_run
from repeatlab.training.config import RunConfig
from repeatlab.training.one_run import CheckpointPlan, Training
from repeatlab.training.prerequisites import prerequisites, source_run
from repeatlab.training.visits import Source

# Of the runs that are about to be made: what is open while they are.
Watch = Callable[[Sequence[RunConfig]], AbstractContextManager]


def train(
    config: RunConfig,
    runs: str | Path | Store = "runs",
    *,
    plan: CheckpointPlan | None = None,
    watch: Watch = nullcontext,
    stop: Stop | None = None,
) -> Run:
    """Make the run that `config` describes, unless the store has it, and return its record.

    A run that was begun goes on from its last checkpoint, with the same records as if it had never
    stopped. Where another process is at it, this one waits for that one's end. A non-finite loss
    ends the run as `diverged` with its data kept. `stop` makes it leave a checkpoint and raise. Any
    other error marks it `failed` and is raised.

    Args:
        config: The run.
        runs: The run store, or its directory.
        plan: When checkpoints are written.
        watch: Makes what is entered when the run is this process's, and left at its end.
        stop: Asks the run to stop; by default the first Ctrl-C, SIGTERM or SIGHUP does.

    Raises:
        StoreError: the store cannot be written.
        Interrupted: `stop` was set.
        KeyboardInterrupt: Ctrl-C, where no `stop` is given; SystemExit for the other signals.
    """
    if stop is None:
        with held_back() as stop:
            return train(config, runs, plan=plan, watch=watch, stop=stop)
    store = runs if isinstance(runs, Store) else Store(runs)
    run = store.run(config.task.name, config.run_id)
    if run.done:
        return run
    store.check_writable()
    pick_device(config.device)  # one that is not there is named before anything is written
    make_needs(config, store, watch=watch, stop=stop)
    with store.locked(run, waiting=partial(leave_if_stopped, stop)), watch([config]):
        if not run.done:
            _train(config, store, run, plan=plan, stop=stop)
    return run


def make_needs(config: RunConfig, store: Store, *, stop: Stop, watch: Watch = nullcontext) -> None:
    """Make the runs that this one needs, while its own lock is free.

    Who holds a run never waits for what it needs, so that no two processes wait for each other.
    """
    for needed in prerequisites(config):
        train(needed, store, watch=watch, stop=stop)


def _train(
    config: RunConfig, store: Store, run: Run, *, plan: CheckpointPlan | None, stop: Stop
) -> None:
    """Begin a run, or go on with it, and bring its record to its end."""
    device = pick_device(config.device)
    writer, state, calibration, source = open_run(config, store, run, device=device)
    try:
        with torch_settings(config.threads, config.stream_seed):
            task = build_task(config, device)
            parts = {"calibration": calibration, "source": source, "plan": plan, "stop": stop}
            Training(config, task, writer, **parts).run(state)
    except Interrupted:
        writer.close("interrupted")
        raise
    except BaseException as error:
        writer.fail(error)
        raise


class Opened(NamedTuple):
    """What a run begins, or goes on, with.

    Attributes:
        writer: Of its record.
        state: Where it goes on from; None at its beginning.
        calibration: t and what it cost, where the method asks for it.
        source: What the method replays, if anything.
    """

    writer: RunWriter
    state: dict[str, Any] | None
    calibration: dict[str, Any]
    source: Source | None


def open_run(config: RunConfig, store: Store, run: Run, *, device: str) -> Opened:
    """Begin a run's record, or go on with it; the store has what it needs, and its lock is held.

    It goes on if this very code has left a checkpoint on such a machine: others could go on
    differently.
    """
    found = {"calibration": _calibrate(config, store), "source": _trace(config, store)}
    environment, left_by = describe(device), run.environment
    if all(left_by.get(name) == environment[name] for name in ("versions", "device", "commit")):
        for state in checkpoint.load(run.path):
            writer = store.resume(run, state["rows"])
            if writer is not None:
                return Opened(writer, state, **found)
    return Opened(store.begin(run, config.to_json(), environment), None, **found)


def _calibrate(config: RunConfig, store: Store) -> dict[str, Any]:
    """Return t and what it cost where the method asks for it, else nothing."""
    if not config.method.calibrated:
        return {}
    run = _needed(calibration_run(config), store, "`t: auto` needs a standard run")
    return {
        "t": calibrate(config, run.fresh_batches["loss"].to_numpy()),
        "run": run.path.name,
        **spent_on("calibration", run.summary["ledger"]),
    }


def _trace(config: RunConfig, store: Store) -> Source | None:
    """Return the recorded counts that the method replays, if any; making them is not charged."""
    source = source_run(config)
    if source is None:
        return None
    batches = _needed(source, store, "a control needs its source").fresh_batches
    return Source(batches["visits"].to_numpy(), batches["loss"].to_numpy())


def _needed(config: RunConfig, store: Store, why: str) -> Run:
    """Return a run that another one needs; `make_needs` has made it."""
    run = store.run(config.task.name, config.run_id)
    status = run.status.get("status", "is missing")
    if status != "complete":
        raise RuntimeError(f"the run {run.path.name} {status}: {why} with finite losses")
    return run


def build_task(
    config: RunConfig, device: str, *, kind: type[Task] | None = None, **parts: Any
) -> Task:
    """Return the run's task as it is before the first update.

    Args:
        config: The run.
        device: Where it is trained.
        kind: A subclass of the task's class to build in its place.
        **parts: What others have made already.
    """
    kind = kind or load_task(TASKS[config.task.name])
    return kind(config.task, seed=config.stream_seed, device=device, **parts)


@contextmanager
def torch_settings(threads: int, seed: int) -> Iterator[None]:
    """Thread count and global random state of a run, and afterwards those from before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "global"))
            yield
    finally:
        torch.set_num_threads(before)


def leave_if_stopped(stop: Stop) -> None:
    """See whether there is a stop while no update is made.

    Raises:
        Interrupted: it was set.
    """
    if stop.is_set():
        raise Interrupted("it was stopped while another process was at the run")
