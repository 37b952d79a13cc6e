"""Where measurements of a task's speed lie, and k, which every axis of cost takes from them.

runs/measurements/<key>.json  what `repeatlab measure` found; the key follows from the task, the
                              device and its threads
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repeatlab.core.files import StoreError, digest_of_content
from repeatlab.store.records import Run


def measurement_key(task: Mapping[str, Any], device: str, threads: int) -> str:
    """Return sixteen hex digits that identify a task's configuration, a device and its threads."""
    return digest_of_content([task, device, threads])


def measured_k(runs: str | Path, run: Run) -> float | None:
    """Return one sample's backward in forwards, as measured for a run's task; None if it was not.

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
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["environment"]["processor"] != environment.get("processor"):
            return None
        parts, samples = found["parts"], found["forward_samples"] / found["backward_samples"]
        return parts["backward"] / parts["forward"] * samples
    except (KeyError, TypeError, ValueError):
        raise StoreError(
            f"{path} is no measurement of this version: make it anew with `repeatlab measure`"
        ) from None
