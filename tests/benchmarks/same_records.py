"""Whether two commits make the same records, bit for bit but for times.

    python tests/benchmarks/same_records.py COMMIT [--updates 40]

trains a short form of every study of the quick profile's task notebooks, one seed an arm, once with
the library at COMMIT and once with that of the working tree, and compares run by run: updates,
evaluations, the ledger and the digest of the final state. What a commit does not know (an arm or a
task that came later) is named, not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).parents[2]


def short_profile(tree: Path, to: Path, updates: int) -> list[Path]:
    """Write the quick profile's studies of `tree` in their short form; return their files."""
    files = []
    (to / "quick").mkdir(parents=True)
    for path in sorted((tree / "params").glob("*.yaml")):
        (to / path.name).write_text(path.read_text())
    for path in sorted((tree / "params" / "quick").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        study = content.get("parameters", {}).get("study")  # a plan has none
        if not isinstance(study, dict) or not content["notebook"].startswith("1"):
            continue
        study |= {"max_updates": updates, "seeds": 1}
        study["evaluation"] = study.get("evaluation", {}) | {"every": updates // 2}
        study["calibration"] = study.get("calibration", {}) | {"updates": 10}
        if "rho_loss" in study["methods"]:
            study["methods"]["rho_loss"]["sampler"]["holdout_updates"] = 5
        files.append(to / "quick" / path.name)
        files[-1].write_text(yaml.safe_dump(content, sort_keys=False))
    return files


def records(tree: Path, profile: Path, store: Path, updates: int) -> dict[tuple, dict]:
    """Train with the library of `tree`; return each run's tables by (study, task, method)."""
    files = short_profile(tree, profile, updates)
    command = [sys.executable, "-m", "repeatlab", "run", *map(str, files), "--runs", str(store)]
    command += ["--workers", str(os.cpu_count())]
    environ = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tree, env=environ, check=True)
    found = {}
    for path in sorted((store / "studies").glob("*.json")):
        for run in json.loads(path.read_text())["runs"]:
            folder = store.joinpath(*run["run"])
            summary = json.loads((folder / "summary.json").read_text())
            found[path.stem, run["task"], run["method"]] = {
                "updates": timeless(pd.read_parquet(folder / "updates.parquet")),
                "evaluations": timeless(pd.read_parquet(folder / "evals.parquet")),
                "ledger": {k: v for k, v in summary["ledger"].items() if "seconds" not in k},
                "final": summary["final"],
                "state": summary["state_sha256"],
            }
    return found


def timeless(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[sorted(name for name in frame if "seconds" not in name)]


def differences(old: dict, new: dict) -> list[str]:
    """Return the names of the parts in which two runs differ."""
    return [
        part
        for part, value in old.items()
        if not (value.equals(new[part]) if isinstance(value, pd.DataFrame) else value == new[part])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="The commit to compare the working tree with.")
    parser.add_argument("--updates", type=int, default=40, help="Updates of each run.")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old = folder / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(old), chosen.commit], check=True)
        try:
            before = records(old, folder / "a", folder / "a_runs", chosen.updates)
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
        after = records(ROOT, folder / "b", folder / "b_runs", chosen.updates)
    for key in sorted(before.keys() ^ after.keys()):
        print("only", "before:" if key in before else "after:", *key)
    both = sorted(before.keys() & after.keys())
    parted = {key: differences(before[key], after[key]) for key in both}
    for key, parts in parted.items():
        if parts:
            print("differs:", *key, "in", ", ".join(parts))
    count = sum(map(bool, parted.values()))
    print(f"{len(both)} runs compared, {count} differ")
    sys.exit(bool(count))


if __name__ == "__main__":
    main()
