"""Searches: where they look, what they make of runs, and how they go on after a kill."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import product
from math import inf, log10, nan

import numpy as np
import optuna
import pytest
import torch
from scipy.stats import chisquare, kstest, loguniform, randint, uniform

from repeatlab import tasks
from repeatlab.cli import ROOT, main
from repeatlab.core.files import StoreError
from repeatlab.core.schema import ConfigError, parse, read_yaml
from repeatlab.cost import Ledger
from repeatlab.store.records import Store
from repeatlab.studies.search import Choices, Range, Search, SearchReport, Trial, run_search
from repeatlab.studies.search.report import cost_of
from repeatlab.studies.search.strategies import TPE, CoarseToFine, Grid, Random
from repeatlab.studies.study import StudyError
from repeatlab.training.config import RunConfig
from repeatlab.training.loop import train

LR = {"low": 0.01, "high": 1.0, "log": True}
FIELDS = {
    "name": "small",
    "task": {"name": "supervised", "width": 4, "lr": 0.05},
    "space": {"task.lr": LR},
    "sampler": "random",
    "trials": 3,
    "metric": "loss",
    "max_updates": 20,
    "evaluation": {"every": 20},
}
LINEAR = {"mapping": {"name": "linear", "t": 1.0}}


def search_of(**changes) -> Search:
    fields = FIELDS | changes
    return Search.of(**{name: value for name, value in fields.items() if value is not None})


@pytest.fixture
def objective(monkeypatch):
    """Replace training by a closed form; return the (lr, seed) of every run that was made."""
    made = []

    def set_to(value_of):
        def fake(config, runs, after=None):
            config, store = RunConfig.from_json(config), Store(runs)
            made.append((config.task.lr, config.seed))
            writer = store.begin(store.run(config.task.name, config.run_id), config.to_json(), {})
            ledger = Ledger(updates=20, forward_samples=100, seconds=0.5, holdout_updates=3)
            value = value_of(config)
            details = {"final": {"validation.loss": value}} if value is not None else {"update": 7}
            status = "diverged" if value is None else "complete"
            writer.finish(status, {"ledger": ledger.to_json(), **details})

        monkeypatch.setattr("repeatlab.studies.search.execution.train_job", fake)
        return made

    return set_to


def valley(config: RunConfig) -> float:
    """A loss that is least at lr = 0.1, and larger with every seed."""
    return (log10(config.task.lr) + 1) ** 2 + config.seed


def runs_of(report) -> list[str]:
    return [run for trial in report.trials for run in trial.runs]


def tried(report) -> list[tuple]:
    return [(trial.params, trial.status, trial.value) for trial in report.trials]


# --- where to look ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"low": 0, "high": 1, "points": 5}, [0, 0.25, 0.5, 0.75, 1]),
        ({"low": 0.001, "high": 10, "log": True, "points": 5}, [0.001, 0.01, 0.1, 1, 10]),
        ({"low": 1, "high": 5, "kind": "int", "points": 3}, [1, 3, 5]),
        ({"low": 1, "high": 8, "kind": "int", "log": True, "points": 4}, [1, 2, 4, 8]),
    ],
)
def test_a_grid_has_equal_distances_or_equal_factors(fields, values):
    grid = parse(Range, fields).grid()
    assert grid == values
    assert {type(value) for value in grid} == {int if "kind" in fields else float}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"low": -2, "high": 3}, uniform(-2, 5)),
        ({"low": 1e-4, "high": 10, "log": True}, loguniform(1e-4, 10)),
    ],
)
def test_draws_are_uniform_on_the_scale(fields, expected):
    draws, range_ = np.random.default_rng(0), parse(Range, fields)
    values = [range_.draw(draws) for _ in range(4000)]
    assert kstest(values, expected.cdf).pvalue > 0.001
    assert {type(value) for value in values} == {float}


def test_whole_numbers_are_equally_likely_or_on_a_log_scale_by_their_share():
    draws = np.random.default_rng(0)
    even = Range(low=2, high=6, kind="int")
    counts = Counter(even.draw(draws) for _ in range(5000))
    assert sorted(counts) == [2, 3, 4, 5, 6]
    assert chisquare([counts[n] for n in sorted(counts)]).pvalue > 0.001
    counts = Counter(even.model_copy(update={"log": True}).draw(draws) for _ in range(5000))
    shares = np.diff(np.log([1.5, 2.5, 3.5, 4.5, 5.5, 6.5])) / np.log(6.5 / 1.5)
    observed = [counts[n] for n in randint(2, 7).support()[0] + np.arange(5)]
    assert chisquare(observed, 5000 * shares).pvalue > 0.001


@pytest.mark.parametrize(
    ("fields", "value", "ends"),
    [
        (LR, 0.1, (0.1 / 3, 0.1 * 3)),
        (LR, 0.02, (0.01, 0.06)),
        ({"low": 0, "high": 6}, 2, (1, 3)),
        ({"low": 0, "high": 6}, 0, (0, 1)),
        ({"low": 1, "high": 10, "kind": "int"}, 4, (3, 5)),
        ({"low": 1, "high": 3, "kind": "int"}, 2, (2, 2)),
        ({"low": 1, "high": 64, "kind": "int", "log": True}, 8, (3, 24)),
    ],
)
def test_the_fine_range_lies_around_the_best_and_inside_the_range(fields, value, ends):
    near = parse(Range, fields).around(value, 3.0)
    assert (near.low, near.high) == pytest.approx(ends)
    draws = np.random.default_rng(0)
    assert all(ends[0] <= near.draw(draws) <= ends[1] * (1 + 1e-12) for _ in range(100))


@pytest.mark.parametrize(
    ("dimension", "value", "end"),
    [
        # 2 % of the range from 0.01 to 1 on a log scale is a factor of 1.0965.
        (Range(**LR), 0.01, "lower"),
        (Range(**LR), 0.0109, "lower"),
        (Range(**LR), 0.011, None),
        (Range(**LR), 0.91, None),
        (Range(**LR), 0.92, "upper"),
        (Range(low=0, high=10), 0.2, "lower"),
        (Range(low=0, high=10), 0.21, None),
        (Range(low=1, high=5, kind="int"), 5, "upper"),
        (Range(low=1, high=5, kind="int"), 4, None),
        (Choices(choices=(64, 16, 32)), 16, "lower"),
        (Choices(choices=(64, 16, 32)), 64, "upper"),
        (Choices(choices=(64, 16, 32)), 32, None),
        (Choices(choices=("a", "b")), "a", None),
        (Choices(choices=(True, False)), True, None),
    ],
)
def test_what_counts_as_the_boundary(dimension, value, end):
    assert dimension.boundary(value) == end


# --- strategies -------------------------------------------------------------------------------

SPACE = {"x": Range(low=-5.0, high=5.0), "y": Range(low=0.001, high=1000.0, log=True)}


def _play(strategy, trials, *, seed=0, direction="minimize", lost=()):
    """Return the trials of a search whose value is a bowl with its least at x = 2, y = 10."""
    sign = 1 if direction == "minimize" else -1
    study = optuna.create_study(direction=direction)
    distributions = {path: dimension.distribution() for path, dimension in SPACE.items()}
    for numbers in strategy.rounds(trials):
        for number in numbers:
            point = strategy.propose(
                number, SPACE, seed=seed, trials=study.trials, direction=direction
            )
            running = optuna.trial.TrialState.RUNNING
            study.add_trial(
                optuna.create_trial(state=running, params=point, distributions=distributions)
            )
        for number in numbers:
            params = study.trials[number].params
            if number in lost:
                study.tell(number, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(
                    number, sign * (0.1 * (params["x"] - 2) ** 2 + (log10(params["y"]) - 1) ** 2)
                )
    return study.trials


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_a_grid_is_every_combination_once():
    space = {
        "a": Range(low=1, high=3, kind="int", points=3),
        "b": Choices(choices=("x", "y")),
    }
    points = [Grid().propose(n, space, seed=0, trials=[], direction="minimize") for n in range(6)]
    assert points == [{"a": a, "b": b} for a, b in product((1, 2, 3), "xy")]


def test_random_trials_depend_on_seed_and_number_only():
    def points(seed, numbers, trials=()):
        return [
            Random().propose(n, SPACE, seed=seed, trials=trials, direction="minimize")
            for n in numbers
        ]

    assert points(0, range(5))[::-1] == points(0, reversed(range(5)), _play(Random(), 3))
    assert len({str(point) for seed in (0, 1) for point in points(seed, range(5))}) == 10


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_fine_stage_stays_within_its_factor_of_the_best_coarse_trial(direction):
    trials = _play(CoarseToFine(coarse=0.4, factor=4.0), 20, direction=direction)
    coarse, fine = trials[:8], trials[8:]
    assert [t.params for t in coarse] == [t.params for t in _play(Random(), 8)]
    best = min(coarse, key=lambda t: abs(t.value)).params
    assert all(abs(t.params["x"] - best["x"]) <= 10 / 8 for t in fine)
    assert all(best["y"] / 4 <= t.params["y"] <= best["y"] * 4 for t in fine)
    assert len({t.params["y"] for t in fine}) == 12


def test_the_fine_stage_looks_everywhere_where_all_coarse_trials_were_lost():
    trials = _play(CoarseToFine(), 40, lost=range(20))
    assert [t.params for t in trials] == [t.params for t in _play(Random(), 40)]


def test_tpe_comes_nearer_than_chance():
    def distance(strategy, **options):
        runs = [_play(strategy, 40, seed=seed, **options)[20:] for seed in range(5)]
        return np.mean([abs(log10(t.params["y"]) - 1) for trials in runs for t in trials])

    chance = distance(Random())
    assert chance > 1  # the mean of |u - 1| over u from -3 to 3 is 5/3
    assert distance(TPE()) < chance / 2


def test_tpe_takes_lost_trials_for_the_worst():
    trials = _play(TPE(), 16)
    by_value = sorted(range(12), key=lambda number: trials[number].value)  # of random trials
    for lost, moves in ((by_value[-3:], False), (by_value[:3], True)):
        changed = _play(TPE(), 16, lost=lost)
        assert [t.params for t in changed[:12]] == [t.params for t in trials[:12]]
        assert (changed[12].params != trials[12].params) == moves


def test_tpe_knows_nothing_of_its_own_round():
    strategy = TPE(at_once=4, startup=4)
    assert strategy.rounds(10) == [range(4), range(4, 8), range(8, 10)]
    before = _play(strategy, 12)
    assert [t.params for t in _play(strategy, 12)] == [t.params for t in before]
    best = min(range(8), key=lambda number: before[number].value)
    changed = _play(strategy, 12, lost=[best])
    same = [a.params == b.params for a, b in zip(before, changed, strict=True)]
    following = 4 * (best // 4 + 1)
    assert all(same[:following])
    assert not all(same[following:])


# --- from a point to a run --------------------------------------------------------------------


def test_a_point_is_the_run_that_it_describes():
    search = search_of(
        method=LINEAR | {"schedule": {"name": "cosine"}},
        space={
            "task.lr": LR,
            "task.batch_size": {"choices": [32, 64]},
            "method.mapping.t": {"low": 0.1, "high": 2},
            "method.mapping.max_repeats": {"low": 2, "high": 5, "kind": "int"},
            "method.schedule.final": {"choices": [0.0, 0.1]},
        },
        threads=2,
        device="cpu",
    )
    point = {
        "task.lr": 0.2,
        "task.batch_size": 32,
        "method.mapping.t": 0.7,
        "method.mapping.max_repeats": 3,
        "method.schedule.final": 0.1,
    }
    expected = RunConfig.from_json(
        {
            "task": {"name": "supervised", "width": 4, "lr": 0.2, "batch_size": 32},
            "method": {
                "mapping": {"name": "linear", "t": 0.7, "max_repeats": 3},
                "schedule": {"name": "cosine", "final": 0.1},
            },
            "max_updates": 20,
            "seed": 4,
            "evaluation": {"every": 20, "test": False},
            "calibration": None,
            "device": "cpu",
            "threads": 2,
        }
    )
    assert search.config(point, seed=4) == expected
    assert search.config(point, seed=4).run_id == expected.run_id


def test_calibration_can_be_searched_and_a_threshold_can_compete_with_auto():
    search = search_of(
        method={"mapping": {"name": "linear", "t": 1.0}},
        space={
            "method.mapping.t": {"choices": ["auto", 0.5]},
            "method.mapping.max_repeats": {"choices": [4, 5]},
        },
        calibration={"updates": 8},
    )
    auto, given = (
        search.config({"method.mapping.t": t, "method.mapping.max_repeats": 4}, seed=0)
        for t in ("auto", 0.5)
    )
    assert auto.calibration.updates == 8
    assert given.calibration is None
    target = {"calibration.target_repeats": {"low": 1.5, "high": 3}}
    search = search_of(method={"mapping": {"name": "linear", "t": "auto"}}, space=target)
    config = search.config({"calibration.target_repeats": 2.5}, seed=0)
    assert config.calibration.target_repeats == 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, "name: the search name '../x' must consist of"),
        ({"sampler": "tpf"}, "sampler: unknown sampler 'tpf'; did you mean 'tpe'?"),
        ({"sampler": {"name": "tpe", "at_once": 0}}, "sampler: at_once must be at least 1, not 0"),
        (
            {"sampler": {"name": "coarse_to_fine", "factor": 1.0}},
            "sampler: factor must be a finite number above 1, not 1.0",
        ),
        (
            {"sampler": {"name": "coarse_to_fine", "coarse": 1.0}},
            "sampler: coarse must lie between 0 and 1, not 1.0",
        ),
        ({"trials": None}, "trials: must be given for the sampler random"),
        ({"sampler": "grid"}, "trials: a grid has as many trials as points; leave it out"),
        (
            {"sampler": "grid", "trials": None},
            "space.task.lr.points: must be given for a grid, and only for it",
        ),
        ({"space": {"task.lr": LR | {"points": 3}}}, "space.task.lr.points: must be given for a g"),
        ({"space": {}}, "space: Dictionary should have at least 1 item"),
        ({"space": {"task.lr": 0.1}}, "space.task.lr: must be {low: ..., high: ...} or {choices"),
        ({"space": {"task.lr": {"low": 1, "high": 1}}}, "space.task.lr: low must be below high, b"),
        ({"space": {"task.lr": {"low": 2}}}, "space.task.lr.high: Field required"),
        ({"space": {"task.lr": LR | {"hi": 3}}}, "space.task.lr.hi: unknown key; did you mean 'hi"),
        (
            {"space": {"task.lr": {"low": 0, "high": 1, "log": True}}},
            "space.task.lr: low must be above 0 on a log scale, not 0",
        ),
        (
            {"space": {"task.batch_size": {"low": 1.5, "high": 4, "kind": "int"}}},
            "space.task.batch_size: low and high must be whole where kind is int, not 1.5 and 4",
        ),
        (
            {"space": {"task.width": {"low": 1, "high": 3, "kind": "int", "points": 4}}},
            "space.task.width: points: 4 whole numbers of this range are not different",
        ),
        ({"space": {"task.lr": {"choices": [0.1]}}}, "space.task.lr.choices: Tuple should have at"),
        ({"space": {"task.lr": {"choices": [1, 1.0]}}}, "space.task.lr: choices must be different"),
        ({"space": {"lr": LR}}, "space.lr: must begin with one of task., method., calibration."),
        ({"space": {"task": LR}}, "space.task: must begin with one of task., method., calib"),
        ({"space": {"max_updates": LR}}, "space.max_updates: must begin with one of"),
        (
            {"space": {"task.lrr": LR}},
            "space: with task.lrr = 0.01: task.lrr: unknown key; did you mean 'lr'?",
        ),
        (
            {"space": {"task.lr.x": LR}},
            "space: with task.lr.x = 0.01: task.lr.x: lr is 0.05, which has no parts",
        ),
        (
            {"space": {"method.mapping.t": LR}},
            "space: with method.mapping.t = 0.01: method.mapping: must be a mapping with the key",
        ),
        (
            {"space": {"task.optimizer.momentum": {"low": 0, "high": 1}}},
            "space: with task.optimizer.momentum = 1.0: task.optimizer: momentum must be",
        ),
        (
            {"space": {"task.batch_size": {"low": 2, "high": 8}}},
            "space: with task.batch_size = 2.0: task.batch_size: must be a valid integer",
        ),
        (
            {
                "method": {"mapping": {"name": "uniform"}},
                "space": {
                    "method.mapping.low": {"low": 1, "high": 4, "kind": "int"},
                    "method.mapping.high": {"low": 3, "high": 5, "kind": "int"},
                },
            },
            "space: with method.mapping.low = 4, method.mapping.high = 3: method.mapping: low must",
        ),
        (
            {
                "method": {"mapping": {"name": "linear", "t": "auto"}},
                "space": {"method.mapping.max_repeats": {"low": 2, "high": 5, "kind": "int"}},
            },
            "space: with method.mapping.max_repeats = 2: calibration.target_repeats: must be less",
        ),
        (
            {"space": {"calibration.updates": {"low": 5, "high": 9, "kind": "int"}}},
            "space.calibration.updates: changes nothing in the run",
        ),
        ({"evaluation": {"test": True}}, "evaluation: test: a search never reads the test split"),
        (
            {"evaluation": {"splits": ["train"]}},
            "evaluation: splits: a search needs the validation",
        ),
        ({"seeds": 0}, "seeds: must be greater than or equal to 1; not 0"),
        ({"metrik": 3}, "metrik: unknown key; did you mean 'metric'?"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ConfigError) as error:
        search_of(**changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "acuracy"}, "metric: unknown metric 'acuracy'; did you mean 'accuracy'?"),
        (
            {"space": {"task.batch_size": {"choices": [8, 5000]}}},
            "space: with task.batch_size = 5000: task.batch_size: 5000 exceeds the 1079 samples",
        ),
        (
            {"space": {"task.dataset": {"choices": ["digits", "mnist"]}}},
            "nowhere",
        ),
    ],
)
def test_what_only_the_data_refuse_is_found_before_anything_is_made(
    tmp_path, monkeypatch, changes, message
):
    monkeypatch.setenv("REPEATLAB_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr("repeatlab.data.sources.urlopen", _no_network)
    with pytest.raises((ConfigError, OSError)) as error:
        run_search(search_of(**changes), tmp_path / "runs", workers=0)
    assert message in str(error.value)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_device_that_is_not_there_is_found_before_anything_is_made(tmp_path):
    device = "cuda" if torch.backends.mps.is_available() else "mps"  # no machine has both
    with pytest.raises(ConfigError, match=f"device: '{device}' is not available here"):
        run_search(search_of(device=device), tmp_path / "runs", workers=0)
    assert list((tmp_path / "runs").iterdir()) == []


def _no_network(*args, **kwargs):
    raise OSError("no network")


# --- what is made of the runs -----------------------------------------------------------------


def test_the_value_is_the_mean_over_seeds_and_the_best_is_the_least(tmp_path, objective):
    made = objective(valley)
    search = search_of(space={"task.lr": LR | {"points": 5}}, sampler="grid", trials=None, seeds=3)
    report = run_search(search, tmp_path, workers=0)
    rates = [10 ** (-2 + step / 2) for step in range(5)]
    assert [trial.params["task.lr"] for trial in report.trials] == pytest.approx(rates)
    assert sorted(made) == [(pytest.approx(rate), seed) for rate, seed in product(rates, range(3))]
    values = [(log10(rate) + 1) ** 2 + 1 for rate in rates]  # the mean of seeds 0, 1, 2 is 1
    assert [trial.value for trial in report.trials] == pytest.approx(values)
    assert report.best is report.trials[2]
    assert report.best.params == {"task.lr": 0.1}
    assert report.warnings == []


def test_the_direction_follows_the_metric():
    assert search_of(metric="loss").direction == "minimize"
    assert search_of(metric="accuracy").direction == "maximize"
    trials = [Trial(n, {"task.lr": 0.1}, "complete", value) for n, value in enumerate((1, 3, 3))]
    space = {"task.lr": Range(**LR)}
    assert SearchReport("m", "minimize", space, tuple(trials)).best.number == 0
    assert SearchReport("m", "maximize", space, tuple(trials)).best.number == 1


@pytest.mark.parametrize(("target", "end"), [(0.001, "lower"), (0.1, None), (10, "upper")])
def test_a_best_value_on_the_boundary_is_warned_of(tmp_path, objective, target, end):
    objective(lambda config: abs(log10(config.task.lr / target)))
    search = search_of(space={"task.lr": LR | {"points": 5}}, sampler="grid", trials=None)
    report = run_search(search, tmp_path, workers=0)
    expected = [] if end is None else [f"lies at the {end} end of what was searched (0.01 to 1)"]
    assert len(report.warnings) == len(expected)
    assert all(part in line for part, line in zip(expected, report.warnings, strict=True))
    stored = json.loads((tmp_path / "searches" / "small.json").read_text())
    assert stored["warnings"] == report.warnings
    assert all(f"warning: {line}" in str(report) for line in report.warnings)


def test_the_cost_sums_the_ledgers_and_counts_a_shared_run_once(tmp_path, objective):
    made = objective(valley)
    search = search_of(space={"task.lr": {"choices": [0.1, 0.2]}}, trials=8, seeds=2)
    report = run_search(search, tmp_path, workers=0)
    assert {trial.params["task.lr"] for trial in report.trials} == {0.1, 0.2}
    assert len(made) == 4
    assert report.trained == 4
    assert report.cost == {
        "runs": 4,
        "updates": 4 * 23,
        "forward_samples": 400,
        "backward_samples": 0,
        "scoring_samples": 0,
        "environment_steps": 0,
        "seconds": 2.0,
    }
    assert json.loads((tmp_path / "searches" / "small.json").read_text())["cost"] == report.cost


def test_the_cost_of_every_ledger_is_what_it_has_spent_besides_calibration():
    names = Ledger().to_json()
    ledger = {name: 10**place for place, name in enumerate(names)}
    cost = cost_of(ledger)
    for name in ("updates", "seconds"):
        assert cost[name] == ledger[name] + ledger[f"holdout_{name}"]
    for name in ("forward_samples", "backward_samples"):
        assert cost[name] == ledger[name] + ledger[f"holdout_{name}"]
    assert cost["scoring_samples"] == ledger["scoring_samples"]
    assert cost["environment_steps"] == ledger["environment_steps"]


def test_teachers_that_trials_share_count_once(tmp_path):
    method = {
        "distillation": {"teachers": 2, "updates": 7},
        "mapping": {"name": "threshold", "t": 1.0},
    }
    search = search_of(
        task={"name": "supervised", "model": "mlp", "width": 8, "augment": False},
        method=method,
        space={"method.mapping.t": {"choices": [0.5, 1.0, 2.0]}},
        sampler="grid",
        trials=None,
        seeds=1,
        max_updates=5,
    )
    cost = run_search(search, tmp_path, workers=0).cost
    assert (cost["runs"], cost["updates"]) == (5, 3 * 5 + 2 * 7)


@pytest.mark.parametrize("value", [nan, inf])
def test_a_metric_that_is_not_finite_is_no_value(tmp_path, objective, value):
    objective(lambda config: value if config.seed else 0.5)
    search = search_of(
        space={"task.lr": {"choices": [0.1, 0.2]}}, sampler="grid", trials=None, seeds=2
    )
    report = run_search(search, tmp_path, workers=0)
    assert tried(report)[0] == ({"task.lr": 0.1}, "diverged", None)
    assert report.trials[0].reason == f"the metric is {value} (seed 1)"
    assert report.best is None
    assert report.warnings == ["no trial is complete: there is no best one"]
    assert "best:" not in str(report)


def test_diverged_trials_are_kept_in_table_log_and_cost(tmp_path, objective):
    objective(lambda config: None if config.task.lr > 0.5 and config.seed else valley(config))
    search = search_of(space={"task.lr": LR | {"points": 3}}, sampler="grid", trials=None, seeds=2)
    report = run_search(search, tmp_path, workers=0)
    assert [trial.status for trial in report.trials] == ["complete", "complete", "diverged"]
    assert report.table["status"].tolist() == [
        "complete",
        "complete",
        "diverged at update 7 (seed 1)",
    ]
    assert report.cost["runs"] == 6
    assert report.best.number == 1
    log = optuna.load_study(
        study_name="small",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "searches" / "small.log"))
        ),
    )
    assert [trial.state.name for trial in log.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert log.trials[2].user_attrs["outcome"]["reason"] == "diverged at update 7 (seed 1)"


# --- real runs --------------------------------------------------------------------------------


def test_a_search_makes_ordinary_runs_and_never_reads_the_test_split(tmp_path):
    search = search_of(method=LINEAR, space={"method.mapping.t": {"low": 0.5, "high": 2}}, seeds=2)
    report = run_search(search, tmp_path / "a", workers=0)
    for trial in report.trials:
        values = []
        for seed, run_id in enumerate(trial.runs):
            config = {
                "task": FIELDS["task"],
                "method": {"mapping": {"name": "linear", "t": trial.params["method.mapping.t"]}},
                "max_updates": 20,
                "seed": seed,
                "evaluation": {"every": 20, "test": False},
            }
            run = train(RunConfig.from_json(config), tmp_path / "b")
            assert run.path.name == run_id
            evals = run.evals
            assert set(evals["split"]) == {"train", "validation"}
            last = evals.query("split == 'validation' and metric == 'loss' and update == 20")
            values.append(last["value"].item())
        assert trial.value == pytest.approx(np.mean(values), rel=1e-12)
    assert report.cost["updates"] == 3 * 2 * 20
    assert report.cost["forward_samples"] == 3 * 2 * 20 * 64


def test_a_second_call_trains_nothing(tmp_path):
    first = run_search(search_of(), tmp_path, workers=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("supervised/*/*")}
    second = run_search(search_of(), tmp_path, workers=0)
    assert (first.trained, second.trained) == (3, 0)
    assert tried(second) == tried(first)
    assert second.cost == first.cost
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("supervised/*/*")}


def test_the_same_search_makes_the_same_trials_in_worker_processes(tmp_path):
    search = search_of(
        sampler={"name": "tpe", "at_once": 2, "startup": 2},
        trials=5,
        method={"mapping": {"name": "linear", "t": "auto"}},
        calibration={"updates": 5},
    )
    here = run_search(search, tmp_path / "here", workers=0)
    there = run_search(search, tmp_path / "there", workers=2)
    assert tried(here) == tried(there)
    assert (
        len(list(tmp_path.glob("there/supervised/*/summary.json"))) == 10
    )  # each with its calibration run
    assert here.cost["runs"] == there.cost["runs"] == 10
    assert here.cost["updates"] == 5 * (20 + 5)


def test_divergence_is_a_result_and_also_that_of_a_calibration_run(tmp_path):
    fields = {
        "space": {"task.lr": {"choices": [0.05, 1e9]}},
        "sampler": "grid",
        "trials": None,
        "calibration": {"updates": 10},
    }
    for t in (1.0, "auto"):
        method = {"mapping": {"name": "linear", "t": t}}
        search = search_of(name=f"t-{t}", method=method, **fields)
        report = run_search(search, tmp_path, workers=0)
        assert [trial.status for trial in report.trials] == ["complete", "diverged"]
        (ended,) = {
            run.summary["update"]
            for run in map(Store(tmp_path).run, ["supervised"] * 2, report.trials[1].costs)
            if run.done
        }
        assert report.trials[1].reason == f"diverged at update {ended} (seed 0)"
        assert report.best.params == {"task.lr": 0.05}
        assert run_search(search, tmp_path, workers=0).cost == report.cost


class _Fails(tasks.load_task(tasks.TASKS["supervised"])):
    """The supervised task, but it breaks at its fifth update where the rate is above 0.5."""

    def step(self, batch, report, weights=None):
        if self.optimizer.param_groups[0]["lr"] > 0.5 and batch.index == 4:
            raise RuntimeError("planted")
        super().step(batch, report, weights)


def test_a_trial_that_failed_takes_no_other_down_and_is_made_again(tmp_path, monkeypatch):
    search = search_of(space={"task.lr": {"choices": [0.9, 0.1]}}, sampler="grid", trials=None)
    with monkeypatch.context() as patch:
        patch.setattr("repeatlab.training.loop.load_task", lambda target: _Fails)
        with pytest.raises(StudyError, match=r"1 of 2 trials failed:\n(?s:.*)Error: planted"):
            run_search(search, tmp_path, workers=0)
    stored = json.loads((tmp_path / "searches" / "small.json").read_text())
    assert [trial["status"] for trial in stored["trials"]] == ["failed", "complete"]
    assert stored["trials"][0]["reason"] == "RuntimeError: planted (seed 0)"
    assert stored["best"]["number"] == 1
    report = run_search(search, tmp_path, workers=0)
    assert report.trained == 1
    assert [trial.status for trial in report.trials] == ["complete", "complete"]


# --- going on ---------------------------------------------------------------------------------

STOPPED = ["random", "coarse_to_fine", {"name": "tpe", "at_once": 2, "startup": 3}]


@pytest.mark.parametrize("sampler", STOPPED)
@pytest.mark.parametrize("killed_after", [0, 5])
def test_a_killed_search_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, objective, sampler, killed_after
):
    made = objective(valley)
    from repeatlab.studies.search.execution import train_job as fake

    search = search_of(
        sampler=sampler,
        trials=8,
        space={"task.lr": LR, "task.optimizer.momentum": {"low": 0, "high": 0.9}},
    )
    whole = run_search(search, tmp_path / "whole", workers=0)
    made.clear()

    def kill(config, runs, after=None):
        if len(made) == killed_after:
            raise KeyboardInterrupt
        return fake(config, runs, after)

    with monkeypatch.context() as patch:
        patch.setattr("repeatlab.studies.search.execution.train_job", kill)
        with pytest.raises(KeyboardInterrupt):
            run_search(search, tmp_path / "killed", workers=0)
    resumed = run_search(search, tmp_path / "killed", workers=0)
    assert tried(resumed) == tried(whole)
    assert len(made) == 8
    assert resumed.trained == 8 - killed_after


@pytest.mark.parametrize("sampler", STOPPED)
def test_without_its_log_a_search_finds_its_runs_again(tmp_path, objective, sampler):
    made = objective(valley)
    search = search_of(sampler=sampler, trials=8)
    before = run_search(search, tmp_path, workers=0)
    (tmp_path / "searches" / "small.log").unlink()
    after = run_search(search, tmp_path, workers=0)
    assert tried(after) == tried(before)
    assert (len(made), after.trained) == (8, 0)


@pytest.mark.parametrize("sampler", STOPPED)
def test_more_trials_go_on_from_those_there_are(tmp_path, objective, sampler):
    made = objective(valley)
    before = run_search(search_of(sampler=sampler, trials=5), tmp_path, workers=0)
    after = run_search(search_of(sampler=sampler, trials=9), tmp_path, workers=0)
    assert tried(after)[:5] == tried(before)
    assert (len(after.trials), after.trained, len(made)) == (9, 4, 9)
    fewer = run_search(search_of(sampler=sampler, trials=5), tmp_path, workers=0)
    assert (tried(fewer), fewer.trained) == (tried(after), 0)


def test_another_search_of_the_same_name_is_refused(tmp_path, objective):
    made = objective(valley)
    run_search(search_of(), tmp_path, workers=0)
    made.clear()
    other = search_of(seed=1, space={"task.lr": LR | {"high": 2}})
    with pytest.raises(ConfigError, match=r"another search .* differs in seed, space: give"):
        run_search(other, tmp_path, workers=0)
    assert made == []


def test_a_torn_last_line_of_the_log_is_no_obstacle(tmp_path, objective):
    objective(valley)
    before = run_search(search_of(), tmp_path, workers=0)
    log = tmp_path / "searches" / "small.log"
    whole = log.read_bytes()
    log.write_bytes(whole + whole.splitlines()[-1][:20])
    after = run_search(search_of(trials=4), tmp_path, workers=0)
    assert tried(after)[:3] == tried(before)
    assert after.trained == 1
    assert run_search(search_of(trials=4), tmp_path, workers=0).trained == 0


def test_a_damaged_log_is_named(tmp_path, objective):
    objective(valley)
    run_search(search_of(), tmp_path, workers=0)
    log = tmp_path / "searches" / "small.log"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"garbage\n", *lines[1:]]))
    with pytest.raises(StoreError, match=r"small\.log cannot be read"):
        run_search(search_of(), tmp_path, workers=0)


# --- the command ------------------------------------------------------------------------------

FILE = """
name: tiny
task: {{name: supervised, width: 4, lr: 5e-2}}
space: {{task.lr: {{low: {low}, high: 1e-1, log: true}}}}
sampler: random
trials: 2
metric: loss
max_updates: 10
"""


def _call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["repeatlab", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, *capsys.readouterr()


def test_the_command_prints_trials_best_and_cost(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(FILE.format(low="1e-2"))
    for trained in (2, 0):
        arguments = ("search", path, "--runs", tmp_path / "runs", "--workers", 0)
        code, out, _ = _call(monkeypatch, capsys, *arguments)
        assert code == 0
        stored = json.loads((tmp_path / "runs" / "searches" / "tiny.json").read_text())
        header, first, second, *rest = out.splitlines()
        assert header.split() == ["trial", "task.lr", "validation.loss", "status"]
        for line, trial in zip((first, second), stored["trials"], strict=True):
            shown = [f"{trial['params']['task.lr']:.4g}", f"{trial['value']:.4g}", "complete"]
            assert line.split()[1:] == shown
        best = min(stored["trials"], key=lambda trial: trial["value"])
        assert rest[0].startswith(f"best: trial {best['number']} with validation.loss ")
        assert rest[1] == f"  task.lr = {best['params']['task.lr']}"
        assert rest[-1].startswith("cost: 2 trials, 2 runs, 20 updates, 1280 forward samples, ")
        assert rest[-1].endswith(f"({trained} runs trained now)")


def test_the_command_names_file_and_field_and_writes_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(FILE.format(low="2e-1"))
    code, out, err = _call(monkeypatch, capsys, "search", path, "--runs", tmp_path / "runs")
    assert (code, out) == (2, "")
    assert err == f"Error: {path}: space.task.lr: low must be below high, but 0.2 >= 0.1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("params/search/*.yaml")), ids=lambda p: p.stem)
def test_every_search_file_is_valid(path):
    search = parse(Search, read_yaml(path), source=str(path))
    assert search.name == f"search-{path.stem}"
