"""Runs that learn from an ensemble: the loss in closed form, the run by hand, what it costs."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn
from torch.nn import functional

from repeatlab.analysis.frames import load
from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive
from repeatlab.data import load_splits
from repeatlab.data.augment import normalize
from repeatlab.store.records import Store
from repeatlab.tasks.distillation import Distilled
from repeatlab.tasks.models import small_cnn
from repeatlab.tasks.supervised import Supervised, SupervisedConfig
from repeatlab.training import weights
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.one_run import Training
from repeatlab.training.prerequisites import teacher_runs

T, BATCH, TEACHER_UPDATES = 12, 16, 20
TEMPERATURE, SHARE = 3.0, 0.8
SETTINGS = {
    "teachers": 2,
    "updates": TEACHER_UPDATES,
    "temperature": TEMPERATURE,
    "share": SHARE,
}


def run_config(method: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
    data = {
        "task": {"name": "supervised", "lr": 0.05, "batch_size": BATCH},
        "method": {"distillation": SETTINGS} | (method or {}),
        "max_updates": T,
        "evaluation": {"splits": [], "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


def a_task(share: float, temperature: float = TEMPERATURE, **fields: Any) -> Distilled:
    """Return a task with made-up targets."""
    settings = {"batch_size": BATCH, "augment": False} | fields
    task = Distilled(SupervisedConfig(**settings), seed=0, device="cpu")
    logits = torch.randn(len(task.data.train), 10, generator=torch.Generator().manual_seed(1))
    targets = (2 * logits / temperature).softmax(1)
    task.imitate(targets, temperature=temperature, share=share, spent={})
    return task


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_sample_s_loss_is_the_closed_form(share, smoothing):
    task = a_task(share, label_smoothing=smoothing)
    batch = task.fresh_batch(0)
    with torch.no_grad():
        logits = task.model(batch.images).double().numpy()
    targets = task.targets[batch.indices].double().numpy()
    divergence = rel_entr(targets, softmax(logits / TEMPERATURE, axis=1)).sum(1)
    goal = (1 - smoothing) * np.eye(10)[batch.labels.numpy()] + smoothing / 10
    hard = -(goal * log_softmax(logits, axis=1)).sum(1)
    expected = (1 - share) * hard + share * TEMPERATURE**2 * divergence
    np.testing.assert_allclose(task.sample_losses(batch).numpy(), expected, rtol=2e-5, atol=1e-6)
    seen = []
    task.step(batch, lambda loss: seen.append(loss.item()))
    assert seen == [pytest.approx(expected.mean(), rel=1e-5)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_sample_s_bound_is_the_norm_of_its_gradient_at_the_logits(share):
    task = a_task(share, label_smoothing=0.1)
    batch = task.fresh_batch(0)
    logits = task.model(batch.images).detach().requires_grad_()
    student = functional.log_softmax(logits / TEMPERATURE, 1)
    soft = nn.KLDivLoss(reduction="sum")(student, task.targets[batch.indices])
    hard = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)(logits, batch.labels)
    ((1 - share) * hard + share * TEMPERATURE**2 * soft).backward()
    torch.testing.assert_close(task.gradient_bounds(batch), logits.grad.norm(dim=1))


def test_at_a_high_temperature_it_matches_logits():
    """Hinton et al. 2015, eq. 4 times T^2: the gradient becomes (z - v) / classes."""
    task = a_task(1.0, temperature=100.0)
    batch = task.fresh_batch(0)
    teacher = task.targets[batch.indices].log() * 100
    logits = task.model(batch.images).detach()
    difference = logits - teacher
    expected = (difference - difference.mean(1, keepdim=True)) / 10
    torch.testing.assert_close(task.gradient_bounds(batch), expected.norm(dim=1), rtol=0.05, atol=0)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    task = a_task(1.0)
    data = task.data
    with torch.no_grad():
        logits = task.model(normalize(data.train.images, data.mean, data.std))
    targets = (logits / TEMPERATURE).softmax(1)
    task.imitate(targets, temperature=TEMPERATURE, share=1.0, spent={})
    batch = task.fresh_batch(0)
    assert task.sample_losses(batch).abs().max() < 1e-5
    assert task.gradient_bounds(batch).max() < 1e-5


def test_weights_of_one_change_nothing_and_the_driver_is_never_weighted():
    plain, ones, zeros = a_task(SHARE), a_task(SHARE), a_task(SHARE)
    drivers = []
    for task, given in ((plain, None), (ones, torch.ones(BATCH)), (zeros, torch.zeros(BATCH))):
        task.step(task.fresh_batch(0), lambda loss, *_: drivers.append(loss.item()), given)
    assert drivers == pytest.approx([drivers[0]] * 3)
    untouched = a_task(SHARE).model
    for a, b, c, d in zip(
        *(m.parameters() for m in (plain.model, ones.model, zeros.model, untouched)), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert torch.equal(c, d)
        assert not torch.equal(a, d)


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Return a store that holds the teachers."""
    store = Store(tmp_path_factory.mktemp("runs"))
    for teacher in teacher_runs(run_config()):
        train(teacher, store)
    return store


def targets_by_hand(store: Store) -> np.ndarray:
    """Return the mean of the teachers' softened distributions on the train split."""
    data = load_splits("digits")
    found = []
    for teacher in teacher_runs(run_config()):
        network = small_cnn(1, 10, width=16)
        network.load_state_dict(weights.load(store.run("supervised", teacher.run_id))["model"])
        with torch.no_grad():
            logits = network(normalize(data.train.images, data.mean, data.std)).double().numpy()
        found.append(softmax(logits / TEMPERATURE, axis=1))
    return np.mean(found, axis=0)


def test_a_run_is_the_bare_loop_on_the_teachers_targets(store):
    run = train(run_config({"mapping": {"name": "constant", "repeats": 2}}), store)
    targets = torch.from_numpy(targets_by_hand(store)).float()
    # The standard run's first weights and batches.
    seed = derive(0, "task supervised")
    task = Supervised(SupervisedConfig(lr=0.05, batch_size=BATCH), seed=seed, device="cpu")
    model = task.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    divergence = nn.KLDivLoss(reduction="batchmean")
    losses = []
    for update in range(T):
        batch = task.fresh_batch(update // 2)
        logits = model(batch.images)
        student = functional.log_softmax(logits / TEMPERATURE, 1)
        soft = TEMPERATURE**2 * divergence(student, targets[batch.indices])
        loss = SHARE * soft + (1 - SHARE) * functional.cross_entropy(logits, batch.labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert run.updates["loss"].tolist() == pytest.approx(losses, rel=1e-4)


def test_the_share_of_no_teacher_is_standard_training(store):
    plain = train(run_config({"distillation": None}), store)
    alone = train(run_config({"distillation": SETTINGS | {"share": 0.0}}), store)
    losses = plain.updates["loss"].tolist()
    assert alone.updates["loss"].tolist() == pytest.approx(losses, rel=1e-4)


def test_teachers_are_standard_runs_of_other_seeds_at_the_run_s_rates():
    rates = {"schedule": {"name": "cosine", "warm_up": 0.1}}
    method = rates | {"mapping": {"name": "linear", "t": 0.5}, "sampler": {"name": "selective"}}
    teachers = teacher_runs(run_config(method, seed=5))
    for teacher in teachers:
        assert teacher.method == parse(type(teacher.method), rates)
        assert teacher.task == run_config().task
        assert teacher.max_updates == TEACHER_UPDATES
        assert teacher.evaluation.splits == ()
        assert not teacher.evaluation.test
    seeds = {t.seed for seed in range(4) for t in teacher_runs(run_config(seed=seed))} | set(
        range(4)
    )
    assert len(seeds) == 4 * 2 + 4
    assert [t.run_id for t in teachers] == [
        t.run_id for t in teacher_runs(run_config(method, seed=5))
    ]
    as_long = teacher_runs(run_config({"distillation": SETTINGS | {"updates": None}}))
    assert {t.max_updates for t in as_long} == {T}
    assert teacher_runs(run_config({"distillation": None})) == []


def test_the_teachers_cost_is_the_run_s(store):
    ledger = train(run_config(), store).summary["ledger"]
    made = 2 * TEACHER_UPDATES
    assert ledger["updates"] == T
    assert ledger["holdout_updates"] == made
    # Every training image once through every teacher, for the targets.
    images = 2 * len(load_splits("digits").train)
    assert ledger["holdout_forward_samples"] == made * BATCH + images
    assert ledger["holdout_backward_samples"] == made * BATCH
    seconds = [
        store.run("supervised", teacher.run_id).summary["ledger"]["seconds"]
        for teacher in teacher_runs(run_config())
    ]
    assert ledger["holdout_seconds"] > sum(seconds)


def test_a_budget_of_cost_pays_for_the_teachers_first(store):
    budget = {"unit": "cost", "k": 2.0}
    updates = 200
    run = train(run_config(budget=budget, max_updates=updates), store)
    ledger = run.summary["ledger"]
    made, images = 2 * TEACHER_UPDATES, 2 * len(load_splits("digits").train)
    left = updates * BATCH * 3 - made * BATCH * 3 - images
    assert ledger["updates"] == -(-left // (BATCH * 3))


def test_a_stopped_run_is_the_unbroken_run_and_its_teachers_are_made_once(
    store, tmp_path, monkeypatch
):
    run = run_config({"mapping": {"name": "constant", "repeats": 3}})
    unbroken = train(run, store)
    original = Training.visit

    def visit(self):
        make = original(self)

        def stopped(batch):
            make(batch)
            if self.config.run_id == run.run_id and self.repeater.updates == 5:
                signal.raise_signal(signal.SIGINT)

        return stopped

    monkeypatch.setattr(Training, "visit", visit)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path)
    assert len(list((tmp_path / "supervised").glob("*/summary.json"))) == 2
    resumed = train(run, tmp_path)
    assert resumed.updates["loss"].equals(unbroken.updates["loss"])
    assert resumed.summary["state_sha256"] == unbroken.summary["state_sha256"]
    counts = [
        {name: count for name, count in r.summary["ledger"].items() if "seconds" not in name}
        for r in (resumed, unbroken)
    ]
    assert counts[0] == counts[1]
    made = [Store(tmp_path).run("supervised", t.run_id) for t in teacher_runs(run)]
    assert [teacher.environment["attempts"] for teacher in made] == [1, 1]


def test_an_arm_of_a_study_learns_from_teachers_of_its_own_seed(small_study, tmp_path):
    methods = {
        "standard": {},
        "distilled": {"distillation": SETTINGS | {"updates": 5}},
        "warm": {"schedule": {"name": "constant", "warm_up": 0.2}},
    }
    study = small_study(methods=methods, seeds=2, evaluation={"every": 10, "test": False})
    study.run(tmp_path, workers=0)
    runs = load(tmp_path, "small").runs.set_index(["method", "seed"])
    assert set(runs["status"]) == {"complete"}
    assert (runs.loc["distilled", "holdout_updates"] == 10).all()
    assert (runs.loc[["standard", "warm"], "holdout_updates"] == 0).all()
    found = {path.parent.name for path in (tmp_path / "supervised").glob("*/weights-*.pt")}
    planned = [p.config for p in study.planned() if p.method == "distilled"]
    assert found == {t.run_id for config in planned for t in teacher_runs(config)}
    assert len(found) == 4


@pytest.mark.parametrize(
    "method",
    [
        {"mapping": {"name": "linear", "t": 0.5}},
        {"mapping": {"name": "constant", "repeats": 2}, "fresh_views": True},
        {"mapping": {"name": "linear", "t": 0.5}, "apply": "step_size"},
        {"sampler": {"name": "importance", "k": 100.0, "ema": 0.0}},
        {"sampler": {"name": "hard_mining"}},
        {"sampler": {"name": "selective"}},
    ],
    ids=["linear", "views", "step_size", "importance", "hard_mining", "selective"],
)
def test_every_kind_of_method_makes_its_updates(method, store):
    run = train(run_config(method), store)
    assert run.status == {"status": "complete"}
    assert len(run.updates) == T
    assert np.isfinite(run.updates["loss"]).all()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"task": {"name": "semisupervised"}},
            "not for the task semisupervised, only for supervised",
        ),
        ({"task": {"name": "supervised", "label_noise": 0.2}}, "other label noise"),
        ({"method": {"mapping": {"name": "linear", "t": "auto"}}}, "t: auto is measured on"),
        ({"method": {"sampler": {"name": "rho_loss"}}}, "rho_loss trains models beforehand"),
    ],
)
def test_what_a_teacher_would_not_fit_is_refused(fields, message):
    distillation = {"distillation": SETTINGS | {"updates": 10}}
    method = distillation | fields.get("method", {})
    with pytest.raises(ConfigError, match=f"method.distillation: .*{message}"):
        run_config(**fields | {"method": method})


@pytest.mark.parametrize(
    "setting", [{"teachers": 0}, {"temperature": 0.0}, {"share": 1.1}, {"updates": 0}]
)
def test_bad_settings_are_named(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"method.distillation.{name}: must be"):
        run_config({"distillation": setting})
