"""How smoothly does the loss fall? Never imports torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from repeatlab.analysis.frames import Records
from repeatlab.store.records import Run


def roughness(records: Records, *, window: int = 20) -> pd.DataFrame:
    """Return how far the loss goes up and down on its way, for each run.

    Of a task's fresh batches, in the order they came and up to as many as each of its complete runs
    has seen, the losses at the first visit are averaged over blocks of `window`. Roughness is the
    total variation of these means over their range: 1 is a monotone fall, and a scale of the loss
    does not matter. All arms of a seed see the same batches, but for those whose sampler chooses
    them.

    Args:
        records: The runs; they are read one by one.
        window: Fresh batches in a block.

    Returns:
        Rows (task, method, seed, batches, roughness); a diverged run has NaN.
    """
    pieces = []
    for _, group in records.done.groupby("task", sort=False):
        complete = group[group["status"] == "complete"]
        first = {
            run.Index: Run(Path(run.path)).fresh_batches["loss"].to_numpy()
            for run in complete.itertuples()
        }
        shared = min(map(len, first.values()), default=0) // window * window
        found = {
            at: total_variation(losses[:shared].reshape(-1, window).mean(axis=1))
            for at, losses in first.items()
        }
        columns = {"batches": shared, "roughness": group.index.map(found).astype(float)}
        pieces.append(group[["task", "method", "seed"]].assign(**columns))
    columns = ["task", "method", "seed", "batches", "roughness"]
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=columns)


def total_variation(values: np.ndarray) -> float:
    """Return the sum of the steps of `values` (n,) over their range; NaN where that is 0.

    >>> total_variation(np.array([3.0, 1.0, 2.0, 0.0]))
    1.6666666666666667
    """
    values = np.asarray(values, dtype=float)
    span = np.ptp(values) if len(values) > 1 else 0.0
    return float(np.abs(np.diff(values)).sum() / span) if span > 0 else np.nan
