"""The explorer: what it shows is what the store holds, and it starts and stops real training."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from repeatlab.report.explorer import POINTS, Explorer, run_curves
from repeatlab.store.records import Run, Store
from repeatlab.studies.study import Study

NODE = shutil.which("node")
VALUES = {"standard": [0.5, 0.6, 0.7], "linear": [0.8, 0.55, np.nan], "fixed2": [0.4, 0.6, None]}


def write_run(run: Run, store: Store, *, value: float, updates: int = 1200) -> None:
    """Write a run whose accuracy goes straight from 0 to `value`; not finite: it diverged."""
    writer = store.begin(run, {"task": {"name": "made"}}, {})
    numbers = np.arange(updates)
    columns = {"update": numbers, "fresh_batch": numbers // 2, "repeat": numbers % 2}
    columns |= {"repeats": np.full(updates, 2), "loss": 1.0 / (1 + numbers)}
    writer.updates(columns | {"lr": np.full(updates, 0.1), "seconds": numbers / 10})
    ledger = {"updates": updates, "fresh_batches": updates // 2, "seconds": updates / 10}
    for share in (0, 1):
        spent = {name: count * share for name, count in ledger.items()}
        metrics = {"validation": {"accuracy": share * value, "loss": 1.0 - share}}
        writer.evals(updates * share, metrics, spent)
    ended = "complete" if np.isfinite(value) else "diverged"
    final = {"validation.accuracy": value} if np.isfinite(value) else {}
    writer.finish(ended, {"ledger": ledger, "final": final})


@pytest.fixture
def runs(tmp_path) -> Path:
    """A store of a small study and a fuller one: `VALUES` by seed, one not finite, one not made."""
    store = Store(tmp_path / "runs")
    for name, arms in {"small": ["standard"], "full": list(VALUES)}.items():
        planned = []
        for method in arms:
            for seed, value in enumerate(VALUES[method]):
                place = ["made", f"{name}-{method}-{seed}"]
                planned.append({"task": "t", "method": method, "seed": seed, "run": place})
                if value is not None:
                    write_run(store.run(*place), store, value=value)
        store.write_study(name, {"name": name, "max_updates": 1200, "runs": planned})
    return store.root


def test_it_opens_with_the_fullest_study_and_its_standard_and_linear_arm(runs):
    explorer = Explorer(runs)
    assert explorer.studies == {"full": "8 of 9", "small": "3 of 3"}
    assert (explorer.study, explorer.task, explorer.arms) == ("full", "t", ["standard", "linear"])
    assert explorer.clicked == ["full-linear-0"]
    assert (explorer.metric, explorer.metrics) == ("accuracy", ["accuracy"])
    table = explorer.table
    assert table["status"] == ["complete"] * 5 + ["diverged"] + ["complete"] * 2 + ["missing"]
    assert table["N"] == [2.0] * 8 + [None]
    assert table["values"]["accuracy"] == [0.5, 0.6, 0.7, 0.8, 0.55, None, 0.4, 0.6, None]


def test_differences_are_those_by_hand_and_what_is_not_finite_travels(runs):
    explorer = Explorer(runs)
    sent = []
    explorer.observe(
        lambda change: sent.append(json.dumps(change["new"], allow_nan=False)), "comparison"
    )
    explorer.arms = ["standard", "linear", "fixed2"]
    found = json.loads(sent[-1])
    table = pd.DataFrame(found["pairs"]).set_index(["method", "seed"])
    by_hand = pd.DataFrame(VALUES).astype(float)
    by_hand = by_hand.sub(by_hand["standard"], axis=0)
    for method in ("linear", "fixed2"):
        for seed in (0, 1):
            assert table.loc[(method, seed), "difference"] == pytest.approx(by_hand[method][seed])
    diverged, missing = table.loc[("linear", 2)], table.loc[("fixed2", 2)]
    assert (diverged["status"], diverged["side"]) == ("diverged", -1)
    assert missing["status"] == "missing"
    assert pd.isna(missing["side"])
    linear, fixed2 = found["differences"]
    for row, values in ((linear, [0.3, -0.05]), (fixed2, [-0.1, 0.0])):
        half = 12.706204736 * np.std(values, ddof=1) / np.sqrt(2)  # t of one degree of freedom
        expected = [np.mean(values), np.mean(values) - half, np.mean(values) + half]
        assert [row["mean"], row["low"], row["high"]] == pytest.approx(expected)
    explorer.arms = ["fixed2", "standard"]
    (back,) = explorer.comparison["differences"]
    assert back["mean"] == pytest.approx(0.05)


def test_curves_are_compared_over_what_is_asked_for(runs):
    explorer = Explorer(runs)
    (standard, _) = explorer.comparison["means"]
    assert standard["x"][-1] == 1200
    explorer.axis = "fresh_batches"
    (standard, _) = explorer.comparison["means"]
    assert standard["x"][-1] == 600
    assert standard["y"][-1] == pytest.approx(0.6)
    assert explorer.comparison["axes"].keys() == {"update", "fresh_batches", "seconds"}
    explorer.metric = "accuracy"
    explorer.arms = []
    assert explorer.comparison == {}


def test_only_runs_that_are_looked_at_are_read(runs):
    """Of the others the tables may be gone: opening a store of thousands reads none of them."""
    for path in (runs / "made").glob("full-*"):
        if path.name != "full-linear-0":
            (path / "updates.parquet").unlink()
        if "fixed2" in path.name:
            (path / "evals.parquet").unlink()
    explorer = Explorer(runs, study="small")
    assert explorer.said == ""
    explorer.study = "full"
    assert len(explorer.curves[0]["data"]["loss"]["x"]) > 0
    explorer.clicked = ["full-fixed2-0"]
    assert "full-fixed2-0" in explorer.said
    assert explorer.curves[0]["data"]["loss"] == {"x": [], "y": []}


def test_a_store_without_studies_says_how_to_make_one(tmp_path):
    explorer = Explorer(tmp_path)
    assert "`repeatlab run` makes one" in explorer.said
    explorer.refresh()
    with pytest.raises(ValueError, match="params must be a parameter file"):
        explorer.start()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=1500), st.data())
def test_a_long_run_is_thinned_to_means_of_its_stretches(counts, data):
    batch = np.repeat(np.arange(len(counts)), counts)
    repeat = np.concatenate([np.arange(count) for count in counts])
    updates = pd.DataFrame(
        {"fresh_batch": batch, "repeat": repeat, "update": np.arange(len(batch))}
    )
    updates["repeats"] = np.repeat(counts, counts)
    updates["loss"] = np.random.default_rng(len(counts)).normal(size=len(batch))
    updates = updates.assign(lr=0.1, seconds=0.0)
    evals = pd.DataFrame(columns=["update", "split", "metric", "value"])
    curves = run_curves(updates, evals, metric="accuracy")
    assert curves["metric"] == {"x": [], "y": []}
    first = updates[updates["repeat"] == 0]
    size = -(-len(counts) // POINTS)
    place = data.draw(st.integers(0, len(curves["N"]["x"]) - 1))
    stretch = slice(place * size, (place + 1) * size)
    assert len(curves["N"]["x"]) <= POINTS
    assert curves["N"]["x"][place] == first["update"].iloc[place * size]
    assert curves["N"]["y"][place] == pytest.approx(np.mean(counts[stretch]))
    assert curves["loss"]["y"][place] == pytest.approx(first["loss"].iloc[stretch].mean())
    assert curves["rate"]["y"][place] == pytest.approx(0.1)


class Waiter:
    """Waits until a trait of an explorer is as wanted, without looking again and again."""

    def __init__(self, explorer: Explorer, name: str) -> None:
        self.explorer, self.name, self.changed = explorer, name, threading.Condition()
        explorer.observe(self._note, name)

    def _note(self, change) -> None:
        with self.changed:
            self.changed.notify_all()

    def until(self, wanted) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: wanted(getattr(self.explorer, self.name)), 120), (
                self.explorer.said
            )


@pytest.fixture
def parameters(tmp_path):
    """Return a function that writes a parameter file of runs that take so many updates."""

    def write(updates: int) -> Path:
        study = {
            "name": "trained",
            "tasks": {"digits": {"name": "supervised", "lr": 0.05}},
            "methods": {"standard": {}, "fixed2": {"mapping": {"name": "constant", "repeats": 2}}},
            "seeds": 1,
            "max_updates": updates,
            "evaluation": {"every": max(1, updates // 2)},
            "lockstep": False,
        }
        Study.of(**study)
        path = tmp_path / "trained.yaml"
        path.write_text(
            yaml.safe_dump({"notebook": "10_supervised", "parameters": {"study": study}})
        )
        return path

    return write


def test_a_study_is_started_shown_and_said_to_have_ended(tmp_path, parameters):
    explorer = Explorer(tmp_path / "runs", params=parameters(4))
    ended = Waiter(explorer, "running")
    explorer.start()
    assert explorer.running
    ended.until(lambda running: not running)
    assert explorer.said.startswith("2 runs: 2 complete")
    assert (explorer.study, explorer.studies) == ("trained", {"trained": "2 of 2"})
    assert explorer.table["status"] == ["complete", "complete"]
    assert (explorer.metric, explorer.arms) == ("accuracy", ["standard"])  # there is no linear
    assert len(explorer.clicked) == len(explorer.curves) == 1


def test_a_study_is_stopped_and_leaves_checkpoints(tmp_path, parameters):
    explorer = Explorer(tmp_path / "runs", params=parameters(1_000_000))
    table, ended = Waiter(explorer, "table"), Waiter(explorer, "running")
    explorer.start()
    try:
        explorer.start()  # once is enough
        table.until(lambda columns: "running" in columns.get("status", ()))
        assert explorer.said == "training: 0 of 2 runs done"
    finally:
        explorer.stop()
        ended.until(lambda running: not running)
    assert explorer.said.startswith("Stopped: 0 of 2 runs done")
    assert "run this again to go on" in explorer.said
    assert "interrupted" in explorer.table["status"]


@pytest.mark.skipif(NODE is None, reason="no node to read the front end's module with")
def test_the_front_end_is_one_module_that_asks_for_nothing(tmp_path):
    (tmp_path / "widget.mjs").write_text(Explorer._esm, encoding="utf-8")
    code = "import w from './widget.mjs'; console.log(typeof w.render)"
    command = [NODE, "--input-type=module", "--eval", code]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "function"
    assert "import " not in Explorer._esm.replace("important", "")
    assert "http" not in Explorer._esm.replace("http://www.w3.org/2000/svg", "")
