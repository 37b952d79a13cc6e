"""When importance sampling was on: before and after a moment of the run, such as a rate's drop.

Never imports torch.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from repeatlab.analysis.frames import RUN_KEYS, Records, mean_interval
from repeatlab.store.records import Run

PHASES = ("before", "after")


def shares_on(records: Records, *, moment: float) -> pd.DataFrame:
    """Return the share of updates on an importance sample, on both sides of a moment.

    A repeat counts as its batch does.

    Args:
        records: The runs; those without importance sampling are passed over.
        moment: As a share of each run's updates.

    Returns:
        Rows (task, method, phase, on, low, high, tau, seeds): means over seeds with 95 % t-limits,
        and the mean of the switch's tau.
    """
    rows = []
    for run in records.done.to_dict("records"):
        made = Run(Path(run["path"]))
        sampler = made.sampler
        if "presampled" not in sampler:
            continue
        updates = made.updates.merge(sampler, on="fresh_batch")
        late = updates["update"] >= moment * run["updates"]
        for phase, part in zip(PHASES, (updates[~late], updates[late]), strict=True):
            means = {"on": part["presampled"].mean(), "tau": part["tau_average"].mean()}
            rows.append({key: run[key] for key in RUN_KEYS} | {"phase": phase} | means)
    keys, found = ["task", "method", "phase"], []
    frame = pd.DataFrame(rows, columns=[*RUN_KEYS, "phase", "on", "tau"])
    for key, runs in frame.groupby(keys, sort=False):
        on, low, high = map(float, mean_interval(runs["on"].to_numpy(float)))
        found.append([*key, on, low, high, runs["tau"].mean(), len(runs)])
    return pd.DataFrame(found, columns=[*keys, "on", "low", "high", "tau", "seeds"])
