"""Measurements of a study's tasks: those that the store has, and the others made now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repeatlab.core.environment import describe, pick_device
from repeatlab.store.records import Store
from repeatlab.studies.diagnostics.measure import measure
from repeatlab.studies.diagnostics.prediction import (
    Measurement,
    measurement_key,
    read_measurements,
    write_measurement,
)
from repeatlab.studies.study import Study


def measured(
    fields: dict[str, Any], runs: str | Path = "runs", *, blocks: int = 9
) -> dict[str, Measurement]:
    """Return the measurement of every task of a study, by what the study calls the task.

    One that the store has for this processor, device and number of threads is not made again, if it
    knows what a slow loader costs. The machine should have nothing else to do meanwhile.

    Args:
        fields: The study's.
        runs: The run store.
        blocks: As in `repeatlab.studies.diagnostics.measure.measure`.

    Raises:
        ConfigError: the fields are not valid.
        StoreError: the store cannot be written, or holds a measurement of another version.
        DataError: a task lacks its data.
    """
    study, store = Study.of(**fields), Store(runs)
    here, known = describe(pick_device(study.device)), read_measurements(store)
    found = {}
    for name, task in study.tasks.items():
        key = measurement_key(task.model_dump(mode="json"), here["device"], study.threads)
        old = known.get(key)
        complete = old is not None and "delayed_briefly" in old.loops
        if complete and old.environment["processor"] == here["processor"]:
            found[name] = old
            continue
        task.prepare()
        settings = {"device": study.device, "threads": study.threads, "blocks": blocks}
        # Half of its batches are the mean of what acting costs.
        found[name] = measure(task, first_batch=study.max_updates // 2, **settings)
        write_measurement(store, found[name])
    return found
