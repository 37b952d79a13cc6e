"""Small pieces of HTML by which objects show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any


def rows_table(rows: Mapping[str, Any]) -> str:
    """Return a table of two columns; a number has six digits at most."""
    cells = (
        f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
        f"<td>{escape(f'{value:.6g}' if isinstance(value, float) else str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"
