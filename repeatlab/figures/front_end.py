"""What widgets show in a browser: one ES module and one style sheet, from files of the package.

Built on anywidget: its front end is one plain module without a build, it comes with its own
extension of JupyterLab, so that nothing is fetched from a network, and the same widget works in
VS Code and on hosted notebooks. It adds two small packages to those of ipywidgets. The drawing is
plain SVG: a plotting library would be ten times as large as all of it.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
CSS = (_HERE / "widgets.css").read_text(encoding="utf-8")


def module(file: Path) -> str:
    """Return the drawing tools of `plot.js` and what is in `file` as one ES module."""
    parts = (_HERE / "plot.js", file)
    return "\n".join(part.read_text(encoding="utf-8") for part in parts)
