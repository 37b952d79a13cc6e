"""The viewpoints on a full study: 1,008 runs of 25,000 updates, generated, without torch.

Six tasks, 21 arms, 8 seeds; every run has a loss and N for each update and 51 evaluations. The
notebooks 20 to 23 run as `repeatlab figures` runs them, side by side, kernels included, where
`import torch` fails. Printed: the wall time of all, the largest memory of any kernel.
"""

from __future__ import annotations

import csv
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from shutil import copytree
from time import perf_counter

import numpy as np
import yaml

from repeatlab.cli import ROOT
from repeatlab.core.environment import processor
from repeatlab.core.schema import read_yaml
from repeatlab.cost import Ledger
from repeatlab.report.notebooks import execute_profile
from repeatlab.store.records import Store

UPDATES, EVERY, BATCH, SEEDS = 25_000, 500, 64, 8
REPEATING = (
    "random", "permuted", "windowed", "time_only", "falling_cosine", "anti_hard", "spaced",
    "cosine_repeats", "threshold", "linear", "control_limit", "quantile", "until", "fixed2",
    "fixed3",
)  # fmt: skip
SINGLE = ["standard", "cosine", "warm_cosine", "importance", "hard_mining", "step_size"]
NOTEBOOKS = ("convergence", "efficiency", "mechanism", "adaptability")
MOST_MEMORY = 4 * 2**30
RESULTS = Path(__file__).parent / "results" / "viewpoints.csv"


def write_run(job: tuple[Path, str, str, int, str]) -> None:
    """Make up one run: a falling, noisy loss, and N by chance where the arm repeats."""
    root, task, method, seed, metric = job
    store = Store(root)
    draws = np.random.default_rng([seed, *f"{task} {method}".encode()])
    longest = 5 if method in REPEATING else 1
    counts = draws.integers(1, longest + 1, UPDATES)
    counts = counts[: int(np.searchsorted(counts.cumsum(), UPDATES)) + 1]
    counts[-1] -= counts.sum() - UPDATES
    batch = np.repeat(np.arange(len(counts)), counts)
    update = np.arange(UPDATES)
    loss = np.exp(-update / 10_000) + 0.1 * draws.random(UPDATES)
    writer = store.begin(store.run(task, f"{task}-{method}-{seed}"), {}, {})
    writer.updates(
        {
            "update": update,
            "fresh_batch": batch,
            "repeat": update - np.repeat(counts.cumsum() - counts, counts),
            "repeats": np.repeat(counts, counts),
            "loss": loss,
            "lr": np.full(UPDATES, 0.1),
            "seconds": 0.01 * (update + 1),
        }
    )
    for done in range(0, UPDATES + 1, EVERY):
        ledger = Ledger(
            updates=done,
            fresh_batches=int(np.searchsorted(counts.cumsum(), done)),
            forward_samples=done * BATCH,
            backward_samples=done * BATCH,
            seconds=0.01 * done,
        ).to_json()
        value = float(np.exp(-done / 10_000) + 0.02 * draws.random())
        scores = {metric: value, "loss": value, "accuracy": 1 - value}
        writer.evals(done, {"train": scores, "validation": scores}, ledger)
    final = {f"{split}.{m}": v for split in ("validation", "test") for m, v in scores.items()}
    writer.finish("complete", {"ledger": ledger, "final": final})


def generate(root: Path) -> int:
    """Write the studies that the quick profile's viewpoints read; return how many runs."""
    store, jobs = Store(root), []
    for view in read_yaml(ROOT / "params/quick/convergence.yaml")["parameters"]["views"]:
        task, planned = view["name"], []
        for method in (*SINGLE, *REPEATING):
            for seed in range(SEEDS):
                run = [task, f"{task}-{method}-{seed}"]
                planned.append({"task": task, "method": method, "seed": seed, "run": run})
                jobs.append((root, task, method, seed, view["metric"]))
        study = {"name": view["study"], "max_updates": UPDATES, "runs": planned}
        store.write_study(view["study"], study)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(write_run, jobs, chunksize=8))
    return len(jobs)


def test_a_thousand_runs_without_torch(tmp_path, monkeypatch, capsys):
    count = generate(tmp_path / "runs")
    project = tmp_path / "project"
    copytree(ROOT / "notebooks", project / "notebooks")
    (project / "params" / "quick").mkdir(parents=True)
    for name in NOTEBOOKS:
        parameters = read_yaml(ROOT / "params" / "quick" / f"{name}.yaml")
        (project / "params" / "quick" / f"{name}.yaml").write_text(yaml.safe_dump(parameters))
    (tmp_path / "without" / "torch").mkdir(parents=True)
    (tmp_path / "without" / "torch" / "__init__.py").write_text("raise ImportError('no torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"), prepend=os.pathsep)
    start = perf_counter()
    places = {"runs": tmp_path / "runs", "figures": tmp_path / "figures"}
    figures = execute_profile("quick", root=project, **places)
    seconds = perf_counter() - start
    memory = getrusage(RUSAGE_CHILDREN).ru_maxrss * 1024
    row = {
        "runs": count,
        "updates per run": UPDATES,
        "figures": len(figures),
        "wall seconds": round(seconds),
        "largest kernel (GiB)": round(memory / 2**30, 2),
        "cores": os.cpu_count(),
        "processor": processor(),
    }
    with capsys.disabled():
        print()
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, row, lineterminator="\n")
        table.writeheader()
        table.writerow(row)
    assert memory < MOST_MEMORY
