"""The site: a card for every arm, pages that say where figures come from, links that live."""

from __future__ import annotations

import base64
import json
import re
from importlib.util import find_spec

import cards
import mapping_explorer
import pytest
import readme
import website
import yaml

from repeatlab.cli import ROOT
from repeatlab.figures.sliders import MappingForm
from repeatlab.studies.study import run_study

ARMS = {arm.name: arm for arm in cards.arms()}
WRITTEN = yaml.safe_load((ROOT / "params" / "methods.yaml").read_text(encoding="utf-8"))


# --- cards ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Return the cards of all arms, without a run store."""
    folder = tmp_path_factory.mktemp("cards")
    cards.write(folder, folder / "no-runs")
    return {file.stem: file.read_text(encoding="utf-8") for file in folder.glob("*.md")}


def test_there_is_a_card_for_every_arm(bare):
    assert set(WRITTEN) <= set(bare)
    assert set(bare) == {*ARMS, "index"}
    for name in WRITTEN:
        assert f"]({name}.md)" in bare["index"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_card_says_what_its_arm_is_and_that_no_run_is_there(name, bare):
    head, _, rest = bare[name].partition("## What it costs")
    (written,) = re.findall(r"```yaml\n(.*?)\n```", head, re.DOTALL)
    assert yaml.safe_load(written) == {name: WRITTEN[name]}
    assert len(re.findall(r"^Source: \{py:\w+\}`repeatlab\.", head, re.MULTILINE)) == len(
        WRITTEN[name]
    )
    assert "no run of it" in rest


@pytest.mark.parametrize(
    ("name", "said"),
    [
        # (p + 1 + k) / (1 + k) at k = 1, 2, 3 with p = 3, and with beta + 1 = 2 samples scored
        ("importance", "| 2.50 | 2.00 | 1.75 |"),
        ("selective", "| 2.00 | 1.67 | 1.50 |"),
        ("linear", "| 1.00 | 1.00 | 1.00 |"),
        ("fixed3", "Expected dose 3.00: 0.33 T fresh batches"),
        ("random", "Expected dose 3.00"),
        ("quantile", "Expected dose 1.70"),
        ("threshold", "The short run that finds t is charged"),
        ("spaced", "The short run that finds t is charged"),
        ("multiplicity", "data of 0.25 T batches"),
        ("importance", "data of 3 T batches"),
        ("importance", "not on `selfsupervised`"),
        ("linear", "tests/benchmarks/results/cost_model.csv"),
    ],
)
def test_a_card_predicts_what_the_formulas_say(name, said, bare):
    assert said in bare[name]


def test_a_card_shows_runs_that_are_there(tmp_path):
    study = {
        "name": "quick-supervised",
        "tasks": {"digits": {"name": "supervised", "lr": 0.02}},
        "methods": {"standard": {}, "fixed2": WRITTEN["fixed2"]},
        "max_updates": 10,
        "seeds": 2,
        "evaluation": {"every": 10},
    }
    run_study(study, tmp_path, workers=0)
    cards.write(tmp_path / "cards", tmp_path)
    page = (tmp_path / "cards" / "fixed2.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| supervised \| accuracy.*$", page, re.MULTILINE)
    cells = row.strip("| ").split(" | ")
    assert cells[2] == "2"  # seeds
    assert cells[-2:] == ["2.00", "1.00"]  # dose, and cost: as many updates
    assert 0 <= float(cells[3].split()[0]) <= 1


# --- pages ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return what Sphinx reads, laid out beside a store with one executed notebook and one cut."""
    folder = tmp_path_factory.mktemp("site")
    executed = folder / "runs" / "notebooks" / "quick"
    executed.mkdir(parents=True)
    for name, kind in (("supervised", "stream"), ("generative", "error")):
        output = {"output_type": kind, "name": "stdout", "text": "said in a run"}
        cell = {"cell_type": "code", "metadata": {}, "execution_count": 1, "id": "a"}
        cells = [
            {"cell_type": "markdown", "metadata": {}, "id": "b", "source": "# Title"},
            cell | {"source": 'runs = "/some/where/runs"', "outputs": [output]},
        ]
        text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
        (executed / f"{name}.ipynb").write_text(text, encoding="utf-8")
    website.lay_out(folder / "source", folder / "runs")
    return folder / "source"


def test_every_picture_that_a_page_shows_lies_beside_it(source):
    """As the READMEs' head picture of the reference study, which lies elsewhere in the project."""
    shown = {
        (file.name, picture)
        for file in source.glob("*.md")
        for picture in re.findall(
            r"(?:!\[[^\]]*\]\(|\{figure\} )([^)\s]+\.(?:png|svg))", file.read_text(encoding="utf-8")
        )
    }
    assert {"index.md", "zh-CN.md"} <= {page for page, _ in shown}
    assert not [one for one in shown if not (source / one[1]).is_file()]


def test_the_first_page_has_the_verdicts_and_figures_with_their_sources(source):
    page = (source / "index.md").read_text(encoding="utf-8")
    results = (ROOT / readme.place(ROOT) / "results.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| H\d: .*$", results, re.MULTILINE):
        assert row in page
    shown = re.findall(r":::\{figure\} figures/([\w-]+)\.png", page)
    assert len(shown) > 2
    for kind in ("notebooks/2", "parameters.md#", "runs.md#set-"):
        assert page.count(f"]({kind}") >= len(shown)


def test_every_figure_leads_to_the_runs_that_it_was_drawn_from(source):
    manifest = json.loads((ROOT / "figures" / "manifest.json").read_text(encoding="utf-8"))
    figures = (source / "figures.md").read_text(encoding="utf-8")
    runs = (source / "runs.md").read_text(encoding="utf-8")
    sets = dict(re.findall(r"^## Set (\d+)\n(.*?)(?=^## |\Z)", runs, re.MULTILINE | re.DOTALL))
    assert manifest
    for name, entry in manifest.items():
        (number,) = re.findall(rf"^`{name}`:.*runs\.md#set-(\d+)\)", figures, re.MULTILINE)
        assert set(re.findall(r"\b[0-9a-f]{16}\b", sets[number])) == set(entry["runs"])


def test_a_notebook_is_shown_as_executed_or_says_that_it_was_not(source):
    done, cut = (
        (source / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        for name in ("10_supervised", "15_generative")
    )
    assert "said in a run" in done
    assert "Without outputs" not in done
    assert "/some/where" not in done
    assert "said in a run" not in cut  # it stopped at an error: the stripped one, and it says so
    assert "Without outputs" in cut
    names = {file.name for file in (ROOT / "notebooks").glob("*.ipynb")}
    assert {file.name for file in (source / "notebooks").glob("*.ipynb")} == names


def test_the_mapping_explorer_is_the_notebooks_form_over_a_run_of_the_library(source):
    page = (source / "mapping_explorer.md").read_text(encoding="utf-8")
    assert MappingForm._esm in page
    assert MappingForm._css in page
    assert page.count("</script>") == page.count("<script") == 1
    state = json.loads(re.search(r"^const state = (.*);$", page, re.MULTILINE)[1])
    # Trained anew: on one machine the same parameters give the same losses, bit for bit.
    updates = mapping_explorer.recorded()
    begun = MappingForm(updates, "linear", "quantile", t=mapping_explorer.T)
    assert base64.b64decode(state["losses"]) == begun.losses
    assert len(updates) == state["max_updates"] > 100
    assert (state["t"], state["chosen"]) == (begun.t, begun.chosen)
    # Of the copy that the project has it stays empty, so that no numbers can grow old there.
    assert "<script" not in (ROOT / "docs" / "mapping_explorer.md").read_text(encoding="utf-8")


def test_the_mapping_explorer_is_in_the_navigation_and_linked_by_its_guide(source):
    assert "\nmapping_explorer\n" in (source / "index.md").read_text(encoding="utf-8")
    assert "](mapping_explorer.md)" in (source / "mappings.md").read_text(encoding="utf-8")


def test_every_module_and_parameter_file_has_its_place(source):
    api = "".join(file.read_text(encoding="utf-8") for file in (source / "api").glob("*.rst"))
    listed = set(re.findall(r"automodule:: (\S+)", api))
    assert {"repeatlab.repetition.mappings", "repeatlab.tasks", "repeatlab.studies.plan"} <= listed
    parameters = (source / "parameters.md").read_text(encoding="utf-8")
    for file in (ROOT / "params").rglob("*.yaml"):
        assert f"## {file.relative_to(ROOT / 'params')}\n" in parameters


# --- links ----------------------------------------------------------------------------------------


def test_dead_links_and_what_is_loaded_from_elsewhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#there">1</a><a href="b.html#gone">2</a>'
        '<a href="c.html">3</a><a href="#top">4</a><a href="https://example.org">5</a>'
        '<img src="d.png"><script src="https://example.org/x.js"></script>',
        encoding="utf-8",
    )
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="a.html">6</a>', encoding="utf-8")
    assert sorted(website.broken(tmp_path)) == [
        "a.html links to b.html#gone",
        "a.html links to c.html",
        "a.html links to d.png",
        "a.html loads https://example.org/x.js",
    ]


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("sphinx", "myst_nb", "furo")),
    reason="no Sphinx: pip install -e .[docs], or `make site`",
)
def test_every_link_of_the_site_leads_somewhere(tmp_path):
    site = tmp_path / "site"
    assert website.build(site, tmp_path / "no-runs") == []
    built = (site / "mapping_explorer.html").read_text(encoding="utf-8")
    assert MappingForm._esm in built  # nothing of the form was read as markup
    assert 'href="mapping_explorer.html"' in (site / "mappings.html").read_text(encoding="utf-8")
