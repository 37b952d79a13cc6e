"""How a benchmark keeps what it found: rows of one form, in a table that outlives the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from repeatlab.analysis.frames import mean_interval
from repeatlab.core.environment import processor
from repeatlab.store.records import Run


def record(path: Path, rows: list[dict]) -> None:
    """Put rows into the table at `path`, in the place of those they are new for."""
    keys = ["task", "data", "scale", "arm", "metric"]
    path.parent.mkdir(exist_ok=True)
    table = pd.DataFrame(rows)
    if path.exists():
        table = pd.concat([pd.read_csv(path), table]).drop_duplicates(keys, keep="last")
    table.to_csv(path, index=False)


def row(
    values: Sequence[float], *, updates: int, seconds: float, digits: int = 3, **labels: str
) -> dict:
    """Return the row of an arm's runs: the mean of their values with its 95 % t-limits.

    `labels` are its task, data, scale, arm and metric; `seconds` are a run's.
    """
    average, low, high = (round(float(found), digits) for found in mean_interval(values))
    return {
        **labels,
        "n": len(values),
        "mean": average,
        "low": low,
        "high": high,
        "updates": updates,
        "seconds per run": round(seconds, 1),
        "processor": processor(),
    }


def counted(found: dict, metric: str, value: float) -> dict:
    """Return the row of one number that is no mean, of the runs that `found` is a row of."""
    return found | {"metric": metric, "mean": value, "low": None, "high": None}


def validation(run: Run) -> pd.DataFrame:
    """Return what a run's evaluations found: a row for each update, a column for each metric.

    Without the test split's, which is evaluated at the end.
    """
    evals = run.evals[run.evals["split"] == "validation"]
    # Not `pivot_table`, which takes the mean where two values stand in one place.
    return evals.pivot(index="update", columns="metric", values="value")  # noqa: PD010
