"""The live picture: what it shows is what runs have recorded so far."""

from __future__ import annotations

import threading
from threading import Event

import numpy as np
import pytest

from repeatlab.core.files import StoreError
from repeatlab.figures.live import Progress, live, picture, progress
from repeatlab.store.records import Store

PATIENCE = 30  # seconds before a test gives up


def rows(first: int, count: int, repeats: int = 2) -> dict[str, np.ndarray]:
    update = np.arange(first, first + count)
    return {
        "update": update,
        "fresh_batch": update // repeats,
        "repeat": update % repeats,
        "repeats": np.full(count, repeats),
        "loss": 3.0 - 0.01 * update,
        "lr": np.full(count, 0.1),
        "seconds": 0.5 * update,
    }


@pytest.fixture
def store(tmp_path):
    """A store with a study of three runs, of which nothing is there yet."""
    store = Store(tmp_path)
    store.check_writable()
    names = ("standard", "fixed2", "linear")
    runs = [
        {"task": "digits", "method": name, "seed": 0, "run": ["supervised", f"id{name}"]}
        for name in names
    ]
    store.write_study("small", {"name": "small", "runs": runs})
    return store


def begin(store, name):
    run = store.run("supervised", f"id{name}")
    return run, store.begin(run, {}, {})


def test_runs_under_way_are_shown_with_what_they_have_recorded(store):
    one, first = begin(store, "standard")
    two, second = begin(store, "linear")
    with store.locked(one), store.locked(two):
        first.updates(rows(0, 10))
        second.updates(rows(0, 4))
        second.evals(4, {"validation": {"accuracy": 0.5}}, {})
        found = progress(store, "small")
        assert (found.planned, found.done) == (3, 0)
        assert {c.name: len(c.updates) for c in found.curves} == {
            "linear, seed 0": 4,
            "standard, seed 0": 10,
        }
        first.updates(rows(10, 5))
        assert [len(c.updates) for c in progress(store, "small").curves] == [4, 15]
        assert len(progress(store, "small", most=1).curves) == 1
    # Begun, but no process is at them; and one that is done takes their place.
    assert progress(store, "small").curves == []
    first.finish("complete", {"final": {}})
    found = progress(store, "small")
    assert (found.done, [c.name for c in found.curves]) == (1, ["standard, seed 0"])


def test_a_run_that_has_written_nothing_and_a_study_that_is_not_there_are_no_errors(store):
    run = store.run("supervised", "idlinear")
    with store.locked(run):
        (curve,) = progress(store, "small").curves
        assert len(curve.updates) == len(curve.evals) == 0
        assert len(picture(progress(store, "small"), "accuracy").axes) == 3
    assert progress(store, "another") == Progress()
    assert picture(Progress(), "accuracy").axes[0].get_title("left") == "0 of 0 runs done"


def test_the_picture_has_every_update_and_the_metric_asked_for(store):
    run, writer = begin(store, "linear")
    recorded = rows(0, 150)
    with store.locked(run):
        writer.updates(recorded)
        for update, value in ((0, 0.1), (100, 0.7)):
            metrics = {"accuracy": value, "loss": 9.0}
            writer.evals(update, {"validation": metrics, "train": {"accuracy": 0.0}}, {})
        loss, repeats, metric = picture(progress(store, "small"), "accuracy").axes
    (curve,) = loss.lines
    assert curve.get_xdata().tolist() == recorded["update"].tolist()
    assert curve.get_ydata() == pytest.approx(recorded["loss"])
    assert set(repeats.lines[0].get_ydata()) == {2.0}
    assert metric.lines[0].get_xydata().tolist() == [[0, 0.1], [100, 0.7]]
    assert metric.get_ylabel() == "validation accuracy"


def test_a_long_run_is_drawn_by_means_over_consecutive_updates(store):
    run, writer = begin(store, "linear")
    with store.locked(run):
        writer.updates(rows(0, 1000))
        (curve,) = picture(progress(store, "small"), "accuracy").axes[0].lines
    assert len(curve.get_xdata()) == 200
    assert curve.get_xdata()[0] == 2.0  # of updates 0 to 4
    assert curve.get_ydata()[0] == pytest.approx(3.0 - 0.01 * 2)


def test_a_picture_follows_what_is_written_meanwhile_and_the_last_one_has_all(store):
    seen, lengths, moved = Event(), [], Event()

    def show(figure):
        lines = figure.axes[0].lines
        lengths.append(len(lines[0].get_xdata()) if lines else 0)
        seen.set()
        if lengths[-1] == 30:
            moved.set()

    run, writer = begin(store, "linear")
    with store.locked(run):
        writer.updates(rows(0, 10))
        with live(store.root, "small", metric="accuracy", every=0.01, show=show):
            assert seen.wait(PATIENCE)
            writer.updates(rows(10, 20))
            assert moved.wait(PATIENCE)
            writer.updates(rows(30, 10))
            writer.finish("complete", {"final": {}})
    assert lengths[0] == 10
    assert lengths[-1] == 40
    assert "live" not in {thread.name for thread in threading.enumerate()}


def test_an_error_inside_is_passed_on_after_a_last_picture(store):
    shown = []
    with (
        pytest.raises(StoreError, match="the disk is full"),
        live(store.root, "small", metric="accuracy", every=1000, show=shown.append),
    ):
        raise StoreError("the disk is full")
    assert [figure.axes[0].get_title("left") for figure in shown] == ["0 of 3 runs done"]


def test_where_nobody_asks_for_pictures_there_is_no_thread_and_no_picture(store):
    shown, threads = [], threading.active_count()
    with live(store.root, "small", metric="accuracy", every=None, show=shown.append):
        assert threading.active_count() == threads
    assert shown == []
