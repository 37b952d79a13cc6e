"""The results in short, as Markdown beside the figures: what the README shows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.analysis.declaration import LEAST_DOSE
from repeatlab.analysis.frames import LOWER_IS_BETTER
from repeatlab.analysis.statistics import ALPHA
from repeatlab.analysis.updates_saved import least_p
from repeatlab.analysis.verdicts import BETTER, EQUIVALENT, NOT_TESTED, UNDECIDED, WORSE
from repeatlab.report.paper.gathering import NO_PLAN, Gathered
from repeatlab.report.paper.wording import bound, dose_words, percent, rate_words

NAME = "results.md"
# Of all arms the ones that a first look needs; `tables/final.csv` of the paper has all.
ARMS = (
    "standard",
    "cosine",
    "importance",
    "fixed2",
    "random",
    "threshold",
    "linear",
    "linear_t",
    "quantile",
    "until",
)
NOTHING = "-"


def write_results(gathered: Gathered, directory: str | Path) -> Path:
    """Write results.md into a directory, and return its path.

    Args:
        gathered: What the runs say.
        directory: Where; made if need be.
    """
    path = Path(directory) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results(gathered), encoding="utf-8")
    return path


def results(gathered: Gathered) -> str:
    """Return the final metric of each task and method, and the verdicts, as Markdown."""
    banner, final = gathered.banner, gathered.tables["final"]
    shown = [method for method in ARMS if method in set(final["method"])]
    rows = [
        [task, _metric(group["metric"].iloc[0]), *(_cell(group, method) for method in shown)]
        for task, group in final.groupby("task", sort=False)
    ]
    parts = [
        f"{_setting(banner)} Validation metric after the last update, at equal updates: mean and "
        "95 % interval (Student) over seeds.",
        _table(["task", "metric", *(f"`{method}`" for method in shown)], rows),
        *_judged(gathered),
    ]
    return "\n\n".join(parts) + "\n"


def _judged(gathered: Gathered) -> list[str]:
    """Return the verdicts: what they follow, with dose and rate, side by side, in words."""
    verdicts, rules = gathered.verdicts, gathered.rules
    if not verdicts:
        return [f"No verdicts: {NO_PLAN}."]
    changes = [f"{one['fields']} ({one['reason']})" for one in rules["changes"]]
    changed = f" Amended since: {'; '.join(changes)}." if changes else " Nothing was amended."
    follows = (
        f"Verdicts follow the plan `{rules['plan']}` (digest `{rules['digest']}`), which was "
        f"registered before its first run: n = {rules['seeds']} seeds, margin "
        f"{percent(rules['margin'])} of updates saved, every arm at its own learning rate, tuned "
        f"with equal effort.{changed} {rules['decides']}"
    )
    unmade = [task for task in rules["tasks"] if task not in set(gathered.tables["arms"]["task"])]
    if unmade:
        follows += f" Of its tasks these are not run yet: {', '.join(unmade)}."
    beside = list(verdicts[0]["views"])
    rows, sides = [], []
    for one in verdicts:
        name, arms = f"{one['hypothesis']}: {one['claim']}", one["arms"]
        plan = [percent(one["margin"]), one["seeds"], f"`{one['digest']}`"]
        rows.append([name, one["verdict"], dose_words(arms), rate_words(arms), *plan])
        sides.append([one["hypothesis"], *one["views"].values()])
    dose = "visits a batch (mean N)"
    rate = "own rate (of the task's, over tasks)"
    return [
        follows,
        _table(["hypothesis", "verdict", dose, rate, "margin", "n", "digest"], rows),
        "The same at own rates on the test split, which no rate was chosen on, and at the rate "
        "that all arms share:",
        _table(["", *beside], sides),
        "In words:",
        "\n".join(f"- **{one['hypothesis']}** {one['claim']} {one['told']}" for one in verdicts),
        *_arms(gathered.tables["arms"]),
    ]


def _arms(arms: pd.DataFrame) -> list[str]:
    """Return what each arm did at its own rate: task by task in words, and with its numbers."""
    if arms.empty:
        return []
    said = [f"- **{task}** {_told(of_task)}" for task, of_task in arms.groupby("task", sort=False)]
    numbers = [
        [
            row.task,
            f"`{row.arm}`",
            f"{row.rate:g}",
            f"{row.mean_n:.2f}",
            f"{_estimate(row.saved)} [{_limits(row.low, row.high)}]",
            f"{row.p_adjusted:.2g}",
            str(row.seeds),
            str(row.diverged),
            row.state,
        ]
        for row in arms.sort_values("task", kind="stable").itertuples()
    ]
    heads = ["task", "arm", "own rate", "visits a batch", "updates saved [95 %]", "p (Holm)", "n"]
    return [
        "At equal updates, against standard training, over all arms (controls too). p is Holm's "
        f'over the {len(arms)} comparisons; an interval is of one comparison, and "anything" is '
        "what the budgets that were tried leave open. Better and worse: p below 0.05. Equivalent: "
        "the 90 % interval lies within the margin. Not tested: an arm that is to repeat, or "
        f"repeats, fewer than {LEAST_DOSE} visits a batch on average. Undecided: the rest."
        f"{_blind(arms)}",
        "\n".join(said),
        _table([*heads, "diverged", "is"], numbers),
    ]


def _blind(arms: pd.DataFrame) -> str:
    """Return which tasks have too few seeds for any of so many comparisons to be decided."""
    least = arms.groupby("task", sort=False)["seeds"].max().map(least_p) * len(arms)
    least = least.clip(upper=1)[least >= ALPHA]
    said = [
        f" On {', '.join(tasks)} it cannot fall below {p:.2g}, whatever the runs show: there an "
        "arm can be equivalent or undecided, and no more."
        for p, tasks in least.index.groupby(least).items()
    ]
    return "".join(said)


def _estimate(saved: float) -> str:
    if saved == 1:
        return "better than every budget"
    return percent(saved) if isfinite(saved) else "worse than every budget"


def _limits(low: float, high: float) -> str:
    if not isfinite(low) and high == 1:
        return "anything"
    return f"{percent(bound(low))}, {percent(bound(high))}"


def _told(of_task: pd.DataFrame) -> str:
    """Return who gained and lost on a task: "(30 seeds): better: none; worse: `fixed2`; ..."."""
    parts = []
    for state in (BETTER, WORSE, EQUIVALENT, NOT_TESTED):
        names = ", ".join(f"`{arm}`" for arm in of_task["arm"][of_task["state"] == state])
        parts.append(f"{state}: {names or 'none'}")
    left = (of_task["state"] == UNDECIDED).sum()
    return f"({of_task['seeds'].max()} seeds): {'; '.join(parts)}; undecided: {left}."


def _setting(banner: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{banner[c]} {c}" for c in ("complete", "diverged", "missing"))
    machines = "; ".join(banner["hardware"]) or "no run"
    absent = f" No study of {', '.join(banner['absent'])}." if banner["absent"] else ""
    return (
        f"Profile {banner['profile']}: {banner['updates']} updates, {banner['seeds']} seeds, "
        f"{banner['planned']} runs planned ({counts}), {banner['core_hours']:.1f} core hours of "
        f"training with tuning and all budgets; {machines}; "
        f"made by commit {', '.join(banner['run_commits']) or 'none'}.{absent}"
    )


def _metric(name: str) -> str:
    return f"{name.replace('_', ' ')} ({'less' if name in LOWER_IS_BETTER else 'more'} is better)"


def _cell(group: pd.DataFrame, method: str) -> str:
    """Return mean and interval of a method's runs, and what is not in them."""
    rows = group[group["method"] == method]
    if not len(rows):
        return NOTHING
    row = rows.iloc[0]
    lacking = [f"{row[what]} {what}" for what in ("missing", "diverged") if row[what]]
    said = _digits(row["mean"], row["mean"])
    if isfinite(row["low"]):
        low, high = (_digits(row[limit], row["mean"]) for limit in ("low", "high"))
        said += f" [{low}, {high}]"
    return " ".join([said, *(f"({what})" for what in lacking)])


def _digits(value: float, scale: float) -> str:
    """Return a number with three decimals, or one where the scale is of hundreds and tens."""
    if not isfinite(value):
        return NOTHING
    return f"{value:.3f}" if abs(scale) < 10 else f"{value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
