"""HTML that objects show themselves by: complete, escaped, and true to the numbers."""

from __future__ import annotations

import re
from itertools import product
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from repeatlab.analysis.frames import Records
from repeatlab.core.html_view import HEIGHT, WIDTH, rows_table, small_curve
from repeatlab.studies.study import Report


def cells(html: str) -> dict[str, str]:
    rows = ElementTree.fromstring(html).findall("tr")
    return {row.find("th").text: row.find("td").text for row in rows}


def points(html: str) -> np.ndarray:
    text = re.search(r"points='([^']*)'", html).group(1)
    return np.array([pair.split(",") for pair in text.split()], dtype=float)


def test_a_table_has_every_row_and_nothing_of_a_name_becomes_markup():
    shown = cells(rows_table({"loss": 1 / 3, "runs": 12, "<b>": "a & b"}))
    assert shown == {"loss": "0.333333", "runs": "12", "<b>": "a & b"}


def test_a_curve_rises_where_its_values_do_and_says_first_and_last():
    html = small_curve("loss", [4.0, 1.0, 2.0])
    assert "loss: 4 to 2" in html
    x, y = points(html).T
    assert x.tolist() == sorted(x)
    # Down on the page is up on the axis.
    assert np.argsort(-y).tolist() == [1, 2, 0]
    assert (y >= 0).all()
    assert (y <= HEIGHT).all()


def test_a_long_curve_has_as_many_points_as_pixels_and_a_constant_one_is_flat():
    assert len(points(small_curve("N", np.arange(10_000)))) == WIDTH
    assert len(set(points(small_curve("N", [2.0] * 50))[:, 1])) == 1


@pytest.mark.parametrize("values", [[], [np.nan, np.inf]])
def test_nothing_finite_is_no_curve(values):
    assert small_curve("loss", values) == ""


def test_what_is_not_finite_is_left_out():
    assert "1 to 3" in small_curve("loss", [1.0, 2.0, 3.0, np.nan])


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


def test_a_study_shows_its_plan(small_study):
    assert cells(small_study()._repr_html_()) == {
        "study": "small",
        "tasks": "digits",
        "methods": "standard, fixed2, linear",
        "seeds": "2",
        "updates": "25",
        "runs": "6",
    }
