"""What is said of the code that made a run: its commit, and which changes it had."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import repeatlab
from repeatlab.core import environment

FILES = (
    "repeatlab/training/making.py",
    "repeatlab/core/environment.py",
    "notebooks/00_small.ipynb",
    "README.md",
)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Return a source tree of one commit, from which this process is as if it had started."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("committed\n")
    (tmp_path / ".gitignore").write_text("*_ignored.py\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(
        environment, "__file__", str(tmp_path / "repeatlab" / "core" / "environment.py")
    )
    return tmp_path


def git(root: Path, *arguments: str) -> str:
    person = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ("git", "-C", str(root), *person, *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit() -> str | None:
    """Return what a new process would say."""
    return environment.commit.__wrapped__()


def test_a_tree_without_changes_is_its_commit(tree):
    assert commit() == git(tree, "rev-parse", "--short=12", "HEAD").strip()
    (tree / "README.md").write_text("changed\n")
    (tree / "repeatlab" / "an_ignored.py").write_text("x = 1\n")
    assert "+" not in commit()


def test_every_change_of_the_code_is_another_code(tree):
    loop, new = (
        tree / "repeatlab" / "training" / "making.py",
        tree / "repeatlab" / "tasks" / "näw one.py",
    )
    head, found = commit(), []
    for change in (
        lambda: loop.write_text("one change\n"),
        lambda: loop.write_text("another one\n"),
        lambda: (new.parent.mkdir(), new.write_text("a new file\n")),
        lambda: new.write_text("and a change of it\n"),
        lambda: new.rename(new.with_name("named_otherwise.py")),
        loop.unlink,
    ):
        change()
        found.append(commit())
        base, _, digest = found[-1].partition("+changes.")
        assert base == head
        assert len(digest) == 8
    assert len(set(found)) == len(found)


def test_the_same_changes_are_the_same_code(tree):
    loop, new = tree / "repeatlab" / "training" / "making.py", tree / "repeatlab" / "new.py"
    loop.write_text("a change\n")
    new.write_text("a new file\n")
    first = commit()
    git(tree, "add", "repeatlab")
    assert commit() == first
    loop.write_text("another one\n")
    assert commit() != first
    loop.write_text("a change\n")
    # No code: what a notebook saves of itself while runs train.
    (tree / "notebooks" / "00_small.ipynb").write_text("executed\n")
    (tree / "repeatlab" / ".making.py.swp").write_text("an editor's\n")
    assert commit() == first


def test_a_tree_whose_notebooks_alone_differ_has_changes(tree):
    head = commit()
    (tree / "notebooks" / "00_small.ipynb").write_text("executed\n")
    assert commit().startswith(f"{head}+changes.")


def test_outside_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(
        environment, "__file__", str(tmp_path / "repeatlab" / "core" / "environment.py")
    )
    assert commit() is None


def test_a_run_from_the_source_alone_knows_its_versions(monkeypatch):
    """As on a machine where the package lies on the path and is not installed."""

    def of_installed(name):
        if name == "repeatlab":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(environment, "version", of_installed)
    assert environment.describe("cpu")["versions"] == {
        "repeatlab": repeatlab.__version__,
        **{name: version(name) for name in environment.PACKAGES},
    }
