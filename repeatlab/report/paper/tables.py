"""The paper's tables, from records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.analysis.frames import Records, final_table, target_summary, to_target
from repeatlab.analysis.plan_tables import plan_tables
from repeatlab.analysis.plans import PlanRecords
from repeatlab.analysis.viewpoints import Views, stack
from repeatlab.store.records import Run, Store

# What a task without a data set learns from.
SIMULATORS = dict.fromkeys(("reinforcement", "ppo"), "CartPole-v1")
# fmt: off
STUDIES = ["task", "study", "data", "model", "metric", "target", "updates", "seeds", "planned",
           "complete", "diverged", "missing", "k", "k_origin"]
FINAL = ["task", "method", "metric", "runs", "missing", "diverged", "mean", "low", "high",
         "mean_repeats", "fresh_batches", "seconds"]
TARGETS = ["task", "method", "metric", "target", "reached", "runs", "update", "fresh_batches",
           "seconds"]
# fmt: on


def every_table(
    viewed: Views, plan: PlanRecords | None, *, runs: Path, k: float | None = None
) -> dict[str, pd.DataFrame]:
    """Return the tables of the paper by name; a table without rows keeps its columns."""
    return {
        "studies": _studies(viewed, k),
        "settings": _settings(viewed),
        "methods": _methods(viewed, runs),
        "final": _final(viewed),
        "targets": _targets(viewed),
        **plan_tables(plan),
    }


def _of(viewed: Views, task: str) -> Records:
    runs = viewed.records.runs
    return Records(runs[runs["task"] == task])


def configurations(viewed: Views, against: str = "standard") -> dict[str, dict[str, Any]]:
    """Return the stored configuration of one run of each task, of the standard arm if there is."""
    found = {}
    for task in viewed.tasks:
        runs = _of(viewed, task).runs
        runs = runs.sort_values("method", key=lambda names: names != against, kind="stable")
        configs = (Run(Path(path)).config for path in runs["path"])
        found[task] = next((config for config in configs if config), {})
    return found


def _studies(viewed: Views, k: float | None) -> pd.DataFrame:
    """Return what was planned and what became of it; a study that is missing has no run."""
    configs, rows = configurations(viewed), []
    costs = viewed.k_table(k).set_index("task")
    for task, view in viewed.tasks.items():
        runs, of_task = _of(viewed, task).runs, configs[task].get("task", {})
        status = runs["status"].value_counts()
        counts = {name: int(status.get(name, 0)) for name in ("complete", "diverged")}
        rows.append(
            {
                "task": task,
                "study": view["study"],
                "data": of_task.get("dataset", SIMULATORS.get(of_task.get("name"), "")),
                "model": of_task.get("model", ""),
                "metric": view["metric"],
                "target": view["target"],
                "updates": int(runs["max_updates"].iloc[0]) if len(runs) else pd.NA,
                "seeds": runs["seed"].nunique(),
                "planned": len(runs),
                **counts,
                "missing": len(runs) - sum(counts.values()),
                "k": costs.loc[task, "k"],
                "k_origin": costs.loc[task, "origin"],
            }
        )
    return pd.DataFrame(rows, columns=STUDIES).astype({"updates": "Int64"})


def _settings(viewed: Views) -> pd.DataFrame:
    """Return the stored settings of each task's runs, but for what differs between them."""
    columns = {}
    for task, config in configurations(viewed).items():
        shared = {k: v for k, v in config.items() if k not in ("method", "seed", "calibration")}
        columns[task] = {name: _said(value) for name, value in _flat(shared)}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [{"setting": n} | {t: c.get(n, "") for t, c in columns.items()} for n in names]
    return pd.DataFrame(rows, columns=["setting", *columns])


def _methods(viewed: Views, runs: Path) -> pd.DataFrame:
    """Return every method with its settings and the tasks that have it so."""
    seen: dict[tuple[str, str], list[str]] = {}
    store = Store(runs)
    for view in viewed.tasks.values():
        if view["study"] in viewed.absent:
            continue
        for method, settings in store.read_study(view["study"])["study"]["methods"].items():
            said = "; ".join(f"{name} = {_said(value)}" for name, value in _flat(settings))
            tasks = seen.setdefault((method, said), [])
            tasks += [view["name"]] * (view["name"] not in tasks)
    rows = [{"method": m, "settings": s, "tasks": ", ".join(t)} for (m, s), t in seen.items()]
    return pd.DataFrame(rows, columns=["method", "settings", "tasks"])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return settings as (dotted name, value), without those that are not set."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append((f"{prefix}{name}".removesuffix(".name"), value))
    return rows


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _final(viewed: Views) -> pd.DataFrame:
    """Return how the runs of each task and method ended, on the validation split."""
    frames = []
    for task, view in viewed.tasks.items():
        records, metric = _of(viewed, task), view["metric"]
        if not len(records.runs):
            continue
        table = final_table(records, metric).rename(
            columns={metric: "mean", "mean N": "mean_repeats", "fresh batches": "fresh_batches"}
        )
        frames.append(table.assign(metric=metric).reindex(columns=FINAL))
    return stack([*frames, pd.DataFrame(columns=FINAL)])


def _targets(viewed: Views) -> pd.DataFrame:
    """Return who reached the target and when, of the tasks that have one."""
    frames = []
    for task, view in viewed.with_target.items():
        evals = _of(viewed, task).evals
        if len(evals):
            times = to_target(evals, view["metric"], view["target"])
            named = target_summary(times).assign(metric=view["metric"], target=view["target"])
            frames.append(named.reindex(columns=TARGETS))
    return stack([*frames, pd.DataFrame(columns=TARGETS)])
