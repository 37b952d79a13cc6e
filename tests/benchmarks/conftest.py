"""How every benchmark measures: one thread, both sides in turn, runs that are kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Measure every benchmark on one thread."""


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
