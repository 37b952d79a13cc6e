"""Whether the laboratory finds what is there, and nothing where nothing is. Never imports torch.

Its own controls are one plan whose answers are known beforehand (`params/quick/controls.yaml`), on
the task `single_index`, whose docstring says why:

- task `updates`: T updates of `standard`, `fixed3` and `once` (one visit a batch, by a mapping);
- task `third`: the same target and T / 3 updates of `standard`, the fresh data that `fixed3` uses;
- task `planted`: batches of which some teach and some do not, told apart by the loss.

Each is judged as any other comparison is: by updates saved, its interval and the plan's margin.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from repeatlab.analysis.evidence import TaskValues
from repeatlab.analysis.frames import Records
from repeatlab.analysis.plans import PlanRecords
from repeatlab.analysis.updates_saved import saved
from repeatlab.analysis.verdicts import BETTER, EQUIVALENT, UNDECIDED, percent_saved, state_of

FINDS = "This laboratory finds what is there, and nothing where nothing is."
EQUAL = "equal"  # every pair, to rounding: of a continuous metric it is the same training
NOTHING = (EQUIVALENT, UNDECIDED)
# What is compared: in words, task, stage, arm, the other one, what it must be.
CONTROLS = (
    ("repetition at one low rate for all", "updates", "shared", "fixed3", "standard", (BETTER,)),
    ("repetition at equal fresh data, own rates", "third", "own", "fixed3", "standard", (BETTER,)),
    ("hardness against any batch", "planted", "own", "hard", "windowed", (BETTER,)),
    ("hardness against easiness", "planted", "own", "hard", "anti_hard", (BETTER,)),
    ("repetition at own rates, equal updates", "updates", "own", "fixed3", "standard", NOTHING),
    ("one visit a batch: equal to the bit", "updates", "own", "once", "standard", (EQUAL,)),
)


def controls_table(plan: PlanRecords) -> pd.DataFrame:
    """Return one row per control: what was compared, what it must be, what it is.

    Columns: control, must be, is, saved (updates saved in per cent, 95 %), p, equal_pairs, reached
    (seeds at the target, arm : other), passed.
    """
    return pd.DataFrame([_row(plan, *control) for control in CONTROLS])


def verdict(table: pd.DataFrame) -> str:
    """Return in one line whether every control came out as it must, or which did not."""
    failed = table[~table["passed"]]
    told = (
        f"{row['control']} is {row['is']}, not {row['must be']}" for _, row in failed.iterrows()
    )
    return f"FAIL: {'; '.join(told)}" if len(failed) else FINDS


def _row(
    plan: PlanRecords,
    control: str,
    task: str,
    stage: str,
    arm: str,
    other: str,
    expected: Iterable[str],
) -> dict[str, object]:
    records, declared = plan.stages[stage], plan.declared
    if task == "third":
        records = _as_task(records, arm, "updates", task)
    values = TaskValues(declared, task, records, plan.budgets, "validation")
    paired = values.paired(arm, other)
    row = {"control": control, "must be": " or ".join(expected), "is": "missing", "passed": False}
    if paired is None or len(paired.seeds) < declared.seeds_on(task):
        return row
    effect, target = saved({task: paired}), declared.goals[task].target
    found = EQUAL if effect.equal == 1 else state_of(effect, effect.p, declared.margin)
    return row | {
        "is": found,
        "saved": percent_saved(effect),
        "p": effect.p,
        "equal_pairs": effect.equal,
        "reached": f"{(paired.arm >= target).sum()} : {(paired.other >= target).sum()}",
        "passed": found in expected,
    }


def _as_task(records: Records, arm: str, task: str, other: str) -> Records:
    """Return the runs, those of an arm on one task as if they had been made on the other."""
    runs = records.runs
    ours = runs["method"] == arm
    moved = runs[ours & (runs["task"] == task)].assign(task=other)
    others = runs[~ours & (runs["task"] == other)]
    return Records(pd.concat([others, moved], ignore_index=True))
