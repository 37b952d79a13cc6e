"""Figures of the cost model against the formulas written out, and measurements kept in a store."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from repeatlab.analysis.echo import break_even_table, echo_runs, echo_studies, echo_table
from repeatlab.cost import CostModel
from repeatlab.figures.cost import cost_curves, echo_times, predictions
from repeatlab.studies.study import Study

# An update takes (1 + 2) * 50 * 1e-5 + 5e-4 = 2 ms, a batch 6 ms.
MODEL = CostModel(forward=1e-5, backward_ratio=2.0, batch_size=50, optimizer=5e-4, data=6e-3)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def curve(axes, label) -> np.ndarray:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line.get_xydata()


def test_the_echo_regime_ends_at_r():
    table = echo_table({"slow": MODEL}).loc["slow"]
    assert table.to_dict() == pytest.approx(
        {"update (ms)": 2.0, "data (ms)": 6.0, "R": 3.0, "most saved": 0.75}
    )


def test_break_even_is_the_papers_table():
    """p = 3, k = 2: tau_th = 2, u = 2 / 3; u < 1 from p = (k + 1) / k on; keep < k / (1 + k)."""
    row = break_even_table({"plan": 2.0}, presample=3.0).loc["plan"]
    assert row.tolist() == pytest.approx([2.0, 2.0, 2 / 3, 1.5, 2 / 3])


def test_a_slow_loader_is_paid_once_a_batch(tmp_path):
    fields = {
        "name": "slow",
        "tasks": {"digits": {"name": "supervised", "lr": 0.05}, "other": {"name": "unsupervised"}},
        "methods": {"linear": {"mapping": {"name": "linear", "t": "auto"}}},
        "seeds": 1,
        "max_updates": 8,
        "evaluation": {"every": 8, "splits": [], "test": False},
    }
    studies = echo_studies(fields, delay_ms=60.0, repeats=[1, 4])
    assert [study["name"] for study in studies.values()] == ["slow-in-turn", "slow-prefetched"]
    for study in studies.values():
        assert list(study["tasks"]) == ["digits"]
        Study.of(**study).run(tmp_path, workers=0)
    rows = echo_runs(tmp_path, studies).set_index(["loader", "method"])
    assert rows["repeats"].to_dict() == {
        (loader, method): n for loader in studies for method, n in (("N=1", 1), ("N=4", 4))
    }
    # At N = 1 every update waits for a batch, at N = 4 every fourth: the first batch at least.
    assert rows.loc[("in turn", "N=1"), "seconds"] > 0.060
    assert rows.loc[("in turn", "N=4"), "seconds"] > 0.015


@pytest.mark.parametrize(
    ("loader", "formula"),
    [("in turn", lambda n: 2 + 6 / n), ("prefetched", lambda n: np.maximum(6 / n, 2))],
)
def test_an_update_over_n_is_drawn_as_the_formula_says(loader, formula):
    measured = pd.DataFrame({"loader": [loader] * 2, "repeats": [1, 4], "seconds": [0.01, 0.003]})
    axes = echo_times(MODEL, measured).axes[0]
    n, milliseconds = curve(axes, loader).T
    assert (n[0], n[-1]) == (1, 8)
    assert milliseconds == pytest.approx(formula(n))
    points = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [line.get_xydata().tolist() for line in points] == [[[1, 10], [4, 3]]]


def test_the_costs_of_choosing_cross_one_where_they_break_even():
    echo, importance, selective = cost_curves(MODEL, presample=3.0).axes
    assert curve(echo, "prefetched")[-1].tolist() == pytest.approx([8, 2.0])
    label = "u: against training on all"
    # u = (p + k + 1) / (p (1 + k)), 1 at p = (k + 1) / k; kept shares break even at k / (1 + k).
    for axes, at, formula in (
        (importance, 1.5, lambda p: (p + 3) / (3 * p)),
        (selective, 2 / 3, lambda keep: 1 / 3 + keep),
    ):
        x, ratio = curve(axes, label).T
        assert ratio == pytest.approx(formula(x))
        vertical = [line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"]
        assert np.ravel(vertical) == pytest.approx([at, at])
    p, tau = curve(importance, "tau_th: an update / a uniform one").T
    assert tau == pytest.approx((p + 3) / 3)


def test_runs_are_points_and_one_without_a_prediction_is_none():
    runs = pd.DataFrame(
        {
            "method": ["standard", "standard", "linear"],
            "seconds": [1.0, 2.0, 3.0],
            "predicted_seconds": [1.1, np.nan, 2.9],
        }
    )
    axes = predictions(runs).axes[0]
    assert curve(axes, "standard").tolist() == [[1.1, 1.0]]
    assert curve(axes, "linear").tolist() == [[2.9, 3.0]]
    assert len(predictions(runs[1:2]).axes[0].lines) == 0
