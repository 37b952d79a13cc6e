"""The first cell that notebooks name for hosted machines: it makes such a machine ready."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import venv
import zipfile

import nbformat
import pytest

from repeatlab.cli import ROOT

TASKS = sorted((ROOT / "notebooks").glob("[14]*_*.ipynb"))
NOTEBOOKS = [ROOT / "notebooks" / "00_quickstart.ipynb", *TASKS]
PLACEHOLDER = "git+https://HOST/OWNER/repeatlab"
# IPython comes from this environment, as it is there on a hosted machine, and repeatlab does not.
NOTEBOOK = """
import sys
from importlib.util import find_spec
sys.path.append({packages!r})
assert find_spec("repeatlab") is None
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
shell.run_cell({cell!r}, silent=True).raise_error()
import os, repeatlab
print("found", repeatlab.WHERE, os.getcwd(), sep="|")
"""


def first_cell(path) -> str:
    """Return the cell's text from the first lines of a notebook."""
    (cell,) = re.findall(r"```\n(.*?)\n```", nbformat.read(path, 4).cells[0].source, re.DOTALL)
    return cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_task_notebook_names_the_same_first_cell(path):
    assert first_cell(path) == first_cell(NOTEBOOKS[0])
    assert PLACEHOLDER in first_cell(path)


@pytest.fixture
def wheel(tmp_path):
    """Return a wheel of a package that stands for repeatlab; it needs nothing and no network."""
    path = tmp_path / "repeatlab-9.0-py3-none-any.whl"
    about = "repeatlab-9.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("repeatlab.py", "WHERE = 'hosted'")
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: repeatlab\nVersion: 9.0"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{about}/RECORD", "")
    return path


def test_it_installs_the_package_and_leaves_a_working_directory(tmp_path, wheel):
    machine, home = tmp_path / "machine", tmp_path / "content"
    home.mkdir()
    venv.create(machine, with_pip=True)
    cell = first_cell(NOTEBOOKS[0]).replace(PLACEHOLDER, wheel.as_uri())
    packages = tmp_path / "packages"
    packages.symlink_to(sysconfig.get_paths()["purelib"])
    done = subprocess.run(
        [machine / "bin" / "python", "-c", NOTEBOOK.format(packages=str(packages), cell=cell)],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, where, directory = done.stdout.splitlines()[-1].split("|")
    assert where == "hosted"
    # The store of a notebook is ../runs: inside what the machine keeps.
    assert directory == str(home / "lab" / "notebooks")
