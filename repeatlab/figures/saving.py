"""Figures on the disk, and the manifest that says what each was made of. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from repeatlab.analysis.frames import Records
from repeatlab.core.environment import commit
from repeatlab.core.files import replacing, safe_name, write_json
from repeatlab.core.locks import hold
from repeatlab.figures.look import STYLE, style


def save_figure(
    figure: Figure,
    name: str,
    directory: str | Path,
    *,
    notebook: str,
    records: Records,
    parameters: Mapping[str, Any],
) -> Any:
    """Write `figure` as PDF and PNG and enter it in the directory's manifest.json.

    The manifest ties each figure to notebook, parameters, run ids and commit.

    Returns:
        The file, so that a notebook's cell can end on this call and show it: drawing the figure
        anew would take as long again.
    """
    from IPython.display import Image

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
    width, height = (round(inches * STYLE["figure.dpi"]) for inches in figure.get_size_inches())
    return Image(filename=str(directory / f"{name}.png"), width=width, height=height)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return the manifest of a figure directory: figure name to its entry."""
    path = Path(directory) / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
