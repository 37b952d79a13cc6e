"""Runs in lock-step: each equal to the run alone, whatever happens to the others."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from repeatlab.cli import cli
from repeatlab.core.schema import parse
from repeatlab.core.signals import Interrupted, Stop
from repeatlab.store.records import Run, Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.lockstep import functional as functional_stack
from repeatlab.studies.lockstep import groups, plan, train_group
from repeatlab.studies.lockstep.functional import FunctionalStack
from repeatlab.studies.lockstep.kinds import STACKS, SupervisedStack, stack_of
from repeatlab.studies.lockstep.network import StackedMLP
from repeatlab.studies.lockstep.optimizers import ColumnOptimizer, StackedOptimizer
from repeatlab.studies.scheduling import with_needs
from repeatlab.studies.study import Study, run_studies
from repeatlab.tasks.models import mlp, small_cnn
from repeatlab.tasks.supervised import Supervised
from repeatlab.training import checkpoint
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.one_run import CheckpointPlan, Training
from repeatlab.training.prerequisites import prerequisites

T = 23
METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "cosine": {"schedule": {"name": "cosine"}},
    "warm_up": {"schedule": {"name": "cosine", "warm_up": 0.2}},
    "fixed3": {"mapping": {"name": "constant", "repeats": 3}},
    "random": {"mapping": {"name": "uniform"}},
    "threshold": {"mapping": {"name": "threshold", "t": "auto"}},
    "linear": {"mapping": {"name": "linear", "t": 0.7}},
    "control_limit": {"mapping": {"name": "control_limit", "window": 4, "k": 0.1}},
    "zscore": {"mapping": {"name": "zscore", "window": 4}},
    "until": {"mapping": {"name": "until", "t": 2.0, "max_repeats": 3}},
    "ramp": {"mapping": {"name": "ramp", "high": 3}},
    "shuffled": {"mapping": {"name": "trace", "of": "random", "control": "windowed", "window": 3}},
    "spaced": {"mapping": {"name": "trace", "of": "random", "control": "spaced", "gap": 2}},
    "step_size": {"mapping": {"name": "linear", "t": 0.7}, "apply": "step_size"},
    "fresh_views": {"mapping": {"name": "constant", "repeats": 2}, "fresh_views": True},
}


def study(**fields: Any) -> Study:
    """Return a study of MLPs that take no time."""
    task = {"name": "supervised", "model": "mlp", "width": 8, "batch_size": 16, "lr": 0.1}
    return Study.of(
        **{
            "name": "small",
            "tasks": {"digits": task | fields.pop("task", {})},
            "methods": {name: METHODS[name] for name in fields.pop("methods", METHODS)},
            "seeds": 2,
            "max_updates": T,
            "evaluation": {"every": 10},
            "calibration": {"updates": 8},
            "device": "cpu",
            **fields,
        }
    )


def configs(**fields: Any) -> list[RunConfig]:
    """Return the runs of such a study, with those that they need."""
    return list(with_needs(p.config for p in study(**fields).planned()).values())


def changed(config: RunConfig, **task: Any) -> RunConfig:
    """Return the run with other settings of its task."""
    fields = config.to_json()
    return parse(RunConfig, fields | {"task": fields["task"] | task})


def at(store: Path, config: RunConfig) -> Run:
    return Store(store).run(config.task.name, config.run_id)


def assert_same(one: Run, other: Run) -> None:
    """Every N, rate and count equal; losses and metrics to float tolerance."""
    assert one.status == other.status
    exact = ["update", "fresh_batch", "repeat", "repeats", "lr"]
    assert one.updates[exact].equals(other.updates[exact])
    assert one.updates["loss"].to_numpy() == pytest.approx(other.updates["loss"], rel=1e-5)
    evals, others = one.evals, other.evals
    timeless = [c for c in evals if "seconds" not in c and c != "value"]
    assert evals[timeless].equals(others[timeless])
    assert evals["value"].to_numpy() == pytest.approx(others["value"], rel=1e-4, abs=1e-5)
    assert one.config == other.config
    ledgers = [
        {k: v for k, v in run.summary["ledger"].items() if "seconds" not in k}
        for run in (one, other)
    ]
    assert ledgers[0] == ledgers[1]
    assert one.summary["final"].keys() == other.summary["final"].keys()


def run_all(runs: list[RunConfig], store: Path, **options: Any) -> dict[str, str | None]:
    """Train all in lock-step, round by round, and return how they ended."""
    outcomes: dict[str, str | None] = {}
    for round_ in groups(runs):
        for group in round_:
            outcomes |= train_group(group, store, **options)
    return outcomes


# --- equal to one by one --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Path, Path, list[RunConfig]]:
    """Every method, in lock-step and one by one."""
    runs = configs()
    together, alone = tmp_path_factory.mktemp("together"), tmp_path_factory.mktemp("alone")
    outcomes = run_all(runs, together)
    assert outcomes == {config.run_id: None for config in runs}
    for config in runs:
        train(config, alone)
    return together, alone, runs


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_what_it_is_alone(stores, method):
    together, alone, _ = stores
    for planned in study().planned():
        if planned.method == method:
            assert_same(at(together, planned.config), at(alone, planned.config))


def test_n_varies_and_the_store_says_how_the_runs_were_made(stores):
    together, alone, runs = stores
    counts = [at(together, config).updates["repeats"].max() for config in runs]
    assert max(counts) > 1 == min(counts)
    ((first,), (second,)) = groups(runs)
    for group in (first, second):
        noted = {at(together, config).environment["lockstep"] for config in group}
        assert noted == {len(group)}
    assert all("lockstep" not in at(alone, config).environment for config in runs)
    assert not list(together.glob("*/*/checkpoint*.pt"))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd", "weight_decay": 0.01},
        {"name": "nesterov", "weight_decay": 0.01},
        {"name": "adam", "weight_decay": 0.01},
        {"name": "adamw"},
    ],
    ids=lambda optimizer: optimizer["name"],
)
def test_other_optimizers_and_label_noise(tmp_path, optimizer):
    task = {"optimizer": optimizer, "lr": 0.01, "label_noise": 0.2, "augment": False}
    check_alone(task, tmp_path, seeds=1)


def test_arms_whose_images_are_split_by_their_seeds(tmp_path):
    """Two seeds in one group train, and are validated, on images of their own."""
    check_alone({"split": "by_seed"}, tmp_path, seeds=2)


def check_alone(task: dict[str, Any], tmp_path, *, seeds: int) -> None:
    runs = configs(task=task, methods=["standard", "cosine", "linear", "random"], seeds=seeds)
    assert [len(group) for round_ in groups(runs) for group in round_] == [4 * seeds]
    run_all(runs, tmp_path / "together")
    for config in runs:
        alone = train(config, tmp_path / "alone")
        assert_same(at(tmp_path / "together", config), alone)
        noise = at(tmp_path / "together", config).summary["label_noise"]
        assert noise == pytest.approx(alone.summary["label_noise"])


AGENT = {
    "name": "reinforcement",
    "hidden": [6],
    "batch_size": 8,
    "lr": 0.01,
    "learning_starts": 20,
    "target_every": 4,
    "evaluation_episodes": 2,
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"driver": "td_error", "target_clock": "fresh_batches", "epsilon_clock": "updates"},
        # Steps in a row, and transitions that overwrite others.
        {"train_frequency": 3, "capacity": 40, "epsilon_steps": 30},
    ],
    ids=["huber", "td_error", "several steps"],
)
def test_agents_are_what_they_are_alone(tmp_path, fields):
    methods = {
        "standard": {},
        "linear": {"schedule": {"name": "linear"}},
        "random": {"mapping": {"name": "uniform"}},
        "mapped": {"mapping": {"name": "linear", "t": 0.1}},
        "fresh": {"mapping": {"name": "constant", "repeats": 3}, "apply": "fresh_samples"},
    }
    runs = [
        p.config
        for p in Study.of(
            name="agents",
            tasks={"agent": AGENT | fields},
            methods=methods,
            seeds=2,
            max_updates=60,
            evaluation={"every": 25},
            device="cpu",
        ).planned()
    ]
    assert [len(group) for round_ in groups(runs) for group in round_] == [10]
    run_all(runs, tmp_path / "together")
    for config in runs:
        assert_same(at(tmp_path / "together", config), train(config, tmp_path / "alone"))
    counts = [at(tmp_path / "together", config).updates["repeats"].max() for config in runs]
    assert max(counts) > 1


def test_an_arm_that_diverges_or_ends_earlier_leaves_and_the_others_go_on(tmp_path):
    normal = configs(methods=["standard", "linear", "random"], seeds=1)
    wild = changed(normal[0], lr=1e18)
    short = normal[0].model_copy(update={"max_updates": 9})
    runs = [normal[0], wild, *normal[1:], short]
    assert train_group(runs, tmp_path / "together") == {config.run_id: None for config in runs}
    for config in runs:
        alone = train(config, tmp_path / "alone")
        if config is not wild:
            assert_same(at(tmp_path / "together", config), alone)
            assert alone.status == {"status": "complete"}
    found, expected = at(tmp_path / "together", wild), at(tmp_path / "alone", wild)
    assert found.status["status"] == expected.status["status"] == "diverged"
    assert found.status["update"] == expected.status["update"] < T
    assert len(found.updates) == len(expected.updates)


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_early_stopping_ends_one_arm_alone(best, tmp_path):
    rule = {"patience": 2, "min_delta": 0.3, "restore_best": best}
    stopping = {"every": 3, "early_stopping": rule}
    runs = configs(methods=["standard", "random", "cosine", "fixed3"], evaluation=stopping, seeds=1)
    run_all(runs, tmp_path / "together")
    lengths = set()
    for config in runs:
        found, alone = at(tmp_path / "together", config), train(config, tmp_path / "alone")
        assert_same(found, alone)
        lengths.add(len(found.updates))
        stopped, expected = (run.summary["early_stopping"] for run in (found, alone))
        assert stopped["best_update"] == expected["best_update"] < len(found.updates)
        assert stopped.get("restored_update") == (stopped["best_update"] if best else None)
    assert min(lengths) < T


def test_nothing_of_an_agent_or_classifier_is_replaced(tmp_path, monkeypatch):
    """What lock-step does in a task's place it does in a subclass, or in what stands for it."""
    tasks = []
    end = Training.end
    monkeypatch.setattr(
        Training, "end", lambda self, error=None: (tasks.append(self.task), end(self, error))[1]
    )
    names = ["standard", "cosine", "random", "fixed3"]
    agents = {"tasks": {"agent": AGENT}, "max_updates": 6, "evaluation": {"every": 3}}
    for runs in (configs(methods=names, seeds=1), configs(methods=names, seeds=1, **agents)):
        run_all(runs, tmp_path)
    assert {type(task).__name__ for task in tasks} == {"Supervised", "AgentInStep"}
    for task in tasks:
        assert not [name for name in vars(task) if callable(getattr(type(task), name, None))]


def test_agents_that_go_back_to_their_best_weights_are_tested_with_them(tmp_path):
    """All end after the same update, and are tested one after another."""
    rule = {"patience": 99, "metric": "return", "mode": "max", "restore_best": True}
    # Sizes at which the products are those of runs alone to the bit.
    agent = AGENT | {"hidden": [120, 84], "batch_size": 32, "evaluation_episodes": 20}
    planned = Study.of(
        name="agents",
        tasks={"agent": agent},
        methods={f"fixed{n}": {"mapping": {"name": "constant", "repeats": n}} for n in (1, 2, 3)},
        seeds=2,
        max_updates=60,
        evaluation={"every": 10, "early_stopping": rule},
        device="cpu",
    ).planned()
    runs = [p.config for p in planned]
    run_all(runs, tmp_path / "together")
    back = 0
    for config in runs:
        found, alone = at(tmp_path / "together", config), train(config, tmp_path / "alone")
        assert_same(found, alone)
        assert found.summary["final"] == alone.summary["final"]
        assert found.summary["state_sha256"] == alone.summary["state_sha256"]
        back += found.summary["early_stopping"]["restored_update"] < 60
    assert back > 1  # of several arms the best weights are not the last


def test_a_run_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    runs = configs(methods=["standard", "cosine", "fixed3", "random"], seeds=1)
    broken = runs[2].run_id
    pause = Training.pause

    def failing(self: Training) -> None:
        pause(self)
        if self.config.run_id == broken:
            raise OSError("no space left")

    monkeypatch.setattr(Training, "pause", failing)
    outcomes = run_all(runs, tmp_path)
    assert outcomes.pop(broken) == "OSError: no space left"
    assert set(outcomes.values()) == {None}
    assert at(tmp_path, runs[2]).status == {"status": "failed", "error": "OSError: no space left"}
    monkeypatch.undo()
    for config in runs:
        alone = train(config, tmp_path / "alone")
        if config.run_id != broken:
            assert_same(at(tmp_path, config), alone)


def test_an_arm_s_seconds_are_its_share_of_the_time(tmp_path):
    runs = configs(methods=["standard", "cosine", "fixed3", "random"], seeds=2)
    start = time.perf_counter()
    run_all(runs, tmp_path)
    passed = time.perf_counter() - start
    seconds = [at(tmp_path, config).updates["seconds"] for config in runs]
    assert all(s.is_monotonic_increasing and s.iloc[0] > 0 for s in seconds)
    assert 0 < sum(s.iloc[-1] for s in seconds) < passed


# --- tasks of any network -------------------------------------------------------------------------

# Of each kind: the task, its updates and how many runs of it are compared.
GENERAL: dict[str, tuple[dict[str, Any], int, int]] = {
    "cnn": ({"name": "supervised", "width": 4, "batch_size": 16, "lr": 0.02}, 200, 4),
    "vae": (
        {
            "name": "unsupervised",
            "width": 4,
            "latent": 3,
            "batch_size": 16,
            "fid_samples": 20,
        },
        60,
        3,
    ),
    "language": (
        {
            "name": "language",
            "dataset": "addition",
            "numbers": 17,
            "width": 8,
            "layers": 1,
            "batch_size": 8,
        },
        100,
        4,
    ),
}


def general(kind: str, **fields: Any) -> list[RunConfig]:
    """Return runs of such a task, of some methods unless others are named."""
    task, updates, _ = GENERAL[kind]
    names = fields.pop("methods", ["standard", "cosine", "linear", "random"])
    methods = {name: METHODS[name] for name in names}
    if kind == "vae" and "linear" in names:
        methods["linear"] = {"mapping": {"name": "linear", "t": 20.0}}
    fields = {"seeds": 1, "max_updates": updates, "device": "cpu"} | fields
    fields.setdefault("evaluation", {"every": updates // 2})
    tasks = {kind: task | fields.pop("task", {})}
    planned = Study.of(name="general", tasks=tasks, methods=methods, **fields).planned()
    return [p.config for p in planned]


def assert_close(one: Run, other: Run) -> None:
    """Every N and rate equal; losses and metrics as they are after some other roundings."""
    assert one.status == other.status
    exact = ["update", "fresh_batch", "repeat", "repeats", "lr"]
    assert one.updates[exact].equals(other.updates[exact])
    assert one.updates["loss"].to_numpy() == pytest.approx(other.updates["loss"], rel=1e-4)
    losses = [run.evals.query("metric == 'loss'")["value"].to_numpy() for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert one.summary["final"].keys() == other.summary["final"].keys()


@pytest.mark.parametrize("kind", GENERAL)
def test_any_network_s_arms_are_what_they_are_alone(kind, tmp_path_factory, monkeypatch):
    if kind != "cnn":  # it is the only one that studies train in lock-step without CUDA
        monkeypatch.setattr(functional_stack, "StackedOptimizer", ColumnOptimizer)
    names = METHODS.keys() - {"threshold", "shuffled", "spaced"}
    names -= {"fresh_views"} if kind != "cnn" else set()
    counts = set()

    @settings(max_examples=GENERAL[kind][2], deadline=None, derandomize=True, database=None)
    @given(
        st.lists(st.sampled_from(sorted(names)), min_size=2, max_size=3, unique=True),
        st.integers(0, 99),
        st.floats(1e-4, 3e-3),
        st.sampled_from(["sgd", "momentum", "nesterov", "adam", "adamw"]),
    )
    def compare(methods: list[str], seed: int, lr: float, optimizer: str) -> None:
        folder = tmp_path_factory.mktemp(kind)
        task = {"lr": lr, "optimizer": {"name": optimizer}}
        runs = general(kind, methods=methods, seeds=[seed], task=task)
        runs.append(changed(runs[0], lr=lr / 3))
        outcomes = train_group(runs, folder / "together")
        assert outcomes == {config.run_id: None for config in runs}
        for config in runs:
            alone = train(config, folder / "alone")
            assert_close(at(folder / "together", config), alone)
            counts.update(alone.updates["repeats"])

    compare()
    assert len(counts) > 2


@pytest.mark.parametrize("kind", GENERAL)
def test_of_any_network_an_arm_diverges_and_another_stops_early(kind, tmp_path):
    task = {"optimizer": {"name": "momentum"}, "lr": 1e-3}
    runs = general(kind, max_updates=12, evaluation={"every": 4}, task=task)
    rule = {"every": 4, "early_stopping": {"patience": 1, "min_delta": 1e9}}
    early = general(kind, max_updates=12, evaluation=rule, task=task)[1]
    wild = changed(runs[0], lr=1e18)
    runs = [wild, early, *runs]
    assert set(train_group(runs, tmp_path / "together").values()) == {None}
    for config in runs:
        found, alone = at(tmp_path / "together", config), train(config, tmp_path / "alone")
        assert found.status["status"] == alone.status["status"]
        assert len(found.updates) == len(alone.updates)
        if config is not wild:
            assert_close(found, alone)
    assert at(tmp_path / "together", wild).status["status"] == "diverged"
    assert len(at(tmp_path / "together", early).updates) == 4


@pytest.mark.parametrize("kind", GENERAL)
def test_a_stopped_group_of_any_network_goes_on(kind, tmp_path, monkeypatch):
    runs = general(kind, max_updates=24)
    stop_after(13, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_group(runs, tmp_path / "stopped")
    monkeypatch.undo()
    for config in runs:
        assert at(tmp_path / "stopped", config).status == {"status": "interrupted"}
    train(runs[0], tmp_path / "stopped")
    train_group(runs, tmp_path / "stopped")
    for config in runs:
        run = at(tmp_path / "stopped", config)
        assert run.environment["attempts"] == 2
        assert_close(run, train(config, tmp_path / "unbroken"))


def test_an_epsilon_that_stays_and_drawn_pixels_are_each_arm_s_own(tmp_path):
    runs = general(
        "vae",
        task={"redraw_epsilon": False, "binarize": True},
        methods=["fixed3", "fresh_views", "random"],
        max_updates=12,
        seeds=2,
    )
    train_group(runs, tmp_path / "together")
    for config in runs:
        assert_close(at(tmp_path / "together", config), train(config, tmp_path / "alone"))


def test_networks_with_statistics_are_refused():
    fields = {"name": "supervised", "model": "cnn"}
    task = Supervised(parse(Supervised.Config, fields), seed=0, device="cpu")
    task.model.append(nn.BatchNorm1d(10))
    with pytest.raises(ValueError, match="buffers"):
        FunctionalStack([task])


# --- stopped and killed ---------------------------------------------------------------------------


def stop_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C after so many steps."""
    steps = 0
    make = StackedOptimizer.step

    def step(self: Any) -> None:
        nonlocal steps
        make(self)
        steps += 1
        if steps == updates:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StackedOptimizer, "step", step)


@pytest.mark.parametrize("again", ["together", "alone"])
def test_a_stopped_group_goes_on_together_or_one_by_one(tmp_path, monkeypatch, again):
    names = ["standard", "cosine", "random", "linear", "until", "fresh_views"]
    runs = [c for c in configs(methods=names) if c.max_updates == T]
    stop_after(13, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_group(runs, tmp_path / "stopped")
    monkeypatch.undo()
    for config in runs:
        run = at(tmp_path / "stopped", config)
        assert run.status == {"status": "interrupted"}
        # `until` keeps back the visits of a batch that may get another.
        assert 11 <= len(run.updates) <= 13
    if again == "together":
        train_group(runs, tmp_path / "stopped")
    for config in runs:
        train(config, tmp_path / "stopped")
        assert at(tmp_path / "stopped", config).environment["attempts"] == 2
        assert_same(at(tmp_path / "stopped", config), train(config, tmp_path / "unbroken"))


def test_a_checkpoint_holds_its_own_arm_alone(tmp_path, monkeypatch):
    runs = configs(methods=["standard", "cosine", "fixed3", "random"], seeds=5)
    stop_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, tmp_path / "together")
    monkeypatch.undo()
    stop = Stop()
    stop.set()
    with pytest.raises(Interrupted):
        train(runs[0], tmp_path / "alone", stop=stop)
    sizes = [
        (at(tmp_path / store, runs[0]).path / checkpoint.CURRENT).stat().st_size
        for store in ("together", "alone")
    ]
    assert sizes[0] < 1.5 * sizes[1]


def test_a_killed_group_leaves_every_run_to_be_gone_on_with(tmp_path):
    runs = configs(methods=["standard", "cosine", "random", "linear"], max_updates=400, seeds=1)
    plan = CheckpointPlan(updates=20)
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=train_group, args=(runs, tmp_path / "killed"), kwargs={"plan": plan}
    )
    process.start()
    end = time.monotonic() + 60
    last = at(tmp_path / "killed", runs[-1])
    while not (last.path / checkpoint.PREVIOUS).exists():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not any(at(tmp_path / "killed", config).done for config in runs)
    for config in runs[:2]:
        train(config, tmp_path / "killed")
    assert train_group(runs, tmp_path / "killed") == {config.run_id: None for config in runs}
    for config in runs:
        run = at(tmp_path / "killed", config)
        assert run.environment["attempts"] == 2
        assert run.updates["update"].tolist() == list(range(400))
        assert_same(run, train(config, tmp_path / "unbroken"))


# --- what goes in lock-step -----------------------------------------------------------------------


def test_runs_go_together_in_rounds_with_what_they_need_before_them():
    runs = configs()
    rounds = groups(runs)
    assert [len(round_) for round_ in rounds] == [1, 1]
    first, second = ({c.run_id for c in round_[0]} for round_ in rounds)
    assert first | second == {config.run_id for config in runs}
    for config in runs:
        assert {needed.run_id for needed in prerequisites(config)} <= first
    # What is replayed comes first, with calibrations; all others go with those that wait for them.
    names = {p.method for p in study().planned() if p.config.run_id in second}
    assert names == METHODS.keys() - {"random"}


def test_no_run_goes_into_a_round_that_is_shorter_than_it_is():
    """Calibrations are short: all that is long goes with what waits for them."""
    ((first,), (second,)) = groups(configs(methods=["standard", "cosine", "threshold"], seeds=4))
    assert [c.max_updates for c in first] == 4 * [8]
    assert [c.max_updates for c in second] == 12 * [T]


def test_every_worker_gets_a_group_of_whole_seeds_if_there_are_enough():
    names = ["standard", "cosine", "fixed3", "random"]
    runs = configs(methods=names, seeds=4)
    (found,) = groups(runs, workers=2)
    assert [sorted({c.seed for c in group}) for group in found] == [[0, 1], [2, 3]]
    assert [len(group) for group in groups(runs, workers=16)[0]] == [4, 4, 4, 4]
    assert [len(group) for group in groups(configs(methods=names, seeds=20))[0]] == [40, 40]
    assert groups(configs(methods=names[:3], seeds=1)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"task": {"model": "cnn", "width": 64}},
        {"task": {"model": "resnet18"}},
        {"task": {"width": 512, "batch_size": 64}},
        {"task": {"clip_norm": 1.0}},
        {"task": {"ema_decay": 0.9}},
        {"task": {"label_smoothing": 0.1}},
        {"task": {"precision": "bfloat16"}},
        {"task": {"optimizer": {"name": "schedule_free"}}},
        {"loader": {"delay_ms": 1}},
        {"budget": {"unit": "cost", "k": 2.0}},
        {"evaluation": {"keep": 1}},
    ],
    ids=str,
)
def test_what_lock_step_does_not_deal_with_is_left_to_be_made_one_by_one(fields):
    names = ["standard", "cosine", "fixed3", "random"]
    assert groups(configs(methods=names, **fields)) == []
    assert len(groups(configs(methods=names))) == 1


@pytest.mark.parametrize(
    ("kind", "task", "without_cuda"),
    [
        ("cnn", {"width": 8, "batch_size": 32}, True),
        ("cnn", {"width": 16, "batch_size": 64}, False),
        ("vae", {}, False),
        ("language", {}, False),
    ],
)
def test_any_network_goes_on_cuda_and_small_cnns_without(monkeypatch, kind, task, without_cuda):
    runs = general(kind, task=task, device="auto")
    assert bool(groups(general(kind, task=task))) is without_cuda
    monkeypatch.setattr(plan, "pick_device", lambda name: "cuda")
    assert [len(group) for round_ in groups(runs) for group in round_] == [len(runs)]
    assert bool(groups(general(kind, task=task))) is without_cuda  # `device: cpu`
    assert stack_of(runs[0].task, "cuda") is FunctionalStack
    normed = [changed(config, model="resnet18") for config in runs if kind == "cnn"]
    assert groups(normed) == []


def test_a_sampler_s_arms_are_left_out_and_the_others_go():
    runs = configs(
        methods=["standard", "cosine", "fixed3", "random"],
    )
    with_sampler = [
        parse(RunConfig, c.to_json() | {"method": {"sampler": {"name": "importance"}}})
        for c in runs
    ]
    ((group,),) = groups(runs + with_sampler)
    assert {c.run_id for c in group} == {c.run_id for c in runs}


# --- a study --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_study_chooses_it_by_itself_unless_told_otherwise(tmp_path, workers):
    chosen = study(methods=["standard", "cosine", "linear", "shuffled", "random"], seeds=1)
    places = {
        "chosen": Places(workers=workers),
        "refused": Places(workers=0, lockstep=False),
    }
    for name, place in places.items():
        report = run_studies([chosen], tmp_path / name, places=place)
        assert set(report.status.values()) == {"complete"}
        assert report.trained == 5
        assert not report.retried
    for planned in chosen.planned():
        run, other = (at(tmp_path / name, planned.config) for name in places)
        assert_same(run, other)
        # The control needs another arm's run, which is alone in its round.
        assert run.environment.get("lockstep") == (None if planned.method == "random" else 4)
        assert "lockstep" not in other.environment
    assert run_studies([chosen], tmp_path / "chosen").trained == 0


def test_a_study_whose_seconds_are_compared_trains_one_by_one(tmp_path):
    small = study(methods=["standard", "cosine", "linear", "random"], seeds=1)
    small = small.model_copy(update={"lockstep": False})
    run_studies([small], tmp_path, places=Places(workers=0))
    for planned in small.planned():
        assert "lockstep" not in at(tmp_path, planned.config).environment


def test_what_one_study_trains_one_by_one_no_other_trains_in_step(tmp_path):
    """The other study's control needs the very runs whose seconds are compared."""
    chosen = study(methods=["standard", "cosine", "linear", "shuffled", "random"], seeds=2)
    apart = study(methods=["standard", "linear"], seeds=2).model_copy(
        update={"lockstep": False, "name": "apart"}
    )
    run_studies([apart, chosen], tmp_path, places=Places(workers=0))
    for planned in apart.planned():
        assert "lockstep" not in at(tmp_path, planned.config).environment
    others = [
        at(tmp_path, p.config) for p in chosen.planned() if p.method in ("cosine", "shuffled")
    ]
    assert all("lockstep" in run.environment for run in others)


def test_a_group_that_fails_as_a_whole_is_made_one_by_one(tmp_path, monkeypatch):
    class Broken(SupervisedStack):
        def __init__(self, tasks: Any) -> None:
            raise RuntimeError("no memory")

    monkeypatch.setitem(STACKS, "supervised", Broken)
    small = study(methods=["standard", "cosine", "linear", "random"], seeds=1)
    report = run_studies([small], tmp_path, places=Places(workers=0))
    assert set(report.status.values()) == {"complete"}
    assert set(report.retried.values()) == {2}


def test_the_command_line_can_refuse(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "repeatlab.studies.study.run_studies", lambda studies, runs, places: asked.append(places)
    )
    monkeypatch.setattr("repeatlab.cli._read_studies", lambda paths, settings: [])
    path = tmp_path / "x.yaml"
    path.write_text("notebook: 10_supervised\nparameters: {}\n")
    for options in ([], ["--no-lockstep"]):
        done = CliRunner().invoke(cli, ["run", str(path), *options])
        assert done.exit_code == 0, done.output
    assert [places.lockstep for places in asked] == [True, False]


@pytest.mark.parametrize("lockstep", [True, False])
def test_status_says_that_seconds_are_a_share(tmp_path, lockstep):
    small = study(methods=["standard", "cosine", "linear", "random"], seeds=1)
    run_studies([small], tmp_path, places=Places(workers=0, lockstep=lockstep))
    done = CliRunner().invoke(cli, ["status", "--all", "--runs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    times = [line.partition(": trained ")[2] for line in done.output.splitlines()[-4:]]
    assert all(time.endswith(" s, its share of 4 in lock-step") == lockstep for time in times)
    assert all(float(time.partition(" s")[0]) > 0 for time in times)


# --- the pieces, against torch --------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False], ids=["vectors", "images"])
def test_outputs_and_gradients_are_autograd_s(flat):
    torch.manual_seed(0)
    networks = [mlp(12, 3, width=5) for _ in range(4)]
    if flat:
        networks = [network[1:] for network in networks]
    alone = copy.deepcopy(networks)
    inputs, targets = torch.randn(4, 7, 12), torch.randint(3, (4, 7))
    stack = StackedMLP(networks)
    earlier = stack(torch.randn_like(inputs))
    kept = earlier.clone()
    outputs = stack(inputs)
    assert torch.equal(earlier, kept)  # the next call is not to write over it
    gradients = []
    for network, images, labels, found in zip(alone, inputs, targets, outputs, strict=True):
        logits = network(images)
        assert torch.allclose(found, logits, atol=1e-6)
        logits.retain_grad()
        functional.cross_entropy(logits, labels).backward()
        gradients.append(logits.grad)
    stack.backward(torch.stack(gradients))
    for arm, network in enumerate(alone):
        for parameter, found in zip(network.parameters(), stack.gradients, strict=True):
            assert torch.allclose(found[arm], parameter.grad, atol=1e-6)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="Conv2d"):
        StackedMLP([small_cnn(1, 10, width=2)])
    with pytest.raises(ValueError, match="Sigmoid"):
        StackedMLP([nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2))])
    weight = nn.Parameter(torch.zeros(2))
    for kind in (torch.optim.RMSprop, torch.optim.Adam):  # the latter is not fused here
        with pytest.raises(ValueError, match=kind.__name__):
            StackedOptimizer([kind([weight])], [torch.zeros(1, 2)], [torch.zeros(1, 2)])


@pytest.mark.parametrize("stacked_kind", [StackedOptimizer, ColumnOptimizer])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.7, 0.9)}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_a_step_is_torch_s_for_every_arm_at_its_own_rate(kind, settings, stacked_kind):
    """To the bit, though kernels round the last numbers of a parameter otherwise: 4 and 7 here.

    In columns to float tolerance.
    """
    exact = stacked_kind is StackedOptimizer
    same = torch.equal if exact else partial(torch.allclose, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    stacks = [torch.randn(4, 9, 4), torch.randn(4, 23)]
    weights = [[nn.Parameter(m), nn.Parameter(v)] for m, v in zip(*stacks, strict=True)]
    alone = copy.deepcopy(weights)
    rates = [0.1, 0.2, 0.1, 0.3]

    def made(owned: list) -> list:
        return [kind(w, lr=r, fused=True, **settings) for w, r in zip(owned, rates, strict=True)]

    found, expected = made(weights), made(alone)
    gradients = [torch.zeros_like(stack) for stack in stacks]
    stacked = stacked_kind(found, stacks, gradients)
    for step in range(20):
        if step == 3:  # as a schedule does
            for optimizer in (*found[1:3], *expected[1:3]):
                optimizer.param_groups[0]["lr"] *= 0.5
        for gradient in gradients:
            gradient.copy_(torch.randn_like(gradient))
        for matrix_of, vector_of, (matrix, vector) in zip(*gradients, alone, strict=True):
            matrix.grad, vector.grad = matrix_of.clone(), vector_of.clone()
        stacked.set_rates()
        stacked.step()
        for optimizer in expected:
            optimizer.step()
    for own, others in zip(weights, alone, strict=True):
        for weight, other in zip(own, others, strict=True):
            assert same(weight, other)
    for one, other in zip(found, expected, strict=True):
        assert one.state_dict()["state"].keys() == other.state_dict()["state"].keys()
        for key, state in other.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    assert same(one.state_dict()["state"][key][name], value)
