"""Sensitivity: outcomes over settings, the edge of the range, and what the figures mark."""

from __future__ import annotations

import numpy as np
import pandas as pd

from repeatlab.analysis import sensitivity
from repeatlab.analysis.frames import Records
from repeatlab.figures import sensitivity as draw
from repeatlab.store.records import Store


def _records(tmp_path, runs: list[tuple]) -> Records:
    """Return records of (method, lr, seed, mapping, last loss: NaN diverged, None missing)."""
    store, rows = Store(tmp_path), []
    for method, lr, seed, mapping, value in runs:
        run = store.run("t", f"{method}-{lr}-{seed}")
        row = {"task": f"lr={lr}", "method": method, "seed": seed, "id": run.path.name}
        row |= {"path": str(run.path), "status": "missing"}
        if value is not None:
            config = {"task": {"lr": lr, "batch_size": 8}, "method": {"mapping": mapping}}
            writer = store.begin(run, config, {})
            row |= {"updates": 30, "fresh_batches": 20, "status": "complete"}
            if np.isnan(value):
                row |= {"status": "diverged"}
                writer.finish("diverged", {"update": 7})
            else:
                row |= {"validation.loss": value}
                writer.finish("complete", {})
        rows.append(row)
    return Records(pd.DataFrame(rows))


LINEAR = {"name": "linear", "t": 0.5, "max_repeats": 5}


def test_settings_come_from_the_configuration_and_a_missing_run_has_its_siblings(tmp_path):
    runs = [("linear", 0.1, 0, LINEAR, 1.0), ("linear", 0.1, 1, LINEAR, None)]
    runs += [("standard", 0.1, 0, None, np.nan), ("other", 0.1, 0, None, None)]
    found = sensitivity.outcomes(_records(tmp_path, runs), "loss")
    assert found["lr"].tolist()[:3] == [0.1, 0.1, 0.1]
    assert found["t"].tolist()[:2] == [0.5, 0.5]
    assert found["most"].tolist()[:2] == [5, 5]
    assert found["t"].isna().tolist()[2:] == [True, True]
    assert np.isnan(found["lr"][3])
    assert found["value"].tolist()[0] == 1.0
    assert found["value"].isna().tolist() == [False, True, True, True]
    assert found["repeats"].tolist()[0] == 1.5


def test_a_value_of_the_setting_counts_what_became_of_its_runs(tmp_path):
    runs = [("standard", 1.0, s, None, v) for s, v in enumerate([1.0, 3.0, np.nan, None])]
    runs += [("standard", 0.1, 0, None, 0.5)]
    summary = sensitivity.over(sensitivity.outcomes(_records(tmp_path, runs), "loss"), "lr")
    assert summary["x"].tolist() == [0.1, 1.0]
    assert summary.loc[1, ["n", "missing", "diverged"]].tolist() == [2, 1, 1]
    assert summary.loc[1, "mean"] == 2.0
    assert np.isnan(summary.loc[0, "low"])


def _summary(means: list[float], diverged: list[int] | None = None) -> pd.DataFrame:
    columns = {"x": np.arange(len(means)), "mean": means, "low": means, "high": means}
    return pd.DataFrame(
        {"method": "linear", "n": 3, "missing": 0, "diverged": diverged or 0, **columns}
    )


def test_panels_hold_each_setting_apart_from_the_others(tmp_path):
    runs = [
        (f"linear_{t}_{most}", 0.1, 0, {"name": "linear", "t": t, "max_repeats": most}, t + most)
        for t, most in ((0.5, 5), (1.0, 5), (0.5, 2))
    ]
    runs.append(("threshold", 0.1, 0, {"name": "threshold", "t": 2.0}, 9.0))
    runs.append(("standard", 0.1, 0, None, 1.0))
    frame = sensitivity.outcomes(_records(tmp_path, runs), "loss")
    panels = sensitivity.panels({"mappings": frame, "batches": frame})
    points = {
        name: panel["summary"][["method", "x", "mean"]].to_numpy().tolist()
        for name, panel in panels.items()
    }
    assert points["t"] == [
        ["linear", 0.5, 5.5], ["linear", 1.0, 6.0], ["threshold", 2.0, 9.0],
    ]  # fmt: skip
    assert points["most repeats"] == [["linear", 2, 2.5], ["linear", 5, 5.5]]
    assert [point[1] for point in points["batch size"]] == [8] * 5


def test_conditions_take_their_value_from_the_runs(tmp_path):
    runs = [("standard", lr, 0, None, 1.0) for lr in (0.1, 1.0)]
    frame = sensitivity.outcomes(_records(tmp_path, runs), "loss")
    table = pd.DataFrame({"task": ["lr=1.0", "lr=0.1"], "method": "linear"})
    assert sensitivity.conditions(table, frame, "rates")["x"].tolist() == [1.0, 0.1]


# --- figures ----------------------------------------------------------------------------------


def test_diverged_runs_are_marked():
    summary = _summary([1.0, 2.0, np.nan], [0, 0, 3])
    panel = {"summary": summary, "xlabel": "x"}
    figure = draw.over_settings({"x": panel}, ylabel="loss", chance=2.3)
    (axes,) = figure.axes
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in crosses] == [2]


def test_arms_of_one_mapping_are_one_line_over_the_mean_n_they_made(tmp_path):
    runs = [("a", 0.1, 0, LINEAR, 1.0), ("b", 0.1, 0, LINEAR | {"t": 1.0}, 2.0)]
    runs += [("fixed2", 0.1, 0, {"name": "constant", "repeats": 2}, 3.0)]
    runs += [("c", 0.1, 0, LINEAR, None)]
    frame = sensitivity.arms(sensitivity.outcomes(_records(tmp_path, runs), "loss"))
    figure = draw.over_mean_repeats(frame, ylabel="loss")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["fixed2", "linear"]
    said = {text.get_text() for text in figure.axes[0].texts}
    assert {"t = 0.5", "t = 1"} <= said
    assert "no complete run: c" in figure.get_suptitle()


def test_an_advantage_that_is_not_finite_is_said():
    rows = pd.DataFrame(
        {"x": [0.1, 1.0], "setting": "lr", "method": "linear", "difference": [0.2, -np.inf],
         "low": [0.1, -np.inf], "high": [0.3, np.inf], "n": 3, "n_diverged": [0, 2],
         "n_missing": 0, "decision": ["better", "undecided"]}
    )  # fmt: skip
    figure = draw.advantages({"rates": rows}, ylabel="advantage")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["2 diverged"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.1", "1"]
