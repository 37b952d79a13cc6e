"""Calibration: the two rules for t, and the short run behind them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repeatlab.core.schema import parse
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import Linear
from repeatlab.tasks.supervised import Supervised
from repeatlab.training.calibration import calibrate, calibration_run, linear_t, mean_plus_std
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

BATCH = 16
CALIBRATION = 12


def run_config(mapping: dict | None = None, **fields) -> RunConfig:
    data = {
        "task": {"name": "supervised", "lr": 0.05, "batch_size": BATCH, "width": 2},
        "method": {"mapping": mapping} if mapping else {},
        "max_updates": 20,
        "evaluation": {"every": 20},
        "calibration": {"updates": CALIBRATION} if mapping else None,
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


THRESHOLD = {"name": "threshold", "t": "auto"}
LINEAR = {"name": "linear", "t": "auto"}

# --- the rules ----------------------------------------------------------------------------------


def test_threshold_is_mean_plus_the_population_s_standard_deviation():
    losses = np.random.default_rng(0).gamma(2.0, size=321)
    deviation = np.sqrt(((losses - losses.mean()) ** 2).sum() / 321)
    assert mean_plus_std(losses) == pytest.approx(losses.mean() + deviation, rel=1e-12)
    assert mean_plus_std(np.array([1.0, 3.0])) == 3.0


def expected_repeats(losses: np.ndarray, t: float, most: int) -> float:
    """Return the mean N of the linear mapping itself."""
    mapping, stats = Linear(t=t, max_repeats=most), LossStats()
    return float(np.mean([mapping(float(loss), stats) for loss in losses]))


float32_losses = st.lists(st.floats(2.0**-10, 100, width=32), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(float32_losses.map(np.array), st.integers(2, 12), st.floats(0.01, 0.99))
def test_linear_t_is_the_largest_that_reaches_the_target(losses, most, share):
    target = 1 + share * (most - 1)
    t = linear_t(losses, target, max_repeats=most)
    assert expected_repeats(losses, t, most) >= target
    # Beyond the mapping's own tolerance of two float32 units in a quotient.
    assert expected_repeats(losses, t * (1 + 2e-6), most) < target


def test_linear_t_is_found_where_a_quotient_rounds_below_its_integer():
    """x / (x / 7) is just below 7 for one float64 in twelve."""
    for loss in np.random.default_rng(5).random(100):
        t = linear_t(np.array([loss]), 6.9, max_repeats=7)
        assert t == pytest.approx(loss / 7, rel=1e-12)


def test_linear_t_scales_with_the_losses():
    losses = np.random.default_rng(1).exponential(size=500)
    t = linear_t(losses, 2.0, max_repeats=5)
    assert linear_t(losses * 1000, 2.0, max_repeats=5) == pytest.approx(1000 * t, rel=1e-12)


def test_linear_t_of_exponential_losses_is_the_closed_form_s():
    """E[N] = 1 + q^2 + q^3 + q^4 + q^5 with q = exp(-t / mu), so at t = mu it is 1.210176."""
    target = 1 + sum(np.exp(-power) for power in (2, 3, 4, 5))
    assert target == pytest.approx(1.210176, abs=5e-7)
    mu, size = 0.7, 400_000
    losses = np.random.default_rng(2).exponential(mu, size=size)
    # d E[N] / d (t / mu) at 1 is -sum k q^k; N has a standard deviation below 0.62.
    slope = sum(power * np.exp(-power) for power in (2, 3, 4, 5))
    error = 0.62 / np.sqrt(size) / slope
    assert linear_t(losses, target, max_repeats=5) == pytest.approx(mu, rel=4 * error)


@pytest.mark.parametrize("target", [1.0, 0.5, 5.0, 7.0])
def test_a_target_out_of_reach_is_named(target):
    with pytest.raises(ValueError, match=r"calibration\.target_repeats must lie between 1 and"):
        linear_t(np.array([1.0, 2.0]), target, max_repeats=5)


@pytest.mark.parametrize("losses", [[0.0, 0.0], [-1.0, -2.0], [0.0, 0.0, 0.0, 1.0]])
def test_losses_that_determine_no_t_are_refused(losses):
    with pytest.raises(ValueError, match="no t gives the linear mapping its target"):
        linear_t(np.array(losses), 2.5, max_repeats=5)


def test_negative_losses_count_as_one_update():
    # Two of three losses must ask for the most: 1, 5, 5 has a mean of 11 / 3.
    t = linear_t(np.array([-3.0, 2.0, 2.0]), 11 / 3, max_repeats=5)
    assert t == pytest.approx(2 / 5, rel=1e-12)


@pytest.mark.parametrize("losses", [[0.0, 0.0, 0.0], [-2.0, -3.0], [-1.0, -3.0]])
def test_losses_whose_mean_and_deviation_give_no_t_are_refused(losses):
    with pytest.raises(ValueError, match=r"mean plus standard deviation must be positive.*give t"):
        mean_plus_std(np.array(losses))


@pytest.mark.parametrize("name", ["threshold", "until"])
def test_a_driver_that_is_zero_at_first_asks_for_a_t(name, tmp_path):
    """FixMatch's unsupervised loss, while no pseudo-label passes."""
    task = {"name": "semisupervised", "driver": "unsupervised", "batch_size": 16, "mu": 1}
    config = run_config({"name": name, "t": "auto"}, task=task | {"width": 4})
    with pytest.raises(ValueError, match=f"it is 0 over {CALIBRATION} batches .give t, or use"):
        train(config, tmp_path)


def test_each_mapping_has_its_rule_and_its_settings():
    losses = np.random.default_rng(3).gamma(3.0, size=400)
    assert calibrate(run_config(THRESHOLD), losses) == mean_plus_std(losses)
    assert calibrate(run_config(LINEAR), losses) == linear_t(losses, 2.0, max_repeats=5)
    changed = run_config(LINEAR | {"max_repeats": 3}, calibration={"target_repeats": 1.5})
    assert calibrate(changed, losses) == linear_t(losses, 1.5, max_repeats=3)
    without = run_config(LINEAR, calibration=None)
    assert calibrate(without, losses) == linear_t(losses, 2.0, max_repeats=5)


# --- the run ------------------------------------------------------------------------------------


def test_the_short_run_is_standard_and_shared_between_arms():
    run = calibration_run(run_config(LINEAR))
    assert run.method.mapping is None
    assert run.method.schedule is None
    assert run.max_updates == CALIBRATION
    assert run.evaluation.splits == ()
    assert not run.evaluation.test
    same = [
        run_config(THRESHOLD),
        run_config(THRESHOLD | {"repeats": 4}),
        run_config(LINEAR, method={"mapping": LINEAR, "schedule": {"name": "cosine"}}),
        run_config(LINEAR, calibration={"updates": CALIBRATION, "target_repeats": 3.0}),
        run_config(LINEAR, max_updates=500),
        run_config(LINEAR, evaluation={"every": 3}),
    ]
    assert {calibration_run(config).run_id for config in same} == {run.run_id}
    other = [
        run_config(LINEAR, seed=1),
        run_config(LINEAR, calibration={"updates": CALIBRATION + 1}),
        run_config(LINEAR, task={"name": "supervised", "batch_size": BATCH}),
    ]
    assert run.run_id not in {calibration_run(config).run_id for config in other}
    # It never costs more than the run itself.
    assert calibration_run(run_config(LINEAR, max_updates=5)).max_updates == 5


def test_arms_share_one_short_run_are_charged_for_it_and_it_never_evaluates(tmp_path, monkeypatch):
    evaluated, built = [], []

    class Watched(Supervised):
        def __init__(self, config, *, seed, device):
            super().__init__(config, seed=seed, device=device)
            built.append(self)

        def evaluate(self, split):
            evaluated.append(self)
            return super().evaluate(split)

    monkeypatch.setattr("repeatlab.training.making.load_task", lambda target: Watched)
    threshold = train(run_config(THRESHOLD), tmp_path)
    assert len(built) == 2
    assert built[0] not in evaluated
    assert built[1] in evaluated
    linear = train(run_config(LINEAR), tmp_path)
    assert len(built) == 3

    short = calibration_run(run_config(LINEAR))
    assert {path.name for path in (tmp_path / "supervised").glob("[!.]*")} == {
        threshold.path.name,
        linear.path.name,
        short.run_id,
    }
    source = train(short, tmp_path)
    assert len(built) == 3
    assert not list(source.path.glob("evals.*"))
    losses = source.updates["loss"].to_numpy()
    assert len(losses) == CALIBRATION
    expected = {
        threshold.path.name: mean_plus_std(losses),
        linear.path.name: linear_t(losses, 2.0, max_repeats=5),
    }
    for run in (threshold, linear):
        found, ledger = run.summary["calibration"], run.summary["ledger"]
        assert found["t"] == expected[run.path.name]
        assert found["run"] == short.run_id
        assert ledger["calibration_updates"] == CALIBRATION
        for direction in ("forward", "backward"):
            assert ledger[f"calibration_{direction}_samples"] == CALIBRATION * BATCH
        assert ledger["calibration_fresh_batches"] == CALIBRATION
        assert ledger["calibration_seconds"] == source.summary["ledger"]["seconds"] > 0
        assert set(run.evals["calibration_updates"]) == {CALIBRATION}
        assert ledger["updates"] == 20

    updates = linear.updates
    fresh = updates[updates["repeat"] == 0].iloc[:-1]  # the last N may be cut
    t = expected[linear.path.name]
    mapping, stats = Linear(t=t), LossStats()
    assert fresh["repeats"].tolist() == [mapping(loss, stats) for loss in fresh["loss"]]


def test_a_given_t_needs_no_short_run(tmp_path):
    run = train(run_config({"name": "threshold", "t": 2.0}, max_updates=3), tmp_path)
    assert run.summary["calibration"] is None
    assert len(list((tmp_path / "supervised").glob("[!.]*"))) == 1


def test_a_short_run_that_diverges_is_an_error_that_names_it(tmp_path):
    task = {"name": "supervised", "lr": 1e20, "batch_size": BATCH, "width": 2}
    config = run_config(THRESHOLD, task=task)
    with pytest.raises(RuntimeError, match="diverged: `t: auto` needs") as error:
        train(config, tmp_path)
    assert calibration_run(config).run_id in str(error.value)
    assert not (tmp_path / "supervised" / config.run_id).exists()
