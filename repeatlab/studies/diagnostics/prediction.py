"""Predicted training time: measured parts, and what a run has counted. Never imports torch.

`repeatlab.studies.diagnostics.measure` makes measurements; where they lie is told in
`repeatlab.store.measurements`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.core.files import StoreError, write_json
from repeatlab.cost import CostModel
from repeatlab.store.measurements import measurement_key
from repeatlab.store.records import Run, Store

REPEATS = 4  # N of the loops that are set against those at N = 1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of one task on one machine: medians over blocks, in seconds.

    Attributes:
        task: The task's configuration.
        device: "cpu", "mps" or the name of the GPU.
        threads: CPU threads of torch.
        batch_size: b, the samples of a fresh batch.
        forward_samples: Samples forward in an update.
        backward_samples: Samples backward in an update.
        parts: Of an update at N = 1, which they add up to: `forward`, `backward`, `optimizer`
            (zero_grad, step, and whatever moves with the weights), `recording` (the loop itself),
            and `data`, the making of its fresh batch. Of other things: `scoring`, a batch's losses
            without a graph; `refresh`, its new view; `resample`, other samples in its place, which
            is missing where the task refuses it.
        loops: An update in whole loops, with all that comes to it: `once` at N = 1, `repeated` at
            N = `REPEATS`.
        spread: Interquartile range over the blocks of everything above.
        environment: Versions, processor and device.
    """

    task: dict[str, Any]
    device: str
    threads: int
    batch_size: int
    forward_samples: int
    backward_samples: int
    parts: dict[str, float]
    loops: dict[str, float]
    spread: dict[str, float]
    environment: dict[str, Any]

    @property
    def key(self) -> str:
        """Sixteen hex digits that identify task, device and threads."""
        return measurement_key(self.task, self.device, self.threads)

    @property
    def backward_ratio(self) -> float:
        """k of the cost model: an update's backward over its forward."""
        return self.parts["backward"] / self.parts["forward"]

    @property
    def sample_ratio(self) -> float:
        """k of `Ledger.cost_units`: one sample's backward over one sample's forward.

        It differs from `backward_ratio` where more samples go forward than backward.
        """
        return self.backward_ratio * self.forward_samples / self.backward_samples

    def delayed(self, seconds: float) -> CostModel:
        """Return the cost model with a loader that sleeps so long for every batch."""
        return replace(self.model, data=self.model.data + seconds)

    @property
    def model(self) -> CostModel:
        """The cost model with these times.

        A fresh batch costs by how much whole loops at N = 1 take longer than at N = `REPEATS`: its
        making, and that its first update finds it, and the network, in no cache. Parts are scaled
        to what is left: the watch on them takes time as well, and makes the host wait for a GPU.
        """
        parts = self.parts
        # once = update + d, repeated = update + d / N
        data = max(0.0, (self.loops["once"] - self.loops["repeated"]) / (1 - 1 / REPEATS))
        whole = sum(parts[name] for name in ("forward", "backward", "optimizer", "recording"))
        scale = (self.loops["once"] - data) / whole
        return CostModel(
            forward=scale * parts["forward"] / self.batch_size,
            backward_ratio=self.backward_ratio,
            batch_size=self.batch_size,
            optimizer=scale * parts["optimizer"],
            recording=scale * parts["recording"],
            data=data,
            scoring=parts["scoring"] / self.batch_size,
        )


def write_measurement(store: Store, measurement: Measurement) -> Path:
    """Keep a measurement, in the place of an older one, and return its file.

    Raises:
        StoreError: the store cannot be written.
    """
    store.check_writable()
    directory = store.root / "measurements"
    directory.mkdir(exist_ok=True)
    path = directory / f"{measurement.key}.json"
    write_json(path, asdict(measurement))
    return path


def read_measurements(store: Store) -> dict[str, Measurement]:
    """Return all measurements of a store by their keys.

    Raises:
        StoreError: a file does not hold a measurement as this version writes them.
    """
    found = {}
    for path in sorted((store.root / "measurements").glob("*.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            found[path.stem] = Measurement(
                **{one.name: held[one.name] for one in fields(Measurement)}
            )
        except (KeyError, TypeError, ValueError):
            raise StoreError(
                f"{path} is no measurement of this version: make it anew with `repeatlab measure`"
            ) from None
    return found


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
    measurements = read_measurements(store)
    done = runs["status"].isin(["complete", "diverged"])
    predicted = [
        _predicted(Run(Path(path)), measurements) if finished else nan
        for path, finished in zip(runs["path"], done, strict=True)
    ]
    place = runs.columns.get_loc("seconds") + 1 if "seconds" in runs else len(runs.columns)
    runs = runs.copy()
    runs.insert(place, "predicted_seconds", predicted)
    return runs


def _predicted(run: Run, measurements: Mapping[str, Measurement]) -> float:
    config = run.config
    environment = run.environment
    key = measurement_key(config["task"], environment["device"], config["threads"])
    measurement = measurements.get(key)
    if measurement is None or "lockstep" in environment:
        return nan
    if measurement.environment["processor"] != environment["processor"]:
        return nan
    return predict(measurement, run.summary["ledger"], config=config)
