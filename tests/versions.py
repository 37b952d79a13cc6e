"""Whether the library works on each Python that it is for, and with the lowest declared versions.

`python tests/versions.py [PYTHON ...]`, which `make test-versions` calls: on each Python (versions
or paths; by default 3.11, 3.12 and 3.13) with the newest versions of what it needs, and on the
first of them with the lowest. For each an environment is made, a quick part of the tests is run
there, and it is deleted again: one takes 6 GB. What cannot be had here is skipped, with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# Between them they meet every library that the package needs.
QUICK = (
    "tests/core",
    "tests/cost",
    "tests/repetition/test_mappings.py",
    "tests/store/test_records.py",
    "tests/tasks/test_retrieval.py",
    "tests/tasks/test_replay_buffer.py",
    "tests/methods/test_schedules.py",
    "tests/training/test_config.py",
    "tests/analysis/test_statistics.py",
    "tests/figures/test_figures.py",
    "tests/studies/test_config_fuzz.py",
    "tests/report",
    "tests/package/test_cli.py",
)
SHOWN = ("torch", "numpy", "pandas", "pydantic")


def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[-1].strip("= ") if lines else f"exit status {done.returncode}"


def tried(uv: str, python: str, resolution: str, folder: Path) -> tuple[str, str, str]:
    """Return what was installed, how its tests went, and what they said that failed."""
    made = call(uv, "venv", "--quiet", "--python", python, folder)
    if made.returncode:
        return "", f"skipped: {last_line(made)}", ""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ",".join(e for e in ("lab", "test") if e in project["optional-dependencies"])
    options = ("--quiet", "--python", folder, "--resolution", resolution)
    installed = call(uv, "pip", "install", *options, "--editable", f".[{extras}]")
    if installed.returncode:
        return "", "FAILED to install", installed.stderr
    listed = call(uv, "pip", "freeze", "--python", folder).stdout.splitlines()
    versions = dict(line.split("==") for line in listed if "==" in line)
    done = call(folder / "bin" / "python", "-m", "pytest", "-q", "--no-header", *QUICK)
    shown = " ".join(f"{name} {versions[name]}" for name in SHOWN)
    failed = "FAILED: " if done.returncode else ""
    return shown, f"{failed}{last_line(done)}", done.stdout if failed else ""


def main(pythons: list[str]) -> int:
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        sys.exit("uv must be there: pip install uv")
    pythons = pythons or list(PYTHONS)
    rows = [(python, "highest") for python in pythons] + [(pythons[0], "lowest-direct")]
    outcomes = []
    for python, resolution in rows:
        with tempfile.TemporaryDirectory() as scratch:
            shown, outcome, said = tried(uv, python, resolution, Path(scratch) / "environment")
        print(said, file=sys.stderr)
        print(f"{python:8} {resolution:13} {shown:55} {outcome}", flush=True)
        outcomes.append(outcome)
    return any(outcome.startswith("FAILED") for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
