"""Whether the laboratory finds what is there, and nothing where nothing is. Never imports torch.

Its own controls are one plan whose answers are known beforehand (`params/quick/controls.yaml`), on
the task `single_index`, whose docstring says why they are:

- task `updates`: T updates of `standard`, `fixed8` and `once` (one visit a batch, by a mapping);
- task `fresh`: the same target and T / 8 updates of `standard`: the fresh data that `fixed8` uses;
- task `planted`: batches of which some teach and some do not, told apart by the loss.

What is compared is whether the target was found: of every run, how far `explained` has come from 0
to the plan's target when it ends. Above it runs differ in how well they fit what both have found,
and there eight visits a batch do end a little lower. Nor is there nothing all the way: `fixed8` at
its own rate finds the target in fewer updates. Nothing must be left at T, where both have found it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from repeatlab.analysis.evidence import TaskValues
from repeatlab.analysis.frames import Records
from repeatlab.analysis.plans import PlanRecords
from repeatlab.analysis.statistics import paired_effect

FINDS = "This laboratory finds what is there, and nothing where nothing is."
FOUND, NOT_FOUND, REVERSED = "found", "not found", "reversed"
EQUAL = "equal"  # every pair, to the bit: it is the same training
MISSING, VACUOUS = "missing", "not found by either"
SAID = {1: FOUND, 0: NOT_FOUND, -1: REVERSED}
# What is compared: in words, task, stage, arm, the other one, what it must be.
CONTROLS = (
    ("repetition, one low rate for all", "updates", "shared", "fixed8", "standard", FOUND),
    ("repetition, equal fresh data, own rates", "fresh", "own", "fixed8", "standard", FOUND),
    ("hardness against any batch", "planted", "own", "hard", "windowed", FOUND),
    ("hardness against easiness", "planted", "own", "hard", "anti_hard", FOUND),
    ("repetition, equal updates, own rates", "updates", "own", "fixed8", "standard", NOT_FOUND),
    ("one visit a batch, by a mapping", "updates", "own", "once", "standard", EQUAL),
)
TABLE = ["control", "must be", "is", "difference", "low", "high", "p", "reached", "passed"]


def controls_table(plan: PlanRecords) -> pd.DataFrame:
    """Return one row per control: what it must be, what it is, and what that rests on.

    Columns: control, must be, is ("found" or "reversed" with a sign-flip p below 0.05, "not found",
    "equal" where every pair is to the bit, "missing" where a seed is, "not found by either" where
    nothing may differ at the target and most runs of an arm are not there), difference (arm -
    other, of the way to the target, mean over pairs) with its 95 % limits low and high, p, reached
    (seeds at the target, arm : other), passed.
    """
    return pd.DataFrame([_row(plan, *control) for control in CONTROLS], columns=TABLE)


def verdict(table: pd.DataFrame) -> str:
    """Return in one line that every control came out as it must, or which did not."""
    told = (
        f"{row['control']}: {row['is']}, must be {row['must be']}"
        for _, row in table[~table["passed"]].iterrows()
    )
    failed = "; ".join(told)
    return f"FAIL: {failed}" if failed else FINDS


def _row(
    plan: PlanRecords, control: str, task: str, stage: str, arm: str, other: str, expected: str
) -> dict[str, object]:
    records, declared = plan.stages[stage], plan.declared
    if task == "fresh":
        records = _as_task(records, arm, "updates", task)
    paired = TaskValues(declared, task, records, plan.budgets, "validation").paired(arm, other)
    row = {"control": control, "must be": expected, "is": MISSING, "passed": False}
    if paired is None or len(paired.seeds) < declared.seeds_on(task):
        return row
    target = declared.goals[task].target
    ours, theirs = (np.clip(values / target, 0, 1) for values in (paired.arm, paired.other))
    effect = paired_effect(ours - theirs)
    reached = [int((values == 1).sum()) for values in (ours, theirs)]
    found = EQUAL if (paired.arm == paired.other).all() else SAID[effect.direction(effect.p)]
    if found == expected == NOT_FOUND and min(reached) <= len(ours) / 2:
        found = VACUOUS
    return row | {
        "is": found,
        "difference": effect.estimate,
        "low": effect.interval.low,
        "high": effect.interval.high,
        "p": effect.p,
        "reached": "{} : {}".format(*reached),
        "passed": found == expected,
    }


def _as_task(records: Records, arm: str, task: str, other: str) -> Records:
    """Return the runs, those of an arm on one task as if they had been made on the other."""
    runs = records.runs
    ours = runs["method"] == arm
    moved = runs[ours & (runs["task"] == task)].assign(task=other)
    return Records(pd.concat([runs[~ours & (runs["task"] == other)], moved], ignore_index=True))
