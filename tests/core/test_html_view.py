"""HTML that objects show themselves by: complete, escaped, and true to the numbers."""

from __future__ import annotations

from itertools import product
from xml.etree import ElementTree

import pandas as pd

from repeatlab.analysis.frames import Records
from repeatlab.core.html_view import rows_table
from repeatlab.studies.study import Report


def cells(html: str) -> dict[str, str]:
    rows = ElementTree.fromstring(html).findall("tr")
    return {row.find("th").text: row.find("td").text for row in rows}


def test_a_table_has_every_row_and_nothing_of_a_name_becomes_markup():
    shown = cells(rows_table({"loss": 1 / 3, "runs": 12, "<b>": "a & b"}))
    assert shown == {"loss": "0.333333", "runs": "12", "<b>": "a & b"}


def test_a_report_shows_how_runs_ended():
    report = Report({"a": "complete", "b": "diverged", "c": "complete"}, trained=2)
    assert cells(report._repr_html_()) == {
        "runs": "3",
        "complete": "2",
        "diverged": "1",
        "trained now": "2",
        "in the store": "1",
    }
    again = Report({"a": "complete"}, trained=1, retried={"a": 2})
    assert cells(again._repr_html_())["more than one attempt"] == "1"


def test_records_show_what_they_are_of_and_how_it_ended():
    runs = product(["digits"], ["standard", "linear"], [0, 1, 4])
    frame = pd.DataFrame(list(runs), columns=["task", "method", "seed"])
    records = Records(frame.assign(status=["complete"] * 5 + ["missing"]))
    expected = {
        "runs": "6",
        "complete": "5",
        "missing": "1",
        "tasks": "digits",
        "methods": "standard, linear",
        "seeds": "3",
    }
    assert cells(records._repr_html_()) == expected
    shown = "runs=6, complete=5, missing=1, tasks='digits', methods='standard, linear', seeds=3"
    assert repr(records) == f"Records({shown})"
