"""Figures on the disk, and the manifest that says what each was made of. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from repeatlab.analysis.frames import Records
from repeatlab.core.environment import commit
from repeatlab.core.files import replacing, safe_name, write_json
from repeatlab.core.locks import hold
from repeatlab.figures.look import STYLE, style


@dataclass(frozen=True)
class SavedFigure:
    """A figure on the disk. A notebook shows that file: drawing it anew would take as long again.

    Attributes:
        png: The file.
    """

    png: Path

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        data = self.png.read_bytes()
        # Width and height stand in the first chunk of every PNG.
        pixels = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
        scale = STYLE["figure.dpi"] / STYLE["savefig.dpi"]
        size = (round(scale * length) for length in pixels)
        return data, dict(zip(("width", "height"), size, strict=True))


def save_figure(
    figure: Figure,
    name: str,
    directory: str | Path,
    *,
    notebook: str,
    records: Records,
    parameters: Mapping[str, Any],
) -> SavedFigure:
    """Write `figure` as PDF and PNG and enter it in the directory's manifest.json.

    The manifest ties each figure to notebook, parameters, run ids and commit.

    Returns:
        What was saved, so that a notebook's cell can end on this call and show it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safe_name("figure name", name)
    with style():
        # One layout for all formats, and for the notebook that shows the figure.
        figure.draw_without_rendering()
    with style(**{"figure.constrained_layout.use": False}):
        # Not "none", whose place holder makes every format draw twice.
        figure.set_layout_engine(None)
        # Without dates, the same figure is the same file.
        for kind, undated in (("pdf", "CreationDate"), ("png", "Software")):
            # A link in the figure's place is replaced, not followed.
            with replacing(directory / f"{name}.{kind}") as file:
                figure.savefig(file, format=kind, metadata={undated: None})
    entry = {
        "files": [f"{name}.pdf", f"{name}.png"],
        "notebook": notebook,
        "parameters": dict(parameters),
        "runs": records.run_ids,
        "missing_runs": len(records.missing),
        "commit": commit(),
    }
    # Another notebook may be entering its own at the same time.
    with hold(directory / ".manifest.lock"):
        manifest = read_manifest(directory) | {name: entry}
        write_json(directory / "manifest.json", dict(sorted(manifest.items())))
    plt.close(figure)
    return SavedFigure(directory / f"{name}.png")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return the manifest of a figure directory: figure name to its entry."""
    path = Path(directory) / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
