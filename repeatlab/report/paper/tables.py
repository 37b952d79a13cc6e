"""The paper's tables, from records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.analysis.comparison import TABLE, comparison_table, over_tasks
from repeatlab.analysis.frames import Records, final_table, target_summary, to_target
from repeatlab.analysis.paired_differences import Endpoint, pairs
from repeatlab.analysis.planned_comparisons import Evidence, Plan
from repeatlab.analysis.viewpoints import Views
from repeatlab.store.records import Run, Store

# Equal what: the axes of the efficiency table.
EQUAL = ("update", "cost", "fresh_batches", "environment_steps", "seconds")
# What a task without a data set learns from.
SIMULATORS = {"reinforcement": "CartPole-v1"}
# fmt: off
STUDIES = ["task", "study", "data", "model", "metric", "target", "updates", "seeds", "planned",
           "complete", "diverged", "missing"]
FINAL = ["task", "method", "metric", "runs", "missing", "diverged", "mean", "low", "high",
         "mean_repeats", "fresh_batches", "seconds"]
TARGETS = ["task", "method", "metric", "target", "reached", "runs", "update", "fresh_batches",
           "seconds"]
# fmt: on


def every_table(
    viewed: Views,
    endpoints: Mapping[str, Endpoint],
    evidence: Evidence,
    plan: Plan,
    *,
    runs: Path,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Return the tables of the paper by name; a table without rows keeps its columns."""
    cost, arms, variants = evidence.cost, list(plan.arms), list(plan.variants)

    def compared(frame: pd.DataFrame) -> pd.DataFrame:
        # An empty frame has no family to adjust in.
        if not len(frame):
            return pd.DataFrame(columns=TABLE)
        return comparison_table(frame, seed=seed)

    by_axis = _pairs_by_axis(viewed, endpoints, plan)
    return {
        "studies": _studies(viewed),
        "settings": _settings(viewed),
        "methods": _methods(viewed, runs),
        "final": _final(viewed),
        "targets": _targets(viewed),
        "convergence": compared(evidence.speed),
        "efficiency": _each_axis(by_axis, lambda frame: over_tasks(frame, seed=seed)),
        "efficiency_by_task": _each_axis(by_axis, compared),
        "hardness": compared(evidence.hardness),
        "mechanism": compared(evidence.controls),
        "adaptability": over_tasks(cost[cost["method"].isin(arms)], seed=seed),
        "sensitivity": compared(cost[cost["method"].isin(variants)]),
        "variants": compared(evidence.variants),
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


def _studies(viewed: Views) -> pd.DataFrame:
    """Return what was planned and what became of it; a study that is missing has no run."""
    configs, rows = configurations(viewed), []
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
    return _together(frames, FINAL)


def _targets(viewed: Views) -> pd.DataFrame:
    """Return who reached the target and when, of the tasks that have one."""
    frames = []
    for task, view in viewed.with_target.items():
        evals = _of(viewed, task).evals
        if len(evals):
            times = to_target(evals, view["metric"], view["target"])
            named = target_summary(times).assign(metric=view["metric"], target=view["target"])
            frames.append(named.reindex(columns=TARGETS))
    return _together(frames, TARGETS)


def _pairs_by_axis(
    viewed: Views, endpoints: Mapping[str, Endpoint], plan: Plan
) -> dict[str, pd.DataFrame]:
    """Return the pairs of the arms at equal updates, cost, fresh data, seconds, and so on."""
    records, methods = viewed.records, list(plan.arms)
    found = {}
    for axis in EQUAL:
        tasks = endpoints
        if axis == "environment_steps":  # only simulators count them
            tasks = {t: e for t, e in endpoints.items() if _counted(records.done, t, axis)}
        if tasks:
            found[axis] = pairs(records, tasks, axis=axis, against=plan.against, methods=methods)
    return found


def _each_axis(
    frames: Mapping[str, pd.DataFrame], table: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """Return the table of each frame, one below the other, with what was equal in front."""
    tables = [table(frame).assign(equal=axis) for axis, frame in frames.items()]
    return pd.concat([t[["equal", *t.columns.drop("equal")]] for t in tables], ignore_index=True)


def _counted(runs: pd.DataFrame, task: str, axis: str) -> bool:
    return axis in runs and bool((runs.loc[runs["task"] == task, axis] > 0).any())


def _together(frames: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    filled = [frame for frame in frames if len(frame)]
    if not filled:
        return pd.DataFrame(columns=columns)
    return pd.concat(filled, ignore_index=True).reindex(columns=columns)
