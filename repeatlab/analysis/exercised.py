"""Whether the runs of a study exercised what they are to tell of: a collapsed VAE tells nothing.

A task whose own part never came into play trains all the same, and its tables look like others'.
What is asked of an arm is asked of its mean over seeds, on the validation split, after the last
update. How often an arm repeated is asked elsewhere: its mean N is in every table.
"""

from __future__ import annotations

from typing import NamedTuple

from repeatlab.analysis.frames import Records


class Condition(NamedTuple):
    """What a metric must exceed at the end, which tells that a task's own part was at work.

    Attributes:
        words: The condition, as it is printed.
        least: What it must exceed: this much,
        above_first: more than before the first update, or absolutely.
    """

    words: str
    least: float
    above_first: bool = False


CONDITIONS = {
    "kl": Condition("KL above 1 nat: the code says something of the image", 1.0),
    "mask_rate": Condition("mask rate above 0.3: images without labels take part", 0.3),
    "knn_accuracy": Condition("kNN accuracy above the untrained encoder's by 0.03", 0.03, True),
}


def exercised(records: Records) -> str:
    """Return a line per task and condition: met by every arm, or by which not, with their values.

    Tasks that none of the conditions is about have no line. Diverged runs are left out.
    """
    lines = []
    for metric, condition in CONDITIONS.items():
        rows = records.measured(metric, "validation")
        rows = rows[rows["status"] == "complete"]
        for task, of_task in rows.groupby("task", sort=False):
            values = of_task.groupby(["method", "seed"], sort=False)["value"]
            # Not pandas' own first and last, which pass over what is no number.
            ends = values.agg(first=lambda run: run.iloc[0], last=lambda run: run.iloc[-1])
            means = ends.groupby("method", sort=False).mean()
            margin = means["last"] - means["first"] * condition.above_first
            short = means["last"][~(margin > condition.least)]
            arms = ", ".join(f"{name} {value:.3g}" for name, value in short.items())
            found = f"not in {len(short)} of {len(means)} arms: {arms}" if arms else "in every arm"
            lines.append(f"{task}: {condition.words}: {found}")
    return "\n".join(lines)
