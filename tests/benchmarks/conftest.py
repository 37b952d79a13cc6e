"""How every benchmark measures: one thread, both sides in turn, tables that keep what was found."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Measure every benchmark on one thread."""


@pytest.fixture
def record() -> Callable[[Path, list[dict]], None]:
    """Return a function that puts rows into a table, in the place of those they are new for."""

    def write(path: Path, rows: list[dict]) -> None:
        keys = ["task", "data", "scale", "arm", "metric"]
        path.parent.mkdir(exist_ok=True)
        table = pd.DataFrame(rows)
        if path.exists():
            table = pd.concat([pd.read_csv(path), table]).drop_duplicates(keys, keep="last")
        table.to_csv(path, index=False)

    return write


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store for runs that take long: it is there again while the code is the same."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return None if done.returncode else done.stdout.strip()

    code = git("rev-parse", "--short", "HEAD:repeatlab")
    if code is None or git("status", "--porcelain", "repeatlab"):
        return tmp_path
    return root / ".benchmarks" / "runs" / code
