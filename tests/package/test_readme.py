"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from repeatlab.cli import ROOT
from repeatlab.studies.study import Study

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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


def test_the_methods_are_valid():
    (snippet,) = blocks("yaml")
    methods = yaml.safe_load(snippet)["methods"]
    study = Study.of(name="x", tasks={"x": {"name": "supervised"}}, methods=methods, max_updates=1)
    assert list(study.methods) == list(methods)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


# --- the same page in Chinese ---------------------------------------------------------------------


def sections(page: str) -> list[str]:
    """Return a page cut at its headings, without the links between the two languages."""
    page = re.sub(r"\[[^]]*\]\(README[^)]*\)", "", page)
    return re.split(
        r"^(?=#+ )", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE
    )


def numbers(text: str) -> list[str]:
    """Return every number in a text, sorted: languages say things in different orders."""
    return sorted(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text))


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


PAIRS = list(zip(sections(README), sections(CHINESE), strict=False))
every_section = pytest.mark.parametrize(
    ("english", "chinese"), PAIRS, ids=[english.partition("\n")[0] for english, _ in PAIRS]
)


def test_the_chinese_page_has_the_same_sections_and_code():
    assert len(sections(CHINESE)) == len(sections(README))
    pattern = re.compile(r"```.*?```", re.DOTALL)
    assert pattern.findall(CHINESE) == pattern.findall(README)
    assert "](README.md)" in CHINESE


@every_section
def test_the_chinese_page_has_the_same_numbers(english, chinese):
    assert numbers(chinese) == numbers(english)


@every_section
def test_the_chinese_page_has_the_same_names_and_links(english, chinese):
    # A line break inside a span is a space.
    for pattern in (r"(?<!`)`([^`]+)`(?!`)", r"\]\(([^)]+)\)"):
        found = [
            sorted(" ".join(part.split()) for part in re.findall(pattern, page))
            for page in (english, chinese)
        ]
        assert found[0] == found[1]


@every_section
def test_the_chinese_page_has_the_same_tables(english, chinese):
    tables = [
        [(line.count("|"), numbers(line)) for line in rows(page)] for page in (english, chinese)
    ]
    assert tables[0] == tables[1]


# --- results --------------------------------------------------------------------------------------


def results() -> list[str]:
    """Return the committed results, and those that `make figures` may have written over them."""
    committed = ["git", "-C", ROOT, "show", "HEAD:figures/results.md"]
    shown = subprocess.run(committed, capture_output=True, encoding="utf-8")
    file = ROOT / "figures" / "results.md"
    found = [shown.stdout] if shown.returncode == 0 else []
    return [*found, file.read_text(encoding="utf-8")] if file.exists() else found


@pytest.mark.parametrize("page", [README, CHINESE], ids=["English", "Chinese"])
def test_the_results_are_those_of_the_figures(page):
    (block,) = re.findall(r"<!-- results -->\n(.*?)<!-- end of results -->", page, re.DOTALL)
    assert block in results(), "`make readme` puts them in"


def test_make_readme_puts_in_the_results(tmp_path):
    """The target works on pages that hold others, and a second time."""
    (tmp_path / "figures").mkdir()
    for name, page in {"README.md": README, "README.zh-CN.md": CHINESE}.items():
        (tmp_path / name).write_text(page, encoding="utf-8")
    for results in ("| one |\n", "text\n\n| two |\n| / & |\n"):
        (tmp_path / "figures" / "results.md").write_text(results, encoding="utf-8")
        subprocess.run(["make", "-s", "-f", ROOT / "Makefile", "readme"], cwd=tmp_path, check=True)
        for name, page in {"README.md": README, "README.zh-CN.md": CHINESE}.items():
            before, after = page.split("<!-- results -->\n")[0], page.split("<!-- end of")[1]
            expected = f"{before}<!-- results -->\n{results}<!-- end of{after}"
            assert (tmp_path / name).read_text(encoding="utf-8") == expected


def test_both_languages_link_to_each_other():
    assert "](README.zh-CN.md)" in README
    assert "](README.md)" in CHINESE
