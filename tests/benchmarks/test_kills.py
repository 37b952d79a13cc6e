"""Runs that are killed again and again end as if nothing had been: counted for every task.

A run of a few updates, with a checkpoint every other one, is killed by SIGKILL at random moments of
its time, and gone on with each time. After one kill of every task the last block of its record is
torn, after another its last checkpoint. Every run is compared, bit for bit, with one that was never
stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep
from typing import NamedTuple

import pandas as pd
import pytest
from every_method import config
from test_resume import same_record

from repeatlab.store.records import Run, Store
from repeatlab.tasks import TASKS
from repeatlab.training import checkpoint
from repeatlab.training.config import LoaderConfig, RunConfig
from repeatlab.training.making import train
from repeatlab.training.one_run import CheckpointPlan, Training

KILLS, MOST = 12, 40  # of every task: until both kinds of damage had their turn
UPDATES = 40
EVERY = 2
METHOD = {"mapping": {"name": "quantile", "window": 4}, "schedule": {"name": "cosine"}}
TABLE = Path(__file__).parent / "results" / "kills.csv"


def run_of(task: str) -> RunConfig:
    run = config(task, METHOD)
    evaluation = run.evaluation.model_copy(update={"splits": ("train",), "every": 10})
    changes = {"max_updates": UPDATES, "evaluation": evaluation}
    return run.model_copy(update=changes | {"loader": LoaderConfig(delay_ms=5)})


class Attempt(NamedTuple):
    """What one process did: the update that it began at, how many it made, what it saved."""

    start: int
    made: int
    saved: list[int]


def _told(tell: Callable[[str], None]) -> None:
    """Make this process's trainings tell where they begin, and every update and checkpoint."""
    begin, visit, state, save = (
        Training.load_state_dict,
        Training.visit,
        Training.state_dict,
        checkpoint.save,
    )
    done = [0]

    def load_state_dict(self, loaded):
        begin(self, loaded)
        tell(f"start {self.repeater.updates}")

    def told_visit(self):
        make = visit(self)

        def counted(batch):
            make(batch)
            tell("update")

        return counted

    def state_dict(self):
        done[0] = self.repeater.updates
        return state(self)

    def told_save(directory, saved):
        save(directory, saved)
        tell(f"saved {done[0]}")

    Training.load_state_dict, Training.visit = load_state_dict, told_visit
    Training.state_dict, checkpoint.save = state_dict, told_save


def _train(data: dict, runs: Path, log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _told(lambda line: os.write(handle, f"{line}\n".encode()))
    train(RunConfig.from_json(data), runs, plan=CheckpointPlan(updates=EVERY, seconds=1e9))


def attempt(run: RunConfig, runs: Path, *, kill_after: float | None) -> tuple[bool, Attempt]:
    """Train in a process of its own; return whether it was killed, and what it did."""
    log = runs / "log"
    log.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(
        target=_train, args=(run.to_json(), runs, log)
    )
    process.start()
    if kill_after is not None:
        sleep(kill_after)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    numbers = {name: [int(n) for key, *n_ in lines for n in n_ if key == name] for name in _TOLD}
    made = sum(key == "update" for key, *_ in lines)
    did = Attempt(next(iter(numbers["start"]), 0), made, numbers["saved"])
    return process.exitcode != 0, did


_TOLD = ("start", "saved")


def tear(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


class Counts(NamedTuple):
    """A row of the table; `lost` are updates that a whole checkpoint held and that were re-made."""

    kills: int
    torn_records: int
    torn_checkpoints: int
    runs: int
    most_remade: int
    differing: int
    lost: int


def killed_again_and_again(task: str, root: Path) -> Counts:
    run, chance = run_of(task), random.Random(f"kills/{task}")
    unbroken = train(run, root / "unbroken")
    assert len(unbroken.updates) == UPDATES
    # The processes are forks of this one, which has loaded everything now.
    (root / "timed").mkdir()
    begin = perf_counter()
    attempt(run, root / "timed", kill_after=None)
    seconds = perf_counter() - begin
    kills = runs = differing = lost = most_remade = 0
    torn = {"records": 0, "checkpoints": 0}
    while kills < KILLS or (kills < MOST and not all(torn.values())):
        store = Store(root / f"killed-{runs}")
        store.root.mkdir()
        killed, before, spared = True, None, 0
        while killed:
            moment = chance.uniform(0, seconds) if kills < MOST else None
            killed, did = attempt(run, store.root, kill_after=moment)
            # An attempt that is killed before it begins leaves what was there.
            begun = did.made > 0 or did.start > 0
            if before is not None and begun:
                reached, saved = before.start + before.made, [0, before.start, *before.saved]
                held = sorted(set(saved))[-1 - spared] if len(set(saved)) > spared else 0
                lost += max(0, held - did.start)
                most_remade = max(most_remade, reached - did.start)
            kills += killed
            before, spared = (did, 0) if begun else (before, spared)
            if killed and not spared:
                spared = _tear_one(store.run(task, run.run_id), torn)
        differing += not _same(unbroken, store.run(task, run.run_id))
        runs += 1
    return Counts(kills, torn["records"], torn["checkpoints"], runs, most_remade, differing, lost)


def _tear_one(run: Run, torn: dict[str, int]) -> int:
    """Tear a record or a checkpoint, each once; return how many checkpoints that spoils."""
    if run.done or not (run.path / checkpoint.PREVIOUS).exists():
        return 0
    states = list(checkpoint.load(run.path))
    if len(states) < 2:
        return 0
    if not torn["checkpoints"]:
        tear(run.path / checkpoint.CURRENT, 0.7)
        torn["checkpoints"] += 1
        return 1
    rows = len(run.updates)
    if not torn["records"] and rows == states[0]["rows"]["updates"]["rows"]:
        stream = run.path / "updates.arrow"
        stream.write_bytes(stream.read_bytes()[:-40])
        assert len(run.updates) < rows
        torn["records"] += 1
        return 1
    return 0


def _same(first: Run, second: Run) -> bool:
    try:
        same_record(first, second)
    except AssertionError:
        return False
    return second.updates["update"].tolist() == list(range(UPDATES))


@pytest.mark.parametrize("task", TASKS)
def test_killed_runs_end_as_the_unbroken_one(task, tmp_path, capsys):
    counts = killed_again_and_again(task, tmp_path)
    row = {"task": task} | counts._asdict()
    TABLE.parent.mkdir(exist_ok=True)
    table = pd.DataFrame([row])
    if TABLE.exists():
        table = pd.concat([pd.read_csv(TABLE), table]).drop_duplicates("task", keep="last")
    table.to_csv(TABLE, index=False)
    with capsys.disabled():
        print(f"\n{row}")
    assert counts.kills >= 10
    assert (counts.torn_records, counts.torn_checkpoints) == (1, 1)
    assert counts.differing == 0
    assert counts.lost == 0
    # Those since the last checkpoint, or since the one before where the last was torn.
    assert counts.most_remade <= 2 * EVERY
