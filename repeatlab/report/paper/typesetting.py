"""From gathered data to a PDF."""

from __future__ import annotations

import shutil
from pathlib import Path

SOURCES = ("paper.typ", "layout.typ", "references.bib")


def typeset(directory: str | Path, *, pages: bool = False) -> Path:
    """Compile the paper of the data that `gather` left in `directory`, and return the PDF.

    The sources are copied beside the data, so that the directory holds all that the PDF is made
    of. The same data gives the same file: no date, and no font but those that Typst brings.

    Args:
        directory: Where the data is, and where the paper goes.
        pages: Write each page as page-<number>.png, too.
    """
    import typst

    directory = Path(directory)
    for name in SOURCES:
        shutil.copyfile(Path(__file__).parent / name, directory / name)
    places = {"root": directory, "ignore_system_fonts": True, "timestamp": 0}
    paper = directory / "paper.pdf"
    typst.compile(directory / "paper.typ", output=paper, **places)
    if pages:
        typst.compile(directory / "paper.typ", output=directory / "page-{0p}.png", **places)
    return paper
