"""The share of updates on importance samples, counted by hand from what a run recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from repeatlab.analysis import importance
from repeatlab.analysis.frames import load
from repeatlab.studies.study import run_study

STUDY = {
    "name": "small",
    "tasks": {"digits": {"name": "supervised", "batch_size": 32, "lr": 0.05}},
    "methods": {
        "standard": {},
        # k is so large that any spread of the scores is enough, once the outputs differ.
        "importance": {
            "sampler": {"name": "importance", "k": 100.0, "ema": 0.0},
            "mapping": {"name": "constant", "repeats": 2},
        },
    },
    "seeds": 2,
    "max_updates": 160,
    "evaluation": {"every": 160, "splits": [], "test": False},
    "device": "cpu",
}


def test_updates_are_counted_on_both_sides_of_the_moment(tmp_path):
    run_study(STUDY, tmp_path, workers=0)
    records = load(tmp_path, "small")
    found = importance.shares_on(records, moment=0.75).set_index("phase")
    assert set(found["method"]) == {"importance"}
    assert found["seeds"].tolist() == [2, 2]
    counted = {"before": [], "after": []}
    for run in records.done[records.done["method"] == "importance"].to_dict("records"):
        made = importance.Run(Path(run["path"]))
        on = dict(zip(made.sampler["fresh_batch"], made.sampler["presampled"], strict=True))
        each = [bool(on[batch]) for batch in made.updates["fresh_batch"]]
        counted["before"].append(sum(each[:120]) / 120)
        counted["after"].append(sum(each[120:]) / 40)
    for phase, shares in counted.items():
        assert found.loc[phase, "on"] == pytest.approx(sum(shares) / 2)
    assert 0 < found["on"].mean() < 1
    assert found["tau"].between(0.5, 10).all()


def test_without_importance_sampling_there_is_nothing(tmp_path):
    run_study(STUDY | {"methods": {"standard": {}}}, tmp_path, workers=0)
    assert importance.shares_on(load(tmp_path, "small"), moment=0.5).empty
