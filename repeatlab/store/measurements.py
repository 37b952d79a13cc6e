"""Measurements of a task's speed, and k, which every axis of cost takes from them.

runs/measurements/<key>.json  what `repeatlab measure` found; the key follows from the task, the
                              device and its threads
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from repeatlab.core.files import StoreError, digest_of_content, write_json
from repeatlab.cost import CostModel
from repeatlab.store.records import Run, Store

REPEATS = 4  # N of the loops that are set against those at N = 1


def measurement_key(task: Mapping[str, Any], device: str, threads: int) -> str:
    """Return sixteen hex digits that identify a task's configuration, a device and its threads."""
    return digest_of_content([task, device, threads])


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
    paths = sorted((store.root / "measurements").glob("*.json"))
    return {path.stem: _read(path) for path in paths}


def _read(path: Path) -> Measurement:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return Measurement(**{one.name: held[one.name] for one in fields(Measurement)})
    except (KeyError, TypeError, ValueError):
        raise StoreError(
            f"{path} is no measurement of this version: make it anew with `repeatlab measure`"
        ) from None


def measurement_of(runs: str | Path, run: Run) -> Measurement | None:
    """Return what was measured of a run's task; None if nothing was.

    It is that of the device, the processor and the number of threads that the run was made on.

    Args:
        runs: The run store.
        run: One of its runs.

    Raises:
        StoreError: the file of the measurement holds something else.
    """
    config, environment = run.config, run.environment
    if not config.get("task") or "device" not in environment:
        return None
    key = measurement_key(config["task"], environment["device"], config.get("threads", 1))
    path = Path(runs, "measurements", f"{key}.json")
    found = _read(path) if path.exists() else None
    same = found and found.environment["processor"] == environment.get("processor")
    return found if same else None
