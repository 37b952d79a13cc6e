"""Predictions against sums by hand; which measurement belongs to which run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repeatlab.core.files import StoreError
from repeatlab.cost import tau_threshold
from repeatlab.store.measurements import (
    Measurement,
    measurement_key,
    measurement_of,
    read_measurements,
    write_measurement,
)
from repeatlab.store.records import Run, Store
from repeatlab.studies.diagnostics.prediction import measurement_table, predict, with_prediction

TASK = {"name": "supervised", "lr": 0.1, "batch_size": 10}
LONG = {  # an update of 100 ms, 20 ms of data
    "forward": 0.030,
    "backward": 0.060,
    "optimizer": 0.008,
    "recording": 0.002,
    "data": 0.020,
    "scoring": 0.025,
    "refresh": 0.015,
    "resample": 0.012,
}
LONG_LOOPS = {"once": 0.120, "repeated": 0.105}
SHORT = {name: value / 100 for name, value in LONG.items()}
LOOPS = {"once": 0.00110, "repeated": 0.00095}


def measurement(parts=LONG, loops=None, **changes) -> Measurement:
    loops = loops or (LONG_LOOPS if parts is LONG else LOOPS)
    fields = {
        "task": TASK,
        "device": "cpu",
        "threads": 1,
        "batch_size": 10,
        "forward_samples": 10,
        "backward_samples": 10,
        "parts": parts,
        "loops": loops,
        "spread": {"once": 0.00005},
        "environment": {"processor": "this one", "device": "cpu"},
    }
    return Measurement(**fields | changes)


def counts(updates: int, fresh_batches: int, scored: int = 0) -> dict[str, int]:
    return {"updates": updates, "fresh_batches": fresh_batches, "scoring_samples": scored}


# --- parts ---------------------------------------------------------------------------------------


def test_ratios_where_more_samples_go_forward_than_backward():
    found = measurement(forward_samples=30)
    assert found.backward_ratio == pytest.approx(2)
    assert found.sample_ratio == pytest.approx(6)
    # An importance update scores 30 samples too, so that tau_th has the ratio of whole updates.
    by_hand = (3 * 0.030 + 0.030 + 0.060) / (0.030 + 0.060)
    assert tau_threshold(3, found.backward_ratio) == pytest.approx(by_hand)


def test_parts_that_add_up_to_an_update_are_taken_as_they_are():
    model = measurement().model
    assert (model.update, model.data) == (pytest.approx(0.100), pytest.approx(0.020))
    assert model.forward * model.batch_size == pytest.approx(0.030)
    assert model.scoring * model.batch_size == pytest.approx(0.025)


seconds = st.floats(1e-5, 1)


@given(seconds, seconds, seconds)
def test_updates_take_what_whole_loops_take(repeated, data, part):
    loops = {"once": repeated + 0.75 * data, "repeated": repeated}  # u + d / 4 = repeated
    if 0.25 * data >= repeated:
        return  # no such loop: the update would take no time
    found = measurement(dict.fromkeys(SHORT, part), loops)
    assert predict(found, counts(8, 8)) == pytest.approx(8 * loops["once"])
    assert predict(found, counts(8, 2)) == pytest.approx(8 * loops["repeated"])
    assert predict(found, counts(8, 4)) == pytest.approx(8 * (repeated + data / 4))
    assert found.model.backward_ratio == found.backward_ratio


def test_noise_makes_no_fresh_batch_cheaper_than_nothing():
    found = measurement(SHORT, LOOPS | {"repeated": 0.00111})
    assert found.model.data == 0
    assert found.model.update == pytest.approx(LOOPS["once"])


# --- predictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ledger", "config", "expected"),
    [
        (counts(30, 30), {}, 30 * 0.120),
        (counts(30, 10), {}, 30 * 0.100 + 10 * 0.020),
        (counts(0, 0), {}, 0),
        (counts(30, 10), {"loader": {"delay_ms": 50}}, 30 * 0.100 + 10 * 0.070),
        # 3 updates of 100 ms take longer than a batch of 70 ms, one update does not
        (counts(30, 10), {"loader": {"delay_ms": 50, "prefetch": True}}, 30 * 0.100),
        (counts(30, 30), {"loader": {"delay_ms": 90, "prefetch": True}}, 30 * 0.110),
        (counts(30, 10), {"method": {"fresh_views": True}}, 3.2 + 20 * 0.015),
        (counts(30, 10), {"method": {"apply": "fresh_samples"}}, 3.2 + 20 * 0.012),
        (counts(30, 10), {"method": {"apply": "step_size"}}, 3.2),
    ],
)
def test_seconds_by_hand(ledger, config, expected):
    assert predict(measurement(), ledger, config=config) == pytest.approx(expected)


def test_a_sampler_pays_for_what_it_scores_and_passes_over():
    ledger = counts(30, 30, scored=90 * 10) | {"passed_batches": 60}
    expected = 30 * 0.120 + 60 * 0.020 + 90 * 0.025
    assert predict(measurement(), ledger) == pytest.approx(expected)
    slow = predict(measurement(), ledger, config={"loader": {"delay_ms": 10}})
    assert slow == pytest.approx(expected + 90 * 0.010)


def test_a_ledger_from_before_scoring_was_counted():
    ledger = {"updates": 30, "fresh_batches": 30}
    assert predict(measurement(), ledger) == pytest.approx(3.6)


# --- the store ------------------------------------------------------------------------------------


def test_a_measurement_reads_back_as_written(tmp_path):
    store, found = Store(tmp_path / "runs"), measurement()
    path = write_measurement(store, found)
    assert path == tmp_path / "runs" / "measurements" / f"{found.key}.json"
    assert read_measurements(store) == {found.key: found}


def test_a_new_measurement_takes_the_place_of_the_old_one(tmp_path):
    store = Store(tmp_path)
    write_measurement(store, measurement())
    write_measurement(store, measurement(batch_size=3))
    assert [m.batch_size for m in read_measurements(store).values()] == [3]


def test_a_store_without_measurements(tmp_path):
    assert read_measurements(Store(tmp_path / "absent")) == {}


@pytest.mark.parametrize("text", ["{", "{}", '{"task": {}, "unknown": 1}', "[1]"])
def test_a_file_of_another_kind_is_named(tmp_path, text):
    path = tmp_path / "measurements" / "0123456789abcdef.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(StoreError, match=r"0123456789abcdef\.json is no measurement"):
        read_measurements(Store(tmp_path))


def test_a_key_says_task_device_and_threads():
    key = measurement_key(TASK, "cpu", 1)
    assert len(key) == 16
    assert key == measurement_key(dict(reversed(TASK.items())), "cpu", 1)
    others = {
        measurement_key(TASK | {"lr": 0.2}, "cpu", 1),
        measurement_key(TASK, "some GPU", 1),
        measurement_key(TASK, "cpu", 2),
    }
    assert len(others | {key}) == 4


# --- runs -----------------------------------------------------------------------------------------


def made(store: Store, run_id: str, *, task=TASK, threads=1, processor="this one", **more):
    """Write a finished run of 30 updates on 10 batches; return its row."""
    run = store.run("supervised", run_id)
    config = {"task": task, "threads": threads, "device": "auto", "method": {}, "loader": {}}
    writer = store.begin(run, config, {"device": "cpu", "processor": processor, **more})
    writer.finish("complete", {"ledger": counts(30, 10) | {"seconds": 3.0}})
    return {"id": run_id, "path": str(run.path), "status": "complete", "seconds": 3.0, "last": 1}


def test_runs_get_the_prediction_of_their_own_measurement(tmp_path):
    store = Store(tmp_path)
    write_measurement(store, measurement())
    write_measurement(store, measurement(task=TASK | {"lr": 0.2}, parts=SHORT))
    rows = [
        made(store, "same"),
        made(store, "other-rate", task=TASK | {"lr": 0.2}),
        made(store, "other-task", task=TASK | {"lr": 0.3}),
        made(store, "threads", threads=2),
        made(store, "processor", processor="another one"),
        made(store, "share", lockstep=8),
        {"id": "x", "path": str(tmp_path / "supervised" / "x"), "status": "missing"},
    ]
    runs = pd.DataFrame(rows)
    before = runs.copy()
    shown = with_prediction(runs, store)
    pd.testing.assert_frame_equal(runs, before)
    assert shown.columns.tolist() == [
        "id", "path", "status", "seconds", "predicted_seconds", "last"
    ]  # fmt: skip
    predicted = shown["predicted_seconds"]
    assert predicted[0] == pytest.approx(3.2)
    # 1.1 = u + d and 0.95 = u + d / 4 milliseconds: u = 0.9, d = 0.2
    assert predicted[1] == pytest.approx(30 * 0.0009 + 10 * 0.0002)
    assert predicted[2:].isna().all()


def test_a_run_s_k_is_that_of_its_task_on_its_machine(tmp_path):
    """V18: a backward is charged as what it was measured to take, and a sample's at that."""
    store, found = Store(tmp_path), measurement(forward_samples=30)
    path = write_measurement(store, found)
    others = {
        "other-task": {"task": TASK | {"lr": 0.3}},
        "threads": {"threads": 2},
        "processor": {"processor": "another one"},
    }
    of = {name: Run(Path(made(store, name, **fields)["path"])) for name, fields in others.items()}
    assert [measurement_of(tmp_path, run) for run in of.values()] == [None] * len(others)
    same = Run(Path(made(store, "same")["path"]))
    assert measurement_of(tmp_path, same) == found
    assert found.sample_ratio == pytest.approx(6)
    path.write_text("[1]")
    with pytest.raises(StoreError, match=f"{path.name} is no measurement"):
        measurement_of(tmp_path, same)


def test_runs_of_which_none_is_done(tmp_path):
    runs = pd.DataFrame([{"id": "x", "path": "nowhere", "status": "missing"}])
    assert with_prediction(runs, Store(tmp_path))["predicted_seconds"].isna().all()


def test_the_table_has_a_row_for_each_measurement():
    table = measurement_table({"a": measurement(), "b": measurement(SHORT)})
    assert table.loc["a", "backward (ms)"] == pytest.approx(60)
    assert table.loc["b", "forward (ms)"] == pytest.approx(0.3)
    assert table.loc["b", ["loop (ms)", "loop iqr (ms)"]].tolist() == [1.1, 0.05]
    assert (table["k"] == 2).all()


def test_predicting_never_loads_torch():
    code = "import sys, repeatlab.studies.diagnostics.prediction; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_has_nothing_that_json_lacks():
    assert Measurement(**json.loads(json.dumps(asdict(measurement())))) == measurement()
