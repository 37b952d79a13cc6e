"""Predicted training time: measured parts, and what a run has counted. Never imports torch.

`repeatlab.studies.diagnostics.measure` makes measurements, `repeatlab.store.measurements` keeps
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.store.measurements import Measurement, measurement_of
from repeatlab.store.records import Run, Store


def measurement_table(measurements: Mapping[str, Measurement]) -> pd.DataFrame:
    """Return a row for each measurement: milliseconds of an update and its parts, and k.

    `loop` is an update of a whole loop at N = 1, its fresh batch included, and `loop iqr` its
    spread; `scoring` is that of a whole batch. `k` is `Measurement.backward_ratio` and `k (sample)`
    is `Measurement.sample_ratio`.
    """
    rows = {}
    for name, found in measurements.items():
        shown = ("forward", "backward", "optimizer", "recording", "data", "scoring")
        times = {part: found.parts[part] for part in shown}
        times |= {"loop": found.loops["once"], "loop iqr": found.spread["once"]}
        ratios = {"k": found.backward_ratio, "k (sample)": found.sample_ratio}
        rows[name] = {f"{part} (ms)": round(1000 * value, 3) for part, value in times.items()}
        rows[name] |= {name: round(value, 2) for name, value in ratios.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")


def predict(
    measurement: Measurement,
    ledger: Mapping[str, float],
    *,
    config: Mapping[str, Any] | None = None,
) -> float:
    """Return the training time of a run, in seconds, from what its ledger has counted.

    N update + d for each fresh batch, after `CostModel.run`. To that come, as the run's method
    asks: a slow loader's delay for every batch made, new views and samples, batches that a sampler
    passed over, and its scores, at a forward without a graph each. What is not in it: calibration
    and models trained beforehand, which have their own seconds; a sampler's sorting, drawing and
    weights; that a sleep ends late, and what follows it finds no caches.

    Args:
        measurement: Of the run's task, on its device and number of threads.
        ledger: The counts of `repeatlab.cost.Ledger` by name.
        config: The run's configuration as its record has it; by default standard training from a
            loader without delay.
    """
    config = config or {}
    method, loader = config.get("method") or {}, config.get("loader") or {}
    updates, fresh_batches = ledger["updates"], ledger["fresh_batches"]
    if not fresh_batches:
        return 0.0
    slow = measurement.delayed(loader.get("delay_ms", 0.0) / 1000)
    seconds = slow.run(updates, fresh_batches, prefetch=loader.get("prefetch", False))
    if method.get("fresh_views"):
        seconds += (updates - fresh_batches) * measurement.parts["refresh"]
    if method.get("apply") == "fresh_samples":
        seconds += (updates - fresh_batches) * measurement.parts["resample"]
    seconds += ledger.get("passed_batches", 0) * slow.data
    return seconds + ledger.get("scoring_samples", 0) * slow.scoring


def with_prediction(runs: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Return `runs` with the column `predicted_seconds` beside `seconds`.

    NaN where a run is not done, where it trained in lock-step (its seconds are a share of a
    group's), and where the store holds no measurement of its task on the processor, device and
    number of threads that it was made with. As `seconds`, it leaves out calibration.

    Args:
        runs: The rows of `repeatlab.analysis.frames.Records.runs`.
        store: Where the measurements are.
    """
    done = runs["status"].isin(["complete", "diverged"])
    predicted = [
        _predicted(Run(Path(path)), store) if finished else nan
        for path, finished in zip(runs["path"], done, strict=True)
    ]
    place = runs.columns.get_loc("seconds") + 1 if "seconds" in runs else len(runs.columns)
    runs = runs.copy()
    runs.insert(place, "predicted_seconds", predicted)
    return runs


def _predicted(run: Run, store: Store) -> float:
    measurement = measurement_of(store.root, run)
    if measurement is None or "lockstep" in run.environment:
        return nan
    return predict(measurement, run.summary["ledger"], config=run.config)
