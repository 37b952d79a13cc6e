"""Optimizers, clipping, label smoothing and averages of weights, against loops written by hand."""

from __future__ import annotations

import io
from itertools import pairwise
from math import log
from typing import Any

import pytest
import torch
from every_method import SIX
from torch import nn
from torch.nn import functional

from repeatlab.core.schema import ConfigError, parse
from repeatlab.studies.checks.expectations import EXPECTATIONS
from repeatlab.studies.checks.learning import regularisation
from repeatlab.studies.checks.probe import Subject
from repeatlab.tasks import TASKS, load_task
from repeatlab.tasks.optimization import OPTIMIZERS, chosen
from repeatlab.tasks.supervised import Supervised, SupervisedConfig
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig

SMALL: dict[str, dict[str, Any]] = {
    "supervised": {"width": 4},
    "semisupervised": {"width": 4, "mu": 1},
    "selfsupervised": {"width": 4, "projection": 8, "bank": 200},
    "reinforcement": {"hidden": (8,), "learning_starts": 40, "evaluation_episodes": 2},
    "unsupervised": {"width": 4, "latent": 3, "fid_samples": 20},
    "generative": {"width": 4, "latent": 5, "fid_samples": 20},
}
every_task = pytest.mark.parametrize("name", SIX)
# What evaluates an average of weights, and where it keeps the two.
AVERAGED = {
    "supervised": (lambda task: task.model, lambda task: task.ema),
    "unsupervised": (lambda task: task.model, lambda task: task.ema),
    "selfsupervised": (
        lambda task: nn.ModuleList([task.encoder, task.head]),
        lambda task: task.ema,
    ),
    "generative": (lambda task: task.g, lambda task: task.g_ema),
}


def build(name: str, device: str = "cpu", **fields: Any) -> Any:
    """Return a small task with batches of eight."""
    kind = load_task(TASKS[name])
    config = kind.Config.model_validate({"name": name, "batch_size": 8} | SMALL[name] | fields)
    return kind(config, seed=0, device=device)


def ignore(*reported: Any) -> None:
    """Take what a task reports."""


def refusal(model: type, fields: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse(model, fields)
    return str(error.value)


# --- optimizers ---------------------------------------------------------------------------------

TORCH = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.01}, {"fused": True}),
    "momentum": (torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.01}, {"fused": True}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.8}, {"nesterov": True, "fused": True}),
    "adam": (torch.optim.Adam, {"betas": (0.5, 0.9), "weight_decay": 0.01}, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"betas": (0.5, 0.9), "eps": 1e-6}, {"fused": True}),
}


def by_hand(task: Any, kind: type, settings: dict[str, Any], visits: list[int], clip: float = 0):
    """Return the weights that a plain loop over the task's batches ends with."""
    model = build("supervised").model
    optimizer = kind(model.parameters(), lr=task.config.lr, **settings)
    for index in visits:
        batch = task.fresh_batch(index)
        loss = functional.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("name", TORCH)
def test_twenty_updates_are_those_of_torch_s_optimizer_bit_for_bit(name):
    kind, settings, fixed = TORCH[name]
    task = build("supervised", lr=0.02, optimizer=chosen(name, **settings))
    visits = [batch for batch in range(10) for _ in range(2)]
    for index in visits:
        task.step(task.fresh_batch(index), ignore)
    expected = by_hand(task, kind, settings | fixed, visits)
    assert all(map(torch.equal, task.model.parameters(), expected))
    assert not torch.equal(expected[0], build("supervised").model[0].weight)


def test_every_optimizer_is_held_to_torch_s():
    """Or, of those that are more than one of torch's, to a loop below."""
    assert TORCH.keys() == OPTIMIZERS.keys() - {"muon", "schedule_free"}


@pytest.mark.parametrize("name", TORCH)
def test_the_defaults_are_torch_s(name):
    """But for the momentum of those that are named after it."""
    kind, _, _ = TORCH[name]
    weight = nn.Parameter(torch.zeros(1))
    ours = chosen(name).build().make([weight], lr=0.1, device="cpu").defaults
    theirs = kind([weight], lr=0.1).defaults
    if name in ("momentum", "nesterov"):
        theirs |= {"momentum": 0.9, "nesterov": name == "nesterov"}
    speed = ("fused", "foreach")
    assert {k: v for k, v in ours.items() if k not in speed} == {
        k: v for k, v in theirs.items() if k not in speed
    }


@every_task
def test_every_task_trains_with_the_optimizer_that_it_is_given(name):
    task = build(name, lr=0.003, optimizer={"name": "adamw", "betas": [0.5, 0.9]})
    assert len(task.optimizers) == (2 if name == "generative" else 1)
    for optimizer in task.optimizers:
        assert type(optimizer) is torch.optim.AdamW
        assert (optimizer.defaults["betas"], optimizer.defaults["lr"]) == ((0.5, 0.9), 0.003)
    before = [p.clone() for p in weights(task)]
    task.step(task.fresh_batch(0), ignore)
    assert not all(map(torch.equal, before, weights(task)))


def weights(task: Any) -> list[torch.Tensor]:
    """Return what the task's optimizers hold."""
    groups = [group for optimizer in task.optimizers for group in optimizer.param_groups]
    return [weight.detach() for group in groups for weight in group["params"]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_configuration_is_read_back_as_it_was_written(name):
    run = {"task": {"name": "supervised", "optimizer": {"name": name}}, "max_updates": 1}
    config = parse(RunConfig, run)
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert again.task.optimizer.build() == OPTIMIZERS[name]()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "lbfgs"}, "unknown optimizer 'lbfgs'"),
        ({"name": "adm"}, "did you mean 'adam'?"),
        ("adam", "must be a mapping with the key 'name'"),
        ({"name": "sgd", "momentum": 0.9}, "momentum: unknown key"),
        ({"name": "momentum", "momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"name": "nesterov", "momentum": 0.0}, "momentum must be above 0"),
        ({"name": "adam", "betas": [0.9, 1.0]}, "betas must be"),
        ({"name": "adam", "betas": [0.9]}, "betas"),
        ({"name": "adamw", "weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"name": "adam", "eps": 0.0}, "eps must be positive"),
    ],
)
def test_what_is_refused_names_its_field_and_the_reason(optimizer, message):
    run = {"task": {"name": "supervised", "optimizer": optimizer}, "max_updates": 1}
    found = refusal(RunConfig, run)
    assert found.startswith("task.optimizer")
    assert message in found


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw", "adam"])
def test_the_check_of_weight_decay_sees_that_it_costs_training_loss(optimizer):
    config = SupervisedConfig(optimizer=chosen(optimizer), width=4)
    found = regularisation(Subject(config, Supervised, EXPECTATIONS["supervised"]))
    assert found.verdict == "pass"


def flat(network: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in network.parameters()]


def test_muon_moves_matrices_by_torch_s_and_the_rest_by_adamw_bit_for_bit():
    task = build("supervised", lr=0.02, optimizer=chosen("muon", momentum=0.8, weight_decay=0.05))
    model = build("supervised").model
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(
        matrices, lr=0.02, momentum=0.8, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=0.02, weight_decay=0.05, fused=True)
    for index in [0, 0, 1, 2, 2, 2]:
        batch = task.fresh_batch(index)
        task.step(batch, ignore)
        model.zero_grad()
        functional.cross_entropy(model(batch.images), batch.labels).backward()
        muon.step()
        adamw.step()
    assert matrices
    assert others
    assert all(map(torch.equal, task.model.parameters(), model.parameters()))


def test_schedule_free_follows_its_recursion_and_evaluates_its_average():
    """Equations 3 to 5 of arXiv 2405.15682, with c of update t by the squares of the rates."""
    momentum, decay, rates = 0.8, 0.01, [0.01, 0.05, 0.05, 0.02, 0.02, 0.05]
    settings = chosen("schedule_free", momentum=momentum, weight_decay=decay)
    task = build("supervised", optimizer=settings)
    model = build("supervised").model
    x, z = flat(model), flat(model)
    largest, counted = 0.0, 0.0
    for index, rate in zip([0, 0, 1, 2, 2, 2], rates, strict=True):
        batch = task.fresh_batch(index)
        task.optimizer.param_groups[0]["lr"] = rate
        task.step(batch, ignore)
        model.zero_grad()
        functional.cross_entropy(model(batch.images), batch.labels).backward()
        largest = max(largest, rate)
        counted += largest**2
        c = largest**2 / counted
        with torch.no_grad():
            for i, y in enumerate(model.parameters()):
                z[i] = z[i] - rate * (y.grad + decay * y)
                x[i] = (1 - c) * x[i] + c * z[i]
                y.copy_(momentum * x[i] + (1 - momentum) * z[i])
    for found, wanted in zip(flat(task.model), flat(model), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(flat(task.ema), x, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    task.model.load_state_dict(task.ema.state_dict())
    with task.learner.evaluating():
        data = task.data.validation
        images = (data.images / 255 - torch.tensor(task.data.mean)) / torch.tensor(task.data.std)
        loss = functional.cross_entropy(task.ema(images), data.labels).item()
    assert task.evaluate("validation")["loss"] == pytest.approx(loss, rel=1e-4)


def test_schedule_free_and_a_second_average_are_refused():
    run = {"task": {"name": "semisupervised", "optimizer": {"name": "schedule_free"}}}
    assert "ema_decay must be 0 with schedule_free" in refusal(RunConfig, run | {"max_updates": 1})


@every_task
@pytest.mark.parametrize("optimizer", ["muon", "schedule_free"])
def test_their_state_goes_on_bit_for_bit_and_evaluation_leaves_no_trace(name, optimizer):
    fields = {"ema_decay": 0.0, "optimizer": {"name": optimizer}}
    unbroken, resumed = build(name, **fields), build(name, **fields)
    for index in (0, 0, 1):
        unbroken.step(unbroken.fresh_batch(index), ignore)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())
    assert unbroken.evaluate("validation") == resumed.evaluate("validation")
    for task in (unbroken, resumed):
        for index in (1, 2):
            task.step(task.fresh_batch(index), ignore)
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())


# --- clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_clipping_is_that_of_torch_bit_for_bit(clip):
    task = build("supervised", lr=0.1, clip_norm=clip)
    visits = [0, 0, 1, 2, 2, 2]
    for index in visits:
        task.step(task.fresh_batch(index), ignore)
    settings = {"momentum": 0.9, "fused": True}
    expected = by_hand(task, torch.optim.SGD, settings, visits, clip)
    plain = by_hand(task, torch.optim.SGD, settings, visits)
    assert all(map(torch.equal, task.model.parameters(), expected))
    assert all(map(torch.equal, plain, expected)) == (clip == 1e6)


@every_task
def test_each_optimizer_s_own_gradients_are_clipped(name):
    norms = {None: [], 1e-3: []}
    for clip, found in norms.items():
        task = build(name, clip_norm=clip)
        for optimizer in task.optimizers:
            optimizer.register_step_pre_hook(
                lambda optimizer, *_, found=found: found.append(norm_of(optimizer))
            )
        task.step(task.fresh_batch(0), ignore)
        assert len(found) == len(task.optimizers)
    assert min(norms[None]) > 2e-3
    assert norms[1e-3] == pytest.approx([1e-3] * len(norms[1e-3]), rel=1e-3)


def norm_of(optimizer: torch.optim.Optimizer) -> float:
    gradients = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
    return torch.cat(gradients).norm().item()


# --- label smoothing ----------------------------------------------------------------------------


def smoothed(logits: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    """-sum_k q_k ln p_k with q = (1 - s) onehot + s / classes."""
    chances = logits.log_softmax(1)
    label = chances.gather(1, labels.unsqueeze(1)).squeeze(1)
    return -(1 - share) * label - share * chances.mean(1)


def test_the_smoothed_loss_drives_is_descended_and_scores():
    task = build("supervised", label_smoothing=0.2, lr=0.5, optimizer=chosen("sgd"))
    batch = task.fresh_batch(0)
    losses = smoothed(task.model(batch.images), batch.labels, 0.2)
    gradients = torch.autograd.grad(losses.mean(), list(task.model.parameters()))
    expected = [
        p.detach() - 0.5 * g for p, g in zip(task.model.parameters(), gradients, strict=True)
    ]
    torch.testing.assert_close(task.sample_losses(batch), losses.detach())
    reported = []
    task.step(batch, lambda *found: reported.append(found), torch.ones(8))
    driver, each, _ = reported[0]
    torch.testing.assert_close(each, losses.detach())
    assert driver.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    for found, wanted in zip(task.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)
    plain = build("supervised", label_smoothing=0.2)
    plain.step(batch, lambda loss: reported.append(loss.item()))
    assert reported[1] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_bounds_are_norms_of_the_smoothed_loss_s_gradient_at_the_logits():
    task = build("supervised", label_smoothing=0.2)
    batch = task.fresh_batch(0)
    logits = task.model(batch.images).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(smoothed(logits, batch.labels, 0.2).sum(), logits)
    torch.testing.assert_close(task.gradient_bounds(batch), gradient.norm(dim=1))


def test_the_lowest_smoothed_loss_is_the_target_s_entropy():
    target = [0.91] + [0.01] * 9
    entropy = -sum(q * log(q) for q in target)
    task = build("supervised", label_smoothing=0.1)
    batch = task.fresh_batch(0)
    sure = functional.one_hot(batch.labels, 10).float().mul(log(91))
    assert task.losses(sure, batch)[0][0].item() == pytest.approx(entropy, rel=1e-5)
    assert entropy == pytest.approx(0.5003, abs=5e-5)


def test_evaluated_losses_are_not_smoothed():
    found = [build("supervised", label_smoothing=s).evaluate("validation") for s in (0.0, 0.3)]
    assert found[0] == found[1]


def test_fixmatch_smooths_labels_but_not_pseudo_labels():
    task = build("semisupervised", label_smoothing=0.2, threshold=0.0)
    batch = task.fresh_batch(0)
    with torch.no_grad():
        logits = task.model(torch.cat([batch.labelled, batch.weak, batch.strong]))
    labelled, weak, strong = logits.split(8)
    pseudo = functional.cross_entropy(strong, weak.argmax(1), reduction="none")
    expected = smoothed(labelled, batch.labels, 0.2) + pseudo
    torch.testing.assert_close(task.sample_losses(batch), expected)


# --- averages of weights ------------------------------------------------------------------------


@pytest.mark.parametrize("name", AVERAGED)
def test_the_average_is_d_to_the_n_of_the_start_and_the_rest_of_what_came(name):
    decay, (trained, average) = 0.7, AVERAGED[name]
    task = build(name, ema_decay=decay, lr=0.01)
    path = [[p.detach().clone() for p in trained(task).parameters()]]
    for index in (0, 0, 1, 2):
        task.step(task.fresh_batch(index), ignore)
        path.append([p.detach().clone() for p in trained(task).parameters()])
    shares = [decay**4, *(0.3 * decay ** (4 - update) for update in (1, 2, 3, 4))]
    for found, *steps in zip(average(task).parameters(), *path, strict=True):
        expected = sum(share * step for share, step in zip(shares, steps, strict=True))
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
    assert all(not torch.equal(a[0], b[0]) for a, b in pairwise(path))


@pytest.mark.parametrize("name", AVERAGED)
def test_the_average_is_evaluated_and_does_not_train(name):
    trained, average = AVERAGED[name]
    plain, averaging = build(name, lr=0.01), build(name, ema_decay=0.5, lr=0.01)
    for index in (0, 1, 2):
        for task in (plain, averaging):
            task.step(task.fresh_batch(index), ignore)
    assert all(map(torch.equal, weights(plain), weights(averaging)))
    batch = plain.fresh_batch(3)
    assert torch.equal(plain.sample_losses(batch), averaging.sample_losses(batch))
    found = averaging.evaluate("validation")
    assert found != plain.evaluate("validation")
    trained(plain).load_state_dict(average(averaging).state_dict())
    assert found == pytest.approx(plain.evaluate("validation"), rel=1e-6)


def test_batchnorm_s_statistics_are_copied_not_averaged():
    task = build("selfsupervised", model="norm_cnn", ema_decay=0.9, lr=0.1)
    for index in range(3):
        task.step(task.fresh_batch(index), ignore)
    pairs = list(zip(task.ema[0].buffers(), task.encoder.buffers(), strict=True))
    assert len(pairs) == 9
    assert all(torch.equal(*pair) for pair in pairs)


def test_without_a_decay_no_average_is_kept():
    for name in AVERAGED:
        assert AVERAGED[name][1](build(name)) is None
    task = build("semisupervised", ema_decay=0.0, lr=0.1)
    task.step(task.fresh_batch(0), ignore)
    batch = task.data.validation
    images = (batch.images.float() / 255 - task.data.mean[0]) / task.data.std[0]
    loss = functional.cross_entropy(task.model(images).double(), batch.labels)
    assert task.evaluate("validation")["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ema_decay": 0.9}, "ema_decay: the agent is judged as it acts"),
        ({"channels_last": True}, "channels_last: observations are no images"),
        ({"clip_norm": 0.0}, "task.clip_norm: "),
        ({"label_smoothing": 0.1}, "task.label_smoothing: unknown key"),
    ],
)
def test_what_means_nothing_for_an_agent_is_refused(fields, message):
    run = {"task": {"name": "reinforcement"} | fields, "max_updates": 1}
    assert message in refusal(RunConfig, run)


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SIX, *OPTIMIZERS])
def test_a_saved_state_goes_on_bit_for_bit(name):
    """Every task with everything on, and the supervised one with every optimizer."""
    fields: dict[str, Any] = {"clip_norm": 0.5, "lr": 0.01}
    fields |= {} if name == "reinforcement" else {"ema_decay": 0.8}
    task_name = name if name in SIX else "supervised"
    fields["optimizer"] = {"name": "adamw" if name in SIX else name}
    if name == "schedule_free":  # which has an average of its own
        fields["ema_decay"] = 0.0
    unbroken = build(task_name, **fields)
    advance(unbroken, 0)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    resumed = build(task_name, **fields)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())
    for task in (unbroken, resumed):
        advance(task, 2)
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())


def advance(task: Any, first: int) -> None:
    """Make two updates on each of two fresh batches."""
    for index in (first, first + 1):
        batch = task.fresh_batch(index)
        for _ in range(2):
            task.step(batch, ignore)
