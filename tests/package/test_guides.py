"""What the guides show works as it stands there, and their tables are those of the benchmarks."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
from textwrap import indent

import pytest
import readme
import yaml
from click.testing import CliRunner

from repeatlab.cli import ROOT, cli
from repeatlab.core.schema import parse
from repeatlab.methods import controls
from repeatlab.repetition.mappings import MAPPINGS
from repeatlab.studies.plan import Plan
from repeatlab.studies.study import Study
from repeatlab.training.config import MethodConfig

DOCS = ROOT / "docs"
GUIDES = {file.stem: file.read_text(encoding="utf-8") for file in sorted(DOCS.glob("*.md"))}
# In it `loader`, `model` and the rest are the reader's: tests/frameworks runs it.
EXECUTED = sorted(set(GUIDES) - {"frameworks"})


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", [n for n in EXECUTED if blocks(GUIDES[n], "pycon")])
def test_what_is_typed_gives_what_is_shown(name):
    text = "\n".join(blocks(GUIDES[name], "pycon"))
    test = doctest.DocTestParser().get_doctest(text, {}, name, str(DOCS / f"{name}.md"), 0)
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test)
    assert test.examples
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", [n for n in EXECUTED if blocks(GUIDES[n], "python")])
def test_what_is_written_runs(name, tmp_path):
    """In a process of its own, since a page may start a process group or workers."""
    given = f"rendezvous, rank, ranks = {str(tmp_path / 'rendezvous')!r}, 0, 1\n"
    page = given + "".join(blocks(GUIDES[name], "python"))
    file = tmp_path / "page.py"
    file.write_text("if __name__ == '__main__':\n" + indent(page, "    "), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", [n for n in EXECUTED if blocks(GUIDES[n], "yaml")])
def test_what_is_configured_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(GUIDES[name], "yaml"):
        data = yaml.safe_load(block)
        data = data.get("parameters", {}).get("study", data)
        if "judged" in data:
            assert parse(Plan, data).judged.real in data["methods"]
        elif "tasks" in data:
            planned = parse(Study, data).planned()
            assert {run.method for run in planned} == set(data["methods"])
        else:
            for method in data["methods"].values():
                parse(MethodConfig, method)


def test_own_data_as_shown_is_read_and_trained_on(tmp_path, monkeypatch):
    """The array file of the page is what its study names, which runs as it is saved."""
    from repeatlab.data import own_data

    monkeypatch.chdir(tmp_path)
    (code,), (config,) = (blocks(GUIDES["own_data"], kind) for kind in ("python", "yaml"))
    exec(code, {})
    _, (images, labels), test = own_data.load("./birds.npz")
    assert images.shape == (200, 1, 8, 8)
    assert labels.tolist() == [n % 4 for n in range(200)]
    assert test is None
    (tmp_path / "birds.yaml").write_text(config, encoding="utf-8")
    small = ["--workers=0", "--set=max_updates=4", "--set=seeds=1"]
    told = CliRunner().invoke(cli, ["run", "birds.yaml", *small])
    assert told.exit_code == 0, told.output
    assert "2 runs: 2 complete" in told.output


def test_the_guide_to_studies_names_every_command():
    elsewhere = {"figures"}  # has a page of its own
    written = re.findall(r"`(\w+)`|^repeatlab (\w+)", GUIDES["studies"], re.MULTILINE)
    assert set(cli.commands) - elsewhere <= {word for pair in written for word in pair}


def test_the_guide_to_mappings_lists_all():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| .", GUIDES["mappings"], re.MULTILINE)
    assert dict(rows) == {name: kind.__name__ for name, kind in MAPPINGS.items()}, "`make readme`"


def test_the_guide_to_controls_lists_all():
    rows = re.findall(r"^\| `(\w+)` \|", GUIDES["controls"], re.MULTILINE)
    functions = [name for name, _ in inspect.getmembers(controls, inspect.isfunction)]
    public = {name for name in functions if name[0] != "_"}
    assert set(rows) == public, "the table of repeatlab/methods/controls.py, then `make readme`"


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", GUIDES[name]):
        path, _, anchor = target.partition("#")
        if path.startswith("api/"):  # made with the site, whose links are held to their targets
            continue
        file = (DOCS / path).resolve() if path else DOCS / f"{name}.md"
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in heads}


@pytest.mark.parametrize("name", [n for n, page in GUIDES.items() if "<!-- end of" in page])
def test_tables_are_those_of_the_benchmarks_and_the_package(name):
    assert readme.guide(GUIDES[name]) == GUIDES[name], "`make readme` puts them in"


def test_a_table_has_the_numbers_of_its_file():
    (lines,) = re.findall(r"<!-- kills.*?-->\n(.*?)<!--", GUIDES["reliability"], re.DOTALL)
    file = ROOT / "tests" / "benchmarks" / "results" / "kills.csv"
    rows = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    shown = [line.strip("| ").split(" | ") for line in lines.splitlines()[2:]]
    assert [row[:2] for row in shown] == [row[:2] for row in rows]
    assert len(rows) > 5


def test_no_page_speaks_of_a_plan_that_no_reader_has():
    for name, page in GUIDES.items():
        assert not re.search(r"the plan's (table|agent|scale|100)|research plan", page), name
