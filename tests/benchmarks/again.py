"""Whether runs of the reference study come out again, bit for bit, on this machine.

    python tests/benchmarks/again.py [--count 10] [--seed 0] [--data DIR]

imports results/reference, draws runs at random, trains each anew in an empty store from nothing but
its stored configuration, and compares N and loss of every update where the export holds them, every
evaluation, the ledger and the digest of the last state. What differs is printed; the exit status is
1 where anything does. Runs that were trained in lock-step round as a stack does; they are trained
alone here, which for agents is the same to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

from repeatlab.cli import ROOT
from repeatlab.store.exchange import import_runs
from repeatlab.store.records import Run, Store
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train


def differences(old: Run, new: Run) -> list[str]:
    """Return the names of what differs between two records of one run, times apart."""
    found = []
    for name in ("updates", "evals"):
        tables = [getattr(run, name) for run in (old, new)]
        if len(tables[0]):  # an export may leave out a run's updates
            columns = [column for column in tables[0] if not column.endswith("seconds")]
            found += [] if tables[0][columns].equals(tables[1][columns]) else [name]
    for name in ("status", "ledger", "state_sha256"):
        before, after = (run.summary.get(name) for run in (old, new))
        if name == "ledger":
            before, after = (
                {key: value for key, value in ledger.items() if "seconds" not in key}
                for ledger in (before, after)
            )
        found += [name] if before != after else []
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="REPEATLAB_DATA")
    said = parser.parse_args()
    if said.data:
        os.environ["REPEATLAB_DATA"] = said.data
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store, again = Store(Path(folder, "runs")), Store(Path(folder, "again"))
        for export in sorted((ROOT / "results" / "reference").glob("*/plans.json")):
            import_runs(store, export.parent)
        planned = [
            (name, tuple(run["run"]), run["method"], run["seed"])
            for name in store.studies()
            for run in store.read_study(name)["runs"]
        ]
        # Another device's last digits are its own.
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        planned = [
            one
            for one in planned
            if (run := store.run(*one[1])).done and run.environment["device"] == here
        ]
        for name, key, method, seed in random.Random(said.seed).sample(planned, said.count):
            old = store.run(*key)
            new = train(RunConfig.model_validate(old.config), again)
            found = differences(old, new)
            rows.append([name, key[1], method, seed, ", ".join(found) or "nothing"])
            print(*rows[-1], flush=True)
    table = pd.DataFrame(rows, columns=["study", "run", "method", "seed", "differs"])
    print(table.to_string(index=False))
    return int((table["differs"] != "nothing").any())


if __name__ == "__main__":
    sys.exit(main())
