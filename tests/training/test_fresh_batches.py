"""Methods as runs: controls of a recorded source, N as a step size, N fresh samples, loaders."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil, floor, sqrt
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from threading import enumerate as enumerate_threads
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive
from repeatlab.data import Batch, TrainStream, load_splits
from repeatlab.repetition.mappings import Linear
from repeatlab.store.records import Run, Store
from repeatlab.tasks import TASKS, load_task
from repeatlab.tasks.models import small_cnn
from repeatlab.tasks.reinforcement import Reinforcement
from repeatlab.training import stand_ins
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.fresh_batches import FreshBatches, SpacedBatches
from repeatlab.training.making import train
from repeatlab.training.prerequisites import prerequisites, source_run
from repeatlab.training.visits import Source, build_mapping

pytestmark = pytest.mark.usefixtures("one_thread")
T = 200
BATCH = 32
WIDTH = 4
LR = 0.05
WINDOW = 10
GAP = 3
LINEAR = {"mapping": {"name": "linear", "t": 0.5}}


def run_config(chosen: dict[str, Any], task: str = "supervised", **fields: Any) -> RunConfig:
    settings = {"lr": LR, "batch_size": BATCH, "width": WIDTH} if task == "supervised" else {}
    data = {
        "task": {"name": task} | settings,
        "method": chosen,
        "max_updates": T,
        "evaluation": {"splits": [], "test": False},
        "calibration": {"updates": 8},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


def control(name: str, of: Any = None, **fields: Any) -> dict[str, Any]:
    mapping = {"name": "trace", "of": of or LINEAR, "control": name, "window": WINDOW, "gap": GAP}
    return {"mapping": mapping} | fields


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def trace(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return N and the first loss of every fresh batch."""
    rows = run.updates
    first = rows[rows["repeat"] == 0].sort_values("fresh_batch")
    assert first["fresh_batch"].tolist() == list(range(len(first)))
    return first["repeats"].to_numpy(), first["loss"].to_numpy()


@pytest.fixture(scope="module")
def source(store) -> tuple[np.ndarray, np.ndarray]:
    counts, losses = trace(train(run_config(LINEAR), store))
    assert len(set(counts.tolist())) >= 4
    return counts, losses


def by_windows(values: np.ndarray) -> list[np.ndarray]:
    return [values[i : i + WINDOW] for i in range(0, len(values), WINDOW)]


def association(counts: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """Return the mean rank correlation within whole windows, and its error without any."""
    pairs = zip(by_windows(counts), by_windows(losses), strict=True)
    found = [spearmanr(n, x)[0] for n, x in pairs if len(n) == WINDOW and np.ptp(n)]
    return float(np.mean(found)), 1 / sqrt(len(found) * (WINDOW - 1))


# --- controls keep what they keep and break what they break ---------------------------------------


def test_a_replay_is_its_source_again(store, source):
    run = train(run_config(control("replay")), store)
    original = train(run_config(LINEAR), store)
    assert run.path != original.path
    assert trace(run)[0].tolist() == source[0].tolist()
    assert run.updates["loss"].tolist() == original.updates["loss"].tolist()
    assert run.summary["state_sha256"] == original.summary["state_sha256"]


@pytest.mark.parametrize("name", ["permuted", "windowed", "anti_hard"])
def test_a_rearranged_trace_holds_exactly_the_source_s_counts(store, source, name):
    counts, _ = trace(train(run_config(control(name)), store))
    assert counts.tolist() != source[0].tolist()
    assert Counter(counts.tolist()) == Counter(source[0].tolist())
    assert counts.sum() == T


@pytest.mark.parametrize("name", ["windowed", "anti_hard"])
def test_every_window_keeps_its_counts(store, source, name):
    counts, _ = trace(train(run_config(control(name)), store))
    for mine, original in zip(by_windows(counts), by_windows(source[0]), strict=True):
        assert sorted(mine) == sorted(original)
        assert mine.sum() == original.sum()


def test_the_permutation_reaches_beyond_windows(store, source):
    counts, _ = trace(train(run_config(control("permuted")), store))
    sums = [[w.sum() for w in by_windows(c)] for c in (counts, source[0])]
    assert sums[0] != sums[1]


def test_anti_hard_turns_the_association_around(store, source):
    counts, _ = trace(train(run_config(control("anti_hard")), store))
    for mine, losses in zip(by_windows(counts), by_windows(source[1]), strict=True):
        assert (np.diff(mine[np.argsort(losses)]) <= 0).all()
    found, error = association(source[0], source[1])
    assert found > 5 * error
    assert association(counts, source[1])[0] < -5 * error


@pytest.mark.parametrize("name", ["windowed", "time_only"])
def test_without_hardness_the_association_is_gone(store, source, name):
    counts, own_losses = trace(train(run_config(control(name)), store))
    for losses in (source[1], own_losses):
        found, error = association(counts, losses)
        assert abs(found) < 3 * error


def test_time_only_is_the_local_mean_and_nothing_else(store, source):
    counts, _ = trace(train(run_config(control("time_only")), store))
    assert len(counts) == len(source[0])
    assert counts.sum() == T
    for mine, original in zip(by_windows(counts), by_windows(source[0]), strict=True):
        assert abs(mine.sum() - original.sum()) <= 1
        assert np.ptp(mine) <= 1


@pytest.mark.parametrize("name", ["falling_linear", "falling_cosine"])
def test_a_falling_schedule_has_the_source_s_mean(store, source, name):
    counts, _ = trace(train(run_config(control(name)), store))
    assert (len(counts), counts.sum()) == (len(source[0]), T)
    place = (np.arange(len(counts)) + 0.5) / len(counts)
    share = 1 - place if name == "falling_linear" else (1 + np.cos(np.pi * place)) / 2
    ideal = 1 + 2 * (source[0].mean() - 1) * share
    assert np.abs(np.cumsum(counts) - np.cumsum(ideal)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("name", ["permuted", "windowed"])
def test_what_a_control_draws_is_its_run_s(source, name):
    def counts(seed: int) -> tuple[int, ...]:
        config = run_config(control(name), seed=seed)
        return build_mapping(config, source=Source(*source)).counts

    assert counts(0) == counts(0)
    assert len({counts(seed) for seed in range(4)}) == 4


def test_the_source_of_a_control_has_its_seed(store):
    runs = [train(run_config(control("permuted"), seed=seed), store) for seed in (0, 1)]
    sources = [train(run_config(LINEAR, seed=seed), store) for seed in (0, 1)]
    assert trace(runs[0])[0].tolist() != trace(runs[1])[0].tolist()
    for run, own in zip(runs, sources, strict=True):
        assert Counter(trace(run)[0].tolist()) == Counter(trace(own)[0].tolist())


# --- against loops written by hand ----------------------------------------------------------------


class ByHand:
    """The pieces of a plain loop: they share with the package the batches and the network."""

    def __init__(self) -> None:
        data, seed = load_splits("digits"), derive(0, "task supervised")
        self.stream = TrainStream(
            data.train, batch_size=BATCH, seed=seed, mean=data.mean, std=data.std, crop_padding=1
        )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(derive(seed, "weights"))
            self.model = small_cnn(1, 10, width=WIDTH)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LR, momentum=0.9, weight_decay=0.0, fused=True
        )
        self.losses: list[float] = []

    def update(self, batch: Batch, factor: Callable[[float], float] = lambda loss: 1.0) -> None:
        loss = functional.cross_entropy(self.model(batch.images), batch.labels)
        self.losses.append(loss.item())
        self.optimizer.param_groups[0]["lr"] = LR * factor(self.losses[-1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self) -> str:
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return digest(parts)


def spaced_visits(counts: list[int]) -> list[tuple[int, int]]:
    """Return (fresh batch, visit) in order: visit j of batch i is due after batch i + j GAP."""
    visits, now = [], 0
    while len(visits) < sum(counts):
        if now < len(counts):
            visits.append((now, 0))
        for batch in range(min(now, len(counts))):  # those that have waited longest come first
            visit, rest = divmod(now - batch, GAP)
            if rest == 0 and visit < counts[batch]:
                visits.append((batch, visit))
        now += 1
    return visits


def test_spaced_reuse_is_a_plain_loop_that_comes_back_later(store, source):
    run = train(run_config(control("spaced")), store)
    visits = spaced_visits(source[0].tolist())
    hand = ByHand()
    for batch, _ in visits:
        hand.update(hand.stream.fresh_batch(batch))
    rows = run.updates
    assert rows["loss"].tolist() == hand.losses
    assert run.summary["state_sha256"] == hand.state()
    assert list(zip(rows["fresh_batch"], rows["repeat"], strict=True)) == visits
    assert rows["repeats"].tolist() == [source[0][batch] for batch, _ in visits]
    assert np.bincount(rows["fresh_batch"]).tolist() == source[0].tolist()
    # No two visits to a batch in a row while there are fresh ones.
    order = rows["fresh_batch"].to_numpy()
    assert (np.diff(order[: order.argmax() + 1]) != 0).all()
    ledger = run.summary["ledger"]
    assert ledger["updates"] == T
    assert ledger["fresh_batches"] == len(source[0])
    firsts = [hand.stream.indices(batch).tolist() for batch in range(len(source[0]))]
    assert ledger["distinct_samples"] == len({n for numbers in firsts for n in numbers})


@pytest.mark.parametrize(
    ("name", "mapping", "repeats"),
    [
        ("linear", LINEAR["mapping"], lambda loss: max(1, min(5, floor(loss / 0.5)))),
        ("constant", {"name": "constant", "repeats": 3}, lambda loss: 3),
    ],
)
def test_step_size_is_a_plain_loop_at_n_times_the_rate(store, name, mapping, repeats):
    run = train(run_config({"mapping": mapping, "apply": "step_size"}, max_updates=60), store)
    hand = ByHand()
    for index in range(60):
        hand.update(hand.stream.fresh_batch(index), repeats)
    rows = run.updates
    assert rows["loss"].tolist() == hand.losses
    assert run.summary["state_sha256"] == hand.state()
    assert rows["lr"].tolist() == pytest.approx([LR * repeats(loss) for loss in hand.losses])
    assert rows["repeats"].tolist() == [1] * 60
    assert rows["fresh_batch"].tolist() == list(range(60))
    if name == "linear":
        assert len(set(rows["lr"])) >= 3


def test_step_size_lets_a_mapping_look_back(store):
    """A z-score needs the losses before: N must be that of a run which repeats nothing else."""
    mapping = {"name": "zscore", "window": 6, "step": 0.5}
    run = train(run_config({"mapping": mapping, "apply": "step_size"}, max_updates=40), store)
    losses = run.updates["loss"].to_numpy().astype(np.float32).astype(float)
    expected = [1] * 6
    for place in range(6, 40):
        recent = losses[place - 6 : place]
        z = (losses[place] - recent.mean()) / recent.std()
        expected.append(int(np.clip(1 + np.floor(z / 0.5), 1, 5)))
    assert len(set(expected)) > 2
    assert run.updates["lr"].tolist() == pytest.approx([LR * n for n in expected])


def test_step_size_multiplies_what_the_schedule_gives(store):
    chosen = {
        "mapping": {"name": "constant", "repeats": 2},
        "apply": "step_size",
        "schedule": {"name": "linear"},
    }
    run = train(run_config(chosen, max_updates=20), store)
    assert run.updates["lr"].tolist() == pytest.approx([2 * LR * (1 - u / 20) for u in range(20)])


FRESH = {"mapping": {"name": "constant", "repeats": 3}, "apply": "fresh_samples"}


def test_fresh_samples_take_other_transitions_without_another_step(store):
    run = train(run_config(FRESH, "reinforcement", max_updates=60), store)
    config = run_config(FRESH, "reinforcement", max_updates=60).task
    seed = derive(0, "task reinforcement")
    hand, losses = Reinforcement(config, seed=seed, device="cpu"), []
    for index in range(20):
        batches = [hand.fresh_batch(index), *(hand.replay(index, visit) for visit in (1, 2))]
        assert all(not torch.equal(batches[0].indices, other.indices) for other in batches[1:])
        for batch in batches:
            hand.step(batch, lambda loss: losses.append(loss.item()))
    assert run.updates["loss"].tolist() == losses
    assert run.summary["state_sha256"] == digest(hand.state_dict())
    # Every draw's samples count as seen.
    drawn = [hand.replay(index, visit).indices for index in range(20) for visit in range(3)]
    assert run.summary["ledger"]["distinct_samples"] == len(torch.cat(drawn).unique())
    # One environment step a fresh batch, as with N visits.
    visits = train(run_config(FRESH | {"apply": "repeat"}, "reinforcement", max_updates=60), store)
    steps = [r.summary["ledger"]["environment_steps"] for r in (run, visits)]
    assert steps == [config.learning_starts + 20] * 2
    assert run.updates["loss"].tolist() != visits.updates["loss"].tolist()


def test_a_control_can_take_fresh_samples(store):
    uniform = {"mapping": {"name": "uniform"}}
    chosen = control("replay", uniform, apply="fresh_samples")
    run = train(run_config(chosen, "reinforcement", max_updates=60), store)
    original = train(run_config(uniform, "reinforcement", max_updates=60), store)
    assert trace(run)[0].tolist() == trace(original)[0].tolist()
    assert len(set(trace(run)[0].tolist())) > 1
    assert run.updates["loss"].tolist() != original.updates["loss"].tolist()


# --- the source of a control ----------------------------------------------------------------------


def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of ids of the runs that are begun from now on."""
    ids: list[str] = []
    begin = Store.begin

    def noted(self: Store, run: Run, *args: Any, **options: Any) -> Any:
        ids.append(run.path.name)
        return begin(self, run, *args, **options)

    monkeypatch.setattr(Store, "begin", noted)
    return ids


def test_the_source_is_made_first_or_found(tmp_path, monkeypatch):
    ids = begun(monkeypatch)
    first, second = (run_config(control(name), max_updates=30) for name in ("permuted", "spaced"))
    original = run_config(LINEAR, max_updates=30)
    assert source_run(first) == original
    assert [r.run_id for r in prerequisites(first)] == [original.run_id]
    train(first, tmp_path)
    assert ids == [original.run_id, first.run_id]
    train(second, tmp_path)
    train(original, tmp_path)
    assert ids == [original.run_id, first.run_id, second.run_id]


def test_a_calibrated_source_is_calibrated_first(tmp_path, monkeypatch):
    ids = begun(monkeypatch)
    auto = {"mapping": {"name": "linear", "t": "auto"}}
    config = run_config(control("windowed", auto), max_updates=30)
    original = run_config(auto, max_updates=30)
    (calibration,) = prerequisites(original)
    run = train(config, tmp_path)
    assert ids == [calibration.run_id, original.run_id, config.run_id]
    assert Counter(trace(run)[0].tolist()) == Counter(trace(train(original, tmp_path))[0].tolist())
    assert run.summary["calibration"] is None


@pytest.mark.parametrize("name", ["windowed", "spaced", "falling_cosine"])
def test_under_a_budget_a_control_ends_with_its_source(tmp_path, name):
    auto = {"mapping": {"name": "linear", "t": "auto"}}
    fields = {
        "max_updates": 40,
        "budget": {"unit": "cost", "k": 2.0},
        "evaluation": {"test": False},
    }
    original = train(run_config(auto, **fields), tmp_path)
    run = train(run_config(control(name, auto), **fields), tmp_path)
    assert len(original.updates) == len(run.updates) == 40 - 8  # the calibration had its share
    assert run.summary["ledger"]["updates"] == 32
    assert run.evals["update"].unique().tolist() == [0, 32]
    visits = run.updates.groupby("fresh_batch").size()
    if name == "windowed":
        assert Counter(visits) == Counter(original.updates.groupby("fresh_batch").size())


def test_a_source_that_diverges_leaves_nothing_to_replay(tmp_path):
    config = run_config(control("permuted"), max_updates=30)
    config = config.model_copy(update={"task": config.task.model_copy(update={"lr": 1e30})})
    with pytest.raises(RuntimeError, match="diverged: a control needs its source with finite"):
        train(config, tmp_path)


def test_the_study_s_arm_is_the_source(tmp_path, monkeypatch, small_study):
    ids = begun(monkeypatch)
    methods = {
        "shuffled": {"mapping": {"name": "trace", "of": "linear", "control": "windowed"}},
        "spaced": {"mapping": {"name": "trace", "of": "linear", "control": "spaced"}},
        "linear": {"mapping": {"name": "linear", "t": "auto"}},
    }
    study = small_study(methods=methods)
    report = study.run(tmp_path, workers=0)
    assert set(report.status.values()) == {"complete"}
    assert len(ids) == len(set(ids)) == 2 * 3 + 2  # three arms and a calibration for each seed
    planned = {(p.method, p.seed): p.config for p in study.planned()}
    for (name, seed), config in planned.items():
        if name != "linear":
            assert source_run(config).run_id == planned["linear", seed].run_id
            counts = [
                trace(Store(tmp_path).run("supervised", c.run_id))[0].tolist()
                for c in (config, planned["linear", seed])
            ]
            assert Counter(counts[0]) == Counter(counts[1])


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"a": {"mapping": {"name": "trace", "of": "liner"}}},
            "methods.a.mapping.of: unknown method 'liner'; did you mean 'linear'?",
        ),
        (
            {"a": {"mapping": {"name": "trace", "of": "standard"}}},
            "methods.a.mapping.of: of must be a method with a mapping of its own",
        ),
        (
            {
                "a": {"mapping": {"name": "trace", "of": "linear"}},
                "b": {"mapping": {"name": "trace", "of": "a"}},
            },
            "methods.b.mapping.of: of must be a method with a mapping of its own: no control",
        ),
        (
            {
                "big": {"mapping": {"name": "linear", "t": 1}, "apply": "step_size"},
                "a": {"mapping": {"name": "trace", "of": "big"}},
            },
            "methods.a.mapping.of: of must be a method with a mapping of its own: no control, and "
            "not step_size",
        ),
        (
            {"a": {"mapping": {"name": "trace"}}},
            "methods.a.mapping: give either counts, or of: the method whose counts are replayed",
        ),
        (
            {"a": {"mapping": {"name": "trace", "counts": [1], "of": "linear"}}},
            "methods.a.mapping: give either counts, or of",
        ),
        (
            {"a": {"mapping": {"name": "trace", "counts": [2, 1], "control": "windowed"}}},
            "methods.a.mapping: control needs of: the method whose counts it changes",
        ),
        (
            {"a": {"mapping": {"name": "trace", "of": "linear", "control": "windwed"}}},
            "methods.a.mapping.control: must be",
        ),
        (
            {"a": {"apply": "step_size"}},
            "methods.a: apply: step_size needs a mapping, whose N it applies",
        ),
        (
            {"a": {"mapping": {"name": "until", "t": 1}, "apply": "step_size"}},
            "methods.a: apply: step_size has no visits for the mapping until",
        ),
        (
            {"a": {"mapping": {"name": "while", "t": 1}, "apply": "step_size"}},
            "methods.a: apply: step_size has no visits for the mapping while",
        ),
        (
            {"a": control("spaced", "linear", fresh_views=True)},
            "methods.a: control: spaced stands alone",
        ),
        (
            {"a": control("spaced", "linear", sampler={"name": "online"})},
            "methods.a: control: spaced stands alone",
        ),
        (
            {"a": FRESH},
            "tasks.digits with methods.a: method.apply: fresh_samples is not for the task "
            "supervised: on a data set N fresh batches",
        ),
        (
            {"a": FRESH | {"sampler": {"name": "online"}}},
            "methods.a: apply: fresh_samples draws uniformly, so it takes no sampler",
        ),
        (
            {"a": FRESH | {"fresh_views": True}},
            "methods.a: fresh_views has no effect with apply: fresh_samples",
        ),
    ],
)
def test_what_cannot_be_replayed_or_applied_is_refused_by_name(small_study, methods, message):
    known = {"standard": {}, "linear": {"mapping": {"name": "linear", "t": 1}}}
    with pytest.raises(ConfigError) as error:
        small_study(methods=known | methods)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("task", "chosen", "message"),
    [
        (
            {"name": "semisupervised"},
            {"sampler": {"name": "rho_loss"}},
            "tasks.it with methods.a: method.sampler: rho_loss is not for the task semisupervised: "
            "pseudo-labels",
        ),
        (
            {"name": "generative", "driver": "generator"},
            {"sampler": {"name": "selective"}},
            "tasks.it with methods.a: method.sampler: selective is not for the task generative: "
            "the generator's loss belongs to no image",
        ),
        (
            {"name": "generative", "driver": "sum"},
            LINEAR | {"apply": "step_size"},
            "tasks.it with methods.a: method.apply: step_size is not for the task generative: "
            "this driver is known only after the discriminator's step",
        ),
        (
            {"name": "supervised", "augment": False},
            LINEAR | {"fresh_views": True},
            "tasks.it with methods.a: method.fresh_views is not for the task supervised: "
            "augment: false leaves one view of each image",
        ),
    ],
)
def test_a_refusal_names_task_method_and_reason(small_study, task, chosen, message):
    with pytest.raises(ConfigError) as error:
        small_study(tasks={"digits": {"name": "supervised"}, "it": task}, methods={"a": chosen})
    assert str(error.value).startswith(message)


def test_what_is_binarized_anew_is_a_fresh_view(small_study):
    fresh = {"a": LINEAR | {"fresh_views": True}}
    small_study(tasks={"it": {"name": "unsupervised", "binarize": True}}, methods=fresh)
    with pytest.raises(ConfigError, match="only what `binarize` draws has another view"):
        small_study(tasks={"it": {"name": "unsupervised"}}, methods=fresh)


def test_a_single_run_needs_the_source_itself():
    with pytest.raises(ConfigError, match="of: 'linear' names a method of a study; a single run"):
        run_config(control("windowed", "linear"))
    assert run_config(control("windowed")).method.source.mapping.build() == Linear(t=0.5)


# --- loaders --------------------------------------------------------------------------------------

LOADED: dict[str, dict[str, Any]] = {
    "standard": {},
    "fixed 3": {"mapping": {"name": "constant", "repeats": 3}},
    "linear": LINEAR,
    "spaced": control("spaced"),
    "hard mining": {"sampler": {"name": "hard_mining"}},
    "selective": {"sampler": {"name": "selective"}},
    "importance": {"sampler": {"name": "importance", "k": 0.01}},
    "rho_loss": {"sampler": {"name": "rho_loss", "presample": 4, "holdout_updates": 5}},
}


def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of delays from now on; nobody waits for them."""
    delays: list[float] = []
    monkeypatch.setattr(stand_ins, "sleep", delays.append)
    return delays


@pytest.mark.parametrize("name", LOADED)
def test_every_batch_of_a_slow_loader_takes_its_delay(store, tmp_path, monkeypatch, name):
    plain = train(run_config(LOADED[name], max_updates=40), store)
    delays = slept(monkeypatch)
    config = run_config(LOADED[name], max_updates=40, loader={"delay_ms": 7})
    for needed in prerequisites(config):
        train(needed, tmp_path)
    delays.clear()
    run = train(config, tmp_path)
    ledger = run.summary["ledger"]
    batches = ledger["fresh_batches"]
    if name == "selective":
        batches = ledger["scoring_samples"] // BATCH
    elif name == "rho_loss":  # presamples, what two models learn from, what they are asked about
        samples = len(load_splits("digits").train)
        asked = sum(ceil(half / BATCH) for half in (samples - samples // 2, samples // 2))
        batches = 40 * 4 + 2 * 5 + asked
    assert delays == [0.007] * batches
    # Slow or not, it is the same training.
    assert run.updates["loss"].tolist() == plain.updates["loss"].tolist()
    assert run.summary["state_sha256"] == plain.summary["state_sha256"]


def test_an_agent_s_batches_are_slow_but_not_its_resampled_ones(tmp_path, monkeypatch):
    delays = slept(monkeypatch)
    train(run_config(FRESH, "reinforcement", max_updates=30, loader={"delay_ms": 2}), tmp_path)
    assert delays == [0.002] * 10


@pytest.mark.parametrize("name", ["standard", "fixed 3", "linear", "spaced"])
def test_prefetched_batches_are_the_same_and_made_beside_the_updates(
    store, tmp_path, monkeypatch, name
):
    threads = []
    batch_of = TrainStream.batch_of

    def noted(self: TrainStream, indices: torch.Tensor, index: int, view: int = 0) -> Batch:
        threads.append(current_thread() is main_thread())
        return batch_of(self, indices, index, view)

    plain = train(run_config(LOADED[name], max_updates=40), store)
    monkeypatch.setattr(TrainStream, "batch_of", noted)
    config = run_config(LOADED[name], max_updates=40, loader={"prefetch": True})
    run = train(config, tmp_path)
    assert run.path.name != plain.path.name
    assert threads
    assert not any(threads)
    columns = [c for c in plain.updates.columns if c != "seconds"]
    assert run.updates[columns].equals(plain.updates[columns])
    assert run.summary["state_sha256"] == plain.summary["state_sha256"]
    counts = [
        {k: v for k, v in r.summary["ledger"].items() if not k.endswith("seconds")}
        for r in (run, plain)
    ]
    assert counts[0] == counts[1]


def test_prefetching_is_one_batch_ahead_and_no_more():
    task = load_task(TASKS["supervised"])(run_config({}).task, seed=0, device="cpu")
    asked, before = [], prefetching()
    make = task.fresh_batch
    task.fresh_batch = lambda index: (asked.append(index), make(index))[1]
    batches = FreshBatches(task, prefetch=True).iter_from(4)
    for index in range(4, 9):
        batch = next(batches)
        assert batch.index == index
        assert torch.equal(batch.images, make(index).images)
    (thread,) = prefetching(before)
    batches.close()
    thread.join(60)  # makes the one that is under way, and ends
    assert not thread.is_alive()
    assert asked == [4, 5, 6, 7, 8, 9]


def prefetching(before: Sequence[Thread] = ()) -> list[Thread]:
    """Return the threads that make batches ahead, but for those of `before`, which may yet end."""
    threads = [thread for thread in enumerate_threads() if thread.name.startswith("prefetch")]
    return [thread for thread in threads if thread not in before]


def test_the_garbage_collector_does_not_wait_for_a_loader_s_thread():
    # It may run while `threading` holds the lock that joining a thread needs.
    go_on = Event()

    class Stuck:
        def fresh_batch(self, index: int) -> Any:
            if index:
                go_on.wait()
            return SimpleNamespace(index=index, indices=torch.tensor([index]))

    before = prefetching()
    left = iter(FreshBatches(Stuck(), prefetch=True))
    next(left)
    (thread,) = prefetching(before)
    cycle = [left]
    cycle.append(cycle)
    del left, cycle
    collector = Thread(target=gc.collect, daemon=True)
    collector.start()
    collector.join(60)
    waits = collector.is_alive()
    go_on.set()
    thread.join(60)
    assert not waits
    assert not thread.is_alive()


def test_a_run_leaves_no_thread_of_its_loader(tmp_path):
    gc.disable()
    try:
        train(run_config({}, max_updates=5, loader={"prefetch": True}), tmp_path)
        for thread in prefetching():
            thread.join(60)
        assert not prefetching()
    finally:
        gc.enable()


@pytest.mark.parametrize("chosen", [LOADED["hard mining"], LOADED["selective"]])
def test_what_depends_on_the_latest_weights_cannot_be_prefetched(chosen):
    with pytest.raises(ConfigError, match="prefetch: a sampler chooses by the latest losses"):
        run_config(chosen, loader={"prefetch": True})
    with pytest.raises(ConfigError, match="prefetch is not for the task reinforcement: the agent"):
        run_config({}, "reinforcement", loader={"prefetch": True})


def test_spaced_visits_begin_anywhere():
    task = load_task(TASKS["supervised"])(run_config({}).task, seed=0, device="cpu")
    counts = np.array([3, 1, 2, 4, 1, 1, 2])
    whole = [batch.index for batch in SpacedBatches(task, counts, gap=GAP)]
    assert whole == [batch for batch, _ in spaced_visits(counts.tolist())]
    for position in range(len(whole)):
        batches = SpacedBatches(task, counts, gap=GAP)
        rest = list(batches.iter_from(position))
        assert [batch.index for batch in rest] == whole[position:]
        assert batches.fresh(position) == len(set(whole[:position]))


def test_distinct_samples_are_those_handed_out():
    task = load_task(TASKS["supervised"])(run_config({}).task, seed=0, device="cpu")
    told = []
    batches = FreshBatches(task, seen=lambda indices: told.append(indices.tolist()))
    loader = batches.iter_from(0)
    numbers: set[int] = set()
    for _ in range(50):  # more than an epoch
        numbers |= set(next(loader).indices.tolist())
        assert batches.distinct() == len(numbers)
    assert len(told) == 50
    assert {n for batch in told for n in batch} == numbers
