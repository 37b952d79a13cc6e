"""What a run may spend, where it ends, and how its learning rates follow."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, cos, inf, pi
from typing import Any

import pytest
import torch
from torch import nn

from repeatlab.core.schema import ConfigError, parse
from repeatlab.cost import Ledger
from repeatlab.data import load_splits
from repeatlab.methods.sampling import rho
from repeatlab.methods.sampling.history import RunningHardMining, RunningOnlineSelection
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import Linear, LinearRepeats, Mapping, Trace
from repeatlab.store.records import Run
from repeatlab.tasks import TASKS, load_task
from repeatlab.tasks.supervised import Supervised
from repeatlab.training import making, one_run
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.rates_and_budget import Budget, Rates
from repeatlab.training.visits import LongSteps

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = 16
T = 100


def run_config(method: dict[str, Any] | None = None, task: str = "supervised", **fields: Any):
    data = {
        "task": {"name": task, "lr": 0.05, "batch_size": BATCH},
        "method": method or {},
        "max_updates": T,
        "evaluation": {"splits": [], "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


def budget_of(config: RunConfig) -> Budget:
    return Budget(config, load_task(TASKS[config.task.name])(config.task, seed=0, device="cpu"))


# --- the budget in its units ----------------------------------------------------------------------


def test_without_a_budget_only_updates_count():
    assert budget_of(run_config()).limit == inf


@pytest.mark.parametrize(
    ("task", "forward", "backward"),
    [("supervised", 16, 16), ("reinforcement", 3 * 16, 16), ("generative", 4 * 16, 4 * 16)],
)
def test_cost_is_counted_in_forwards(task, forward, backward):
    budget = budget_of(run_config(task=task, budget={"unit": "cost", "k": 1.5}))
    update = forward + 1.5 * backward
    assert budget.limit == pytest.approx(T * update)
    prepared = Ledger(
        calibration_forward_samples=30,
        calibration_backward_samples=10,
        holdout_forward_samples=12,
        holdout_backward_samples=6,
        calibration_seconds=99.0,
    )
    assert budget.spent(Ledger(), 7, 0, 5.0) == pytest.approx(7 * update)
    assert budget.spent(prepared, 7, 11, 5.0) == pytest.approx(7 * update + 11 + 42 + 1.5 * 16)


def test_seconds_are_those_of_training_and_of_what_came_before():
    budget = budget_of(run_config(budget={"unit": "seconds", "seconds": 60.0}))
    assert budget.limit == 60
    prepared = Ledger(calibration_seconds=3.0, holdout_seconds=4.0, holdout_forward_samples=10)
    assert budget.spent(prepared, 7, 11, 5.0) == 12


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"unit": "seconds"}, "budget: seconds must be given for unit: seconds, and only for it"),
        ({"unit": "cost", "seconds": 3.0}, "budget: seconds must be given for unit: seconds"),
        ({"unit": "cost"}, "budget: k must be given for unit: cost, and only for it"),
        ({"unit": "joules"}, "budget.unit: must be 'cost' or 'seconds'"),
        ({"unit": "cost", "k": 0.0}, "budget.k: must be greater than 0"),
        ({"unit": "seconds", "seconds": 0.0}, "budget.seconds: must be greater than 0"),
    ],
)
def test_bad_budgets_are_named(budget, message):
    with pytest.raises(ConfigError) as error:
        run_config(budget=budget)
    assert str(error.value).startswith(message)


# --- runs that end when their budget does ---------------------------------------------------------

AUTO = {"mapping": {"name": "threshold", "t": "auto"}}
COST: dict[str, dict[str, Any]] = {
    "standard": {},
    "fixed 3": {"mapping": {"name": "constant", "repeats": 3}},
    "until": {"mapping": {"name": "until", "t": 0.5}},
    "auto": AUTO,
    "selective": {"sampler": {"name": "selective"}},
    "importance": {"sampler": {"name": "importance", "presample": 2}},
    "hard mining": {"sampler": {"name": "hard_mining"}},
    "rho_loss": {"sampler": {"name": "rho_loss", "presample": 4, "holdout_updates": 5}},
}


def assert_whole(run: Run) -> None:
    """Every batch has as many visits as its N says, and every update its row."""
    rows = run.updates
    assert rows["update"].tolist() == list(range(len(rows)))
    assert rows["repeats"].tolist() == rows.groupby("fresh_batch")["update"].transform(len).tolist()
    assert len(rows) == run.summary["ledger"]["updates"]


@pytest.mark.parametrize("k", [2.0, 1.87])
@pytest.mark.parametrize("name", COST)
def test_a_run_ends_with_the_update_that_spends_its_budget(tmp_path, monkeypatch, name, k):
    monkeypatch.setattr("repeatlab.methods.sampling.importance.tau_threshold", lambda p, k: 0.05)
    calibration = {"updates": 7} if name == "auto" else None
    config = run_config(COST[name], budget={"unit": "cost", "k": k}, calibration=calibration)
    run = train(config, tmp_path)
    assert run.status == {"status": "complete"}
    assert_whole(run)
    ledger = Ledger(**run.summary["ledger"])
    limit, update = T * (1 + k) * BATCH, (1 + k) * BATCH
    spent = ledger.cost_units(k)
    assert spent >= limit * (1 - 1e-9)
    # Without the last update, and what was scored for it, something was left.
    last = {"selective": 20 * BATCH, "importance": 2 * BATCH, "rho_loss": 4 * BATCH}
    assert spent - update - last.get(name, 0) < limit * (1 - 1e-9)
    if name == "importance":  # n updates, all but the first with a presample
        scored = 2 * BATCH
        assert ledger.updates == ceil((limit + scored) / (update + scored))
        assert ledger.scoring_samples == scored * (ledger.updates - 1)
    elif name == "rho_loss":  # two models of five updates, asked about every sample
        samples, scored = len(load_splits("digits").train), 4 * BATCH
        assert ledger.updates == ceil((limit - samples - 10 * update) / (update + scored))
        assert ledger.scoring_samples == samples + ledger.updates * scored
    elif name != "selective":
        assert ledger.updates == (T - 7 if name == "auto" else T)


def test_a_spent_budget_still_makes_an_update(tmp_path):
    method = {"sampler": {"name": "rho_loss", "presample": 2, "holdout_updates": 50}}
    run = train(run_config(method, budget={"unit": "cost", "k": 2.0}, max_updates=30), tmp_path)
    assert run.summary["ledger"]["updates"] == 1
    assert_whole(run)


def test_the_last_batch_is_cut_where_the_budget_ends(tmp_path):
    method = {"mapping": {"name": "constant", "repeats": 5}, "sampler": {"name": "selective"}}
    run = train(run_config(method, budget={"unit": "cost", "k": 2.0}), tmp_path)
    assert_whole(run)
    assert run.updates["repeats"].iloc[0] == 5
    assert run.updates["repeats"].iloc[-1] < 5


def test_the_end_of_the_budget_is_evaluated(tmp_path):
    evaluation = {"splits": ["validation"], "every": 40, "test": False}
    config = run_config(
        AUTO, budget={"unit": "cost", "k": 2.0}, calibration={"updates": 7}, evaluation=evaluation
    )
    run = train(config, tmp_path)
    assert sorted(run.evals["update"].unique()) == [0, 40, 80, 93]
    final = run.evals[run.evals["update"] == 93].set_index("metric")["value"]
    assert run.summary["final"]["validation.accuracy"] == final["accuracy"]


# --- seconds --------------------------------------------------------------------------------------


class Clock:
    """A clock that moves when a task makes an update, by what its task says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Let every update take half a second, and nothing else any time."""
    ticking = Clock()

    class Timed(Supervised):
        def step(self, *args: Any, **options: Any) -> None:
            super().step(*args, **options)
            ticking.now += 0.5

        def evaluate(self, split: str) -> dict[str, float]:
            ticking.now += 1000
            return super().evaluate(split)

    monkeypatch.setattr(making, "load_task", lambda target: Timed)
    monkeypatch.setattr(one_run, "perf_counter", ticking)
    monkeypatch.setattr(rho, "perf_counter", ticking)
    return ticking


def seconds(budget: float) -> dict[str, Any]:
    return {"budget": {"unit": "seconds", "seconds": budget}}


@pytest.mark.parametrize("flush", [500, 3])
def test_seconds_of_training_end_a_run(tmp_path, clock, monkeypatch, flush):
    monkeypatch.setattr(one_run, "FLUSH_UPDATES", flush)
    evaluation = {"splits": ["train"], "every": 4, "test": True}
    run = train(run_config(evaluation=evaluation, **seconds(5.0)), tmp_path)
    assert run.summary["ledger"]["updates"] == 10
    assert run.summary["ledger"]["seconds"] == 5
    assert_whole(run)


def test_seconds_of_the_calibration_count(tmp_path, clock):
    run = train(run_config(AUTO, calibration={"updates": 8}, **seconds(10.0)), tmp_path)
    ledger = run.summary["ledger"]
    assert ledger["calibration_seconds"] == 4
    assert ledger["updates"] == (10 - 4) / 0.5


def test_seconds_of_the_models_trained_beforehand_count(tmp_path, clock):
    method = {"sampler": {"name": "rho_loss", "presample": 2, "holdout_updates": 5}}
    ledger = train(run_config(method, **seconds(10.0)), tmp_path).summary["ledger"]
    assert ledger["holdout_seconds"] == 2 * 5 * 0.5
    assert ledger["updates"] == (10 - 5) / 0.5


def test_updates_end_a_run_that_has_time_left(tmp_path, clock):
    assert train(run_config(**seconds(1e6)), tmp_path).summary["ledger"]["updates"] == T


# --- rates ----------------------------------------------------------------------------------------


def by_cosine(share: float) -> float:
    return 0.05 * (1 + cos(pi * share)) / 2


@pytest.mark.parametrize("k", [2.0, 1.87])
def test_the_standard_arm_is_the_same_under_a_budget_of_its_cost(tmp_path, k):
    method = {"schedule": {"name": "cosine"}}
    plain = train(run_config(method), tmp_path)
    limited = train(run_config(method, budget={"unit": "cost", "k": k}), tmp_path)
    assert limited.updates["lr"].tolist() == plain.updates["lr"].tolist()
    assert limited.summary["state_sha256"] == plain.summary["state_sha256"]


def test_the_schedule_runs_on_the_spent_share_of_the_cost(tmp_path):
    budget, schedule = {"unit": "cost", "k": 3.0}, {"schedule": {"name": "cosine"}}
    calibrated = train(
        run_config(AUTO | schedule, budget=budget, calibration={"updates": 10}), tmp_path
    )
    rates = calibrated.updates["lr"].tolist()
    assert rates == pytest.approx([by_cosine((10 + update) / T) for update in range(90)])

    method = {"sampler": {"name": "rho_loss", "presample": 2, "holdout_updates": 3}} | schedule
    chosen = train(run_config(method, budget=budget), tmp_path)
    update, samples = 4 * BATCH, len(load_splits("digits").train)
    before = samples + 6 * update  # two models, and their losses
    rates = chosen.updates["lr"].tolist()
    for made, rate in enumerate(rates):
        # Its own presample is scored before an update is made.
        spent = before + made * update + (made + 1) * 2 * BATCH
        assert rate == pytest.approx(by_cosine(spent * T // (T * update) / T))
    assert rates[-1] < 0.05 * 0.01
    assert len(rates) < T


def test_the_schedule_runs_on_the_spent_share_of_the_seconds(tmp_path, clock):
    method = {"schedule": {"name": "linear"}}
    run = train(run_config(method, **seconds(8.0)), tmp_path)
    # 16 updates of half a second on a schedule of 100 steps.
    expected = [0.05 * (1 - int(update / 16 * T) / T) for update in range(16)]
    assert run.updates["lr"].tolist() == pytest.approx(expected)


def test_n_by_the_clock_follows_the_spent_share(tmp_path, clock):
    method = {"mapping": {"name": "ramp", "high": 5, "low": 1}}
    # 16 updates of half a second: N goes down to 1 in these, and not in T.
    run = train(run_config(method, **seconds(8.0)), tmp_path)
    starts = run.updates.query("repeat == 0")
    expected = [int(5 - 4 * update / 16 + 0.5) for update in starts["update"]]
    assert starts["repeats"].tolist() == expected == [5, 4, 3, 2, 2]

    method |= {"sampler": {"name": "rho_loss", "presample": 2, "holdout_updates": 3}}
    run = train(run_config(method, budget={"unit": "cost", "k": 3.0}), tmp_path)
    starts = run.updates.query("repeat == 0").reset_index()
    update, samples = 4 * BATCH, len(load_splits("digits").train)
    # Its two models first; and a fresh batch's presample is scored before N is asked for.
    spent = samples + 6 * update + starts["update"] * update + 2 * BATCH * (starts.index + 1)
    expected = [int(5 - 4 * share + 0.5) for share in spent / (T * update)]
    assert starts["repeats"].tolist()[:-1] == expected[:-1]
    assert expected[-1] == 1


SELECTIVITY: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {
    "hard_mining._beta": ({"beta": 0.4, "beta_end": 1.0}, lambda share: 0.4 + 0.6 * share),
    "online._pressure": (
        {"pressure": 256.0, "pressure_end": 4.0},
        lambda share: 256.0 * (4.0 / 256.0) ** share,
    ),
}


@pytest.mark.parametrize("name", SELECTIVITY)
def test_a_sampler_that_moves_follows_the_spent_share(tmp_path, clock, monkeypatch, name):
    (sampler, moving), (fields, at) = name.split("."), SELECTIVITY[name]
    kind = {"hard_mining": RunningHardMining, "online": RunningOnlineSelection}[sampler]
    inner, found = getattr(kind, moving), []
    monkeypatch.setattr(kind, moving, lambda self: found.append(inner(self)) or found[-1])
    method = {
        "sampler": {"name": sampler} | fields,
        "mapping": {"name": "linear", "t": "auto", "max_repeats": 3},
    }
    for budget, shares in (
        (None, lambda updates: updates / T),
        # Four updates of half a second for t, then twelve.
        (seconds(8.0)["budget"], lambda updates: (4 + updates) / 16),
        ({"unit": "cost", "k": 3.0}, lambda updates: (4 + updates) / T),
    ):
        found.clear()
        config = run_config(method, budget=budget, calibration={"updates": 4})
        run = train(config, tmp_path)
        starts = run.updates.query("repeat == 0")["update"]
        assert 1 < len(starts) < len(run.updates)
        assert found == pytest.approx([at(share) for share in shares(starts)])


def test_n_scales_a_rate_that_the_budget_moves(tmp_path):
    method = {
        "mapping": {"name": "constant", "repeats": 3},
        "apply": "step_size",
        "schedule": {"name": "linear"},
    }
    run = train(run_config(method, budget={"unit": "cost", "k": 2.0}), tmp_path)
    expected = [3 * 0.05 * (1 - update / T) for update in range(T)]
    assert run.updates["lr"].tolist() == pytest.approx(expected)


@pytest.fixture
def optimizers() -> list[torch.optim.Optimizer]:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.4, 0.1)]
    return [torch.optim.SGD(groups), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)]


def current(optimizers: list[torch.optim.Optimizer]) -> list[float]:
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def test_all_groups_of_all_optimizers_are_scaled_alike(optimizers):
    method = {
        "mapping": {"name": "constant", "repeats": 2},
        "apply": "step_size",
        "schedule": {"name": "linear"},
    }
    rates = Rates(run_config(method), optimizers)
    assert rates.moving
    for position, factor in [(0, 3), (25, 1), (50, 2), (75, 4)]:
        rates.set(position)
        share = 1 - position / T
        assert current(optimizers) == pytest.approx([share * lr for lr in (0.4, 0.1, 2.0)])
        rates.scale(factor)
        assert current(optimizers) == pytest.approx([factor * share * lr for lr in (0.4, 0.1, 2.0)])
    # What was set is handed out in order, in pieces.
    assert rates.drain(torch.arange(3).numpy()).tolist() == pytest.approx([1.2, 0.3, 0.4])
    assert rates.drain(torch.arange(3, 4).numpy()).tolist() == pytest.approx([0.4])


def test_without_schedule_and_scale_rates_are_left_alone(optimizers):
    rates = Rates(run_config(), optimizers)
    assert not rates.moving
    assert rates.drain(torch.arange(5, 8).numpy()).tolist() == [0.4] * 3


def test_a_schedule_alone_is_a_function_of_the_update(optimizers):
    rates = Rates(run_config({"schedule": {"name": "linear"}}), optimizers)
    assert rates.moving
    rates.set(50)
    assert current(optimizers) == pytest.approx([0.2, 0.05, 1.0])
    assert rates.drain(torch.tensor([0, 50, 99]).numpy()).tolist() == pytest.approx(
        [0.4, 0.2, 0.004]
    )


# --- N as a step size -----------------------------------------------------------------------------


def long_steps(mapping: Mapping) -> LongSteps:
    return LongSteps(mapping, task=None, batches=None)


def test_a_step_size_is_what_the_mapping_says_of_the_loss():
    steps = long_steps(Linear(t=0.5))
    assert [steps.factor(loss, LossStats()) for loss in (0.2, 1.0, 1.6, 9.0)] == [1, 2, 3, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_scales_nothing(bad):
    steps = long_steps(Linear(t=0.5))
    assert steps.factor(bad, LossStats()) == 1
    assert steps.stats.count == 0


def test_a_step_size_knows_where_the_run_is():
    of_run = LossStats()
    steps = long_steps(Trace(counts=(4, 2, 5)))
    found = []
    for of_run.index in (2, 0, 1):
        found.append(steps.factor(1.0, of_run))
    assert found == [5, 4, 2]
    steps, found = long_steps(LinearRepeats(high=5, low=1)), []
    for of_run.progress in (0.0, 0.5, 0.99):
        found.append(steps.factor(1.0, of_run))
    assert found == [5, 3, 1]
