"""`repeatlab new`: a mapping, task or notebook of one's own, beside the package's.

All that it writes stands in `templates/KIND.tmpl`, part by part, each behind a line of one of

    === PATH: what is to be filled in                 a new file
    === PATH, before "MARK": what is to be filled in  above the one line with this mark
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from string import Template
from typing import Any

from repeatlab.core.schema import ConfigError

TEMPLATES = Path(__file__).with_name("templates")
_PART = re.compile(r'^=== (\S+?)(?:, before "(.+)")?: (.*)\n', re.MULTILINE)


def scaffold(kind: str, name: str) -> list[str]:
    """Write what a "mapping", "task" or "notebook" needs; return a line for each file.

    Raises:
        ConfigError: the name is none, or taken, or a file has no place for it; nothing is written.
    """
    root = Path(__file__).resolve().parents[1]
    class_name = "".join(part.capitalize() for part in name.split("_"))
    wrong = iskeyword(name) or iskeyword(class_name)
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,23}", name) or wrong:
        raise ConfigError(
            f"name must be in snake_case, as square_root, of 24 characters at most; not {name!r}"
        )
    words = {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "dashed": name.replace("_", "-"),
        "Name": class_name,
        "number": _number(root),
    }
    text = Template((TEMPLATES / f"{kind}.tmpl").read_text(encoding="utf-8")).substitute(words)
    _, *found = _PART.split(text)
    parts = list(zip(*(found[place::4] for place in range(4)), strict=True))
    files = {path: _before(root, path, mark, words) for path, mark, _, _ in parts}
    for path, mark, _, body in parts:
        files[path] = _inserted(files[path], body, mark, path) if mark else body
    for path, content in files.items():
        (root / path).write_text(content, encoding="utf-8")
    said = [f"{path}: {hint}" for path, _, hint, _ in parts]
    if kind != "notebook":  # of which no page has a generated table
        subprocess.run([sys.executable, root / "docs" / "readme.py"], cwd=root, check=True)
        said.append("README.md, README.zh-CN.md, docs/: `make readme` after a change of docstrings")
    return said


def _number(root: Path) -> int:
    """Return the first number of a notebook, from 40 on, that none has."""
    taken = {file.name[:2] for file in (root / "notebooks").glob("*.ipynb")}
    return next(number for number in range(40, 100) if str(number) not in taken)


def _before(root: Path, path: str, mark: str | None, words: Mapping[str, Any]) -> str:
    """Return what a file holds, which must know nothing of the name yet; "" where it is new."""
    file = root / path
    if not mark:
        # A notebook has its name behind any number.
        there = sorted(file.parent.glob(file.name.replace(f"{words['number']}_", "[0-9][0-9]_")))
        text = ""
    else:
        text = file.read_text(encoding="utf-8")
        # Also a class that the file imports, and would then have lost.
        named = rf'^ *"{words["name"]}": |^class {words["Name"]}\b|import .*\b{words["Name"]}\b'
        there = path.startswith("repeatlab/") and re.search(named, text, re.MULTILINE)
    if there:
        raise ConfigError(f"name must be one that is not taken; {path} has {words['name']!r}")
    return text


def _inserted(text: str, part: str, mark: str, path: str) -> str:
    """Return a file's text with a part above the line that holds the mark."""
    lines = text.splitlines(keepends=True)
    places = [place for place, line in enumerate(lines) if mark in line]
    if len(places) != 1:
        raise ConfigError(f"{path} must have one line with {mark!r}, to be written above")
    lines[places[0] : places[0]] = part
    return "".join(lines)
