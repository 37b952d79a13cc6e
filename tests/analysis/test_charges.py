"""What is spent once, before the first update, is told beside a verdict and is no part of it."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_plans import ARMS, Truth, draw, write

from repeatlab.analysis.plans import load_plan
from repeatlab.analysis.verdicts import judge
from repeatlab.store.records import Run


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_charge_for_calibration_refutes_nothing_where_arms_are_bit_equal(seeds, tmp_path):
    """V1: 2 % of T charged to arms that are the standard arm, bit for bit."""
    truth = Truth(tasks=1, seeds=seeds, equal=True)
    write(draw(truth, np.random.default_rng(0)), tmp_path, charge=0.1)
    plan = load_plan(tmp_path, "simulated")
    own = plan.stages["own"]
    charged = own.runs.set_index("method").loc["linear", "calibration_updates"]
    assert (charged > 0).all()  # the records do hold the charge
    seen, verdicts = plan.views["own rates, validation"]
    for arm in ARMS:
        _, ours, theirs = seen.until[arm]["task0"]
        assert (ours == theirs).all()
    found = {v.hypothesis: v for v in verdicts}
    assert found["H1"].verdict == ("equivalent" if seeds == 8 else "inconclusive")
    effects = {arm: one.effect.equal for arm, one in found["H1"].comparisons.items()}
    assert effects == dict.fromkeys(effects, 1.0)
    assert effects


def test_a_gain_below_one_interval_of_the_evaluations_is_seen(tmp_path):
    """V1: two evaluations; an arm that is there 20 % sooner, within one of them."""
    slope = 12.0
    gains = dict.fromkeys(ARMS, slope * np.log(1.25))
    truth = Truth(tasks=1, slope=slope, gains=gains, evaluations=2)
    write(draw(truth, np.random.default_rng(0)), tmp_path, charge=0.1)
    plan = load_plan(tmp_path, "simulated")
    h1 = judge(plan.evidence("own", "validation"), plan.declared)[0]
    assert h1.verdict == "supported"
    assert Run(tmp_path / "simulated" / "simulated-0-linear-1-0").evals["update"].nunique() == 3
