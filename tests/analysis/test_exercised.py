"""A run whose task's own part never came into play is named; others are not."""

from __future__ import annotations

import pandas as pd
import pytest

from repeatlab.analysis.exercised import exercised
from repeatlab.analysis.frames import Records


class Written(Records):
    """Records whose evaluations are given."""

    evals = None


def records(metric: str, arms: dict[str, list[list[float]]], status: str = "complete") -> Records:
    """Return runs of one task: by arm, for every seed the metric at updates 0, 10, ..."""
    rows = [
        {
            "task": "digits",
            "method": arm,
            "seed": seed,
            "status": status,
            "update": 10 * place,
            "split": "validation",
            "metric": metric,
            "value": value,
        }
        for arm, seeds in arms.items()
        for seed, values in enumerate(seeds)
        for place, value in enumerate(values)
    ]
    given = Written(pd.DataFrame())
    # In any order: the last update is meant, not the last row.
    given.__dict__["evals"] = pd.DataFrame(rows).sample(frac=1, random_state=0)
    return given


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        ("kl", [0.05, 1.2], [2.0, 0.3]),
        ("mask_rate", [0.0, 0.31], [0.9, 0.29]),
        # What an untrained encoder reaches is no achievement.
        ("knn_accuracy", [0.6, 0.7], [0.92, 0.93]),
    ],
)
def test_an_arm_that_did_not_is_named_with_its_value(metric, good, bad):
    line = exercised(records(metric, {"standard": [good, good], "linear": [bad, bad]}))
    assert line.startswith("digits: ")
    assert line.endswith(f"not in 1 of 2 arms: linear {bad[-1]:.3g}")
    assert exercised(records(metric, {"standard": [good]})).endswith("in every arm")


def test_the_mean_over_seeds_counts():
    arms = {"standard": [[0.0, 0.2], [0.0, 2.0]], "linear": [[0.0, 0.2], [0.0, 1.6]]}
    assert exercised(records("kl", arms)).endswith("not in 1 of 2 arms: linear 0.9")


def test_a_value_that_is_no_number_is_none_that_meets_it():
    assert "1 of 1 arms: standard" in exercised(records("kl", {"standard": [[1.5, float("nan")]]}))


def test_other_tasks_and_diverged_runs_have_no_line():
    assert exercised(records("accuracy", {"standard": [[0.1, 0.9]]})) == ""
    assert exercised(records("kl", {"standard": [[0.0, 0.1]]}, status="diverged")) == ""
