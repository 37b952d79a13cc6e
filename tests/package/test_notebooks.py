"""The committed notebooks: thin, stripped but for their checked cells, and consistent."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys

import nbformat
import pytest

from repeatlab.cli import ROOT
from repeatlab.studies.parameter_files import parameter_names

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKED = {"keep_output", "nbval-check-output"}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, 4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert {"00_quickstart", "10_supervised", "20_convergence"} <= {p.stem for p in NOTEBOOKS}


def test_it_is_valid(notebook):
    nbformat.validate(notebook)


def test_it_is_thin(notebook):
    lines = []
    for cell in _code(notebook):
        tree = ast.parse(cell.source)
        assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        lines += [line for line in cell.source.splitlines() if line.strip()]
    assert len([line for line in lines if not line.lstrip().startswith("#")]) < 60


def test_every_picture_that_it_draws_is_shown(notebook):
    """Figures show themselves only as the value of a cell: in a loop they have to be displayed."""
    for cell in _code(notebook):
        body = ast.parse(cell.source).body
        lost = [
            node.value
            for node in ast.walk(ast.Module(body, []))
            if (isinstance(node, ast.Expr) and node is not body[-1])
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_")
        ]
        called = {ast.unparse(value.func) for value in lost if isinstance(value, ast.Call)}
        assert not called & {"picture_grid", "repeats_over_time", "tau_over_time", "save_figure"}


def test_it_begins_with_what_it_is_for_and_its_parameters(notebook):
    assert notebook.cells[0].source.startswith("# ")
    assert "parameters" in notebook.cells[1].metadata.tags


def test_only_checked_cells_keep_their_output_and_every_one_has_it(notebook):
    checked = 0
    for cell in _code(notebook):
        tags = set(cell.metadata.get("tags", []))
        if tags & CHECKED:
            assert tags >= CHECKED, "nbval compares what nbstripout keeps: both tags or none"
            # Without a count, nbval runs the cell but never compares it.
            assert cell.execution_count
            assert cell.outputs
            checked += 1
        else:
            assert not cell.outputs
    assert checked


def test_stripping_them_as_contributors_are_told_changes_nothing(tmp_path):
    copies = [shutil.copy(path, tmp_path) for path in NOTEBOOKS]
    command = [sys.executable, "-m", "nbstripout", "--keep-count", *map(str, copies)]
    subprocess.run(command, check=True)
    for path in NOTEBOOKS:
        stripped = (tmp_path / path.name).read_bytes()
        assert stripped == path.read_bytes(), f"nbstripout --keep-count notebooks/{path.name}"


def test_store_and_figures_are_parameters_of_every_notebook_that_uses_them():
    for path in NOTEBOOKS:
        if path.stem != "00_quickstart":
            assert {"runs", "figures"} <= parameter_names(path), path.name
