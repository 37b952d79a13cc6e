"""Nothing is drawn twice, and nothing is left that would be drawn otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest

from repeatlab.cli import ROOT
from repeatlab.report.notebooks import execute_profile
from repeatlab.store.exchange import export
from repeatlab.store.records import Store

STUDY = """
    name: tiny-{name}
    tasks: {{digits: {{name: supervised, width: 2, batch_size: 8}}}}
    methods: {{standard: {{}}}}
    seeds: {seeds}
    max_updates: {updates}
    evaluation: {{every: 2, splits: [], test: false}}
    device: cpu
"""
# Counts its executions, and leaves a figure that says which one it is of.
CODE = """
import pathlib
from repeatlab.core.files import write_json
from repeatlab.core.locks import hold
from repeatlab.figures import read_manifest
place = pathlib.Path(figures)
place.mkdir(exist_ok=True)
log = place.parent / f"{own}.log"
log.write_text((log.read_text() if log.exists() else "") + "x")
(place / f"{own}.pdf").write_text(own)
entry = {own: {"notebook": own, "files": [f"{own}.pdf"]}}
with hold(place / ".lock"):
    write_json(place / "manifest.json", read_manifest(place) | entry)
"""


def notebook(root: Path, name: str, more: str = "") -> Path:
    made = nbformat.v4.new_notebook()
    parameters = "study = {}\nviews = []\nshown = {}\nplan = None\nruns = '.'\nfigures = '.'\n"
    made.cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"own = {name!r}\n{CODE}\n{more}"),
    ]
    for number, cell in enumerate(made.cells):
        cell["id"] = str(number)
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(made, path)
    return path


def study(root: Path, name: str, seeds: int = 1) -> None:
    fields = STUDY.format(name=name, seeds=seeds, updates=len(name))
    text = f"notebook: 10_{name}\nparameters:\n  study:{fields}"
    (root / "params" / "tiny" / f"{name}.yaml").write_text(text)


def view(root: Path, name: str, of: str) -> None:
    text = f"notebook: 20_{name}\nparameters: {{views: [{{study: tiny-{of}}}]}}\n"
    (root / "params" / "tiny" / f"{name}.yaml").write_text(text)


def in_this_process(job, *, output, runs, figures, kernels) -> None:
    """Execute a notebook as `execute` does, but without a kernel, which takes seconds to start."""
    cells = nbformat.read(job.notebook, 4).cells
    given = job.parameters | {"runs": str(runs), "figures": str(figures)}
    names: dict[str, object] = {}
    for cell in cells:
        exec(cell.source, names)
        names |= given
    (output / f"{job.source.stem}.ipynb").write_text("executed")


def make(root: Path, **options) -> tuple[set[str], list[str]]:
    """Make the figures, and return what was drawn and what was said."""
    before = {path.stem: len(path.read_text()) for path in root.glob("*.log")}
    said: list[str] = []
    places = {"runs": root / "runs", "figures": root / "figures"}
    execute_profile("tiny", root=root, **places, echo=said.append, **options)
    after = {path.stem: len(path.read_text()) for path in root.glob("*.log")}
    return {name for name in after if after[name] != before.get(name, 0)}, said


@pytest.fixture(scope="module")
def drawn_once(tmp_path_factory):
    """Return a project of two studies with a notebook each, and of one that looks at the first."""
    root = tmp_path_factory.mktemp("drawn")
    for directory in ("notebooks", "params/tiny"):
        (root / directory).mkdir(parents=True)
    for name in ("10_one", "10_other", "20_view"):
        notebook(root, name)
    study(root, "one")
    study(root, "other")
    view(root, "view", of="one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repeatlab.report.notebooks.execute", in_this_process)
        assert make(root)[0] == {"10_one", "10_other", "20_view"}
    return root


@pytest.fixture
def project(drawn_once, tmp_path):
    return shutil.copytree(drawn_once, tmp_path / "project")


@pytest.fixture
def draw(project, monkeypatch):
    monkeypatch.setattr("repeatlab.report.notebooks.execute", in_this_process)
    return partial(make, project)


def test_what_has_not_changed_is_left_but_by_force(draw):
    drawn, said = draw()
    assert not drawn
    # No study is looked at, either.
    names = ("10_one", "10_other", "20_view")
    assert sorted(said) == [f"{name}: nothing has changed" for name in names]
    drawn, said = draw(force=True, only=["20_view"])
    assert drawn == {"20_view"}
    assert "20_view: changed: nothing, but it is forced" in said


def test_a_changed_notebook_is_drawn(project, draw):
    notebook(project, "20_view", "done = True")
    drawn, said = draw()
    assert drawn == {"20_view"}
    assert "20_view: changed: source" in said
    assert not draw()[0]


def test_a_changed_parameter_file_draws_what_reads_it_and_nothing_else(project, draw):
    study(project, "other", seeds=2)
    drawn, said = draw()
    assert drawn == {"10_other"}
    assert "10_other: changed: parameters, runs" in said
    assert any(line.startswith("1 study: 2 runs: 2 complete (1 trained now") for line in said)
    study(project, "one", seeds=2)
    drawn, said = draw()
    assert drawn == {"10_one", "20_view"}
    assert "20_view: changed: runs" in said
    view(project, "view", of="other")
    assert draw()[0] == {"20_view"}
    assert not draw()[0]


def test_what_measures_goes_first_so_that_nothing_is_drawn_before_k_is_known(project, draw):
    # Every axis of cost is drawn by the k that the store has measured.
    measures = """
store = pathlib.Path(runs) / "measurements"
store.mkdir(exist_ok=True)
(store / "one.json").write_text("{}")
"""
    notebook(project, "26_measures", measures)
    (project / "params" / "tiny" / "measures.yaml").write_text(
        "notebook: 26_measures\nalone: true\n"
    )
    drawn, _ = draw()
    assert drawn >= {"26_measures", "20_view"}
    drawn, said = draw()
    assert drawn == set(), said


def test_runs_that_are_made_anew_or_missing_are_seen(project, draw):
    store = Store(project / "runs")
    (planned,) = store.read_study("tiny-one")["runs"]
    shutil.rmtree(store.run(*planned["run"]).path)
    drawn, said = draw()
    assert drawn == {"10_one", "20_view"}  # its seconds are others
    assert "1 study: 1 run: 1 complete (1 trained now, 0 in the store)" in said[0]
    assert not draw()[0]


def test_a_study_that_is_not_of_the_profile_is_seen_once_it_is_there(project, draw):
    view(project, "view", of="elsewhere")
    assert draw()[0] == {"20_view"}
    assert not draw()[0]
    store = Store(project / "runs")
    store.write_study("tiny-elsewhere", store.read_study("tiny-other"))
    assert draw()[0] == {"20_view"}
    # The code that last looked at a study is not the study.
    store.write_study("tiny-elsewhere", store.read_study("tiny-other") | {"commit": "0123"})
    assert not draw()[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: (root / "figures" / "10_one.pdf").unlink(),
        lambda root: (root / "figures" / "10_one.pdf").write_text("of another profile"),
        lambda root: (root / "runs" / "notebooks" / "tiny" / "one.ipynb").unlink(),
        lambda root: (root / "runs" / "notebooks" / "tiny" / "one.json").write_text("{"),
    ],
    ids=["deleted", "overwritten", "executed copy", "digests"],
)
def test_what_a_notebook_left_and_is_not_there_any_more_is_drawn(project, draw, spoil):
    spoil(project)
    assert draw()[0] == {"10_one"}
    assert not draw()[0]


def test_a_manifest_that_is_gone_draws_all(project, draw):
    (project / "figures" / "manifest.json").unlink()
    assert draw()[0] == {"10_one", "10_other", "20_view"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_failed_or_was_interrupted_is_drawn_again(project, draw, error):
    notebook(project, "10_one", f"raise {error.__name__}")
    with pytest.raises(error):
        draw()
    # Also where it is as it was when it last came to its end.
    notebook(project, "10_one")
    assert "10_one" in draw()[0]
    assert not draw()[0]


def test_the_paper_follows_the_figures_that_it_shows_and_keeps_its_results(project, draw):
    results = "(place / 'results.md').write_text((place / '20_view.pdf').read_text())"
    notebook(project, "30_paper", results)
    text = "notebook: 30_paper\nparameters: {shown: {20_view: What it looks at.}}\n"
    (project / "params" / "tiny" / "paper.yaml").write_text(text)
    assert draw()[0] == {"30_paper"}
    assert not draw()[0]
    (project / "figures" / "results.md").unlink()
    assert draw()[0] == {"30_paper"}
    notebook(project, "20_view", "(place / '20_view.pdf').write_text('another')")
    assert draw()[0] == {"20_view", "30_paper"}
    assert (project / "figures" / "results.md").read_text() == "another"


def test_a_plan_is_not_looked_at_again_and_its_runs_are_those_of_who_names_it(project, draw):
    plan = {
        "plan": {"tasks": {"one": {}}},
        "digest": "0" * 16,
    }
    store = Store(project / "runs")
    store.write_plan("planned", plan)
    content = store.read_study("tiny-other")
    store.write_study("planned-one-own", content | {"plan": "0" * 16})
    assert not draw()[0]  # nobody has named it
    text = "notebook: 20_view\nparameters: {views: [{study: tiny-other}], plan: planned}\n"
    (project / "params" / "tiny" / "view.yaml").write_text(text)
    assert draw()[0] == {"20_view"}
    store.write_study("planned-one-own", content | {"plan": "1" * 16})
    assert draw()[0] == {"20_view"}
    store.write_plan("planned", plan | {"changes": ["amended"]})
    assert draw()[0] == {"20_view"}
    assert not draw()[0]


def test_what_a_notebook_trains_by_itself_is_no_change(project, draw):
    """Nor are studies of others whose names begin as a plan's do."""
    name = "tiny-one-more"
    more = f"""
store = __import__("repeatlab.store.records", fromlist=["Store"]).Store(runs)
store.write_study({name!r}, store.read_study("tiny-one") | {{"name": {name!r}}})
"""
    notebook(project, "10_one", more)
    store = Store(project / "runs")
    store.write_plan("tiny", {"plan": {"tasks": {"one": {}}}, "digest": "0" * 16})
    text = "notebook: 20_view\nparameters: {views: [{study: tiny-other}], plan: tiny}\n"
    (project / "params" / "tiny" / "view.yaml").write_text(text)
    assert draw()[0] == {"10_one", "20_view"}
    assert name in store.studies()
    assert not draw()[0]
    content = store.read_study(name)
    store.write_study(name, content | {"max_updates": 1})  # by another than the notebook
    assert draw()[0] == {"10_one"}


def test_changed_code_draws_all(project):
    packages = project / "packages"
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "repeatlab", packages / "repeatlab", ignore=leave)

    def figures() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "repeatlab", "figures", "20_view", "--profile", "tiny"],
            cwd=project,
            env=os.environ | {"PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            check=True,
        )
        return [
            line for line in done.stdout.splitlines() if "changed" in line or line.endswith(": new")
        ]

    shutil.rmtree(project / "runs" / "notebooks")
    assert figures() == ["20_view: new"]  # by a kernel
    assert figures() == ["20_view: nothing has changed"]
    with (packages / "repeatlab" / "figures" / "colours.yaml").open("a") as file:
        file.write("# a comment\n")
    assert figures() == ["20_view: changed: code"]


def test_the_digests_are_in_the_store_and_not_with_what_is_committed(project, draw):
    record = project / "runs" / "notebooks" / "tiny" / "view.json"
    assert json.loads(record.read_text()).keys() > {"source", "parameters", "runs", "code"}
    manifest = json.loads((project / "figures" / "manifest.json").read_text())
    assert manifest["20_view"].keys() == {"notebook", "files"}


PLAN = """
name: never
seeds: 1
methods: {standard: {}, fixed2: {mapping: {name: constant, repeats: 2}}}
judged: {arms: [fixed2], real: fixed2}
tasks:
  digits:
    {task: {name: supervised, width: 2}, max_updates: 9, metric: accuracy, target: 0.9}
"""


def test_results_that_are_published_are_imported_and_their_plan_is_not_trained(project, draw):
    (project / "params" / "tiny" / "plan.yaml").write_text(PLAN)
    store = Store(project / "runs")
    assert export(store, ["tiny-one", "tiny-other"], project / "results" / "tiny" / "both") == 2
    shutil.rmtree(store.root)
    said = draw()[1]
    assert any("results/tiny/both: 2 runs imported" in line for line in said)
    assert any("0 trained now, 2 in the store" in line for line in said)
    assert store.read_plan("never") is None
