"""What viewpoints look at by default."""

from __future__ import annotations

import nbformat
import pytest
import yaml

from repeatlab.analysis.viewpoints import fullest
from repeatlab.cli import ROOT
from repeatlab.core.files import write_json
from repeatlab.store.records import Store

SMOKE = [{"study": "smoke-supervised", "name": "supervised"}]


def profile(name: str) -> dict:
    return {"views": [{"study": f"{name}-supervised", "name": "supervised"}], "methods": [name]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A store in which quick has 3 runs done of 3, paper 2 of 9 and smoke 1 of 1."""
    monkeypatch.delenv("REPEATLAB_SMOKE", raising=False)
    store = Store(tmp_path / "runs")
    for name, planned, done in (("quick", 3, 3), ("paper", 9, 2), ("smoke", 1, 1)):
        runs = [("made", f"{name}-{number}") for number in range(planned)]
        written = [{"task": "t", "method": "m", "seed": 0, "run": run} for run in runs]
        store.write_study(f"{name}-supervised", {"name": name, "runs": written})
        for run in runs[:done]:
            path = store.run(*run).path
            path.mkdir(parents=True)
            write_json(path / "summary.json", {})
        if name != "smoke":
            file = tmp_path / "params" / name / "convergence.yaml"
            file.parent.mkdir(parents=True)
            file.write_text(yaml.safe_dump({"parameters": profile(name)}))
    return tmp_path


def test_smoke_views_give_way_to_the_profile_of_which_most_is_done(place):
    asked = {"params": place / "params"}
    assert fullest(place / "runs", SMOKE, "convergence", **asked) == profile("quick")
    for path in (place / "runs" / "made").glob("quick-*"):
        (path / "summary.json").unlink()
    assert fullest(place / "runs", SMOKE, "convergence", **asked) == profile("paper")


@pytest.mark.parametrize("study", ["mine", "quick-supervised"])
def test_views_that_somebody_chose_are_kept(place, study):
    chosen = [{"study": study}]
    asked = {"params": place / "params"}
    assert fullest(place / "runs", chosen, "convergence", **asked) == {"views": chosen}


def test_the_notebooks_own_views_hold_where_nothing_is_fuller(place, monkeypatch):
    own, asked = {"views": SMOKE}, {"params": place / "params"}
    assert fullest(place / "runs", SMOKE, "unheard-of", **asked) == own
    assert fullest(place / "nothing", SMOKE, "convergence", **asked) == own
    assert fullest(place / "runs", SMOKE, "convergence", params=place / "nowhere") == own
    monkeypatch.setenv("REPEATLAB_SMOKE", "1")
    assert fullest(place / "runs", SMOKE, "convergence", **asked) == own


@pytest.mark.parametrize(
    "name", ["20_convergence", "21_efficiency", "22_mechanism", "23_adaptability"]
)
def test_a_viewpoint_asks_for_the_parameters_of_its_own_file(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    viewpoint = name.partition("_")[2]
    assert any(f'fullest(runs, views, "{viewpoint}")' in cell.source for cell in cells)
    content = yaml.safe_load((ROOT / "params" / "quick" / f"{viewpoint}.yaml").read_text())
    assert content["notebook"] == name
