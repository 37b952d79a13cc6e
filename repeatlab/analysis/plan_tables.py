"""The tables of a plan: verdicts side by side, arms, tasks together, one-off charges, tuning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from repeatlab.analysis.declaration import LEAST_DOSE
from repeatlab.analysis.evidence import doses, repeating
from repeatlab.analysis.plans import VIEWS, PlanRecords, arm_over_tasks
from repeatlab.analysis.statistics import holm
from repeatlab.analysis.updates_saved import Saved, saved, share_saved
from repeatlab.analysis.verdicts import NOT_TESTED, state_of

# fmt: off
VERDICTS = ["hypothesis", "claim", *VIEWS]
ARMS = ["task", "arm", "rate", "mean_n", "repeated", "seeds", "diverged", "equal_pairs", "saved",
        "low", "high", "reuse", "reuse_low", "reuse_high", "p", "p_adjusted", "state"]
OVER_TASKS = ["arm", "tasks", "mean_n", "saved", "low", "high", "p", "p_adjusted", "state", "mean",
              "mean_low", "mean_high", "tau", "new_low", "new_high", "note"]
ONE_OFF = ["task", "arm", "calibration", "holdout", "charge", "saved", "runs"]
TUNING = ["task", "arm", "rate", "fields", "trials", "updates", "on_edge"]
TABLES = {"verdicts": VERDICTS, "arms": ARMS, "over_tasks": OVER_TASKS, "one_off": ONE_OFF,
          "tuning": TUNING}
# fmt: on


def verdicts_side_by_side(plan: PlanRecords) -> pd.DataFrame:
    """Return one row per hypothesis: its claim, and its verdict in every view."""
    rows: dict[str, dict[str, str]] = {}
    for view, (_, verdicts) in plan.views.items():
        for one in verdicts:
            row = rows.setdefault(one.hypothesis, {"hypothesis": one.hypothesis})
            row |= {"claim": one.claim, view: one.verdict}
    return pd.DataFrame(list(rows.values()), columns=VERDICTS)


def arms_table(plan: PlanRecords) -> pd.DataFrame:
    """Return one row per arm and task: dose, rate, updates saved and fresh data saved.

    Columns: task, arm, rate (in units of the task's), mean_n, repeated (share of batches visited
    more than once), seeds, diverged (of the arm's runs), equal_pairs, saved, low, high (share of
    updates, 95 %), reuse, reuse_low, reuse_high (E(N): fresh batches that the standard arm needs
    for the arm's metric, over those that the arm used), p, p_adjusted (Holm over the table), state
    by it and the margin; "not tested" where an arm that is to repeat, or repeats, hardly does.
    """
    records, values = plan.stages["own"], plan.values("own", "validation")
    rows = []
    for arm in _arms(plan):
        of_arm = doses(records, arm)
        for task, of_task in values.items():
            paired = of_task.paired(arm, plan.declared.against)
            if paired is None:
                continue
            effect, dose = saved({task: paired}), of_arm[task]
            choice = plan.rates.get(task, {}).get(arm)
            low, high, _ = effect.interval
            reuse = [ratio * dose.mean for ratio in (effect.ratio, low, high)]
            diverged = int(np.isnan([*of_task.arms[arm].values()]).sum())
            # Others that repeat a little are nearly the standard arm as well, unless they diverge.
            hardly = 1 < dose.mean < LEAST_DOSE and not diverged
            asked = arm in plan.declared.repeating
            tested = not hardly and (dose.mean >= LEAST_DOSE or not asked)
            rows.append(
                {
                    "effect": effect,
                    "pooled": [] if tested else None,
                    "task": task,
                    "arm": arm,
                    "rate": choice["rate"] if choice else 1.0,
                    "mean_n": dose.mean,
                    "repeated": dose.repeated,
                    "seeds": effect.seeds,
                    "diverged": diverged,
                    "equal_pairs": effect.equal,
                    **_shares(effect),
                    **dict(zip(["reuse", "reuse_low", "reuse_high"], reuse, strict=True)),
                }
            )
    return _decided(rows, plan.declared.margin, ARMS)


def over_tasks_table(plan: PlanRecords) -> pd.DataFrame:
    """Return one row per arm: its effect on the plan's tasks, and on tasks like them.

    Columns: arm, tasks, mean_n, saved, low, high, p, p_adjusted (Holm over arms) and state on these
    tasks; mean, mean_low, mean_high over tasks taken as drawn from many; tau (standard deviation of
    the log ratio of budgets between tasks); new_low and new_high, which hold a new task's effect in
    95 %; note (on which tasks limits lie beyond the budgets, so that there is no such mean). All
    but p, tau and the counts are shares of updates. An arm that is to repeat is told on the tasks
    on which it does; where there is none, on all, and not tested.
    """
    values, records = plan.values("own", "validation"), plan.stages["own"]
    rows = []
    for arm in _arms(plan):
        pairs = {task: one.paired(arm, plan.declared.against) for task, one in values.items()}
        pairs = {task: paired for task, paired in pairs.items() if paired is not None}
        of_arm = doses(records, arm)
        tested = repeating(pairs, of_arm) if arm in plan.declared.repeating else pairs
        pairs = tested or pairs
        if not pairs:
            continue
        here, alone, among, beyond = arm_over_tasks(pairs)
        random = (among.mean, *among.interval[:2], *among.prediction[:2])
        names = ["mean", "mean_low", "mean_high", "new_low", "new_high"]
        rows.append(
            {
                "effect": here,
                "pooled": alone.values() if tested else None,
                "arm": arm,
                "tasks": here.tasks,
                "mean_n": float(np.mean([of_arm[task].mean for task in pairs])),
                **_shares(here),
                "tau": among.tau,
                **dict(zip(names, (1 - np.exp(-np.array(random))).tolist(), strict=True)),
                "note": "no mean: limits beyond the budgets on " * bool(beyond) + ", ".join(beyond),
            }
        )
    return _decided(rows, plan.declared.margin, OVER_TASKS)


def one_off_table(plan: PlanRecords, arms: pd.DataFrame) -> pd.DataFrame:
    """Return one row per arm and task that pays something once, before its first update.

    Args:
        plan: Its runs at own rates.
        arms: What `arms_table` returns of them.

    Returns:
        Columns task, arm, calibration and holdout (updates, mean over seeds), charge (their sum),
        saved (share of T, as the estimate has it), runs (that pay the charge back, each saving
        the share / (1 - share) of T; infinite where the arm saves nothing).
    """
    done, found = plan.stages["own"].done, arms.set_index(["arm", "task"])["saved"]
    rows = []
    for (arm, task), runs in done.groupby(["method", "task"], sort=False):
        parts = {
            part: float(runs[f"{part}_updates"].mean()) if f"{part}_updates" in runs else 0.0
            for part in ("calibration", "holdout")
        }
        charge, gain = sum(parts.values()), float(found.get((arm, task), np.nan))
        if charge and arm != plan.declared.against:
            # The share is of what the standard arm needs, T / (1 - share).
            each = gain / (1 - gain) * plan.declared.goals[task].updates if gain < 1 else np.inf
            due = charge / each if gain > 0 else np.inf
            rest = {"charge": charge, "saved": gain, "runs": due}
            rows.append({"task": task, "arm": arm} | parts | rest)
    return pd.DataFrame(rows, columns=ONE_OFF)


def tuning_table(plan: PlanRecords) -> pd.DataFrame:
    """Return one row per task and arm: what tuning chose, among how many trials, at what cost.

    Columns: task, arm, rate (in units of the task's), fields (that were chosen with it), trials
    (settings, each with the same seeds; 0 where the arm takes its source's), updates, on_edge
    (whether the best rate is the grid's first or last).
    """
    rows = []
    for task, of_task in plan.rates.items():
        for arm, choice in of_task.items():
            fields = ", ".join(f"{name} = {value}" for name, value in choice["fields"].items())
            rows.append({"task": task, "arm": arm} | choice | {"fields": fields})
    return pd.DataFrame(rows, columns=TUNING)


def plan_tables(plan: PlanRecords | None) -> dict[str, pd.DataFrame]:
    """Return every table of a plan by its name; without a plan they are empty."""
    if plan is None:
        return {name: pd.DataFrame(columns=columns) for name, columns in TABLES.items()}
    arms = arms_table(plan)
    return {
        "verdicts": verdicts_side_by_side(plan),
        "arms": arms,
        "over_tasks": over_tasks_table(plan),
        "one_off": one_off_table(plan, arms),
        "tuning": tuning_table(plan),
    }


def _arms(plan: PlanRecords) -> list[str]:
    methods = plan.stages["own"].runs["method"].unique()
    return [arm for arm in methods if arm != plan.declared.against]


def _shares(effect: Saved) -> dict[str, float]:
    ratios = (effect.ratio, effect.interval.low, effect.interval.high)
    return dict(zip(["saved", "low", "high"], map(share_saved, ratios), strict=True))


def _decided(rows: list[dict[str, Any]], margin: float, columns: list[str]) -> pd.DataFrame:
    """Return the rows with p, p adjusted over all of them, and what that and the margin decide.

    Each has its `effect`, and the effects that are `pooled` in it; None where it is not tested.
    """
    adjusted = holm([row["effect"].p for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        effect, pooled = row["effect"], row["pooled"]
        state = NOT_TESTED if pooled is None else state_of(effect, p, margin, pooled)
        row |= {"p": effect.p, "p_adjusted": float(p), "state": state}
    return pd.DataFrame(rows, columns=columns)
