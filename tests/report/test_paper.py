"""The paper says what the runs say: numbers, verdicts, and what is missing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typst
from click.testing import CliRunner
from matplotlib.figure import Figure
from pypdf import PdfReader

import repeatlab.report.paper
from repeatlab.analysis.declaration import Declaration, Goal
from repeatlab.analysis.frames import load
from repeatlab.analysis.plans import VIEWS as VIEWS_OF_A_PLAN
from repeatlab.analysis.verdicts import HYPOTHESES
from repeatlab.cli import ROOT, cli
from repeatlab.core.schema import ConfigError
from repeatlab.cost import Ledger
from repeatlab.figures import save_figure
from repeatlab.report.paper import gather, typeset, write_results
from repeatlab.report.paper.results import results
from repeatlab.store.exchange import import_runs
from repeatlab.store.measurements import Measurement, write_measurement
from repeatlab.store.records import Store
from repeatlab.studies.parameter_files import read_job

SOURCES = Path(repeatlab.report.paper.__file__).parent
VIEWS = [
    {"study": "made", "name": "letters", "metric": "accuracy", "target": 0.5},
    {"study": "never-made", "name": "absent", "metric": "loss", "target": None},
]
SHOWN = {"convergence-one": "Drawn.", "mechanism-two": "Not drawn."}
METHODS = ("standard", "threshold", "linear", "control_limit", "windowed")
# Accuracy at the updates 0, 10 and 20: method and seed shift it; the run left out is never begun.
LEFT_OUT = ("windowed", 2)


TASK = {"name": "supervised", "dataset": "alphabet", "lr": 0.0625}
DECLARED = Declaration(
    goals={"letters": Goal("accuracy", 0.5, 20)},
    seeds=3,
    margin=0.125,
    arms=("threshold", "linear"),
    real="linear",
    controls=("windowed",),
    variants=("threshold", "linear"),
    budgets=(0.5, 1.0, 2.0),
    window=17,
)
REPEATING = ("threshold", "linear")  # every batch twice


def _value(method: str, seed: int, update: int) -> float:
    return 0.1 + 0.031 * update + 0.007 * METHODS.index(method) + 0.01 * seed


def _write(store: Store, run_id: str, method: str, seed: int, last: int) -> list[str]:
    """Write one run, and return where it is."""
    environment = {"processor": "Abacus", "cores": 7, "commit": "0ddba11"}
    environment |= {"versions": {"torch": "9.8.7"}, "device": "cpu"}
    config = {"task": TASK, "max_updates": last, "threads": 1}
    writer = store.begin(store.run("letters", run_id), config, environment)
    visits = 2 if method in REPEATING else 1
    for update in (0, last // 2, last):
        counts = {"updates": update, "fresh_batches": update // visits}
        counts["calibration_updates"] = 4 if method == "linear" else 0
        samples = dict.fromkeys(("forward_samples", "backward_samples"), 4 * update)
        ledger = Ledger(**counts, **samples, seconds=float(update)).to_json()
        value = _value(method, seed, update)
        writer.evals(update, {"validation": {"accuracy": value}}, ledger)
    made = np.arange(last)
    losses = {"loss": 1.0 / (1 + made), "lr": made, "seconds": made}
    counts = {"update": made, "fresh_batch": made // visits, "repeat": made % visits}
    writer.updates(counts | losses | {"repeats": np.full(last, visits)})
    final = dict.fromkeys(("validation.accuracy", "test.accuracy"), value)
    writer.finish("complete", {"ledger": ledger, "final": final})
    return ["letters", run_id]


def _study(store: Store, name: str, task: str, updates: int, runs: dict) -> None:
    methods = {name: {"mapping": {"name": name}} for name in METHODS}
    planned = [{"task": task, "method": m, "seed": s, "run": run} for (m, s), run in runs.items()]
    study = {"name": name, "max_updates": updates, "study": {"methods": methods}, "runs": planned}
    store.write_study(name, study)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return a store with one study of three seeds and a plan over it, and with one figure."""
    root = tmp_path_factory.mktemp("paper")
    store, runs = Store(root / "runs"), {}
    for seed in range(3):
        for method in METHODS:
            run_id = f"{method}-{seed}"
            runs[method, seed] = ["letters", run_id]
            if (method, seed) != LEFT_OUT:
                _write(store, run_id, method, seed, 20)
    _study(store, "made", "a", 20, runs)
    for stage in ("own", "shared"):
        _study(store, f"tiny-letters-{stage}", "letters", 20, runs)
    for ratio, last in ((0.5, 10), (2, 40)):
        made = {
            ("standard", seed): _write(store, f"standard-{last}-{seed}", "standard", seed, last)
            for seed in range(3)
        }
        _study(store, f"tiny-letters-budget-{ratio}", "letters", last, made)
    choice = {"rate": 0.5, "fields": {"t": 3}, "trials": 6, "on_edge": True, "updates": 120}
    changes = [{"from": "0" * 16, "fields": "margin", "reason": "the pilot was small"}]
    content = {"digest": "abcdef0123456789", "changes": changes, "declaration": asdict(DECLARED)}
    store.write_plan("tiny", content | {"rates": {"letters": dict.fromkeys(METHODS, choice)}})
    # Of the task on this processor: a sample's backward takes 0.75 of a forward.
    measured = Measurement(
        task=TASK,
        device="cpu",
        threads=1,
        batch_size=8,
        forward_samples=8,
        backward_samples=16,
        parts={"forward": 2.0, "backward": 3.0},
        loops={},
        spread={},
        environment={"processor": "Abacus"},
    )
    write_measurement(store, measured)
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
        plan="tiny",
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


def test_the_results_in_short_are_the_runs_numbers_and_the_verdicts(
    gathered, tmp_path, monkeypatch
):
    page = write_results(gathered, tmp_path / "figures").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == ["task", "metric", "`standard`", "`threshold`", "`linear`"]
    # 0.01 apart: Student's interval of three is 2.484 times the standard deviation.
    means = [_value(method, 1, 20) for method in ("standard", "threshold", "linear")]
    cells = [f"{m:.3f} [{m - 0.02484:.3f}, {m + 0.02484:.3f}]" for m in means]
    assert rows[2] == ["letters", "accuracy (more is better)", *cells]
    verdicts, sides, (heads, _, *arms) = rows[5:10], rows[12:17], rows[17:]
    table = gathered.tables["arms"]
    assert [row[1] for row in arms] == [f"`{arm}`" for arm in table["arm"]]
    for row, one in zip(arms, table.itertuples(), strict=True):
        told = dict(zip(heads, row, strict=True))
        assert float(told["visits a batch"]) == pytest.approx(one.mean_n, abs=0.005)
        assert (told["n"], told["is"]) == (str(one.seeds), one.state)
    assert "On letters it cannot fall below 1, whatever the runs show" in page  # 3 seeds: 0.25 x 4
    for state, of_state in table.groupby("state"):
        (line,) = re.findall(r"^- \*\*letters\*\* (.*)$", page, re.MULTILINE)
        listed = ", ".join(f"`{arm}`" for arm in of_state["arm"])
        assert f"{state}: {len(of_state) if state == 'undecided' else listed}" in line
    assert [row[0][:2] for row in verdicts] == [one.name for one in HYPOTHESES]
    assert verdicts[0][1:] == [
        "interim",
        "threshold 2.00, linear 2.00",
        "threshold 0.5, linear 0.5",
        "12 %",
        "3",
        "`abcdef0123456789`",
    ]
    assert sides == [[one.name, *["interim"] * 3] for one in HYPOTHESES]
    assert "Amended since: margin (the pilot was small)." in page
    # 2^(1 - 3): three seeds decide nothing.
    assert "p cannot fall below 0.25: at this scale nothing can be decided" in page
    assert (
        "- **H1** Loss-driven repetition reaches the target in fewer updates. This is not " in page
    )
    assert "Profile tiny: 20 updates, 3 seeds, 15 runs planned (14 complete, 0 diverged," in page
    assert "Abacus, 7 cores; made by commit 0ddba11. No study of never-made." in page
    monkeypatch.setattr("repeatlab.report.paper.results.ARMS", ["windowed", "cosine"])
    more = write_results(gathered, tmp_path)
    cells = more.read_text(encoding="utf-8").splitlines()[4].strip("| ").split(" | ")
    # Of two, 0.01 apart: 0.0635 to each side.
    assert cells[2:] == ["0.753 [0.689, 0.817] (1 missing)"]


@pytest.mark.parametrize("profile", ["quick", "reference"])
def test_the_committed_results_are_those_of_the_committed_runs(profile, tmp_path):
    """Nothing is trained: what `repeatlab export` has written says every word of results.md."""
    exports = sorted(file.parent for file in (ROOT / "results" / profile).rglob("plans.json"))
    assert exports
    for export in exports:
        import_runs(Store(tmp_path / "runs"), export)
    said = read_job(ROOT / "params" / profile / "paper.yaml", ROOT).parameters
    found = gather(tmp_path / "runs", tmp_path / "figures", tmp_path / "paper", **said)
    figures = ROOT / "figures" if profile == "quick" else ROOT / "figures" / profile
    assert results(found) == (figures / "results.md").read_text(encoding="utf-8")


def test_updates_saved_are_those_that_the_standard_arm_would_have_needed(gathered):
    arms = gathered.tables["arms"].set_index("arm")
    # The standard arm gains 0.62 from T to 2 T; between them the metric goes with log T.
    ratio = 2 ** (0.014 / 0.62)
    assert arms.loc["linear", "saved"] == pytest.approx(1 - 1 / ratio, rel=1e-6)
    assert arms.loc["linear", "reuse"] == pytest.approx(2 * ratio, rel=1e-6)
    assert arms.loc["linear", ["rate", "mean_n", "repeated", "seeds"]].tolist() == [0.5, 2, 1, 3]
    assert arms.loc["control_limit", ["mean_n", "repeated"]].tolist() == [1, 0]
    together = gathered.tables["over_tasks"].set_index("arm")
    # One task has no spread, and says nothing of another.
    assert together.loc["linear", "saved"] == arms.loc["linear", "saved"]
    assert together.loc["linear", ["tau", "new_low"]].isna().all()
    # One comparison of four: p = 0.25 each.
    assert together["p_adjusted"].tolist() == [1.0] * 3 + [1.0]


def test_a_charge_is_paid_back_after_so_many_runs_as_save_it(gathered):
    (row,) = gathered.tables["one_off"].to_dict("records")
    saved = 1 - 2 ** (-0.014 / 0.62)
    assert (row["arm"], row["calibration"], row["charge"]) == ("linear", 4, 4)
    # Of what the standard arm needs, T / (1 - saved).
    assert row["runs"] == pytest.approx(4 * (1 - saved) / (20 * saved), rel=1e-6)


def test_the_tuning_is_told_with_its_effort(gathered):
    tuning = gathered.tables["tuning"].set_index("arm")
    assert tuning.loc["linear"].to_dict() == {
        "task": "letters",
        "rate": 0.5,
        "fields": "t = 3",
        "trials": 6,
        "updates": 120,
        "on_edge": True,
    }


def test_a_task_s_k_is_the_measured_one_and_else_the_given_one(gathered):
    studies = gathered.tables["studies"].set_index("task")
    assert studies.loc["letters", ["k", "k_origin"]].tolist() == [0.75, "measured"]
    assert studies.loc["absent", ["k", "k_origin"]].tolist() == [2.0, "given"]


def test_the_banner_says_where_the_numbers_come_from(gathered):
    banner = _json(gathered.directory / "banner.json")
    assert banner["profile"] == "tiny"
    assert banner["data"] == ["alphabet"]
    assert (banner["updates"], banner["seeds"]) == ("20", "3")
    assert (banner["planned"], banner["complete"], banner["missing"]) == (15, 14, 1)
    assert banner["absent"] == ["never-made"]
    assert banner["hardware"] == ["Abacus, 7 cores"]
    assert banner["run_commits"] == ["0ddba11"]


def test_verdicts_are_strict_json_name_their_plan_and_are_interim_while_runs_are_missing(gathered):
    verdicts = _json(gathered.directory / "verdicts.json")
    assert [v["hypothesis"] for v in verdicts] == [h.name for h in HYPOTHESES]
    assert {v["verdict"] for v in verdicts} == {"interim"}
    for one in verdicts:
        assert one["digest"] == "abcdef0123456789"
        assert (one["plan"], one["seeds"], one["margin"]) == ("tiny", "3", 0.125)
        assert one["changes"][0]["reason"] == "the pilot was small"
        assert one["lacking"] == ["letters, windowed: 2 of 3 seeds"]
        assert list(one["views"]) == list(VIEWS_OF_A_PLAN)


@pytest.mark.parametrize("plan", [None, "never"])
def test_without_a_registered_plan_there_are_no_verdicts_and_it_is_said(places, tmp_path, plan):
    found = gather(
        places / "runs", places / "figures", tmp_path / "data",
        profile="tiny", views=VIEWS, shown=SHOWN, plan=plan,
    )  # fmt: skip
    assert found.verdicts == []
    assert found.verdict_lines.startswith("no verdicts")
    assert "No verdicts: no plan" in write_results(found, tmp_path).read_text(encoding="utf-8")
    assert found.banner["absent"] == ["never-made"] + (["plan never"] if plan else [])
    assert _squeezed("missing: verdict on H1") in _text(tmp_path / "data")


def test_every_table_is_there_in_latex_too(gathered):
    for name, table in gathered.tables.items():
        latex = (gathered.directory / "tables" / f"{name}.tex").read_text(encoding="utf-8")
        assert latex.count(r"\\") == len(table) + 1
    assert r"control\_limit" in (gathered.directory / "tables" / "final.tex").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
        "With loss-driven repetition the target is reached in fewer updates.",
        "It ends better at equal updates.",
        "was worth its while.",
        "That the batches of high loss get the extra updates is what makes the difference.",
        "One arm is better than the standard one on every task by itself.",
        "It is the same for every mapping and threshold compared.",
    ],
    "refuted": [
        "With loss-driven repetition the target is reached in more updates.",
        "It ends worse at equal updates.",
        "was not worth its while.",
        "That the batches of high loss get the extra updates is not what makes the difference.",
        "On some task it is worse.",
        "It depends on the mapping or on its threshold.",
    ],
    "equivalent": [
        "With loss-driven repetition the target is reached in about as many updates.",
        "It ends about as well at equal updates.",
        "it made no difference that matters where updates were spent.",
        "It does not matter which batches get the extra updates, nor when.",
        "On no task is there a difference that matters.",
        "No mapping or threshold does better than another.",
    ],
    "inconclusive": ["Whether it ends better at equal updates is neither shown nor excluded."],
    "not tested": ["Whether it ends better at equal updates was not tested, since no arm"],
    "interim": ["Whether it ends better at equal updates is not judged before every planned run"],
}


@pytest.mark.parametrize("verdict", WORDINGS)
def test_sentences_change_with_the_verdict(data, verdict):
    verdicts = _json(data / "verdicts.json")
    made_up = [v | {"verdict": verdict, "told": f"Made up for {verdict}."} for v in verdicts]
    (data / "verdicts.json").write_text(json.dumps(made_up))
    text = _text(data)
    for wording, sentences in WORDINGS.items():
        for sentence in sentences:
            assert (_squeezed(sentence) in text) == (wording == verdict), sentence
    for hypothesis in HYPOTHESES:
        said = f"{hypothesis.name} is {verdict}. Made up for {verdict}."
        assert _squeezed(said) in text


def test_each_hypothesis_has_a_wording_for_every_verdict_wherever_it_is_spoken_of():
    source = (SOURCES / "paper.typ").read_text(encoding="utf-8")
    for name in (h.name for h in HYPOTHESES):
        calls = re.findall(rf'#by-verdict\("{name}",(.*?)\n\)', source, re.DOTALL)
        assert len(calls) == 3  # abstract, results, conclusion
        for call in calls:
            told = re.findall(r"^  (\w+): \[\S", call, re.MULTILINE)
            assert told == ["whether", "supported", "refuted", "equivalent"]


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
        "one_off": "runs",
        "over_tasks": "tau",
        "arms": "reuse_low",
        "tuning": "rate",
        "methods": "settings",
        "settings": "letters",
    }
    sought = {}
    for place, (name, column) in enumerate(columns.items()):
        path = data / "tables" / f"{name}.csv"
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        sought[name] = str(round(float(seventh) + place, 3))
        table.loc[0, column] = sought[name]
        table.to_csv(path, index=False)
    banner = _json(data / "banner.json") | {"planned": 7130 + int(seventh[2])}
    rules = _json(data / "rules.json") | {"window": 8170 + int(seventh[2])}
    verdicts = _json(data / "verdicts.json")
    verdicts[0]["sentence"] = f"p = {seventh}99"
    verdicts[1]["digest"] = f"digest{seventh}"
    verdicts[2]["margin"] = float(seventh) + 0.2
    for name, content in (("banner", banner), ("rules", rules), ("verdicts", verdicts)):
        (data / f"{name}.json").write_text(json.dumps(content))
    text = _text(data)
    for name, number in sought.items():
        shown = number if name in ("methods", "settings") else f"{float(number):.3g}"
        assert shown in text, name
    assert f"{banner['planned']}planned" in text
    assert f"windowsof{rules['window']}freshbatches" in text
    assert f"p={seventh}99" in text
    assert f"digest{seventh}" in text
    assert f"margin{round(100 * float(seventh) + 20)}%" in text


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
    assert done.output.startswith("no verdicts: no plan")
    assert (tmp_path / "out" / "paper.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_parameters_name_figures_by_their_section(profile, tmp_path):
    from repeatlab.studies.parameter_files import read_job

    job = read_job(ROOT / "params" / profile / "paper.yaml", ROOT)
    assert job.parameters["profile"] == profile
    sections = {name.partition("-")[0] for name in job.parameters["shown"]}
    assert sections == set(repeatlab.report.paper.gathering.SECTIONS)
