"""Forms with sliders: what the browser computes is what Python does, and what they begin with."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repeatlab.figures.sliders import OFFERED, MappingForm
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import MAPPINGS
from repeatlab.repetition.repeater import BatchRepeater

PNG = b"\x89PNG\r\n\x1a\n"
# Few values as well as many: equal losses and ties are where the order of a sum shows.
LOSS = st.sampled_from([0.1, 0.2, 0.3, 1.0, 3.0]) | st.floats(0.015625, 20.0, width=32)
LOSSES = st.lists(LOSS, min_size=1, max_size=400)
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node to run the front end's module in")
# Answers each line of questions with a line.
ASK = """
import widget from "./widget.mjs";
import { createInterface } from "node:readline";
const { MAPPINGS, countsOnTrace } = widget;
console.log(JSON.stringify(Object.fromEntries(
  Object.entries(MAPPINGS).map(([name, { fields }]) => [name, Object.keys(fields)]))));
for await (const line of createInterface({ input: process.stdin })) {
  const { name, fields, losses, max_updates } = JSON.parse(line);
  const traced = Float32Array.from(losses);
  console.log(JSON.stringify(countsOnTrace(name, fields, traced, max_updates)));
}
"""


def trace(losses, visits=1) -> pd.DataFrame:
    """Rows of a run that visited each batch `visits` times; repeats have other losses."""
    rows = [
        {"repeat": repeat, "loss": loss / (repeat + 1)}
        for loss in losses
        for repeat in range(visits)
    ]
    return pd.DataFrame(rows)


def counted_by_the_loop(mapping, losses, max_updates) -> list[int]:
    """N of each fresh batch in a real loop whose batches have these losses."""
    repeater = BatchRepeater(losses, mapping, max_updates=max_updates)
    for loss in repeater:
        repeater.report(loss)
    rows = pd.DataFrame(repeater.drain())
    return rows.groupby("fresh_batch").size().tolist()


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Return what asks the front end's module, under node, for N; and the fields that it knows."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "widget.mjs").write_text(MappingForm._esm, encoding="utf-8")
    (folder / "ask.mjs").write_text(ASK, encoding="utf-8")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([NODE, str(folder / "ask.mjs")], **pipes) as process:
        known = json.loads(process.stdout.readline())

        def ask(**question) -> list[int]:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask, known
        process.stdin.close()


@needs_node
def test_the_browser_knows_the_mappings_offered_with_all_their_fields(node):
    _, known = node
    own = {name: [f.name for f in fields(MAPPINGS[name])] for name in OFFERED}
    assert {name: sorted(names) for name, names in known.items()} == {
        name: sorted(names) for name, names in own.items()
    }
    assert not {"uniform", "trace", "until", "until_limit", "while"} & {*OFFERED}


FIELDS = {
    "t": st.sampled_from([0.1, 0.3, 1.0]) | st.floats(0.01, 5),
    "k": st.sampled_from([0.5, 1.0, 2.0, 3.0]) | st.floats(0.1, 6),
    "step": st.sampled_from([0.5, 1.0, 2.0]) | st.floats(0.1, 4),
    "window": st.integers(2, 300),
    "levels": st.lists(st.floats(0.05, 0.95), min_size=1, max_size=3),
}


@needs_node
@pytest.mark.parametrize("name", OFFERED)
@settings(max_examples=60, deadline=None)
@given(losses=LOSSES, data=st.data())
def test_n_in_the_browser_is_n_in_a_loop(node, name, losses, data):
    ask, known = node
    counts = st.integers(1, 10)
    values = {field: data.draw(FIELDS.get(field, counts)) for field in known[name]}
    if "low" in values:
        values["low"], values["high"] = sorted((values["low"], values["high"]))
    max_updates = data.draw(st.integers(1, len(losses)))  # so that the trace suffices
    mapping = MAPPINGS[name](**values)
    found = ask(name=name, fields=values, losses=losses, max_updates=max_updates)
    assert found == counted_by_the_loop(mapping, losses, max_updates)


@needs_node
@pytest.mark.parametrize("root", [3, 7, 13, 16])
def test_where_only_rounding_decides_the_browser_rounds_as_numpy_does(node, root):
    """One loss b among n - 1 of a lies sqrt(n - 1) deviations above the mean: on a whole number."""
    ask, _ = node
    window, draws, found = root**2 + 1, np.random.default_rng(0), []
    for a, b in np.sort(draws.uniform(0.1, 9, (60, 2)).astype(np.float32)).tolist():
        losses = [a] * (window // 2) + [b] + [a] * (window - window // 2 - 1) + [b]
        for name, values in (
            ("control_limit", {"k": root, "repeats": 2, "window": window}),
            ("zscore", {"step": root, "max_repeats": 2, "window": window}),
        ):
            size = len(losses) + 1
            counts = ask(name=name, fields=values, losses=losses, max_updates=size)
            stats = LossStats(window)
            for loss in losses[:-1]:
                stats.observe(loss)
            found.append(MAPPINGS[name](**values)(b, stats))
            assert counts == [1] * window + [found[-1]], (a, b)
    assert set(found) == {1, 2}  # both are met


@needs_node
def test_counts_end_with_the_trace_where_the_budget_is_larger(node):
    ask, _ = node
    values = {"t": 1.0, "repeats": 2}
    assert ask(name="threshold", fields=values, losses=[2, 0.5, 3], max_updates=99) == [2, 1, 2]


def test_a_form_begins_with_the_first_losses_and_what_was_asked_for():
    form = MappingForm(trace([0.1, 3.0, np.nan], visits=2), "quantile", t=0.5, window=20)
    assert np.frombuffer(form.losses, "<f4").tolist() == [np.float32(0.1), 3.0]
    assert form.max_updates == 6
    assert form.chosen == [{"name": "quantile", "window": 20}, {"name": "threshold"}]
    assert form.t == 0.5
    assert MappingForm(trace([1.0, 2.0, 3.0, 4.0, 5.0])).t == 2.0  # the lower quartile


def test_losses_that_are_not_positive_can_be_shown():
    assert MappingForm(trace([-0.5, -0.7])).t == 1.0


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"must be one of constant, .*; not 'until'"):
        MappingForm(trace([1.0]), "until")
    with pytest.raises(ValueError, match="no finite loss"):
        MappingForm(trace([np.inf]))
    with pytest.raises(ValueError, match=r"must be one of .*; not 'trace'"):
        MappingForm(trace([1.0]), other="trace")
