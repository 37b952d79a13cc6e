"""How Sphinx builds the site; `docs/website.py` lays out what it reads."""

from __future__ import annotations

import re
from typing import Any

from repeatlab import __version__

project, version = "repeatlab", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "repeatlab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False

# Notebooks are shown as they were executed, or stripped; nothing is trained here.
nb_execution_mode = "off"
# Without a network nothing is fetched: widgets show the picture that stands beside them.
nb_ipywidgets_js: dict[str, Any] = {}
nb_render_markdown_format = "myst"
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None),
    ("html", "application/javascript", None),
]
highlight_language = "none"  # a block without a language is a shell's
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
# A YAML file is no dialect of its own, and a notebook may print what is no code at all.
suppress_warnings = ["misc.highlighting_failure", "mystnb.unknown_mime_type", "ref.python"]

# Docstrings write code in single backquotes.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Class attributes", "Attributes")]
napoleon_use_ivar = True

PLAIN = re.compile(r"(`[^`]*`)")
ALIGNED = re.compile(r"\S.* {3,}\S")
SECTION = re.compile(r"[A-Z][a-z]+( attributes)?:")


def _plain(line: str) -> str:
    """Escape what reStructuredText reads as markup outside of code: |x|, *, a trailing _."""
    parts = PLAIN.split(line)
    parts[::2] = [re.sub(r"([|*]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make docstrings reStructuredText: tables and indented code literal, all else plain."""
    written: list[str] = []
    literal, before, last = "", "", ""  # what is literal now, the last text, the last line
    for line in lines:
        text, indented = line.strip(), line.startswith("    ")
        # What is indented behind a paragraph is code, as against what a section such as Args holds.
        paragraph = before[:1].strip() and not SECTION.fullmatch(before)
        begun, goes_on = literal, (indented or not text) if literal == "    " else bool(text)
        if not (literal and goes_on):
            literal = ""
        if not literal and text[:1] == text[-1:] == "|" and text.count("|") > 2:
            literal = "table"
        elif not literal and not indented and not last and ALIGNED.match(line):
            literal = "columns"
        elif not literal and indented and paragraph and not last:
            literal = "    "
        if literal and not begun:
            written += ["::", ""]
        elif begun and not literal:
            written.append("")
        if literal:
            written.append(line if literal == "    " else f"    {line}")
        else:
            written.append(line if text.startswith((">>>", "...")) else _plain(line))
        before, last = (line if text else before), text
    lines[:] = written


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what another library has put into a class of the project."""
    home = getattr(obj, "__module__", None) or ""
    return True if callable(obj) and home and not home.startswith("repeatlab") else None


def setup(app: Any) -> None:
    """Have docstrings read before napoleon does."""
    app.connect("autodoc-process-docstring", _as_rst, priority=100)
    app.connect("autodoc-skip-member", _skip)
