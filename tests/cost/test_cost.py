"""The cost model against the closed forms that it stands for."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repeatlab.cost import (
    CostModel,
    Ledger,
    break_even_keep,
    break_even_presample,
    cost_ratio,
    cost_units,
    tau_threshold,
)

MODEL = CostModel(forward=1e-3, backward_ratio=2.0, batch_size=10, optimizer=0.01, data=0.1)
positive = st.floats(0.1, 100)


@pytest.mark.parametrize(
    ("presample", "k", "u"), [(3, 2, 0.6667), (5, 2, 0.5333), (1.5, 2, 1), (3, 1.4265, 0.74545)]
)
def test_the_table_of_cost_ratios(presample, k, u):
    assert cost_ratio(presample, k) == pytest.approx(u, abs=5e-5)


def test_the_threshold_of_the_papers_setting():
    assert tau_threshold(3, 2) == 2


@given(positive, positive)
def test_break_even_is_where_the_cost_ratio_is_one(presample, k):
    assert cost_ratio(break_even_presample(k), k) == pytest.approx(1)
    assert (cost_ratio(presample, k) < 1 - 1e-9) <= (presample > break_even_presample(k))


@given(positive, positive)
def test_tau_th_is_the_importance_update_over_the_uniform_one(presample, k):
    model = CostModel(forward=0.2, backward_ratio=k, batch_size=7)
    assert model.importance_update(presample) / model.update == pytest.approx(
        tau_threshold(presample, k)
    )


def test_the_parts_by_hand():
    # (1 + 2) * 10 * 1 ms + 10 ms = 40 ms
    assert MODEL.update == pytest.approx(0.04)
    assert MODEL.fresh_batch(3) == pytest.approx(0.22)
    assert MODEL.fresh_batch(2, prefetch=True) == pytest.approx(0.1)
    assert MODEL.fresh_batch(3, prefetch=True) == pytest.approx(0.12)
    assert MODEL.run(30, 10) == pytest.approx(2.2)
    assert MODEL.free_repeats() == pytest.approx(2.5)
    # 2 * (0.1 + 10 ms) + 40 ms
    assert MODEL.importance_update(2) == pytest.approx(0.26)


@given(positive)
def test_selective_backprop_breaks_even(k):
    forwards_and_backward = 1 + break_even_keep(k) * (1 + k)
    assert forwards_and_backward == pytest.approx(1 + k)


@pytest.mark.parametrize(
    ("field", "value"), [("forward", 0), ("backward_ratio", -1), ("data", -0.1), ("batch_size", 0)]
)
def test_a_bad_part_is_named(field, value):
    parts = {"forward": 1.0, "backward_ratio": 2.0, "batch_size": 8} | {field: value}
    with pytest.raises(ValueError, match=f"^{field} must"):
        CostModel(**parts)


counts = st.integers(0, 10_000)


@given(counts, counts, counts, counts, counts, positive)
def test_cost_units_are_forwards_with_a_backward_worth_k(
    forward, backward, scoring, calibration, holdout, k
):
    ledger = Ledger(
        forward_samples=forward,
        backward_samples=backward,
        scoring_samples=scoring,
        calibration_forward_samples=calibration,
        calibration_backward_samples=2 * calibration,
        holdout_forward_samples=3 * holdout,
        holdout_backward_samples=holdout,
        # None of these is a sample passing.
        updates=7,
        fresh_batches=5,
        distinct_samples=3,
        environment_steps=9,
        seconds=2.0,
        calibration_updates=11,
        holdout_updates=13,
    )
    prepared = calibration + 2 * calibration * k + 3 * holdout + holdout * k
    parts = forward + backward * k + scoring + prepared
    before = ("calibration_", "holdout_")
    assert cost_units(ledger.to_json(), k, parts=before) == pytest.approx(prepared)
    assert ledger.cost_units(k) == pytest.approx(parts)


@given(st.lists(st.tuples(counts, counts, positive), min_size=1))
def test_a_table_costs_row_by_row_what_its_ledgers_do(rows):
    """Without the columns that nobody has, as records of earlier versions are."""
    frame = pd.DataFrame(rows, columns=["forward_samples", "pretraining_backward_samples", "k"])
    ledgers = [
        Ledger(forward_samples=forward, pretraining_backward_samples=backward)
        for forward, backward, _ in rows
    ]
    expected = [ledger.cost_units(k) for ledger, (*_, k) in zip(ledgers, rows, strict=True)]
    assert cost_units(frame, frame["k"]).tolist() == expected


@pytest.mark.parametrize("k", [2.0, 1.4265])
def test_the_cost_of_an_importance_update_is_tau_th_uniform_ones(k):
    uniform = Ledger(forward_samples=64, backward_samples=64)
    chosen = Ledger(forward_samples=64, backward_samples=64, scoring_samples=3 * 64)
    ratio = chosen.cost_units(k) / uniform.cost_units(k)
    assert ratio == pytest.approx(tau_threshold(3, k))


def test_a_ledger_that_spent_nothing_costs_nothing():
    assert Ledger().cost_units(2.0) == 0
    assert set(Ledger().to_json().values()) == {0}


def test_charges_are_added_by_name():
    ledger = Ledger(holdout_updates=3, updates=5)
    ledger.charge({"holdout_updates": 4, "holdout_forward_samples": 64, "holdout_seconds": 0.5})
    ledger.charge({"holdout_seconds": 0.25})
    ledger.charge({})
    expected = Ledger(
        holdout_updates=7, holdout_forward_samples=64, holdout_seconds=0.75, updates=5
    )
    assert ledger == expected
    with pytest.raises(AttributeError, match="holdout_update"):
        ledger.charge({"holdout_update": 1})
    assert Ledger(**ledger.to_json()) == ledger
