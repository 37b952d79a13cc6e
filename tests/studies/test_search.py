"""Searches: where they look, what they make of runs, and how they go on after a kill."""

from __future__ import annotations

import json
import sys
from itertools import product
from math import inf, log10, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, loguniform, uniform

from repeatlab import tasks
from repeatlab.analysis.frames import load
from repeatlab.cli import ROOT, main
from repeatlab.core.schema import ConfigError, parse, read_yaml
from repeatlab.cost import Ledger, cost_units
from repeatlab.store.records import Store
from repeatlab.studies.scheduling import Outcome
from repeatlab.studies.search import Search, run_search, search_with
from repeatlab.studies.search_space import Choices, Range
from repeatlab.studies.study import StudyError
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

LR = {"low": 0.01, "high": 1.0, "log": True}
GRID = {"choices": [0.01, 0.03, 0.1, 0.3, 1.0]}
FIELDS = {
    "name": "small",
    "task": {"name": "supervised", "width": 4, "lr": 0.05},
    "space": {"task.lr": LR},
    "sampler": {"name": "random", "trials": 3},
    "metric": "loss",
    "max_updates": 20,
    "evaluation": {"every": 20},
}
LINEAR = {"mapping": {"name": "linear", "t": 1.0}}


def search_of(**changes) -> Search:
    return parse(Search, FIELDS | changes)


def grid(*choices, **changes) -> Search:
    space, sampler = {"task.lr": {"choices": choices}}, {"name": "grid"}
    return search_of(space=space, sampler=sampler, **changes)


class Maker:
    """Makes runs whose metric is a closed form of their configuration; None is a divergence.

    Attributes:
        made: The (rate, seed) of every run made.
        rounds: How many runs were asked for at a time.
        most: After so many runs it is killed.
    """

    def __init__(self, value_of, store: Store, most: float = inf) -> None:
        self.value_of, self.store, self.most = value_of, store, most
        self.made, self.rounds = [], []

    def __call__(self, configs):
        self.rounds.append(len(configs))
        outcomes = {}
        for run_id, config in configs.items():
            if len(self.made) >= self.most:
                raise KeyboardInterrupt
            self.made.append((config.task.lr, config.seed))
            value = self.value_of(config)
            if isinstance(value, str):
                outcomes[run_id] = Outcome(value)
                continue
            run = self.store.run(config.task.name, run_id)
            writer = self.store.begin(run, config.to_json(), {})
            ledger = Ledger(updates=20, forward_samples=100, seconds=0.5, holdout_updates=3)
            final = value if isinstance(value, dict) else {"validation.loss": value}
            details = {"update": 7} if value is None else {"final": final}
            status = "diverged" if value is None else "complete"
            writer.finish(status, {"ledger": ledger.to_json(), **details})
        return outcomes


def valley(config: RunConfig) -> float:
    """A loss that is least at lr = 0.1, and larger with every seed."""
    return (log10(config.task.lr) + 1) ** 2 + config.seed


def found(search: Search, path, value_of=valley, most=inf):
    """Return what a search by closed form finds, and what made its runs."""
    make = Maker(value_of, Store(path), most)
    return search_with(search, make.store, make), make


def rates(report) -> list[float]:
    return [trial.params["task.lr"] for trial in report.trials]


# --- where to look ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "value", "end"),
    [
        # 2 % of the range from 0.01 to 1 on a log scale is a factor of 1.0965.
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
def test_what_counts_as_an_end(dimension, value, end):
    assert dimension.end_at(value) == end


# --- samplers ---------------------------------------------------------------------------------

RANGES = {"task.lr": LR, "method.mapping.t": {"low": 0.5, "high": 2}}


def test_a_grid_is_every_combination_once(tmp_path):
    space = {"task.lr": {"choices": [0.1, 0.2]}, "task.batch_size": {"choices": [16, 32, 64]}}
    report, _ = found(search_of(space=space, sampler={"name": "grid"}), tmp_path)
    points = [tuple(trial.params.values()) for trial in report.trials[:6]]
    assert points == list(product((0.1, 0.2), (16, 32, 64)))


def test_a_best_value_at_an_end_is_a_warning(tmp_path):
    report, _ = found(grid(0.2, 0.4), tmp_path)
    assert report.warnings == [
        "the best task.lr, 0.2, lies at the lower end of what was searched (0.2, 0.4): look further"
        " there"
    ]
    assert f"warning: {report.warnings[0]}" in str(report)
    assert found(grid(0.05, 0.1, 0.2), tmp_path)[0].warnings == []


def test_draws_are_uniform_on_their_scale():
    space = {
        "task.lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "method.mapping.t": {"low": 0.5, "high": 2},
        "method.mapping.max_repeats": {"low": 2, "high": 6, "kind": "int"},
        "task.batch_size": {"choices": [16, 32]},
    }
    sampler = {"name": "random", "trials": 1000}
    points = search_of(space=space, method=LINEAR, sampler=sampler).points
    drawn = {path: [point[path] for point in points] for path in space}
    assert {type(value) for value in drawn["method.mapping.max_repeats"]} == {int}
    assert kstest(drawn["task.lr"], loguniform(1e-4, 1e-1).cdf).pvalue > 0.001
    assert kstest(drawn["method.mapping.t"], uniform(0.5, 1.5).cdf).pvalue > 0.001
    for path, values in (
        ("method.mapping.max_repeats", range(2, 7)),
        ("task.batch_size", (16, 32)),
    ):
        counts = [drawn[path].count(value) for value in values]
        assert sum(counts) == 1000
        assert chisquare(counts).pvalue > 0.001


def test_whole_numbers_on_a_log_scale_are_drawn_by_their_share_of_it():
    """A number n stands for n - 1/2 to n + 1/2, of which the least and the largest have all."""
    space = {"method.mapping.max_repeats": {"low": 2, "high": 6, "kind": "int", "log": True}}
    sampler = {"name": "random", "trials": 2000}
    points = search_of(space=space, method=LINEAR, sampler=sampler).points
    drawn = [point["method.mapping.max_repeats"] for point in points]
    shares = np.diff(np.log(np.arange(1.5, 7)))
    counts = [drawn.count(value) for value in range(2, 7)]
    assert chisquare(counts, 2000 * shares / shares.sum()).pvalue > 0.001


@given(st.integers(0, 50), st.integers(1, 12), st.integers(1, 12))
def test_random_trials_depend_on_the_seed_and_their_number_only(seed, few, more):
    def points(trials):
        sampler = {"name": "random", "trials": trials}
        return search_of(space=RANGES, method=LINEAR, seed=seed, sampler=sampler).points

    assert points(few + more)[:few] == points(few)
    rates_ = [point["task.lr"] for point in points(few + more)]
    assert len(set(rates_)) == few + more


# --- from a point to a run --------------------------------------------------------------------


def test_a_point_is_the_run_that_it_describes():
    point = {
        "task.lr": 0.2,
        "task.batch_size": 32,
        "method.mapping.t": 0.7,
        "method.mapping.max_repeats": 3,
        "method.schedule.final": 0.1,
    }
    search = search_of(
        method=LINEAR | {"schedule": {"name": "cosine"}},
        space={path: {"choices": [value, 2 * value]} for path, value in point.items()},
        sampler={"name": "grid"},
        seeds=5,
        threads=2,
        device="cpu",
    )
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
    assert search.configs(point)[4] == expected
    assert search.configs(point)[4].run_id == expected.run_id


def test_calibration_can_be_searched_and_a_threshold_can_compete_with_auto():
    space = {"method.mapping.t": {"choices": ["auto", 0.5]}}
    search = search_of(method=LINEAR, space=space, calibration={"updates": 8})
    auto, given_ = (search.configs({"method.mapping.t": t})[0] for t in ("auto", 0.5))
    assert auto.calibration.updates == 8
    assert given_.calibration is None
    target = {"calibration.target_repeats": {"low": 1.5, "high": 3}}
    search = search_of(method={"mapping": {"name": "linear", "t": "auto"}}, space=target)
    (config,) = search.configs({"calibration.target_repeats": 2.5})
    assert config.calibration.target_repeats == 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, "name: the search name '../x' must consist of"),
        ({"sampler": {"name": "gird"}}, "sampler: unknown sampler 'gird'; did you mean 'grid'?"),
        ({"sampler": {"name": "random"}}, "sampler.trials: Field required"),
        ({"sampler": {"name": "grid"}}, "space.task.lr: must be {choices: [...]} for a grid"),
        ({"space": {}}, "space: Dictionary should have at least 1 item"),
        ({"space": {"task.lr": 0.1}}, "space.task.lr: must be a mapping with keys among high, kin"),
        ({"space": {"task.lr": {"low": 1, "high": 1}}}, "space.task.lr: low must be below high; n"),
        ({"space": {"task.lr": {"low": 2}}}, "space.task.lr.high: Field required"),
        ({"space": {"task.lr": LR | {"hi": 3}}}, "space.task.lr.hi: unknown key; did you mean 'hi"),
        (
            {"space": {"task.lr": {"low": 0, "high": 1, "log": True}}},
            "space.task.lr: low must be above 0 on a log scale; not 0",
        ),
        (
            {"space": {"task.batch_size": {"low": 1.5, "high": 4, "kind": "int"}}},
            "space.task.batch_size: low and high must be whole; not 1.5, 4",
        ),
        ({"space": {"task.lr": {"choices": [0.1]}}}, "space.task.lr.choices: Tuple should have at"),
        ({"space": {"task.lr": {"choices": [1, 1.0]}}}, "space.task.lr: choices must be different"),
        ({"space": {"lr": LR}}, "space.lr.[key]: String should match pattern '^(task|method|calib"),
        ({"space": {"max_updates": LR}}, "space.max_updates.[key]: String should match pattern"),
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
        ({"evaluation": {"test": True}}, "evaluation: must have test: false and validation in s"),
        ({"evaluation": {"splits": ["train"]}}, "evaluation: must have test: false and validation"),
        (
            {
                "method": {"mapping": {"name": "linear", "t": "auto"}},
                "space": {"method.mapping.max_repeats": {"low": 2, "high": 5, "kind": "int"}},
            },
            "space: with method.mapping.max_repeats = 2: calibration.target_repeats: must be less",
        ),
        ({"seeds": 0}, "seeds: must be greater than or equal to 1; not 0"),
        ({"metrik": 3}, "metrik: unknown key; did you mean 'metric'?"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ConfigError) as error:
        search_of(**changes)
    assert str(error.value).startswith(message)


# --- what is made of the runs -----------------------------------------------------------------


def test_the_value_is_the_mean_over_seeds_and_the_best_is_the_least(tmp_path):
    search = search_of(space={"task.lr": GRID}, sampler={"name": "grid"}, seeds=3)
    report, make = found(search, tmp_path)
    assert rates(report) == GRID["choices"]
    assert sorted(make.made) == list(product(GRID["choices"], range(3)))
    values = [(log10(rate) + 1) ** 2 + 1 for rate in GRID["choices"]]  # mean of 0, 1, 2 is 1
    assert [trial.value for trial in report.trials] == pytest.approx(values)
    assert report.best is report.trials[2]
    assert report.warnings == []


def test_the_cost_sums_the_ledgers_and_counts_a_shared_run_once(tmp_path):
    space, sampler = {"task.lr": {"choices": [0.1, 0.2]}}, {"name": "random", "trials": 8}
    report, make = found(search_of(space=space, sampler=sampler, seeds=2), tmp_path)
    assert set(rates(report)) == {0.1, 0.2}
    assert make.rounds == [4]
    spent = {name: value for name, value in report.cost.items() if value}
    assert spent == {
        "updates": 4 * 20,
        "forward_samples": 400,
        "seconds": 2.0,
        "holdout_updates": 4 * 3,
    }
    assert cost_units(report.cost, 2.0) == 400


@pytest.mark.parametrize("value", [nan, inf])
def test_a_metric_that_is_not_finite_is_no_value(tmp_path, value):
    report, _ = found(grid(0.1, 0.2, seeds=2), tmp_path, lambda c: value if c.seed else 0.5)
    assert [trial.value for trial in report.trials] == [None, None]
    assert report.trials[0].reason == f"the metric is {value} (seed 1)"
    assert report.best is None
    assert report.warnings == ["all trials diverged: there is no best one"]
    assert "best:" not in str(report)


def test_diverged_trials_are_told_from_complete_ones(tmp_path):
    def value(config):
        return {0.1: 1.0, 0.2: None}[config.task.lr] if config.seed else 0.5

    report, make = found(grid(0.1, 0.2, seeds=2), tmp_path, value)
    assert report.table["reason"].tolist() == ["", "diverged at update 7 (seed 1)"]
    assert report.best.value == 0.75
    stored = json.loads(json.dumps(make.store.read_study("small")))["found"]
    assert [trial["value"] for trial in stored["trials"]] == [0.75, None]


def test_a_failed_run_is_an_error_after_the_others_of_its_stage(tmp_path):
    def value(config):
        return "planted" if config.task.lr == 0.1 else 0.5

    with pytest.raises(StudyError, match=r"1 of 3 runs failed:\n  .*: planted$"):
        found(grid(0.05, 0.1, 0.2), tmp_path, value)
    report, make = found(grid(0.05, 0.1, 0.2), tmp_path)
    assert make.made == [(0.1, 0)]
    assert [trial.value for trial in report.trials] == [0.5, 0.0, 0.5]


def test_a_metric_that_the_task_has_not_is_named_and_costs_no_second_training(tmp_path):
    with pytest.raises(ConfigError, match="metric: unknown metric 'los'; did you mean 'loss'"):
        found(grid(0.1, 0.2, metric="los"), tmp_path)
    assert found(grid(0.1, 0.2), tmp_path)[1].made == []


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
    runs = load(tmp_path / "a", "small").done
    assert runs["id"].tolist() == [run for trial in report.trials for run in trial.runs]
    assert runs.groupby("method", sort=False)["validation.loss"].mean().tolist() == pytest.approx(
        [trial.value for trial in report.trials]
    )


def test_a_second_call_trains_nothing(tmp_path):
    first = run_search(search_of(), tmp_path, workers=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("supervised/*/*")}
    second = run_search(search_of(), tmp_path, workers=0)
    assert (second.trials, second.cost) == (first.trials, first.cost)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("supervised/*/*")}


def test_the_same_search_makes_the_same_trials_in_worker_processes(tmp_path):
    search = search_of(
        sampler={"name": "random", "trials": 4},
        method={"mapping": {"name": "linear", "t": "auto"}},
        calibration={"updates": 5},
    )
    here = run_search(search, tmp_path / "here", workers=0)
    there = run_search(search, tmp_path / "there", workers=2)
    assert here.trials == there.trials
    # Each with its calibration run
    assert len(list(tmp_path.glob("there/supervised/*/summary.json"))) == 8
    assert here.cost["updates"] == there.cost["updates"] == 4 * 20
    assert here.cost["calibration_updates"] == 4 * 5


@pytest.mark.parametrize("t", [1.0, "auto"])
def test_divergence_is_a_result_and_also_that_of_a_calibration_run(tmp_path, t):
    method = {"mapping": {"name": "linear", "t": t}}
    search = grid(0.05, 1e9, method=method, calibration={"updates": 10})
    report = run_search(search, tmp_path, workers=0)
    assert [trial.value is None for trial in report.trials] == [False, True]
    summaries = [json.loads(p.read_text()) for p in tmp_path.glob("supervised/*/summary.json")]
    (ended,) = {summary["update"] for summary in summaries if summary["status"] == "diverged"}
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
    search = grid(0.9, 0.1)
    with monkeypatch.context() as patch:
        patch.setitem(tasks.TASKS, "supervised", f"{__name__}:_Fails")
        with pytest.raises(StudyError, match=r"1 of 2 runs failed:\n  .*: RuntimeError: planted"):
            run_search(search, tmp_path, workers=0)
    assert [p.parent for p in tmp_path.glob("supervised/*/summary.json")] == [
        Store(tmp_path).run("supervised", search.configs({"task.lr": 0.1})[0].run_id).path
    ]
    report = run_search(search, tmp_path, workers=0)
    assert all(trial.value is not None for trial in report.trials)


# --- going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", [0, 5])
def test_a_killed_search_ends_as_if_it_had_not_been(tmp_path, killed_after):
    space = {"task.lr": LR, "task.optimizer.momentum": {"low": 0, "high": 0.9}}
    search = search_of(sampler={"name": "random", "trials": 8}, space=space)
    whole, _ = found(search, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        found(search, tmp_path / "killed", most=killed_after)
    resumed, make = found(search, tmp_path / "killed")
    assert resumed.trials == whole.trials
    assert len(make.made) == 8 - killed_after


def test_more_trials_go_on_from_those_there_are(tmp_path):
    before, _ = found(search_of(sampler={"name": "random", "trials": 5}), tmp_path)
    after, make = found(search_of(sampler={"name": "random", "trials": 9}), tmp_path)
    assert after.trials[:5] == before.trials
    assert (len(after.trials), len(make.made)) == (9, 4)


# --- the command ------------------------------------------------------------------------------

FILE = """
name: tiny
task: {{name: supervised, width: 4, lr: 5e-2}}
space: {{task.lr: {{low: {low}, high: 1e-1, log: true}}}}
sampler: {{name: random, trials: 2}}
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
    for _ in range(2):
        arguments = ("search", path, "--runs", tmp_path / "runs", "--workers", 0)
        code, out, _ = _call(monkeypatch, capsys, *arguments)
        assert code == 0
        stored = Store(tmp_path / "runs").read_study("tiny")["found"]
        header, first, second, *rest = out.splitlines()
        assert header.split() == ["task.lr", "validation.loss", "reason"]
        for line, trial in zip((first, second), stored["trials"], strict=True):
            shown = [f"{trial['params']['task.lr']:.4g}", f"{trial['value']:.4g}"]
            assert line.split()[1:] == shown
        best = min(stored["trials"], key=lambda trial: trial["value"])
        assert rest[0].startswith(f"best: task.lr = {best['params']['task.lr']} with ")
        assert rest[-1] == "cost: 2 trials, 20 updates, 1280 samples forward"
    code, out, _ = _call(monkeypatch, capsys, "status", "tiny", "--runs", tmp_path / "runs")
    assert (code, "complete" in out) == (0, True)


def test_the_command_names_file_and_field_and_writes_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(FILE.format(low="2e-1"))
    code, out, err = _call(monkeypatch, capsys, "search", path, "--runs", tmp_path / "runs")
    assert (code, out) == (2, "")
    assert err == f"Error: {path}: space.task.lr: low must be below high; not 0.2, 0.1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("params/search/*.yaml")), ids=lambda p: p.stem)
def test_every_search_file_is_valid(path):
    search = parse(Search, read_yaml(path), source=str(path))
    assert search.name == f"search-{path.stem}"
