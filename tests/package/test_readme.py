"""What the README shows works as it stands there, is short, and says what its sources say."""

from __future__ import annotations

import re
import subprocess

import pytest
import readme
import schematic
import torch
import yaml
from click.testing import CliRunner
from torch.nn.functional import cross_entropy

from repeatlab.cli import ROOT, cli
from repeatlab.report.paper.wording import OPENINGS

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "README.zh-CN.md": CHINESE}
MARKS = ("results", "tasks", "wings")
both_pages = pytest.mark.parametrize("name", PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def unmarked(page: str) -> str:
    """Return a page without what `make readme` writes between its markers."""
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end of \1 -->", "", page, flags=re.DOTALL)


def prose(page: str) -> str:
    """Return what is read aloud of a page: no code, pictures, targets of links, names."""
    page = re.sub(r"```.*?```|<!--.*?-->|`[^`]*`|!\[[^]]*\]\([^)]*\)", " ", page, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)|[|#*\[\]-]", " ", page)


# --- code -----------------------------------------------------------------------------------------


def test_the_loop_makes_its_updates():
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    names = {
        "loader": [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)],
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "cross_entropy": cross_entropy,
    }
    (snippet,) = blocks("python")
    exec(snippet, names)
    assert len(steps) == names["repeater"].max_updates == 5_000
    drained = names["repeater"].drain()  # what the line below it tells of
    assert len(drained["repeats"]) == len(drained["loss"]) == 5_000


def test_the_study_trains(tmp_path):
    """The file as it stands on the page, at a hundredth of its updates."""
    (snippet,) = blocks("yaml")
    small = snippet.replace("max_updates: 400", "max_updates: 8").replace("seeds: 3", "seeds: 1")
    assert small.count("8") > snippet.count("8")
    file = tmp_path / "mine.yaml"
    file.write_text(small, encoding="utf-8")
    told = CliRunner().invoke(cli, ["run", str(file), "--runs", str(tmp_path), "--workers", "0"])
    assert told.exit_code == 0, told.output
    arms = yaml.safe_load(snippet)["parameters"]["study"]["methods"]
    done = [*tmp_path.glob("supervised/*/summary.json")]
    assert len(done) == len(arms) + 1  # and the short run that finds t


# --- links, words and numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", sorted({t for p in PAGES.values() for t in re.findall(r"\]\((?!http)([^)#]+)", p)})
)
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_it_is_read_aloud_in_five_minutes():
    tasks = marked(README, "tasks")  # a table that grows, and nobody reads aloud
    assert len(prose(README.replace(tasks, "")).split()) < 5 * 155


@both_pages
def test_every_number_that_was_measured_stands_between_the_markers(name):
    """Outside them are names (Python 3.11, notebook 10) and what a reader may choose."""
    found = re.findall(r"\d+(?:\.\d+)? ?%|\d+\.\d+|\d{3,}", prose(unmarked(PAGES[name])))
    assert found == ["3.11"]


# What a PyTorch user knows under another name, or not at all.
TERMS = re.compile(
    r"\b(fresh batch|visits?|arms?|dose|driver loss|ledger|own rate|shared rate|controls?|"
    r"mappings?|updates saved|fresh data saved|verdicts?|plans?|run store|profile|wings?|"
    r"better|worse|equivalent|not tested|undecided|diverged|interim|target|null)\b",
    re.IGNORECASE,
)


def entries() -> set[str]:
    """Return the terms that the glossary has an entry for, as a link names them."""
    return {
        re.sub(r"\s+", "-", name.strip().lower())
        for line in re.findall(r"^## (.*)$", GLOSSARY, re.MULTILINE)
        for name in line.split(",")
    }


def test_every_term_of_its_own_has_an_entry_in_the_glossary():
    used = {word.lower() for word in TERMS.findall(re.sub(r"`[^`]*`", "", README))}
    assert len(used) > 5
    known = entries()
    for term in used:
        assert {term.replace(" ", "-"), term.rstrip("s").replace(" ", "-")} & known, term


@both_pages
def test_links_into_the_glossary_name_an_entry(name):
    named = re.findall(r"\]\(docs/glossary\.md#([^)]+)\)", PAGES[name])
    assert named
    assert set(named) <= entries()


# --- the same page in Chinese ---------------------------------------------------------------------


def sections(page: str) -> list[str]:
    """Return a page cut at its headings, without the links between the two languages."""
    page = re.sub(r"\[[^]]*\]\(README[^)]*\)", "", unmarked(page)).replace(".zh-CN.svg", ".svg")
    return re.split(
        r"^(?=#+ )", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE
    )


PAIRS = list(zip(sections(README), sections(CHINESE), strict=False))
every_section = pytest.mark.parametrize(
    ("english", "chinese"), PAIRS, ids=[english.partition("\n")[0] for english, _ in PAIRS]
)


def test_the_chinese_page_has_the_same_sections_and_code():
    assert len(sections(CHINESE)) == len(sections(README))
    pattern = re.compile(r"```.*?```", re.DOTALL)
    assert pattern.findall(unmarked(CHINESE)) == pattern.findall(unmarked(README))
    assert "](README.md)" in CHINESE
    assert "](README.zh-CN.md)" in README


@every_section
def test_the_chinese_page_has_the_same_names_links_and_rows(english, chinese):
    # A line break inside a span is a space.
    for pattern in (r"(?<!`)`([^`]+)`(?!`)", r"\]\(([^)]+)\)", r"^\|()"):
        found = [
            sorted(" ".join(part.split()) for part in re.findall(pattern, page, re.MULTILINE))
            for page in (english, chinese)
        ]
        assert found[0] == found[1]


# --- what is generated ----------------------------------------------------------------------------


def results() -> list[str]:
    """Return the committed results, and those that `make figures` may have written over them."""
    folder = readme.place(ROOT)
    committed = ["git", "-C", ROOT, "show", f"HEAD:{folder}/results.md"]
    shown = subprocess.run(committed, capture_output=True, encoding="utf-8")
    file = ROOT / folder / "results.md"
    found = [shown.stdout] if shown.returncode == 0 else []
    return [*found, file.read_text(encoding="utf-8")] if file.exists() else found


def marked(page: str, mark: str) -> str:
    (block,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- end of {mark} -->", page, re.DOTALL)
    return block


@pytest.fixture
def copy(tmp_path):
    """Return what puts results beside copies of the pages and updates these."""

    def updated(text: str) -> dict[str, str]:
        folder = tmp_path / readme.place(ROOT)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.md").write_text(text, encoding="utf-8")
        for name, page in PAGES.items():
            (tmp_path / name).write_text(page, encoding="utf-8")
        readme.update(tmp_path)
        return {name: (tmp_path / name).read_text(encoding="utf-8") for name in PAGES}

    return updated


def test_the_pages_say_what_the_results_and_the_package_say(copy):
    assert PAGES in [copy(text) for text in results()], "`make readme` puts them in"


def test_every_number_in_short_is_one_of_the_results():
    for text in results():
        found = readme.read(text)
        for words, say in ((readme.ENGLISH, str), (readme.CHINESE["short"], readme.in_chinese)):
            shown = readme.short(found, words, None, say)
            numbers = re.findall(r"\d+(?:\.\d+)?", shown)
            assert len(numbers) > 5
            assert set(numbers) <= set(re.findall(r"\d+(?:\.\d+)?", text))


NO_PLAN = """Profile other: 10 updates, 8 seeds, 16 runs planned (15 complete, 1 diverged); a CPU.

| task | metric | `standard` |
| --- | --- | --- |
| supervised | accuracy (more is better) | 0.5 |

No verdicts: no plan is registered.
"""


def test_make_readme_puts_in_other_results_and_leaves_the_rest(copy):
    pages = copy(NO_PLAN)
    assert "No verdicts" in marked(pages["README.md"], "results")
    assert "没有判断" in marked(pages["README.zh-CN.md"], "results")
    for name, page in pages.items():
        assert "15" in marked(page, "results")
        assert unmarked(page) == unmarked(PAGES[name])


def test_results_that_are_none_are_refused(copy):
    with pytest.raises(ValueError, match="profile"):
        copy("| one |\n")


@both_pages
def test_the_tasks_and_the_wings_are_all_there(name):
    from repeatlab.tasks import TASKS

    tasks = re.findall(r"^\| `(\w+)` \|", marked(PAGES[name], "tasks"), re.MULTILINE)
    assert tasks == list(TASKS)
    lines = marked(PAGES[name], "wings").splitlines()[1:-1]
    folders = {file.parent.name for file in (ROOT / "repeatlab").glob("*/__init__.py")}
    assert {line.split()[0] for line in lines} == folders


def test_no_sentence_of_the_results_stays_english_in_chinese():
    for text in results():
        found = readme.read(text)
        told = readme.blocks(ROOT)["README.zh-CN.md"]["results"]
        page = readme.chinese_page(found)
        for english in ("updates", "seeds", "nothing", "verdict", "is better", "visits", "runs"):
            assert english not in re.sub(r"`[^`]*`|\([^)]*png\)", "", told + page), english


SAID = [
    *(opening.format(margin="10 %") for opening in OPENINGS.values()),
    "Linear (1.31 visits a batch) saved 4 % of the updates (95 %: -3 % to 10 %), but evaluations"
    " are too far apart for equivalence (20 % on digits of the way to the target); quantile cost"
    " 3 % more updates (95 %: -1 % to no bound); and 2 more.",
    "Threshold was worse than every budget that was tried (with so few seeds there are no limits).",
    "Threshold saved 4 % of the updates (its limits lie beyond every budget that was tried).",
    "With 8 seeds, flipped as wholes over all tasks, p cannot fall below 0.0078, or 0.055 among the"
    " 7 comparisons of H1 to H3: equivalence can be shown at this scale, a difference cannot.",
    "With 12 seeds, flipped as wholes over all tasks, p cannot fall below 0.00049: at this scale a"
    " verdict can go either way.",
    "Of its tasks these are not run yet: A, B.",
    "The comparisons it rests on: 4 undecided, 1 better, 2 worse, 1 equivalent.",
    "(30 seeds): better: none; worse: `linear`; equivalent: none; not tested: none; undecided: 12.",
]


@pytest.mark.parametrize("said", SAID)
def test_what_results_can_say_is_said_in_chinese_with_the_same_numbers(said):
    translated = readme.in_chinese(said)
    assert re.findall(r"[a-z]{3,}", translated.lower().replace("digits", "")) == [
        arm for arm in ("linear", "quantile", "threshold") if arm in said.lower()
    ]
    numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", text)) for text in (said, translated)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("suffix", schematic.WORDS)
def test_the_drawing_is_that_of_its_command(suffix):
    file = ROOT / "docs" / f"method{suffix}.svg"
    assert file.read_text(encoding="utf-8") == schematic.draw(schematic.WORDS[suffix])
