"""The paper says what the runs say: numbers, verdicts, and what is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typst
from click.testing import CliRunner
from matplotlib.figure import Figure
from pypdf import PdfReader
from repeatlab.analysis.hypotheses import HYPOTHESES

import repeatlab.report.paper
from repeatlab.analysis.frames import load
from repeatlab.cli import ROOT, cli
from repeatlab.core.schema import ConfigError
from repeatlab.cost import Ledger
from repeatlab.figures import save_figure
from repeatlab.report.paper import gather, typeset, write_results
from repeatlab.store.records import Store

SOURCES = Path(repeatlab.report.paper.__file__).parent
VIEWS = [
    {"study": "made", "name": "letters", "metric": "accuracy", "target": 0.5},
    {"study": "never-made", "name": "absent", "metric": "loss", "target": None},
]
SHOWN = {"convergence-one": "Drawn.", "mechanism-two": "Not drawn."}
METHODS = ("standard", "threshold", "linear", "control_limit", "windowed")
# Accuracy at the updates 0, 10 and 20: method and seed shift it; the run left out is never begun.
LEFT_OUT = ("windowed", 2)


def _value(method: str, seed: int, update: int) -> float:
    return 0.1 + 0.031 * update + 0.007 * METHODS.index(method) + 0.01 * seed


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return a store with one study of three seeds, and figures with one figure."""
    root = tmp_path_factory.mktemp("paper")
    store, planned = Store(root / "runs"), []
    for seed in range(3):
        for method in METHODS:
            run_id = f"{method}-{seed}"
            run = store.run("letters", run_id)
            planned.append(
                {"task": "a", "method": method, "seed": seed, "run": ["letters", run_id]}
            )
            if (method, seed) == LEFT_OUT:
                continue
            environment = {"processor": "Abacus", "cores": 7, "commit": "0ddba11"}
            environment |= {"versions": {"torch": "9.8.7"}, "device": "cpu"}
            task = {"name": "supervised", "dataset": "alphabet", "lr": 0.0625}
            writer = store.begin(run, {"task": task, "max_updates": 20}, environment)
            for update in (0, 10, 20):
                counts = dict.fromkeys(("updates", "fresh_batches"), update)
                samples = dict.fromkeys(("forward_samples", "backward_samples"), 4 * update)
                ledger = Ledger(**counts, **samples, seconds=float(update)).to_json()
                value = _value(method, seed, update)
                writer.evals(update, {"validation": {"accuracy": value}}, ledger)
            batches = np.arange(20)
            losses = {"loss": 1.0 / (1 + batches), "lr": batches, "seconds": batches}
            counts = {"update": batches, "fresh_batch": batches, "repeat": 0 * batches}
            writer.updates(counts | losses | {"repeats": 1 + batches % 2})
            writer.finish("complete", {"ledger": ledger, "final": {"validation.accuracy": value}})
    methods = {name: {"mapping": {"name": name}} for name in METHODS}
    study = {"name": "made", "max_updates": 20, "study": {"methods": methods}, "runs": planned}
    store.write_study("made", study)
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    save_figure(
        figure,
        "convergence-one",
        root / "figures",
        notebook="20_convergence",
        records=load(root / "runs", "made"),
        parameters={},
    )
    return root


@pytest.fixture(scope="module")
def gathered(places):
    return gather(
        places / "runs",
        places / "figures",
        places / "data",
        profile="tiny",
        views=VIEWS,
        shown=SHOWN,
        k=2.0,
        plan={"controls": ["windowed"], "window": 17},
    )


@pytest.fixture
def data(gathered, tmp_path):
    """Return a copy of the gathered data, to be changed."""
    return Path(shutil.copytree(gathered.directory, tmp_path / "data"))


def _squeezed(text: str) -> str:
    """Return `text` without what breaking lines changes: spaces and hyphens."""
    return re.sub(r"[\s\u00ad-]", "", text)


def _text(directory: Path) -> str:
    return _squeezed("\n".join(p.extract_text() for p in PdfReader(typeset(directory)).pages))


def _json(path: Path):
    def refuse(word):
        raise AssertionError(f"{path.name} holds {word}, which is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# --- what is gathered -------------------------------------------------------------------------


def test_the_final_table_holds_the_means_of_the_runs(gathered):
    final = pd.read_csv(gathered.directory / "tables" / "final.csv").set_index("method")
    seeds = {m: [s for s in range(3) if (m, s) != LEFT_OUT] for m in METHODS}
    expected = {m: sum(_value(m, s, 20) for s in seeds[m]) / len(seeds[m]) for m in METHODS}
    assert final["mean"].to_dict() == pytest.approx(expected)
    assert final["missing"].to_dict() == dict.fromkeys(METHODS, 0) | {"windowed": 1}


def test_the_results_in_short_are_the_runs_numbers_and_the_verdicts(gathered, tmp_path):
    page = write_results(gathered, tmp_path / "figures").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == ["task", "metric", "`standard`", "`threshold`", "`linear`"]
    # 0.01 apart: Student's interval of three is 2.484 times the standard deviation.
    means = [_value(method, 1, 20) for method in ("standard", "threshold", "linear")]
    cells = [f"{m:.3f} [{m - 0.02484:.3f}, {m + 0.02484:.3f}]" for m in means]
    assert rows[2] == ["letters", "accuracy (more is better)", *cells]
    assert [row[1] for row in rows[5:]] == [one.verdict for one in gathered.verdicts]
    assert [row[0][:2] for row in rows[5:]] == [one.name for one in HYPOTHESES]
    assert "Profile tiny: 20 updates, 3 seeds, 15 runs planned (14 complete, 0 diverged," in page
    assert "Abacus, 7 cores; made by commit 0ddba11. No study of never-made." in page
    more = write_results(gathered, tmp_path, methods=["windowed", "cosine"])
    cells = more.read_text(encoding="utf-8").splitlines()[4].strip("| ").split(" | ")
    # Of two, 0.01 apart: 0.0635 to each side.
    assert cells[2:] == ["0.753 [0.689, 0.817] (1 missing)"]


def test_differences_are_those_of_the_pairs_on_every_axis(gathered):
    table = pd.read_csv(gathered.directory / "tables" / "efficiency_by_task.csv")
    found = table[table["task"] == "letters"].set_index(["equal", "method"])["difference"]
    # All arms count alike, so that every axis reads the end of both runs.
    for axis in ("update", "cost", "fresh_batches", "seconds"):
        assert found[axis, "threshold"] == pytest.approx(0.007)
        assert found[axis, "linear"] == pytest.approx(0.014)
    assert "environment_steps" not in found.index


def test_the_banner_says_where_the_numbers_come_from(gathered):
    banner = _json(gathered.directory / "banner.json")
    assert banner["profile"] == "tiny"
    assert banner["data"] == ["alphabet"]
    assert (banner["updates"], banner["seeds"]) == ("20", "3")
    assert (banner["planned"], banner["complete"], banner["missing"]) == (15, 14, 1)
    assert banner["absent"] == ["never-made"]
    assert banner["hardware"] == ["Abacus, 7 cores"]
    assert banner["run_commits"] == ["0ddba11"]


def test_verdicts_are_strict_json_and_not_decided_by_missing_runs(gathered):
    verdicts = _json(gathered.directory / "verdicts.json")
    assert [v["hypothesis"] for v in verdicts] == [h.name for h in HYPOTHESES]
    assert {v["verdict"] for v in verdicts} == {"inconclusive"}
    assert verdicts[0]["numbers"]["linear"]["missing"] == 1  # the study that was never made


def test_every_table_is_there_in_latex_too(gathered):
    for name, table in gathered.tables.items():
        latex = (gathered.directory / "tables" / f"{name}.tex").read_text(encoding="utf-8")
        assert latex.count(r"\\") == len(table) + 1
    assert r"control\_limit" in (gathered.directory / "tables" / "final.tex").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": {"arm": ["linear"]}}, "plan: unknown arm; it has against, arms"),
        ({"shown": {"supervised-curves": "x"}}, "first word must be one of convergence"),
    ],
)
def test_a_wrong_parameter_is_refused(places, tmp_path, options, message):
    fields = {"profile": "tiny", "views": VIEWS, "shown": SHOWN, "k": 2.0} | options
    with pytest.raises(ConfigError, match=message):
        gather(places / "runs", places / "figures", tmp_path, **fields)


# --- what is printed --------------------------------------------------------------------------

WORDINGS = {
    "supported": [
        "Loss-driven repetition converges sooner at equal cost.",
        "It ends better at equal cost.",
        "was worth its cost.",
        "That the batches of high loss get the extra updates is what makes the difference.",
        "One arm is better than the standard one on every task by itself.",
        "It holds for every mapping and threshold compared.",
    ],
    "refuted": [
        "Loss-driven repetition converges later at equal cost.",
        "It ends worse at equal cost.",
        "was not worth its cost.",
        "That the batches of high loss get the extra updates is not what makes the difference.",
        "On some task it is worse at equal cost.",
        "It depends on the mapping or on its threshold.",
    ],
    "inconclusive": [
        "Whether loss-driven repetition converges sooner or later at equal cost is not decided.",
        "Whether it ends better or worse at equal cost is not decided.",
        "the runs leave open whether extra updates where the loss is high are worth their cost.",
        "What part of the mechanism makes a difference, if any, is not decided.",
        "That one arm is better on every task is not shown",
        "How it depends on the mapping and its threshold is not decided.",
    ],
}


@pytest.mark.parametrize("verdict", WORDINGS)
def test_sentences_change_with_the_verdict(data, verdict):
    verdicts = _json(data / "verdicts.json")
    made_up = [v | {"verdict": verdict, "sentence": f"Made up for {verdict}."} for v in verdicts]
    (data / "verdicts.json").write_text(json.dumps(made_up))
    text = _text(data)
    for wording, sentences in WORDINGS.items():
        for sentence in sentences:
            assert (_squeezed(sentence) in text) == (wording == verdict), sentence
    for hypothesis in HYPOTHESES:
        said = f"{hypothesis.name} is {verdict}. Made up for {verdict}."
        assert _squeezed(said) in text


def test_each_hypothesis_has_three_wordings_wherever_it_is_spoken_of():
    source = (SOURCES / "paper.typ").read_text(encoding="utf-8")
    for name in (h.name for h in HYPOTHESES):
        calls = re.findall(rf'#by-verdict\("{name}",(.*?)\n\)', source, re.DOTALL)
        assert len(calls) == 3  # abstract, results, conclusion
        for call in calls:
            assert re.findall(r"^  (\w+): \[\S", call, re.MULTILINE) == list(WORDINGS)


def test_what_is_missing_is_boxed(data):
    (data / "verdicts.json").write_text("[]")
    text = _text(data)
    for what in ("figure mechanism-two", "studies never-made", "verdict on H1", "verdicts"):
        assert _squeezed(f"missing: {what}") in text
    assert _squeezed("missing: figure convergence-one") not in text
    assert _squeezed("Drawn. 1 planned runs are missing.") in text


def test_a_paper_without_any_run_is_one_of_boxes(tmp_path):
    gather(tmp_path, tmp_path, tmp_path / "out", profile="none", views=VIEWS, shown=SHOWN, k=2.0)
    text = _text(tmp_path / "out")
    for what in ("every run", "the runs of this table", "studies made, never-made"):
        assert _squeezed(f"missing: {what}") in text


@pytest.mark.parametrize("seventh", ["0.317", "0.713"])
def test_every_table_and_sentence_is_read_from_the_data(data, seventh):
    # One place in each file gets a number of its own; all of them must be in the print.
    columns = {
        "studies": "target",
        "final": "mean",
        "targets": "target",
        "convergence": "low",
        "efficiency": "iqm",
        "efficiency_by_task": "difference",
        "hardness": "difference",
        "mechanism": "difference",
        "adaptability": "probability",
        "sensitivity": "high",
        "methods": "settings",
        "settings": "letters",
    }
    sought = {}
    for place, (name, column) in enumerate(columns.items()):
        path = data / "tables" / f"{name}.csv"
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        sought[name] = str(round(float(seventh) + place, 3))
        table.loc[0, column] = sought[name]
        if column in ("low", "high"):
            table.loc[0, {"low": "high", "high": "low"}[column]] = "0.1"
        table.to_csv(path, index=False)
    banner = _json(data / "banner.json") | {"planned": 7130 + int(seventh[2])}
    rules = _json(data / "rules.json") | {"window": 8170 + int(seventh[2])}
    verdicts = _json(data / "verdicts.json")
    verdicts[0]["sentence"] = f"p = {seventh}99"
    for name, content in (("banner", banner), ("rules", rules), ("verdicts", verdicts)):
        (data / f"{name}.json").write_text(json.dumps(content))
    text = _text(data)
    for name, number in sought.items():
        shown = number if name in ("methods", "settings") else f"{float(number):.3g}"
        assert shown in text, name
    assert f"{banner['planned']}planned" in text
    assert f"windowsof{rules['window']}freshbatches" in text
    assert f"p={seventh}99" in text


def test_the_prose_holds_no_number():
    source = (SOURCES / "paper.typ").read_text(encoding="utf-8")
    code = r'//.*|"[^"\n]*"|\$[^$]*\$|H[1-5]|[\d.]+(pt|em|cm|fr|%)|(update|slice)\(\d\)|(==|>) 0'
    assert not re.findall(r".*\d.*", re.sub(code, "", source))


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("0.123456", "0.123"),
        ("-0.0012345", "\u22120.00123"),
        ("123456.0", "123456"),
        ("12.0", "12"),
        ("0.0", "0"),
        ("-12.345", "\u221212.3"),
        ("0.00000123", "1.23e\u22126"),
        ("inf", "∞"),
        ("", "\u2013"),
    ],
)
def test_numbers_are_printed_to_three_digits(tmp_path, value, printed):
    shutil.copy(SOURCES / "layout.typ", tmp_path)
    source = tmp_path / "try.typ"
    source.write_text(f'#import "layout.typ": number\n#metadata(number("{value}")) <it>')
    assert json.loads(typst.query(source, "<it>", field="value", one=True)) == printed


def test_the_same_data_give_the_same_file(data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "elsewhere"))
    assert typeset(data).read_bytes() == typeset(other).read_bytes()


def test_every_reference_is_cited_and_can_be_found():
    source = (SOURCES / "paper.typ").read_text(encoding="utf-8")
    entries = (SOURCES / "references.bib").read_text(encoding="utf-8").split("\n\n")
    keys = {re.match(r"@\w+\{(\w+),", entry.strip()).group(1) for entry in entries}
    assert keys == {key for key in re.findall(r"@(\w+)", source) if not key.startswith("table")}
    for entry in entries:
        assert re.search(r"arXiv:\d{4}\.\d{5}|arxiv\.org/abs/\d{4}\.\d{5}|doi = |pages = ", entry)


def test_the_command_builds_a_paper_of_boxes_from_nothing(tmp_path):
    places = {name: str(tmp_path / name) for name in ("runs", "figures", "out")}
    options = [word for name, place in places.items() for word in (f"--{name}", place)]
    done = CliRunner().invoke(cli, ["paper", "--profile", "paper", *options])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0].split() == ["H1", "inconclusive"]
    assert (tmp_path / "out" / "paper.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_parameters_name_figures_by_their_section(profile, tmp_path):
    from repeatlab.report.notebooks import read_job

    job = read_job(ROOT / "params" / profile / "paper.yaml", ROOT)
    assert job.parameters["profile"] == profile
    sections = {name.partition("-")[0] for name in job.parameters["shown"]}
    assert sections == set(repeatlab.report.paper.gathering.SECTIONS)
