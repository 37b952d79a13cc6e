"""Writes what stands between the markers of README.md and README.zh-CN.md: `make readme`.

Results from results.md beside the figures, of the reference study where it has been drawn, every
number of which `make figures PROFILE=reference` has written, else of the quick profile; the tasks
and the map of the package from its docstrings, as the mappings and controls of their guides; the
tables of docs/*.md from tests/benchmarks/results, each where a comment names a file and its
columns.
Needs the standard library alone.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
# The first that there is: of profiles, and of what `make figures` draws over all tasks.
PLACES = ("figures/reference", "figures")
FIGURES = ("adaptability-heat-map", "convergence-update")
ENGLISH = {
    "figure": "Share of updates that each arm saves against standard training, task by task",
    "setting": "**Profile {profile}**: {updates} updates, {seeds} seeds, {runs} runs ({counts})."
    " {decides}",
    "verdicts": "**Verdicts**, by the plan `{plan}`, which was registered before its first run:"
    " {verdicts}.",
    "first": "**H1**, the target in fewer updates: {told}",
    "none": "**No verdicts**: the store holds no registered plan.",
}
CHINESE = json.loads(Path(__file__).with_name("chinese.json").read_text(encoding="utf-8"))
SETTING = re.compile(
    r"Profile (?P<profile>\S+): (?P<updates>.+?) updates, (?P<seeds>.+?) seeds, (?P<runs>\d+) runs"
    r" planned \((?P<counts>.+?)\)"
)
PLAN = re.compile(
    r"Verdicts follow the plan `(?P<plan>[^`]+)` \(digest `(?P<digest>\w+)`\).*?"
    r"(?:Nothing was amended\.|Amended since: .*?\.) (?P<decides>With .*)"
)


@dataclass(frozen=True)
class Results:
    """What figures/results.md says.

    Attributes:
        setting: Profile, updates, seeds, runs, counts; with a plan also plan, digest, decides.
        final: Rows of the table of final metrics, its heading first.
        verdicts: The same of the verdicts; empty without a plan.
        beside: The same of the verdicts in other views.
        told: Hypothesis -> what the runs say of it, in words.
        by_task: A line for each task: which arms were better, worse, equivalent or not tested.
    """

    setting: dict[str, str]
    final: list[list[str]]
    verdicts: list[list[str]]
    beside: list[list[str]]
    told: dict[str, str]
    by_task: list[str]


def read(text: str) -> Results:
    """Return what the file says.

    Raises:
        ValueError: it does not begin as `repeatlab.report.paper.results` writes it.
    """
    setting = SETTING.search(text)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    if setting is None or not tables:
        raise ValueError("results must begin with their profile and hold a table")
    plan = PLAN.search(text)
    final, verdicts, beside = ([*map(_cells, tables), [], []])[:3]
    told = dict(re.findall(r"^- \*\*(H\d)\*\* (.*)$", text, re.MULTILINE))
    for row in verdicts[1:]:  # the claim stands in the table
        name, _, claim = row[0].partition(": ")
        told[name] = told.get(name, "").removeprefix(claim).strip()
    known = setting.groupdict() | (plan.groupdict() if plan else {"decides": ""})
    by_task = re.findall(r"^- (\*\*[^*]+\*\* \(\d+ seeds\): .*)$", text, re.MULTILINE)
    return Results(known, final, verdicts, beside, told, by_task)


def _cells(table: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [row for row in rows if set("".join(row)) != {"-"}]


def table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table, the first as its heading."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def in_chinese(text: str) -> str:
    """Return a sentence or cell of the results in Chinese; its numbers and names stay."""
    for pattern, replacement in CHINESE["phrases"]:
        text = re.sub(pattern, replacement, text)
    return text


def short(found: Results, words: dict[str, str], figure: str | None, say=str) -> str:
    """Return a figure and lines: what was run, what it decides, what was saved, on which task.

    Args:
        found: The results.
        words: Sentences by name, as `ENGLISH`.
        figure: Path of the figure, if there is one.
        say: What turns a sentence of the results into the language of the words.
    """
    setting = {name: say(value) for name, value in found.setting.items()}
    lines = [f"![{words['figure']}]({figure})", ""] if figure else []
    lines.append(f"- {words['setting'].format(**setting).strip()}")
    if found.verdicts:
        verdicts: dict[str, list[str]] = {}
        for row in found.verdicts[1:]:
            verdicts.setdefault(row[1], []).append(row[0].partition(":")[0])
        said = "; ".join(f"{', '.join(names)} {say(one)}" for one, names in verdicts.items())
        lines.append(f"- {words['verdicts'].format(verdicts=said, **setting)}")
        lines.append(f"- {words['first'].format(told=say(found.told['H1']))}")
        lines += [f"- {say(line)}" for line in found.by_task]
    else:
        lines.append(f"- {words['none']}")
    return "\n".join(lines) + "\n"


def chinese_page(found: Results) -> str:
    """Return the tables of the results in Chinese, as a page."""
    words, setting = CHINESE["page"], {k: in_chinese(v) for k, v in found.setting.items()}
    parts = [f"# {words['title']}", words["setting"].format(**setting), _translated(found.final)]
    if found.verdicts:
        parts += [words["verdicts"].format(**setting), _translated(found.verdicts)]
        parts += [words["beside"], _translated(found.beside)]
    return "\n\n".join(parts) + "\n"


def _translated(rows: list[list[str]]) -> str:
    heads = [CHINESE["headings"].get(cell, cell) for cell in rows[0]]
    body = [[c if c[:1] == "`" else in_chinese(c) for c in row] for row in rows[1:]]
    return table([heads, *body])


def _assigned(file: str, name: str) -> Any:
    """Return the literal that a module of the project assigns to a name."""
    tree = ast.parse((PROJECT / file).read_text(encoding="utf-8"))
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if name in [getattr(target, "id", None) for target in targets]:
            return ast.literal_eval(node.value)
    raise ValueError(f"{file} must assign {name}")


def first_sentence(file: str) -> str:
    """Return what a module's docstring says first, without the papers it names in brackets."""
    docstring = ast.get_docstring(ast.parse((PROJECT / file).read_text(encoding="utf-8"))) or ""
    text = re.sub(r" \([^()]*\d{4}[^()]*\)", "", " ".join(docstring.split()))
    sentence = re.match(r".*?\.(?=\s|$)", text)
    return sentence[0] if sentence else text


def tasks(known: Mapping[str, str], heads: list[str]) -> str:
    """Return the table of the tasks; what is not `known` is told by its module."""
    rows = [heads]
    for name, target in _assigned("repeatlab/tasks/__init__.py", "TASKS").items():
        module = target.partition(":")[0].replace(".", "/")
        rows.append([f"`{name}`", known.get(name) or first_sentence(f"{module}.py")])
    return table(rows) + "\n"


def mappings() -> str:
    """Return the table of the mappings: name, class, and what the class says first."""
    tree = ast.parse((PROJECT / "repeatlab/repetition/mappings.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    (named,) = (
        n.value for n in tree.body if getattr(getattr(n, "target", 0), "id", 0) == "MAPPINGS"
    )
    rows = [["name in YAML", "class", "N"]]
    for key, kind in zip(named.keys, named.values, strict=True):
        said = ast.get_docstring(classes[kind.id]) or ""
        first = " ".join(said.split("\n\n")[0].split())
        rows.append([f"`{key.value}`", f"`{kind.id}`", first])
    return table(rows) + "\n"


def controls() -> str:
    """Return the table of the controls, as their module has it."""
    tree = ast.parse((PROJECT / "repeatlab/methods/controls.py").read_text(encoding="utf-8"))
    return (
        table(_cells("\n".join(re.findall(r"^\|.*", ast.get_docstring(tree), re.MULTILINE)))) + "\n"
    )


def wings(known: Mapping[str, str]) -> str:
    """Return the map of the package: a line for each wing, in the order of their imports."""
    lines = []
    for name in _assigned("tests/wings.py", "ORDER"):
        said = known.get(name) or first_sentence(f"repeatlab/{name}/__init__.py")
        lines.append(f"{name:11} {said}")
    return "\n".join(["```", *lines, "```", ""])


def place(root: Path) -> str:
    """Return the folder under `root` of the results that the pages show."""
    return next(folder for folder in PLACES if (root / folder / "results.md").exists())


def blocks(root: Path) -> dict[str, dict[str, str]]:
    """Return what stands between the markers of each page; results are those under `root`."""
    folder = place(root)
    found = read((root / folder / "results.md").read_text(encoding="utf-8"))
    there = [f"{folder}/{name}.png" for name in FIGURES]
    figure = next((path for path in there if (PROJECT / path).exists()), None)
    return {
        "README.md": {
            "results": short(found, ENGLISH, figure),
            "tasks": tasks({}, ["task", "what it is"]),
            "wings": wings({}),
        },
        "README.zh-CN.md": {
            "results": short(found, CHINESE["short"], figure, in_chinese),
            "tasks": tasks(CHINESE["tasks"], ["任务", "内容"]),
            "wings": wings(CHINESE["wings"]),
        },
    }


TABLE = re.compile(
    r"(<!-- (?P<file>\w+\.csv): (?P<columns>.*?)(?: where (?P<where>.*?))? -->\n)"
    r".*?(?P<end><!-- end of (?P=file) -->)",
    re.DOTALL,
)


def with_tables(page: str) -> str:
    """Return a page with the benchmarks' tables between their comments.

    <!-- kills.csv: task; kills; lost where task=supervised -->
    <!-- end of kills.csv -->
    """
    return TABLE.sub(lambda found: f"{found[1]}{_benchmark(found)}\n{found['end']}", page)


def _benchmark(found: re.Match[str]) -> str:
    with (PROJECT / "tests/benchmarks/results" / found["file"]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    column, _, value = (found["where"] or "").partition("=")
    if column:
        rows = [row for row in rows if row[column] == value]
    names = found["columns"].split("; ")
    body = [[_cell(row[name]) for name in names] for row in rows]
    return table([[name.replace("_", " ") for name in names], *body])


def _cell(text: str) -> str:
    """Return a cell without what only the file's other columns explain."""
    text = re.sub(r", [\d.]+ of .* epochs$", "", text).replace("nan", "-")
    return text.replace("the plan's agent", "the agent of params/paper")


def filled(page: str, parts: Mapping[str, str]) -> str:
    """Return a page with each part between the markers of its name."""
    for mark, block in parts.items():
        marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)", re.DOTALL)
        page = marks.sub(lambda found, block=block: f"{found[1]}{block}{found[2]}", page)
    return page


def guide(page: str) -> str:
    """Return a page of docs/ with what is generated of it."""
    return with_tables(filled(page, {"mappings": mappings(), "controls": controls()}))


def update(root: Path) -> None:
    """Write the blocks into the pages under `root`."""
    for path in (root / "docs").glob("*.md"):
        path.write_text(guide(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name, parts in blocks(root).items():
        page = (root / name).read_text(encoding="utf-8")
        (root / name).write_text(filled(page, parts), encoding="utf-8")


if __name__ == "__main__":
    update(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
