"""One run: `train(config)` makes exactly T updates and leaves its record in the store."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from repeatlab import checkpoint
from repeatlab.calibration import calibrate, calibration_run
from repeatlab.config import RunConfig
from repeatlab.environment import describe, pick_device
from repeatlab.method import Source
from repeatlab.prerequisites import source_run
from repeatlab.records import Run, RunWriter, Store
from repeatlab.seeding import derive
from repeatlab.tasks import TASKS, load_task
from repeatlab.training import STOP, CheckpointPlan, Interrupted, Training


def train(
    config: RunConfig, runs: str | Path | Store = "runs", *, plan: CheckpointPlan | None = None
) -> Run:
    """Make the run that `config` describes, unless the store has it, and return its record.

    A run that was begun goes on from its last checkpoint, with the same records as if it had never
    stopped. Where another process is at it, this one waits for that one's end. A non-finite loss
    ends the run as `diverged` with its data kept. Ctrl-C, once, and `training.STOP` make it leave a
    checkpoint and raise. Any other error marks it `failed` and is raised.

    Args:
        config: The run.
        runs: The run store, or its directory.
        plan: When checkpoints are written.

    Raises:
        StoreError: the store cannot be written.
        Interrupted: `training.STOP` was set.
    """
    store = runs if isinstance(runs, Store) else Store(runs)
    run = store.run(config.task.name, config.run_id)
    if run.done:
        return run
    store.check_writable()
    device = pick_device(config.device)
    with _interrupted_at_an_update(), store.locked(run):
        if not run.done:
            _train(config, store, run, device=device, plan=plan)
    return run


def _train(
    config: RunConfig, store: Store, run: Run, *, device: str, plan: CheckpointPlan | None
) -> None:
    calibration, source = _calibrate(config, store), _trace(config, store)
    environment = describe(device)
    writer, state = _resumed(store, run, environment)
    if writer is None:
        writer = store.begin(run, config.to_json(), environment)
    try:
        with _torch_settings(config):
            task = load_task(TASKS[config.task.name])(config.task, seed=config.seed, device=device)
            parts = {"calibration": calibration, "source": source, "plan": plan}
            Training(config, task, writer, **parts).run(state)
    except Interrupted:
        writer.close("interrupted")
        raise
    except BaseException as error:
        writer.fail(error)
        raise


def _resumed(
    store: Store, run: Run, environment: dict[str, Any]
) -> tuple[RunWriter | None, dict[str, Any] | None]:
    """Return a writer and a state to go on from, if this very code has left any on such a machine.

    Other versions could go on differently: the run then begins anew.
    """
    left_by = run.environment
    if any(left_by.get(name) != environment[name] for name in ("versions", "device", "commit")):
        return None, None
    for state in checkpoint.load(run.path):
        writer = store.resume(run, state["rows"])
        if writer is not None:
            return writer, state
    return None, None


@contextmanager
def _interrupted_at_an_update() -> Iterator[None]:
    """Let the first Ctrl-C stop the run at an update, with a checkpoint; the second, at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before, pressed = signal.getsignal(signal.SIGINT), False

    def stop(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        STOP.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    except Interrupted as error:
        if pressed:
            STOP.clear()
            raise KeyboardInterrupt(str(error)) from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _torch_settings(config: RunConfig) -> Iterator[None]:
    """Thread count and global random state of this run, and afterwards those from before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(derive(config.seed, "global"))
            yield
    finally:
        torch.set_num_threads(threads)


def _calibrate(config: RunConfig, store: Store) -> dict[str, Any]:
    """Return t and what it cost where the method asks for it, else nothing."""
    if not config.method.calibrated:
        return {}
    source = _completed(calibration_run(config), store, "`t: auto` needs a standard run")
    ledger = source.summary["ledger"]
    return {
        "t": calibrate(config, source.updates["loss"].to_numpy()),
        "run": source.path.name,
        "calibration_updates": ledger["updates"],
        "calibration_forward_samples": ledger["forward_samples"],
        "calibration_backward_samples": ledger["backward_samples"],
        "calibration_seconds": ledger["seconds"],
    }


def _trace(config: RunConfig, store: Store) -> Source | None:
    """Return the recorded counts that the method replays, if any; making them is not charged."""
    needed = source_run(config)
    if needed is None:
        return None
    updates = _completed(needed, store, "a control needs its source").updates
    first = updates[updates["repeat"] == 0]
    return Source(updates.groupby("fresh_batch").size().to_numpy(), first["loss"].to_numpy())


def _completed(config: RunConfig, store: Store, why: str) -> Run:
    """Return a run that another one needs, made now if the store lacks it."""
    run = train(config, store)
    if run.summary["status"] != "complete":
        raise RuntimeError(
            f"the run {run.path.name} {run.summary['status']}: {why} with finite losses"
        )
    return run
