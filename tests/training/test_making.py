"""The loop: against plain loops written out by hand, and what it records.

The hand-written loops share nothing with the package but the batches, the seed of the initial
weights and the network's definition.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from math import ceil, cos, floor, isnan, pi
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

from repeatlab.core import environment
from repeatlab.core.files import StoreError, write_json
from repeatlab.core.schema import parse
from repeatlab.core.seeding import derive
from repeatlab.data import Batch, TrainStream, load_splits
from repeatlab.repetition.mappings import Constant
from repeatlab.store.records import Run, Store
from repeatlab.tasks.models import small_cnn
from repeatlab.tasks.supervised import Supervised
from repeatlab.training import making, one_run
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.fresh_batches import FreshBatches
from repeatlab.training.making import train
from repeatlab.training.visits import build_mapping

pytestmark = pytest.mark.usefixtures("one_thread")
T = 23
EVERY = 10
BATCH = 32
WIDTH = 8
LR = 0.2

METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "constant 1": {"mapping": {"name": "constant"}},
    "cosine": {"schedule": {"name": "cosine"}},
    "fixed 2": {"mapping": {"name": "constant", "repeats": 2}},
    "fixed 3": {"mapping": {"name": "constant", "repeats": 3}},
    "fixed 40": {"mapping": {"name": "constant", "repeats": 40}},
    "random": {"mapping": {"name": "uniform", "low": 1, "high": 5}},
    "threshold": {"mapping": {"name": "threshold", "t": 2.3}},
    "threshold auto": {"mapping": {"name": "threshold", "t": "auto", "repeats": 3}},
    "linear": {"mapping": {"name": "linear", "t": 0.575}},
    "linear auto": {"mapping": {"name": "linear", "t": "auto"}},
    "control limit": {"mapping": {"name": "control_limit", "k": 0.1, "window": 4}},
    "quantile": {"mapping": {"name": "quantile", "levels": [0.3, 0.6], "window": 4}},
    "z-score": {"mapping": {"name": "zscore", "step": 0.5, "window": 4}},
    "trace": {"mapping": {"name": "trace", "counts": [3, 1, 4, 1, 5, 9]}},
    "linear, cosine": {
        "mapping": {"name": "linear", "t": 0.575},
        "schedule": {"name": "cosine"},
    },
    "random, fresh views": {"mapping": {"name": "uniform"}, "fresh_views": True},
}


def run_config(method: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
    method = method or {}
    auto = (method.get("mapping") or {}).get("t") == "auto"
    data = {
        "task": {"name": "supervised", "lr": LR, "batch_size": BATCH, "width": WIDTH},
        "method": method,
        "max_updates": T,
        "evaluation": {"every": EVERY},
        "calibration": {"updates": 8} if auto else None,
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


class Watched(Supervised):
    """The supervised task, noting what the loop does with it.

    Attributes:
        steps: Calls of `optimizer.step` that came to their end.
        training_forwards: Forwards of the model in training mode.
        rates: Learning rate at each step.
        threads: torch's threads at each step.
        evaluations: (steps made, split) of each evaluation.
        initial: Weights before the first step.
        batches: Every fresh batch asked for, by index.
        visits: The batch of every step.
    """

    def __init__(self, config: Any, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        self.steps = self.training_forwards = 0
        self.rates: list[float] = []
        self.threads: list[int] = []
        self.evaluations: list[tuple[int, str]] = []
        self.batches: dict[int, Batch] = {}
        self.visits: list[Batch] = []
        self.initial = weights(self.model)
        self.optimizer.register_step_post_hook(self._stepped)
        self.model.register_forward_hook(self._forwarded)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.threads.append(torch.get_num_threads())

    def _forwarded(self, model: nn.Module, *_: Any) -> None:
        self.training_forwards += model.training

    def fresh_batch(self, index: int) -> Batch:
        assert index not in self.batches
        self.batches[index] = super().fresh_batch(index)
        return self.batches[index]

    def step(self, batch: Batch, report: Callable) -> None:
        self.visits.append(batch)
        super().step(batch, report)

    def evaluate(self, split: str) -> dict[str, float]:
        self.evaluations.append((self.steps, split))
        return super().evaluate(split)


class Trained(NamedTuple):
    config: RunConfig
    run: Run
    task: Watched


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train_watched(config: RunConfig, store: Path, kind: type[Supervised] = Watched) -> Trained:
    """Return the run of `config` with the task object that it trained."""
    built = []

    def build(task_config: Any, **options: Any) -> Supervised:
        built.append(kind(task_config, **options))
        return built[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "load_task", lambda target: build)
        run = train(config, store)
    return Trained(config, run, built[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Trained]:
    """Every method, trained once."""
    store = tmp_path_factory.mktemp("runs")
    return {name: train_watched(run_config(method), store) for name, method in METHODS.items()}


every_method = pytest.mark.parametrize("name", METHODS)

# --- against loops written by hand --------------------------------------------------------------


class ByHand:
    """The pieces of a plain PyTorch loop, for the reader to see what is compared with."""

    def __init__(self, seed: int = 0) -> None:
        seed, data = derive(seed, "task supervised"), load_splits("digits")
        self.stream = TrainStream(
            data.train,
            batch_size=BATCH,
            seed=seed,
            mean=data.mean,
            std=data.std,
            crop_padding=1,
        )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(derive(seed, "weights"))
            self.model = small_cnn(1, 10, width=WIDTH)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, fused=True)
        self.losses: list[float] = []

    def update(self, batch: Batch) -> float:
        loss = functional.cross_entropy(self.model(batch.images), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]


def assert_same_training(trained: Trained, hand: ByHand) -> None:
    """Bit for bit: every loss, every weight, every momentum buffer."""
    assert trained.run.updates["loss"].tolist() == hand.losses
    found, expected = trained.task.model.state_dict(), hand.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    momenta = [
        [state["momentum_buffer"] for state in optimizer.state_dict()["state"].values()]
        for optimizer in (trained.task.optimizer, hand.optimizer)
    ]
    assert len(momenta[0]) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


@pytest.mark.parametrize("name", ["standard", "constant 1"])
def test_one_update_a_batch_is_the_plain_loop(runs, name):
    hand = ByHand()
    for index in range(T):
        hand.update(hand.stream.fresh_batch(index))
    assert_same_training(runs[name], hand)


def test_the_plain_loop_of_another_seed_gives_other_weights(runs, tmp_path):
    hand = ByHand(seed=1)
    for index in range(T):
        hand.update(hand.stream.fresh_batch(index))
    assert_same_training(train_watched(run_config(seed=1), tmp_path), hand)
    assert runs["standard"].run.updates["loss"].tolist() != hand.losses


@pytest.mark.parametrize(("name", "repeats"), [("fixed 2", 2), ("fixed 3", 3), ("fixed 40", 40)])
def test_fixed_repeats_are_a_loader_that_yields_each_batch_so_often(runs, name, repeats):
    class Repeating(torch.utils.data.IterableDataset):
        def __iter__(self):
            for index in range(T):
                for _ in range(repeats):
                    yield hand.stream.fresh_batch(index)

    hand = ByHand()
    loader = torch.utils.data.DataLoader(Repeating(), batch_size=None)
    for _, batch in zip(range(T), loader, strict=False):
        hand.update(batch)
    assert_same_training(runs[name], hand)


def train_by_hand(count: Callable[[float], int], factor: Callable[[int], float]) -> ByHand:
    """Dynamic repetition, written out: the first loss of a batch decides how often it is used."""
    hand = ByHand()
    index = update = 0
    while update < T:
        batch = hand.stream.fresh_batch(index)
        repeats = 1
        visit = 0
        while visit < repeats and update < T:
            hand.optimizer.param_groups[0]["lr"] = LR * factor(update)
            loss = hand.update(batch)
            if visit == 0:
                repeats = count(loss)
            visit += 1
            update += 1
        index += 1
    return hand


def decided(run: Run) -> list[int]:
    """Return N of every fresh batch but the last, whose N may be cut."""
    rows = run.updates
    return rows.loc[rows["repeat"] == 0, "repeats"].tolist()[:-1]


def by_cosine(update: int) -> float:
    return (1 + cos(pi * update / T)) / 2


@pytest.mark.parametrize(
    ("name", "count", "factor"),
    [
        ("threshold", lambda loss: 2 if loss > 2.3 else 1, lambda update: 1.0),
        ("linear", lambda loss: max(1, min(5, floor(loss / 0.575))), lambda update: 1.0),
        ("cosine", lambda loss: 1, by_cosine),
        ("linear, cosine", lambda loss: max(1, min(5, floor(loss / 0.575))), by_cosine),
    ],
)
def test_dynamic_repetition_is_the_loop_written_by_hand(runs, name, count, factor):
    assert_same_training(runs[name], train_by_hand(count, factor))
    if name != "cosine":  # more than one count must have been put to the test
        assert len(set(decided(runs[name].run))) > 1


# --- the budget ---------------------------------------------------------------------------------


@every_method
def test_exactly_t_updates_and_as_many_forwards(runs, name):
    task = runs[name].task
    assert task.steps == T
    assert task.training_forwards == T
    assert runs[name].run.summary["ledger"]["updates"] == T


@pytest.mark.parametrize("updates", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["fixed 3", "linear", "random, fresh views"])
def test_exactly_t_updates_however_t_cuts_a_repeat(tmp_path, name, updates):
    run, task = train_watched(run_config(METHODS[name], max_updates=updates), tmp_path)[1:]
    assert task.steps == task.training_forwards == updates
    rows = run.updates
    assert rows["update"].tolist() == list(range(updates))
    # The recorded N is the one that was carried out: T = 7, N = 3 gives 3, 3, 1.
    assert rows["repeats"].tolist() == rows.groupby("fresh_batch")["update"].transform(len).tolist()


@every_method
def test_rows_tell_the_visits_in_order(runs, name):
    rows = runs[name].run.updates
    assert rows["update"].tolist() == list(range(T))
    batch = repeat = -1
    left = 0
    for row in rows.itertuples():
        if left == 0:
            batch, repeat, left = batch + 1, -1, row.repeats
        repeat, left = repeat + 1, left - 1
        assert (row.fresh_batch, row.repeat) == (batch, repeat)
    assert left == 0
    assert [visit.index for visit in runs[name].task.visits] == rows["fresh_batch"].tolist()
    assert np.isfinite(rows.to_numpy(dtype=float)).all()


def test_the_methods_differ_in_how_they_repeat(runs):
    rows = {name: decided(runs[name].run) for name in METHODS}
    assert rows["trace"] == [3, 1, 4, 1, 5]
    assert runs["trace"].run.updates["repeats"].iloc[-1] == 9
    for name in METHODS:
        fixed = {"standard": 1, "constant 1": 1, "cosine": 1, "fixed 2": 2, "fixed 3": 3}
        if name in fixed:
            assert set(rows[name]) == {fixed[name]}, name
        elif name != "fixed 40":
            assert len(set(rows[name])) > 1, name


# --- the learning rate --------------------------------------------------------------------------


@every_method
def test_the_recorded_rate_is_the_optimizer_s(runs, name):
    assert runs[name].run.updates["lr"].tolist() == runs[name].task.rates


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ({"name": "cosine"}, by_cosine),
        ({"name": "linear"}, lambda update: 1 - update / T),
        ({"name": "step"}, lambda update: 0.1 ** ((update >= T / 2) + (update >= 3 * T / 4))),
        ({"name": "exponential", "k": 2.0}, lambda update: np.exp(-2 * update / T)),
        ({"name": "inverse_time", "k": 4.0}, lambda update: 1 / (1 + 4 * update / T)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_all_methods_have_the_same_rate_at_the_same_update(tmp_path, schedule, factor):
    expected = [LR * factor(update) for update in range(T)]
    for name in ("standard", "fixed 3", "random", "linear"):
        method = METHODS[name] | {"schedule": schedule}
        rates = train_watched(run_config(method), tmp_path).task.rates
        assert rates == pytest.approx(expected, rel=1e-12)


def test_a_schedule_scales_every_group_of_every_optimizer(tmp_path):
    class TwoOptimizers(Watched):
        def __init__(self, config, *, seed, device):
            super().__init__(config, seed=seed, device=device)
            first, *rest = self.model.parameters()
            groups = [{"params": [first]}, {"params": rest, "lr": 10 * LR}]
            self.optimizer = torch.optim.SGD(groups, lr=LR)
            other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
            self.optimizers = [self.optimizer, other]

    config = run_config({"schedule": {"name": "cosine"}})
    run, task = train_watched(config, tmp_path, TwoOptimizers)[1:]
    rates = [group["lr"] for optimizer in task.optimizers for group in optimizer.param_groups]
    assert rates == [base * by_cosine(T - 1) for base in (LR, 10 * LR, 0.5)]
    assert run.updates["lr"].iloc[-1] == LR * by_cosine(T - 1)


# --- common random numbers ----------------------------------------------------------------------


@every_method
def test_arms_start_equal_and_see_the_same_fresh_batches(runs, name):
    reference, task = runs["standard"].task, runs[name].task
    assert all(torch.equal(task.initial[key], reference.initial[key]) for key in reference.initial)
    assert list(task.batches) == list(range(len(task.batches)))
    for index, batch in task.batches.items():
        same = reference.batches[index]
        assert torch.equal(batch.indices, same.indices)
        assert torch.equal(batch.images, same.images)
        assert torch.equal(batch.labels, same.labels)


def test_another_seed_has_other_weights_batches_and_draws(runs, tmp_path):
    first = runs["random"]
    second = train_watched(run_config(METHODS["random"], seed=1), tmp_path)
    assert not torch.equal(first.task.initial["0.weight"], second.task.initial["0.weight"])
    assert not torch.equal(first.task.batches[0].indices, second.task.batches[0].indices)
    assert first.run.updates["repeats"].tolist() != second.run.updates["repeats"].tolist()
    assert first.run.summary["state_sha256"] != second.run.summary["state_sha256"]


@every_method
def test_the_same_seed_gives_the_same_records_again(runs, name, tmp_path):
    first, again = runs[name].run, train(runs[name].config, tmp_path)
    clocks = ["seconds", "calibration_seconds"]
    for table in ("updates", "evals"):
        one, two = (
            getattr(run, table).drop(columns=clocks, errors="ignore") for run in (first, again)
        )
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    one, two = first.summary, again.summary
    assert one["state_sha256"] == two["state_sha256"] == digest(runs[name].task.state_dict())
    assert one["final"] == two["final"]
    for clock in clocks:
        del one["ledger"][clock], two["ledger"][clock]
    assert one["ledger"] == two["ledger"]


def test_methods_that_train_differently_end_in_different_states(runs):
    states = {name: runs[name].run.summary["state_sha256"] for name in METHODS}
    assert states["standard"] == states["constant 1"]
    same = {"standard", "constant 1"}
    others = [state for name, state in states.items() if name not in same]
    assert states["standard"] not in others
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("method", ["standard", "random"])
def test_nothing_outside_the_run_is_touched(tmp_path, method):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    torch.set_num_threads(2)
    try:
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        config = run_config(METHODS[method], threads=1, seed=3)
        task = train_watched(config, tmp_path).task
        assert torch.get_num_threads() == 2
        assert set(task.threads) == {1}
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert random.getstate() == before[2]
    finally:
        torch.set_num_threads(1)


def test_a_run_does_not_depend_on_the_random_state_around_it(runs, tmp_path):
    torch.manual_seed(99)
    torch.rand(7)
    run = train(run_config(METHODS["random"]), tmp_path)
    assert run.summary["state_sha256"] == runs["random"].run.summary["state_sha256"]


def test_a_task_that_draws_from_the_global_generator_is_reproducible(tmp_path):
    class Noisy(Watched):
        def step(self, batch, report):
            noisy = batch.images + 0.1 * torch.randn(batch.images.shape)
            super().step(batch._replace(images=noisy), report)

    states = []
    for surrounding in (1, 2):
        torch.manual_seed(surrounding)
        run = train_watched(run_config(), tmp_path / str(surrounding), Noisy).run
        states.append(run.summary["state_sha256"])
    assert states[0] == states[1]


def test_fresh_views_show_the_same_samples_under_new_draws(runs, tmp_path):
    for name, fresh in (("random", False), ("random, fresh views", True)):
        visits = runs[name].task.visits
        repeats = [(a, b) for a, b in pairwise(visits) if a.index == b.index]
        assert len(repeats) > 5
        for first, second in repeats:
            assert torch.equal(first.indices, second.indices)
            assert torch.equal(first.labels, second.labels)
            assert torch.equal(first.images, second.images) != fresh

    # Each visit has its own draws, and they are the same in every run.
    once, again = (
        train_watched(run_config(METHODS["fixed 3"] | {"fresh_views": True}), tmp_path / place).task
        for place in ("once", "again")
    )
    views = [visit.images for visit in once.visits if visit.index == 0]
    assert len(views) == 3
    assert not any(torch.equal(views[a], views[b]) for a, b in [(0, 1), (0, 2), (1, 2)])
    for first, second in zip(once.visits, again.visits, strict=True):
        assert torch.equal(first.images, second.images)


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "updates", "expected"),
    [
        (10, 23, [0, 10, 20, 23]),
        (10, 20, [0, 10, 20]),
        (7, 5, [0, 5]),
        (1, 3, [0, 1, 2, 3]),
        (4, 9, [0, 4, 8, 9]),
        (5, 1, [0, 1]),
    ],
)
@pytest.mark.parametrize("name", ["standard", "fixed 3", "random"])
@pytest.mark.parametrize("flush", [500, 3])
def test_evaluations_are_made_at_fixed_updates(
    tmp_path, monkeypatch, every, updates, expected, name, flush
):
    monkeypatch.setattr(one_run, "FLUSH_UPDATES", flush)
    config = run_config(METHODS[name], max_updates=updates, evaluation={"every": every})
    run, task = train_watched(config, tmp_path)[1:]
    due = [(update, split) for update in expected for split in ("train", "validation")]
    assert task.evaluations == [*due, (updates, "test")]
    evals = run.evals
    assert list(dict.fromkeys(zip(evals["update"], evals["split"], strict=True))) == [
        *due,
        (updates, "test"),
    ]
    assert run.updates["update"].tolist() == list(range(updates))


@every_method
def test_evaluations_carry_the_counts_of_their_update(runs, name):
    run = runs[name].run
    rows = run.updates
    for row in run.evals.itertuples():
        made = rows[rows["update"] < row.update]
        assert row.fresh_batches == made["fresh_batch"].nunique()
        assert row.forward_samples == row.backward_samples == row.update * BATCH
        assert row.seconds == (made["seconds"].iloc[-1] if len(made) else 0)
    final = run.evals[run.evals["update"] == T].set_index(["split", "metric"])["value"]
    assert run.summary["final"] == {".".join(key): value for key, value in final.items()}
    assert {split for split, _ in final.index} == {"train", "validation", "test"}


def test_evaluation_can_be_left_out(tmp_path):
    config = run_config(evaluation={"every": 5, "splits": [], "test": False})
    run, task = train_watched(config, tmp_path)[1:]
    assert task.evaluations == []
    assert run.summary["final"] == {}
    assert run.summary["status"] == "complete"


def test_evaluating_often_does_not_change_the_training(runs, tmp_path):
    run = train(run_config(METHODS["linear"], evaluation={"every": 1}), tmp_path)
    assert run.updates["loss"].tolist() == runs["linear"].run.updates["loss"].tolist()
    assert run.summary["state_sha256"] == runs["linear"].run.summary["state_sha256"]


@pytest.mark.parametrize("flush", [500, 4])
def test_the_clock_counts_updates_and_never_an_evaluation(tmp_path, monkeypatch, flush):
    now = [100.0]

    class Clocked(Watched):
        def step(self, batch, report):
            super().step(batch, report)
            now[0] += 1

        def evaluate(self, split):
            now[0] += 1000
            return super().evaluate(split)

    monkeypatch.setattr(one_run, "perf_counter", lambda: now[0])
    monkeypatch.setattr(one_run, "FLUSH_UPDATES", flush)
    run = train_watched(run_config(METHODS["fixed 3"]), tmp_path, Clocked).run
    assert run.updates["seconds"].tolist() == list(range(1, T + 1))
    assert run.summary["ledger"]["seconds"] == T
    evals = run.evals
    assert (evals["seconds"] == evals["update"]).all()


# --- the ledger ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repeats", "updates"), [(1, 23), (2, 23), (3, 23), (3, 24), (40, 23), (1, 70), (2, 100)]
)
def test_fixed_repeats_cost_what_the_closed_forms_say(tmp_path, repeats, updates):
    method = {"mapping": {"name": "constant", "repeats": repeats}}
    run, task = train_watched(run_config(method, max_updates=updates), tmp_path)[1:]
    ledger = run.summary["ledger"]
    seconds = ledger.pop("seconds")
    fresh = ceil(updates / repeats)
    an_epoch = len(task.stream.data) // BATCH
    distinct = fresh * BATCH
    if fresh > an_epoch:  # the next epoch's order brings some of those that were left out
        seen = torch.cat([task.stream.indices(index) for index in range(fresh)])
        distinct = len(set(seen.tolist()))
        assert an_epoch * BATCH < distinct <= len(task.stream.data)
    assert {name: count for name, count in ledger.items() if count} == {
        "updates": updates,
        "fresh_batches": fresh,
        "distinct_samples": distinct,
        "forward_samples": updates * BATCH,
        "backward_samples": updates * BATCH,
    }
    assert ledger["host_reads"] == ledger["calibration_updates"] == 0
    assert seconds == run.updates["seconds"].iloc[-1] > 0
    assert run.updates["seconds"].is_monotonic_increasing


def test_calibration_is_charged_on_top(runs):
    for name in METHODS:
        ledger = runs[name].run.summary["ledger"]
        expected = 8 if "auto" in name else 0
        assert ledger["calibration_updates"] == expected
        assert ledger["calibration_forward_samples"] == expected * BATCH
        assert (ledger["calibration_seconds"] > 0) == bool(expected)


def test_samples_are_counted_once_however_often_they_come():
    class Fixed:
        def fresh_batch(self, index):
            indices = [[4, 2], [2, 2], [9, 0], [4, 9]][index]
            return Batch(None, None, torch.tensor(indices), index)

    batches = FreshBatches(Fixed())
    stream = iter(batches)
    counts = [batches.distinct()]
    for _ in range(4):
        next(stream)
        counts.append(batches.distinct())
    assert counts == [0, 2, 2, 4, 4]
    assert next(FreshBatches(Fixed()).iter_from(2)).index == 2


# --- done runs ----------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_done_run_is_not_made_again(tmp_path, monkeypatch):
    config = run_config(METHODS["threshold auto"])
    train(config, tmp_path)
    before = snapshot(tmp_path)

    def never(*_, **__):
        raise AssertionError("a done run was touched")

    for name in ("load_task", "describe", "Training"):
        monkeypatch.setattr(making, name, never)
    monkeypatch.setattr("repeatlab.store.records.write_json", never)
    run = train(config, Store(tmp_path))
    assert run.summary["status"] == "complete"
    assert snapshot(tmp_path) == before
    with pytest.raises(AssertionError, match="a done run was touched"):
        train(run_config(METHODS["threshold auto"], seed=1), tmp_path)


def test_a_run_s_directory_says_what_it_was(runs):
    trained = runs["linear auto"]
    assert trained.run.path.name == trained.config.run_id
    assert trained.run.path.parent.name == "supervised"
    assert RunConfig.from_json(trained.run.config) == trained.config
    environment = json.loads((trained.run.path / "environment.json").read_text())
    assert environment["versions"]["torch"] == version("torch")
    assert environment["device"] == "cpu"
    assert trained.run.summary["peak_memory_bytes"] is None
    assert trained.run.status == {"status": "complete"}


def test_an_unwritable_store_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")

    def never(*_, **__):
        raise AssertionError("work was done for nothing")

    monkeypatch.setattr(making, "load_task", never)
    for name in ("standard", "threshold auto"):
        with pytest.raises(StoreError, match="file"):
            train(run_config(METHODS[name]), tmp_path / "file")


def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: 'cuda' is not available here"):
        train(run_config(device="cuda"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert environment.pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.pick_device("auto") == "cuda"


# --- divergence and failure ---------------------------------------------------------------------


def poisoned(at: int) -> type[Watched]:
    """Return a task whose weights turn NaN just before update `at`."""

    class Poisoned(Watched):
        def step(self, batch, report):
            if self.steps == at:
                with torch.no_grad():
                    next(self.model.parameters()).fill_(torch.nan)
            super().step(batch, report)

    return Poisoned


@pytest.mark.parametrize("name", ["standard", "fixed 3", "linear"])
@pytest.mark.parametrize("at", [0, 1, 4, 5, 10, 11, T - 1])
@pytest.mark.parametrize("flush", [500, 5])
def test_a_run_that_diverges_keeps_its_data(runs, tmp_path, monkeypatch, name, at, flush):
    monkeypatch.setattr(one_run, "FLUSH_UPDATES", flush)
    run, task = train_watched(run_config(METHODS[name]), tmp_path, poisoned(at))[1:]
    assert task.steps == at  # the update that the NaN would drive is not made
    assert run.done
    assert run.status["status"] == run.summary["status"] == "diverged"
    assert run.status["update"] == run.summary["update"] == at
    assert f"nan at update {at} " in run.status["reason"]

    rows, healthy = run.updates, runs[name].run.updates
    assert rows["update"].tolist() == list(range(at + 1))
    columns = ["update", "fresh_batch", "repeat", "repeats", "loss", "lr"]
    pd.testing.assert_frame_equal(rows[columns].iloc[:at], healthy[columns].iloc[:at])
    last = rows.iloc[at]
    assert isnan(last["loss"])
    assert [last["fresh_batch"], last["repeat"]] == [
        healthy["fresh_batch"][at],
        healthy["repeat"][at],
    ]
    # Where the loss decides, a first loss that is NaN decides nothing.
    undecided = name == "linear" and last["repeat"] == 0
    assert last["repeats"] == (0 if undecided else healthy["repeats"][at])
    assert rows["seconds"].is_monotonic_increasing
    assert np.isfinite(rows["seconds"]).all()

    summary = run.summary
    assert summary["final"] == {}
    ledger = summary["ledger"]
    assert ledger["updates"] == at
    assert (ledger["forward_samples"], ledger["backward_samples"]) == ((at + 1) * BATCH, at * BATCH)
    assert ledger["fresh_batches"] == rows["fresh_batch"].nunique()
    assert ledger["seconds"] == rows["seconds"].iloc[-1]
    assert "test" not in set(run.evals["split"])
    due = [update for update in (0, 10, 20) if update <= at]
    assert sorted(set(run.evals["update"])) == due


def test_a_huge_learning_rate_diverges_for_real(tmp_path):
    task = {"name": "supervised", "lr": 1e20, "batch_size": BATCH, "width": WIDTH}
    config = run_config(task=task)
    run = train(config, tmp_path)
    assert run.status["status"] == "diverged"
    losses = run.updates["loss"]
    assert np.isfinite(losses.iloc[:-1]).all()
    assert not np.isfinite(losses.iloc[-1])
    assert run.status["update"] == len(losses) - 1 < T
    before = snapshot(tmp_path)
    assert train(config, tmp_path).done
    assert snapshot(tmp_path) == before


def failing(at: int, error: BaseException) -> type[Watched]:
    class Failing(Watched):
        def step(self, batch, report):
            if self.steps == at:
                raise error
            super().step(batch, report)

    return Failing


@pytest.mark.parametrize("error", [RuntimeError("out of cheese"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_fails_says_why_and_keeps_whole_blocks(runs, tmp_path, monkeypatch, error):
    monkeypatch.setattr(one_run, "FLUSH_UPDATES", 5)
    config = run_config(METHODS["linear"])
    with pytest.raises(type(error)):
        train_watched(config, tmp_path, failing(17, error))
    run = Store(tmp_path).run("supervised", config.run_id)
    assert not run.done
    assert run.summary == {}
    assert run.status == {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    rows, healthy = run.updates, runs["linear"].run.updates
    assert rows["update"].tolist()[:15] == list(range(15))
    assert rows["loss"].tolist() == healthy["loss"].tolist()[: len(rows)]
    assert sorted(set(run.evals["update"])) == [0, 10]

    # Tried again it is an ordinary run.
    again = train(config, tmp_path)
    assert again.summary["state_sha256"] == runs["linear"].run.summary["state_sha256"]
    assert again.updates["loss"].tolist() == healthy["loss"].tolist()


def test_a_task_that_cannot_be_built_fails_with_its_reason(tmp_path):
    class Broken(Watched):
        def __init__(self, config, *, seed, device):
            raise OSError("no such data")

    config = run_config()
    with pytest.raises(OSError, match="no such data"):
        train_watched(config, tmp_path, Broken)
    run = Store(tmp_path).run("supervised", config.run_id)
    assert run.status == {"status": "failed", "error": "OSError: no such data"}


def test_a_killed_run_is_made_anew(runs, tmp_path):
    config = run_config(METHODS["random"])
    run = train(config, tmp_path)
    (run.path / "summary.json").unlink()
    write_json(run.path / "status.json", {"status": "running"})
    again = train(config, tmp_path)
    assert again.status == {"status": "complete"}
    assert again.summary["state_sha256"] == runs["random"].run.summary["state_sha256"]


# --- parts --------------------------------------------------------------------------------------


def test_the_mapping_gets_its_t_and_its_seed():
    assert build_mapping(run_config()) == Constant(1)
    mapping = build_mapping(run_config(METHODS["threshold auto"]), t=1.25)
    assert (mapping.t, mapping.repeats) == (1.25, 3)
    assert build_mapping(run_config(METHODS["linear"])).t == 0.575
    seeds = [build_mapping(run_config(METHODS["random"], seed=s)).seed for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_the_digest_sees_every_number():
    state = {"a": torch.arange(4.0), "b": [1, {"c": 2.5}]}
    same = {"a": torch.arange(4.0), "b": [1, {"c": 2.5}]}
    assert digest(state) == digest(same)
    nudged = torch.arange(4.0)
    nudged[3] = torch.nextafter(nudged[3], torch.tensor(9.0))
    others = [
        state | {"a": nudged},
        state | {"b": [2, {"c": 2.5}]},
        state | {"b": [1, {"c": 2.25}]},
        state | {"b": [1, {"d": 2.5}]},
        state | {"z": 0},
    ]
    assert len({digest(state), *map(digest, others)}) == 6
