"""Forms with sliders: what they compute agrees with the loop, and what they show follows."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repeatlab.cost import CostModel
from repeatlab.figures.sliders import CostForm, MappingForm, counts_on_trace, offered
from repeatlab.figures.trace import binned
from repeatlab.repetition.mappings import MAPPINGS, ControlLimit, Linear, Threshold
from repeatlab.repetition.repeater import BatchRepeater

PNG = b"\x89PNG\r\n\x1a\n"
LOSSES = st.lists(st.floats(0.015625, 20.0, width=32), min_size=1, max_size=60)


def trace(losses, visits=1) -> pd.DataFrame:
    """Rows of a run that visited each batch `visits` times; repeats have other losses."""
    rows = [
        {"repeat": repeat, "loss": loss / (repeat + 1)}
        for loss in losses
        for repeat in range(visits)
    ]
    return pd.DataFrame(rows)


def slider(form, name):
    """Return the form's slider with this description, wherever in it."""
    (found,) = [
        w
        for box in form.children
        for w in (*getattr(box, "children", ()), box)
        if getattr(w, "description", None) == name
    ]
    return found


def counted_by_the_loop(mapping, losses, max_updates) -> list[int]:
    """N of each fresh batch in a real loop whose batches have these losses."""
    repeater = BatchRepeater(losses, mapping, max_updates=max_updates)
    for loss in repeater:
        repeater.report(loss)
    rows = pd.DataFrame(repeater.drain())
    return rows.groupby("fresh_batch").size().tolist()


@pytest.mark.parametrize("name", offered())
@settings(max_examples=25, deadline=None)
@given(losses=LOSSES, data=st.data())
def test_counts_are_those_of_the_loop_for_every_mapping_offered(name, losses, data):
    kind = MAPPINGS[name]
    needed = {"t": 1.0} if "t" in {f.name for f in fields(kind)} else {}
    mapping = kind(**needed)
    max_updates = data.draw(st.integers(1, len(losses)))  # so that the trace suffices
    counts = counts_on_trace(mapping, losses, max_updates=max_updates)
    assert counts.tolist() == counted_by_the_loop(mapping, losses, max_updates)
    assert counts.sum() == max_updates


def test_a_window_shorter_than_the_trace_is_looked_back_on():
    losses = [1.0, 1.1, 0.9, 1.0, 5.0, 1.0, 1.05, 0.95, 1.0, 5.0]
    mapping = ControlLimit(k=1.5, repeats=3, window=3)
    counts = counts_on_trace(mapping, losses, max_updates=10)
    assert counts.tolist() == counted_by_the_loop(mapping, losses, 10)
    assert 3 in counts


def test_counts_end_with_the_trace_where_the_budget_is_larger():
    counts = counts_on_trace(Threshold(t=1.0), [2.0, 0.5, 3.0], max_updates=100)
    assert counts.tolist() == [2, 1, 2]


def test_every_mapping_is_offered_but_those_that_a_trace_cannot_serve():
    without = {"until", "until_limit", "while", "trace"}
    assert set(MAPPINGS) - set(offered()) == without


def test_moving_t_redraws_n_at_once():
    losses = np.linspace(3.0, 0.1, 50)
    form = MappingForm(trace(losses, visits=2), "linear", t=1.0)
    picture = form.children[-1]
    assert form.mapping == Linear(t=1.0)
    assert form.counts.tolist() == counts_on_trace(Linear(t=1.0), losses, max_updates=100).tolist()
    before = bytes(picture.value)
    assert before.startswith(PNG)
    slider(form, "t").value = 0.3
    assert form.mapping == Linear(t=slider(form, "t").value)
    assert form.counts.tolist() == counts_on_trace(form.mapping, losses, max_updates=100).tolist()
    assert bytes(picture.value).startswith(PNG)
    assert picture.value != before


@pytest.mark.parametrize("name", offered())
def test_choosing_a_mapping_brings_its_sliders_and_its_counts(name):
    losses = np.linspace(3.0, 0.1, 40)
    form = MappingForm(trace(losses), "constant" if name != "constant" else "linear")
    slider(form, "mapping").value = name
    assert type(form.mapping) is MAPPINGS[name]
    asked = [s.description for s in form.children[1].children]
    assert asked == [f.name for f in fields(MAPPINGS[name]) if f.name != "seed"]
    expected = counts_on_trace(form.mapping, losses, max_updates=40)
    assert form.counts.tolist() == expected.tolist()
    assert f"mean N {expected.mean():.3f}" in form.children[2].value


def test_sliders_that_contradict_each_other_are_told_and_the_last_picture_stays():
    form = MappingForm(trace(np.linspace(3.0, 0.1, 20)), "uniform", low=2, high=4)
    picture, mapping = form.children[-1].value, form.mapping
    slider(form, "low").value = 7
    assert "low must not exceed high" in form.children[2].value
    assert (form.children[-1].value, form.mapping) == (picture, mapping)
    slider(form, "high").value = 8
    assert "mean N" in form.children[2].value
    assert (form.mapping.low, form.mapping.high) == (7, 8)


def test_a_diverged_run_is_shown_up_to_where_it_ended_and_negative_losses_can_be_shown():
    form = MappingForm(trace([1.0, 2.0, np.nan]), "threshold", t=1.5)
    assert form.counts.tolist() == [1, 2]
    form = MappingForm(trace([-0.5, -0.7, -0.9]), "linear")
    assert form.counts.tolist() == [1, 1, 1]


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"must be one of constant, .*; not 'until'"):
        MappingForm(trace([1.0]), "until")
    with pytest.raises(ValueError, match="no finite loss"):
        MappingForm(trace([np.inf]))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=100), st.integers(1, 40))
def test_bins_keep_the_sum_and_are_few(values, most):
    edges, means = binned(np.array(values), most)
    assert len(means) <= most
    assert (edges[0], edges[-1]) == (0, len(values))
    assert (means * np.diff(edges)).sum() == pytest.approx(sum(values), abs=1e-9)


def test_a_cost_form_begins_with_what_was_measured_and_follows_its_sliders():
    measured = CostModel(
        forward=2e-5, backward_ratio=1.5, batch_size=64, optimizer=1e-4, data=4e-3, scoring=1e-5
    )
    form = CostForm(measured)
    # A log slider keeps its exponent, so that a value comes back rounded.
    assert form.model.update == pytest.approx(measured.update)
    assert form.model.data == pytest.approx(measured.data)
    picture = bytes(form.children[-1].value)
    assert picture.startswith(PNG)
    slider(form, "times as fast").value = 10
    assert form.model.update == pytest.approx(measured.update / 10)
    assert form.model.scoring == pytest.approx(1e-6)
    assert form.model.free_repeats() == pytest.approx(10 * measured.free_repeats())
    slider(form, "k").value = 3.0
    assert form.model.update == pytest.approx((4 * 64 * 2e-5 + 1e-4) / 10)
    slider(form, "data (ms)").value = 100
    assert form.model.data == pytest.approx(0.1)
    assert form.children[-1].value != picture
