"""What a study of many small runs costs beside their training, and whether its workers grow.

Everything but training is: starting the processes, handing runs out, building tasks, writing and
finishing records. Training is what the runs' clocks say, and their evaluations' share is none of
it.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import pandas as pd
import psutil

from repeatlab.core.environment import processor
from repeatlab.store.records import Store
from repeatlab.studies.scheduling import open_trainer
from repeatlab.studies.study import Study, run_studies

RUNS, WORKERS, UPDATES = 200, 2, 400
TABLE = Path(__file__).parent / "results" / "study_overhead.csv"


def many_runs() -> Study:
    return Study.of(
        name="overhead",
        tasks={"digits": {"name": "supervised", "width": 4, "batch_size": 32, "lr": 0.01}},
        methods={
            "standard": {},
            "linear": {"mapping": {"name": "linear", "t": 0.8}},
        },
        seeds=RUNS // 2,
        max_updates=UPDATES,
        evaluation={"every": UPDATES, "splits": [], "test": False},
        device="cpu",
    )


def worker_memory() -> list[float]:
    """Return the resident megabytes of every worker process of this one."""
    children = psutil.Process().children(recursive=True)
    # Copies of the process that has imported the libraries; itself it is a child of this one.
    workers = [c for c in children if "processes" in " ".join(c.cmdline())]
    return [w.memory_info().rss / 2**20 for w in workers if w.ppid() != os.getpid()]


def test_a_study_of_many_small_runs(tmp_path, monkeypatch, capsys):
    ends, memory = [], []

    @contextmanager
    def watched(*where):
        with open_trainer(*where) as train:

            def noted(configs, **options):
                for outcome in train(configs, **options):
                    ends.append(perf_counter())
                    if len(ends) in (20, RUNS):  # between two runs: workers wait for it
                        memory.append(max(worker_memory()))
                    yield outcome

            yield noted

    monkeypatch.setattr("repeatlab.studies.study.open_trainer", watched)
    study = many_runs()
    begin = perf_counter()
    report = run_studies([study], tmp_path, workers=WORKERS)
    wall = perf_counter() - begin
    assert list(report.status.values()) == ["complete"] * RUNS
    store = Store(tmp_path)
    runs = [store.run(*run["run"]) for run in store.read_study("overhead")["runs"]]
    training = sum(run.summary["ledger"]["seconds"] for run in runs)
    row = {
        "runs": RUNS,
        "updates": UPDATES,
        "workers": WORKERS,
        "wall_seconds": round(wall, 1),
        "training_seconds": round(training, 1),
        "overhead": round(1 - training / (WORKERS * wall), 3),
        # From the 20th run to the last: what starting the processes takes is left out.
        "overhead_after_start": round(1 - _steady(runs, ends), 3),
        "worker_mb_after_20": round(memory[0]),
        "worker_mb_after_all": round(memory[-1]),
        "load_average": round(os.getloadavg()[0], 1),
        "processor": processor(),
    }
    TABLE.parent.mkdir(exist_ok=True)
    pd.DataFrame([row]).to_csv(TABLE, index=False)
    with capsys.disabled():
        print(f"\n{row}")
    assert row["worker_mb_after_all"] < 1.1 * row["worker_mb_after_20"]
    assert row["overhead"] < 0.15


def _steady(runs: list, ends: list[float]) -> float:
    """Return the share of the workers' time that runs trained in, from the 20th run's end on."""
    ended = sorted(runs, key=lambda run: (run.path / "summary.json").stat().st_mtime_ns)
    training = sum(run.summary["ledger"]["seconds"] for run in ended[20:])
    return training / (WORKERS * (ends[-1] - ends[19]))
