"""The site's mapping explorer in a real browser, with neither server nor kernel behind it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import mapping_explorer
import pytest

from repeatlab.repetition.mappings import MAPPINGS
from repeatlab.repetition.repeater import BatchRepeater

DOCS = Path(mapping_explorer.__file__).parent
SAID = re.compile(
    r"mean N (.+), N > 1 on (.+)% of fresh batches; after (\d+) of (\d+) .*: (\d+) of (\d+) updates"
)


@pytest.fixture(scope="module")
def updates(chromium):
    """Return the rows of the run that the page shows; nothing is trained where no browser is."""
    return mapping_explorer.recorded()


@pytest.fixture(scope="module")
def losses(updates):
    """Return the losses as the page has them, in float32."""
    return updates["loss"].astype("float32").tolist()


@pytest.fixture(scope="module")
def site(updates, tmp_path_factory):
    """Build a site of this page alone: links to all others lead nowhere."""
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="no Sphinx: pip install -e .[docs]")
    folder = tmp_path_factory.mktemp("explorer")
    source, site = folder / "source", folder / "site"
    shutil.copytree(DOCS / "_static", source / "_static")
    shutil.copy(DOCS / "conf.py", source)
    page = (DOCS / "mapping_explorer.md").read_text(encoding="utf-8")
    page = mapping_explorer.filled(page, updates)
    (source / "mapping_explorer.md").write_text(page, encoding="utf-8")
    (source / "index.md").write_text("# Home\n\n```{toctree}\nmapping_explorer\n```\n")
    assert sphinx.build_main(["-Q", "-d", str(folder / "trees"), str(source), str(site)]) == 0
    return site


@pytest.fixture
def form(page, site):
    """Open the page as a file, and return its form; `page.problems` also has the console's."""
    page.on("console", lambda said: said.type == "error" and page.problems.append(said.text))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.asked = []
    page.goto((site / "mapping_explorer.html").as_uri())
    form = page.locator(".repeatlab")
    form.locator("svg").wait_for()
    return form


def _said(form, side: int) -> list[float]:
    """Return the numbers that a side of the form says."""
    text = form.locator(".said").nth(side).text_content()
    return [float(number) for number in SAID.fullmatch(text).groups()]


def _by_hand(name: str, losses: list[float], **fields: float) -> list[float]:
    """Return the same numbers of the mapping in a real loop whose batches have these losses."""
    total = len(losses)
    repeater = BatchRepeater(losses, MAPPINGS[name](**fields), max_updates=total)
    for loss in repeater:
        repeater.report(loss)
    fresh = repeater.drain()["fresh_batch"].tolist()
    counts = [fresh.count(batch) for batch in range(fresh[-1] + 1)]
    many = sum(count > 1 for count in counts) / len(counts)
    mean = total / len(counts)
    return [round(mean, 3), round(100 * many, 1), len(counts), total, total, total]


@pytest.mark.parametrize(
    ("name", "first", "moved"),
    [
        ("linear", {"t": mapping_explorer.T}, {"max_repeats": 3}),
        ("threshold", {"t": mapping_explorer.T}, {"repeats": 4}),
        ("quantile", {}, {"window": 20}),
        ("zscore", {}, {"step": 0.5}),
        ("control_limit", {}, {"k": 1.5}),
        ("cosine", {}, {"high": 3}),
    ],
)
def test_a_field_that_is_moved_changes_n_as_in_python(page, form, losses, name, first, moved):
    form.get_by_label("mapping").first.select_option(name)
    before = _said(form, 0)
    assert before == pytest.approx(_by_hand(name, losses, **first), abs=0.0011)
    ((field, value),) = moved.items()
    side = form.locator(".side").first
    side.get_by_label(field).fill(str(value))
    after = _said(form, 0)
    assert after != before
    assert after == pytest.approx(_by_hand(name, losses, **first | moved), abs=0.0011)
    assert page.problems == []


def test_t_moves_with_its_slider_on_the_second_side_too(page, form, losses):
    other = _said(form, 0)
    form.get_by_label("mapping").last.select_option("threshold")
    slider = form.locator(".side").last.get_by_label("t", exact=True)
    slider.fill("0")  # logarithmic: t = 1
    assert _said(form, 1) == pytest.approx(_by_hand("threshold", losses, t=1.0), abs=0.0011)
    assert _said(form, 0) == other
    assert page.problems == []


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_the_window_and_loads_nothing_from_elsewhere(page, form, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [form.bounding_box(), *(one.bounding_box() for one in form.locator("input").all())]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    assert {urlsplit(url).scheme for url in page.asked} <= {"file", "data"}
    assert page.problems == []


def test_fields_that_contradict_each_other_are_named(page, form):
    form.get_by_label("mapping").first.select_option("ramp")
    form.get_by_label("low").fill("8")
    said = form.locator(".said").first.text_content()
    assert said == "low must not exceed high, but 8 > 5"
    assert page.problems == []
