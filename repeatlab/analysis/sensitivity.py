"""What a setting changes: the outcome of runs over learning rate, t and so on. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.frames import RUN_KEYS, Records, mean_and_limits
from repeatlab.store.records import Run

SETTINGS = {
    "mapping": "method.mapping.name",
    "t": "method.mapping.t",
    "most": "method.mapping.max_repeats",
    "lr": "task.lr",
    "batch_size": "task.batch_size",
    "label_noise": "task.label_noise",
}
OVER = ["method", "x", "n", "missing", "diverged", "mean", "low", "high", "repeats"]


def outcomes(records: Records, metric: str) -> pd.DataFrame:
    """Return one row per planned run: how it ended, and under which settings.

    Args:
        records: The runs.
        metric: Of the last evaluation, on the validation split.

    Returns:
        Columns task, method, seed, status, one for each of `SETTINGS`, value (NaN unless complete)
        and repeats (updates a batch). A run that is missing has the settings of other seeds of its
        task and method; NaN if there are none.
    """
    rows = []
    for row in records.runs.to_dict("records"):
        config, made = Run(Path(row["path"])).config, row.get("updates", np.nan)
        rows.append(
            {key: row[key] for key in [*RUN_KEYS, "status"]}
            | {name: _at(config, path) for name, path in SETTINGS.items()}
            | {
                "value": row[f"validation.{metric}"] if row["status"] == "complete" else np.nan,
                "repeats": made / row["fresh_batches"] if made and made == made else np.nan,
            }
        )
    frame = pd.DataFrame(rows)
    for name in SETTINGS:
        known = frame.groupby(["task", "method"])[name].transform("first")
        frame[name] = frame[name].where(frame[name].notna(), known)
    return frame


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return np.nan if value is None else value


def arms(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `outcomes` with what its arms are variants of.

    Args:
        frame: With the settings `mapping`, `t` and `most` (of a mapping that has them).

    Returns:
        The frame with `family` (the mapping's name where it has a t, else the method's) and `said`
        (its t, and its most repeats where they are not the usual ones).
    """
    has_t, usual = frame["t"].notna(), frame["most"].mode()
    said = frame["t"].map("t = {:g}".format, na_action="ignore").fillna("")
    other = frame["most"].notna() & ~frame["most"].isin(usual)
    said = said.where(~other, said + frame["most"].map(", N ≤ {:g}".format, na_action="ignore"))
    return frame.assign(family=frame["mapping"].where(has_t, frame["method"]), said=said)


def over(frame: pd.DataFrame, x: str) -> pd.DataFrame:
    """Return one row per method and value of the setting `x`, in rising order.

    Args:
        frame: What `outcomes` returns. Rows whose `x` is NaN are left out: such a method does not
            have the setting.
        x: One of its settings.

    Returns:
        Columns method, x, n (complete runs), missing, diverged, mean with low and high (95 %
        t-limits over complete runs) and repeats (mean updates a batch).
    """
    rows = []
    for (method, value), group in frame.dropna(subset=x).groupby(["method", x], sort=False):
        ended = group.dropna(subset="value")
        diverged = int((group["status"] == "diverged").sum())
        counts = {"n": len(ended), "diverged": diverged}
        counts["missing"] = len(group) - len(ended) - diverged
        limits = mean_and_limits(ended["value"].to_numpy())
        repeats = ended["repeats"].mean()
        rows.append({"method": method, "x": value, "repeats": repeats} | counts | limits)
    ordered = pd.DataFrame(rows, columns=OVER)
    order = {method: place for place, method in enumerate(ordered["method"].unique())}
    return ordered.sort_values(
        ["method", "x"], key=lambda c: c.map(order) if c.name == "method" else c
    ).reset_index(drop=True)


# Study -> the setting that it varies, and what its axis is called.
VARIED = {
    "noise": ("label_noise", "share of wrong labels"),
    "rates": ("lr", "learning rate"),
    "batches": ("batch_size", "batch size"),
}


def panels(frames: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """Return what `figures.sensitivity.over_settings` draws of some studies.

    Args:
        frames: "mappings" or a key of `VARIED` -> what `outcomes` returns of that study. The
            first gives two panels: over t, with the `most` that occurs most often, and over `most`,
            with the t for which it varies most.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, frame in frames.items():
        if name == "mappings":
            varied = arms(frame).assign(method=lambda rows: rows["family"])
            usual = varied["most"].mode()
            over_t = varied[varied["most"].isna() | varied["most"].isin(usual[:1])]
            found["t"] = _panel(over_t, "t", "t (unit of the loss)")
            spread = varied.groupby("t")["most"].nunique()
            if len(spread) and spread.max() > 1:
                at = spread.idxmax()
                rows = varied[varied["t"] == at]
                found["most repeats"] = _panel(rows, "most", f"most repeats, t = {at:g}")
        else:
            x, xlabel = VARIED[name]
            found[xlabel] = _panel(frame, x, xlabel)
    return found


def _panel(frame: pd.DataFrame, x: str, xlabel: str) -> dict[str, Any]:
    return {"summary": over(frame, x), "xlabel": xlabel}


def conditions(table: pd.DataFrame, frame: pd.DataFrame, study: str) -> pd.DataFrame:
    """Return the rows of `comparison.comparison_table` with the condition's value `x`, in order.

    Args:
        table: Its tasks are conditions, such as one for each batch size.
        frame: What `outcomes` returns of the same runs.
        study: The key of `VARIED` that says by which setting the conditions differ.
    """
    x = VARIED[study][0]
    values = frame.dropna(subset=x).groupby("task")[x].first()
    return table.assign(x=table["task"].map(values), setting=VARIED[study][1])
