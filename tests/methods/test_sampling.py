"""Samplers: what they draw, how it is weighted, what it leaves behind and what it costs."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from every_method import SIX
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive, generator
from repeatlab.data import gather
from repeatlab.methods import sampling
from repeatlab.methods.sampling import (
    SAMPLERS,
    HardMining,
    Importance,
    Multiplicity,
    OnlineBatchSelection,
    Progress,
    RhoLoss,
    Sampler,
    SelectiveBackprop,
)
from repeatlab.methods.sampling.running import RunningSampler, Selection
from repeatlab.methods.selection import draw, draw_distinct, importance_sampling, percentile, tau
from repeatlab.tasks import TASKS, load_task
from repeatlab.tasks.classification import cross_entropy_bounds
from repeatlab.tasks.models import norm_cnn
from repeatlab.training import making
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = 8


# --- tasks to draw from ---------------------------------------------------------------------------


class Numbers(NamedTuple):
    """A batch of nothing but sample numbers."""

    indices: Tensor
    index: int


class Toy:
    """Numbered samples whose losses and bounds are given: all that a sampler needs of a task."""

    device = "cpu"
    batch_size = forward_samples = scoring_samples = bound_samples = BATCH

    def __init__(self, losses: Any, bounds: Any = None) -> None:
        self.losses = torch.as_tensor(losses)
        self.bounds = self.losses if bounds is None else torch.as_tensor(bounds)

    def fresh_batch(self, index: int) -> Numbers:
        return Numbers((torch.arange(BATCH) + index * BATCH) % len(self.losses), index)

    def population(self, index: int) -> range:
        return range(len(self.losses))

    def candidates(self, index: int, block: int) -> Numbers:
        return self.fresh_batch(block)

    def batch_of(self, indices: Tensor, index: int) -> Numbers:
        return Numbers(indices, index)

    def pick(self, blocks: list[Numbers], picks: Tensor, index: int) -> Numbers:
        return gather(blocks, picks, index)

    def sample_losses(self, batch: Numbers) -> Tensor:
        return self.losses[batch.indices]

    def gradient_bounds(self, batch: Numbers) -> Tensor:
        return self.bounds[batch.indices]

    def step(self, batch: Numbers, report: Callable, weights: Tensor | None = None) -> None:
        losses = self.sample_losses(batch)
        report(losses.mean(), losses, self.gradient_bounds(batch))


def build(name: str, seed: int = 0, **fields: Any) -> Any:
    kind = load_task(TASKS[name])
    fields = {"name": name, "batch_size": 16} | fields
    return kind(parse(kind.Config, fields), seed=seed, device="cpu")


def start(
    settings: Sampler, task: Any, *, seed: int = 0, progress: Progress = lambda: 0.0
) -> RunningSampler:
    def rebuild(stream: str) -> Any:
        return build("supervised", seed=derive(seed, stream), **RHO_TASK)

    return settings.start(task, seed=seed, progress=progress, rebuild=rebuild)


def always_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let importance sampling be worth its cost from the second batch on."""
    monkeypatch.setattr("repeatlab.methods.sampling.importance.tau_threshold", lambda p, k: 0.05)


def visit(task: Any, running: RunningSampler, selection: Selection) -> None:
    """Make one update as the loop does."""

    def seen(driver: Tensor, losses: Tensor, bounds: Tensor | None = None) -> None:
        running.observe(selection.batch, losses, bounds)

    task.step(selection.batch, seen, selection.weights)


def see_all(task: Toy, running: RunningSampler) -> None:
    """Let a sampler see the scores of every sample."""
    running.known(task.population(0))
    everything = task.batch_of(torch.arange(len(task.losses)), 0)
    running.observe(everything, task.losses, task.bounds)


# --- drawing --------------------------------------------------------------------------------------

PRIORITIES = torch.tensor([5.0, 0.0, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64)


def test_places_are_drawn_in_proportion_to_their_priority():
    drawn = torch.cat([draw(PRIORITIES, 500, generator(0, "test", i)) for i in range(40)])
    counts = np.bincount(drawn, minlength=len(PRIORITIES))
    assert counts[1] == 0
    expected = (PRIORITIES / PRIORITIES.sum() * counts.sum()).numpy()
    kept = expected > 0
    assert chisquare(counts[kept], expected[kept]).pvalue > 1e-3
    assert chisquare(counts[kept]).pvalue < 1e-9  # the test can tell


def test_different_places_are_drawn_in_proportion_to_what_is_left():
    pairs: Counter = Counter()
    for index in range(6000):
        places = draw_distinct(PRIORITIES, 2, generator(0, "test", index)).tolist()
        assert len(set(places)) == 2
        pairs[tuple(places)] += 1
    share = (PRIORITIES / PRIORITIES.sum()).tolist()
    expected = {
        (a, b): share[a] * share[b] / (1 - share[a])
        for a in range(6)
        for b in range(6)
        if a != b and share[a] and share[b]
    }
    assert sum(expected.values()) == pytest.approx(1)
    assert pairs.keys() <= expected.keys()
    counts = [pairs[pair] for pair in expected]
    assert chisquare(counts, 6000 * np.array(list(expected.values()))).pvalue > 1e-3


def test_different_places_are_found_however_improbable_they_are():
    priorities = torch.tensor([1.0, 1e-30, 0.0, 1e-300], dtype=torch.float64)
    assert sorted(draw_distinct(priorities, 3, generator(0, "test")).tolist()) == [0, 1, 3]
    with pytest.raises(ValueError, match="4 different samples cannot be drawn from 4"):
        draw_distinct(priorities, 4, generator(0, "test"))


# --- importance sampling: closed forms ------------------------------------------------------------

scores = st.lists(st.just(0.0) | st.floats(1e-6, 1e3), min_size=2, max_size=400)


def test_tau_of_one_hot_scores_is_the_root_of_the_presample():
    assert tau(torch.eye(384)[7]) == pytest.approx(19.5959, abs=5e-5)


@pytest.mark.parametrize("value", [1e-6, 1.0, 3e4])
def test_tau_of_equal_scores_is_one(value):
    assert tau(torch.full((384,), value)) == pytest.approx(1)


@given(scores)
def test_tau_is_the_coefficient_of_variation_in_other_words(values):
    found = tau(torch.tensor(values, dtype=torch.float64))
    assert 1 - 1e-12 <= found <= sqrt(len(values)) * (1 + 1e-12)
    mean = np.mean(values)
    variation = np.std(values) / mean if mean else 0.0
    assert found == pytest.approx(sqrt(1 + variation**2), rel=1e-9)


@given(scores, st.integers(0, 99))
def test_weights_are_the_inverse_of_what_was_likely(values, index):
    values = torch.tensor(values, dtype=torch.float64)
    places, weights = importance_sampling(values, 16, generator(0, "test", index))
    likely = values / values.sum() if values.any() else torch.full_like(values, 1 / len(values))
    assert (likely[places] > 0).all()
    torch.testing.assert_close(
        weights.double(), 1 / (len(values) * likely[places]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("presample", "k", "threshold"), [(3, 2.0, 2.0), (5, 1.5, 3.0)])
def test_sampling_is_worth_its_cost_above_tau_th(presample, k, threshold):
    running = start(Importance(presample=presample, k=k), Toy(torch.ones(64)))
    assert running.switch.threshold == pytest.approx(threshold)


# --- importance sampling: no bias -----------------------------------------------------------------

PRESAMPLE = 3
DRAWS = 3000


@pytest.fixture(scope="module")
def trained() -> Any:
    """A small network that finds some samples easy by now, and its 48 candidates' gradients."""
    task = build("supervised", lr=0.2, width=2)
    for index in range(60):
        task.step(task.fresh_batch(index), lambda loss: None)
    blocks = [task.fresh_batch(60 + place) for place in range(PRESAMPLE)]
    gradients = []
    for block in blocks:
        losses = functional.cross_entropy(task.model(block.images), block.labels, reduction="none")
        for loss in losses:
            parts = torch.autograd.grad(loss, task.model.parameters(), retain_graph=True)
            gradients.append(torch.cat([part.flatten() for part in parts]))
    return task, blocks, torch.stack(gradients).double()


@pytest.mark.parametrize("score", ["gradient_norm", "loss"])
def test_the_weighted_gradient_is_that_of_the_presample_and_the_plain_one_is_not(
    trained, score, monkeypatch
):
    task, blocks, gradients = trained
    task.stream.indices(60)  # one epoch: no sample is twice among the candidates
    place = {int(n): i for i, n in enumerate(torch.cat([b.indices for b in blocks]))}
    assert len(place) == len(gradients) == PRESAMPLE * 16
    monkeypatch.setattr(task, "candidates", lambda index, block: blocks[block % PRESAMPLE])
    running = start(Importance(presample=PRESAMPLE, score=score, ema=0.9999), task)
    running.switch.tau = 1e6  # always on
    found = running.score(blocks, score)
    monkeypatch.setattr(running, "score", lambda blocks, kind: found)  # they do not change
    weighted, plain = torch.zeros(2, DRAWS, gradients.shape[1], dtype=torch.float64)
    for index in range(DRAWS):
        batch, weights = running.fresh_batch(index)
        rows = gradients[[place[int(n)] for n in batch.indices]]
        weighted[index] = (weights.double().unsqueeze(1) * rows).mean(0)
        plain[index] = rows.mean(0)
        if index < 5:  # what the update's own backward makes of it
            twin = build("supervised", width=2, lr=1e-9)
            twin.model.load_state_dict(task.model.state_dict())
            twin.step(batch, lambda *seen: None, weights)
            own = torch.cat([p.grad.flatten() for p in twin.model.parameters()])
            torch.testing.assert_close(own.double(), weighted[index], rtol=1e-3, atol=1e-6)
    full = gradients.mean(0)
    bias = (found.double() / found.double().sum()) @ gradients - full  # of the mean without weights
    noise = torch.randn(20, len(full), generator=generator(0, "test"), dtype=torch.float64)
    # How far off both means are, in standard errors, in these directions.
    directions = torch.cat([torch.stack([bias, full]), noise])
    off = {
        name: ((drawn - full) @ directions.T).mean(0)
        / ((drawn @ directions.T).std(0) / sqrt(DRAWS))
        for name, drawn in {"weighted": weighted, "plain": plain}.items()
    }
    assert off["weighted"].abs().max() < 3.5  # by chance in 1 % of cases
    assert off["plain"][0] > 10


def test_where_a_sample_is_never_drawn_its_part_is_nothing():
    # Scores of 0 mean gradients of 0: sum g_i w_i f_i is the mean of f all the same.
    values = torch.tensor([0.0, 2.0, 0.0, 6.0], dtype=torch.float64)
    places, weights = importance_sampling(values, 4000, generator(0, "test"))
    assert set(places.tolist()) == {1, 3}
    assert (weights.double() * values[places]).mean() == pytest.approx(2.0)


# --- importance sampling: the switch --------------------------------------------------------------


def test_tau_is_averaged_and_switches_the_sampling_on_and_off():
    # Two easy blocks of equal scores, then some of very unequal ones, then equal ones again.
    unequal = torch.eye(BATCH)[0] * 79 + 1
    kinds = [torch.ones(BATCH)] * 3 + [unequal] * 7 + [torch.ones(BATCH)] * 40
    task = Toy(torch.zeros(len(kinds) * BATCH), torch.cat(kinds))
    settings = Importance(presample=2, k=4.0, ema=0.5)
    running, threshold = start(settings, task), 7 / 5
    average, block, expected, phases = 0.0, 0, [], []
    for index in range(14):
        selection = running.fresh_batch(index)
        on = average > threshold
        taken = kinds[block : block + (2 if on else 1)]
        if on:
            assert set(selection.indices.tolist()) <= set(range(block * 8, block * 8 + 16))
        else:
            assert torch.equal(selection.indices, task.fresh_batch(block).indices)
            assert torch.equal(selection.weights, torch.ones(BATCH))
        assert selection.batch.index == index
        values = torch.cat(taken).numpy()
        now = sqrt(1 + (values.std() / values.mean()) ** 2)
        average = 0.5 * average + 0.5 * now
        expected.append((index, now, average, on))
        visit(task, running, selection)
        visit(task, running, selection)  # a repeat tells nothing new
        block += len(taken)
        phases.append(on)
    assert phases[0] is False
    assert phases[-1] is False
    assert sum(phases) >= 3
    rows = running.drain()
    assert list(rows) == ["fresh_batch", "tau", "tau_average", "presampled"]
    assert rows["fresh_batch"].tolist() == [row[0] for row in expected]
    assert rows["tau"] == pytest.approx([row[1] for row in expected])
    assert rows["tau_average"] == pytest.approx([row[2] for row in expected])
    assert rows["presampled"].tolist() == phases
    assert running.scored == sum(phases) * 2 * BATCH
    assert all(len(column) == 0 for column in running.drain().values())


@pytest.mark.parametrize("name", [name for name in SIX if name != "selfsupervised"])
def test_a_uniform_batch_is_the_standard_arm_s(name):
    task, standard = build(name), build(name)
    running = start(Importance(k=0.01), task)  # tau_th is far above what tau can reach
    for index in range(4):
        selection, batch = running.fresh_batch(index), standard.fresh_batch(index)
        assert all(
            torch.equal(mine, theirs)
            for mine, theirs in zip(selection.batch[:-1], batch[:-1], strict=True)
        )
        assert selection.batch.index == batch.index == index
        visit(task, running, selection)
        standard.step(batch, lambda *seen: None, torch.ones(16))
    assert running.scored == 0


# --- gradient bounds against autograd -------------------------------------------------------------

BOUNDED = {
    "supervised": {"lr": 0.2},
    "semisupervised": {"lr": 0.05, "mu": 2, "unlabelled_weight": 2.0},
    "reinforcement": {"sutton_barto_reward": False},
    "unsupervised": {},
    "generative": {},
}


def gradients_at_the_logits(name: str, task: Any, batch: Any) -> Tensor:
    """Return every sample's gradient at the last pre-activation, (batch, ...), by autograd."""
    if name == "supervised":
        logits = task.model(batch.images)
        loss = functional.cross_entropy(logits, batch.labels, reduction="sum")
    elif name == "semisupervised":
        labelled, weak, strong = (task.model(i) for i in (batch.labelled, batch.weak, batch.strong))
        confidence, guess = weak.softmax(1).max(1)
        sure = (confidence >= task.config.threshold).float()
        assert 0 < sure.sum() < len(sure)
        supervised = functional.cross_entropy(labelled, batch.labels, reduction="sum")
        pairs = functional.cross_entropy(strong, guess.detach(), reduction="none") * sure
        loss = supervised + task.config.unlabelled_weight * pairs.sum() / task.config.mu
        at_labelled, at_strong = torch.autograd.grad(loss, (labelled, strong))
        return torch.cat([at_labelled, at_strong.view(len(labelled), -1)], dim=1)
    elif name == "reinforcement":
        logits = task.model(batch.observations)
        best = task.model(batch.next_observations).argmax(1)
        following = task.target(batch.next_observations)[torch.arange(len(best)), best]
        targets = (batch.returns + batch.discounts * following).detach()
        chosen = logits[torch.arange(len(best)), batch.actions]
        assert 0 < ((chosen - targets).abs() > 1).sum() < len(chosen)  # both branches of Huber
        loss = functional.smooth_l1_loss(chosen, targets, reduction="sum")
    elif name == "unsupervised":
        upcoming = torch.Generator()
        upcoming.set_state(task.noise.get_state())
        epsilon = torch.randn((len(batch.images), task.config.latent), generator=upcoming)
        mean, log_variance = task.model.encode(batch.images)
        logits = task.model.decoder(mean + (log_variance / 2).exp() * epsilon)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.images, reduction="sum")
    else:
        logits = task.d(batch.images)
        loss = functional.binary_cross_entropy_with_logits(
            logits, torch.ones_like(logits), reduction="sum"
        )
    return torch.autograd.grad(loss, logits)[0].view(len(batch.indices), -1)


def networks(task: Any) -> list[nn.Module]:
    return [value for value in vars(task).values() if isinstance(value, nn.Module)]


@pytest.mark.parametrize("name", BOUNDED)
def test_the_gradient_bound_is_the_norm_of_the_gradient_at_the_logits(name):
    task = build(name, **BOUNDED[name])
    for index in range(30):
        task.step(task.fresh_batch(index), lambda *seen: None)
    if name == "reinforcement":
        with torch.no_grad():
            task.model[-1].bias += torch.tensor([2.5, 1.0])
    batch = task.fresh_batch(30)
    if name == "semisupervised":  # some pseudo-labels are to count, and some not
        middle = task.model(batch.weak).softmax(1).amax(1).median().item()
        task.config = task.config.model_copy(update={"threshold": middle})
    modes = [network.training for network in networks(task)]
    for network in networks(task):
        network.eval()
    expected = gradients_at_the_logits(name, task, batch).norm(dim=1)
    for network, mode in zip(networks(task), modes, strict=True):
        network.train(mode)
    assert expected.std() > 0
    torch.testing.assert_close(task.gradient_bounds(batch), expected, rtol=1e-4, atol=1e-6)
    # An update reports them by the way, with the networks as they train.
    expected = gradients_at_the_logits(name, task, batch).norm(dim=1)
    reported = []
    task.step(batch, lambda driver, losses, bounds: reported.append(bounds), torch.ones(16))
    torch.testing.assert_close(reported[0], expected, rtol=1e-4, atol=1e-6)


def test_the_cross_entropy_bound_at_its_ends():
    labels = torch.tensor([0, 3])
    equal = cross_entropy_bounds(torch.zeros(2, 10), labels)
    assert equal.tolist() == pytest.approx([0.948683, 0.948683], abs=1e-6)
    sure = torch.full((2, 10), -50.0)
    sure[:, 3] = 50.0  # wrong about the first, right about the second
    assert cross_entropy_bounds(sure, labels).tolist() == pytest.approx([sqrt(2), 0], abs=1e-6)


# --- scoring leaves no trace ----------------------------------------------------------------------

CHOICES: dict[str, Sampler] = {
    "hard_mining": HardMining(),
    "prioritized": HardMining(score="gradient_norm", alpha=0.6, beta=0.4, beta_end=1.0),
    "online": OnlineBatchSelection(sort_every=3, pressure_end=2.0),
    "importance": Importance(),
    "importance by loss": Importance(score="loss", presample=2),
    "selective": SelectiveBackprop(history=50),
    "rho_loss": RhoLoss(presample=3, holdout_updates=3),
    "multiplicity": Multiplicity(views=2),
}
# Which score nothing, and look at no more than they train on.
UNSCORED = ("hard_mining", "prioritized", "online", "multiplicity")
# What makes BatchNorm part of every image network.
NETWORKS = {
    "supervised": {},
    "semisupervised": {"model": "norm_cnn", "mu": 1},
    "selfsupervised": {"model": "norm_cnn"},
    "reinforcement": {},
    "unsupervised": {},
    "generative": {},
}
# Small, so that many combinations take little time.
SMALL = {
    "semisupervised": {"mu": 1, "width": 4},
    "selfsupervised": {"width": 4},
    "unsupervised": {"width": 4},
    "generative": {"width": 8},
}
RHO_TASK = {"width": 2, "label_noise": 0.3, "augment": False}


def allowed() -> Iterator[tuple[str, str]]:
    """Yield each of the six tasks with the samplers that it takes."""
    for task in SIX:
        refused = load_task(TASKS[task]).Config(name=task).refusals()
        for name, settings in CHOICES.items():
            parts = {next(n for n, kind in SAMPLERS.items() if kind is type(settings))}
            if isinstance(settings, HardMining):
                parts.add("weighted" if settings.beta else "unweighted")
            if isinstance(settings, Multiplicity):
                parts.add("fresh_views")
            parts.add(getattr(settings, "score", "loss"))
            if not parts & refused.keys():
                yield task, name


every_choice = pytest.mark.parametrize(("task", "name"), list(allowed()))


def test_every_sampler_is_tried():
    assert {type(settings) for settings in CHOICES.values()} == set(SAMPLERS.values())
    assert Counter(task for task, _ in allowed()) == {
        "supervised": 8,
        "semisupervised": 6,  # not rho_loss
        "selfsupervised": 3,  # neither that nor what needs weights or bounds
        "reinforcement": 5,  # neither that nor hard mining without weights
        "unsupervised": 7,  # not several views of what is not augmented
        "generative": 6,  # not rho_loss
    }


def with_dropout(config: Any, shape: tuple[int, ...], classes: int) -> nn.Module:
    model = norm_cnn(shape[0], classes, width=2)
    return nn.Sequential(*list(model)[:-1], nn.Dropout(0.5), model[-1])


def streams() -> tuple:
    """Return the states of all global random generators."""
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy, random.getstate()


@every_choice
def test_choosing_leaves_networks_and_random_streams_as_they_were(task, name, monkeypatch):
    monkeypatch.setattr("repeatlab.tasks.supervised.build_model", with_dropout)
    chosen, plain = (build(task, **NETWORKS[task]) for _ in range(2))
    if task in ("supervised", "semisupervised", "selfsupervised", "generative"):
        kinds = {type(part) for network in networks(chosen) for part in network.modules()}
        assert nn.BatchNorm2d in kinds
        assert (nn.Dropout in kinds) == (task == "supervised")
    running = start(CHOICES[name], chosen)
    if name == "rho_loss":
        monkeypatch.setattr(running, "rebuild", lambda stream: build(task))
        running.prepare()
    if isinstance(running.settings, Importance):
        running.switch.tau = 1e6
    modes = [network.training for network in networks(chosen)]
    before = streams()
    for index in range(3):
        plain.fresh_batch(index)  # an agent acts for it
        running.fresh_batch(index)
    assert digest(chosen.state_dict()) == digest(plain.state_dict())
    assert [network.training for network in networks(chosen)] == modes
    assert all(p.grad is None for network in networks(chosen) for p in network.parameters())
    assert streams() == before


# --- what scoring costs ---------------------------------------------------------------------------

# Which networks a sample passes; an autoencoder's encoder stands for both its halves.
PASSED = {
    "supervised": lambda task: [task.model],
    "semisupervised": lambda task: [task.model],
    "selfsupervised": lambda task: [task.encoder],
    "reinforcement": lambda task: [task.model, task.target],
    "unsupervised": lambda task: [task.model.encoder],
}


def counted(kind: type, networks_of: Callable[[Any], list[nn.Module]], total: list[int]) -> type:
    """Return the task with a count, in `total`, of samples that pass a network for a score."""

    class Counted(kind):
        asked = 0  # batches of candidates

        def candidates(self, index: int, block: int) -> Any:
            Counted.asked += 1
            return super().candidates(index, block)

        def __init__(self, *args: Any, **options: Any) -> None:
            self.scoring = False
            super().__init__(*args, **options)
            for network in networks_of(self):
                network.register_forward_hook(self._passed)

        def _passed(self, network: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if self.scoring:
                assert not torch.is_grad_enabled()
                total[0] += len(inputs[0])

        def sample_losses(self, batch: Any) -> Tensor:
            self.scoring = True
            losses = super().sample_losses(batch)
            self.scoring = False
            return losses

        def gradient_bounds(self, batch: Any) -> Tensor:
            self.scoring = True
            bounds = super().gradient_bounds(batch)
            self.scoring = False
            return bounds

    return Counted


def as_fields(settings: Sampler) -> dict[str, Any]:
    name = next(name for name, kind in SAMPLERS.items() if kind is type(settings))
    return {"name": name} | vars(settings)


def run_config(task: str, name: str, updates: int = 9, **fields: Any) -> RunConfig:
    data = {
        "task": {"name": task, "batch_size": 16} | SMALL.get(task, {}),
        "method": {"sampler": as_fields(CHOICES[name])} | fields.pop("method", {}),
        "max_updates": updates,
        "evaluation": {"splits": [], "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


@pytest.mark.parametrize(("task", "name"), [pair for pair in allowed() if pair[0] in PASSED])
def test_the_ledger_counts_every_sample_that_was_scored(task, name, tmp_path, monkeypatch):
    total = [0]
    kind = counted(load_task(TASKS[task]), PASSED[task], total)
    monkeypatch.setattr(making, "load_task", lambda target: kind)
    always_on(monkeypatch)
    run = train(run_config(task, name), tmp_path)
    ledger = run.summary["ledger"]
    assert ledger["scoring_samples"] == total[0]
    assert (total[0] > 0) == (name not in UNSCORED)
    assert ledger["updates"] == 9
    if name == "rho_loss":
        samples = len(build(task).stream.data)
        assert ledger["scoring_samples"] == samples + 9 * 3 * 16
        assert ledger["holdout_updates"] == 2 * 3
        assert ledger["holdout_forward_samples"] == 2 * 3 * 16
        assert ledger["holdout_backward_samples"] == 2 * 3 * 16
        assert ledger["holdout_seconds"] > 0
        assert ledger["holdout_fresh_batches"] == 2 * 3
    else:
        assert ledger["holdout_updates"] == ledger["holdout_forward_samples"] == 0
    # What asks for candidates has seen all their batches.
    assert ledger["passed_batches"] == max(9, kind.asked) - 9
    assert (kind.asked > 9) == (name not in UNSCORED)


def test_a_repeat_is_not_scored_again(tmp_path):
    method = {"mapping": {"name": "constant", "repeats": 3}}
    run = train(run_config("supervised", "rho_loss", method=method), tmp_path)
    samples = len(build("supervised").stream.data)
    assert run.summary["ledger"]["scoring_samples"] == samples + 3 * 3 * 16


# --- hard mining ----------------------------------------------------------------------------------

# Some samples have no loss at all: the floor is what gets them drawn.
LOSSES = torch.cat([torch.zeros(4), torch.linspace(0.05, 3.0, 20)])


def probabilities(losses: Any, alpha: float, floor: float) -> np.ndarray:
    """max(s_i, floor * mean s)^alpha, normalised."""
    values = np.asarray(losses, dtype=np.float64)
    priorities = np.maximum(values, floor * values.mean()) ** alpha
    return priorities / priorities.sum()


@pytest.mark.parametrize(("alpha", "floor"), [(1.0, 0.1), (0.6, 0.3), (0.0, 0.1)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_hard_samples_are_drawn_as_often_as_their_priority_says(alpha, floor, beta):
    task = Toy(LOSSES)
    running = start(HardMining(alpha=alpha, floor=floor, beta=beta), task)
    see_all(task, running)
    counts = np.zeros(len(LOSSES))
    for index in range(2500):
        indices = running.fresh_batch(index).indices
        if beta:  # with replacement: every draw counts
            counts += np.bincount(indices, minlength=len(LOSSES))
        else:  # without: the first draw is by the priorities, the others by what is left
            assert len(indices.unique()) == BATCH
            counts[indices[0]] += 1
    expected = probabilities(LOSSES, alpha, floor)
    assert chisquare(counts, counts.sum() * expected).pvalue > 1e-3
    assert (chisquare(counts).pvalue < 1e-9) == (alpha > 0)
    # None starves: the floor's share of an equal chance, less what the floor itself adds.
    assert expected.min() >= (floor / (1 + floor)) ** alpha / len(LOSSES) * (1 - 1e-12)
    rare = counts[:4].sum() / counts.sum()
    error = 4 * sqrt(4 * expected.min() / counts.sum())
    assert rare == pytest.approx(4 * expected.min(), abs=error)


def test_the_weights_are_those_of_prioritized_replay():
    task = Toy(LOSSES, bounds=LOSSES.flip(0) + 0.1)
    settings = HardMining(score="gradient_norm", alpha=0.6, floor=0.2, beta=0.4, beta_end=1.0)
    running = start(settings, task, progress=lambda: share)
    see_all(task, running)
    likely = probabilities(task.bounds, 0.6, 0.2)
    for made, share in enumerate([0.0, 0.1, 0.5, 0.9, 1.0]):
        indices, weights = running.fresh_batch(made).indices, running.fresh_batch(made).weights
        beta = 0.4 + 0.6 * share
        expected = (len(LOSSES) * likely[indices]) ** -beta
        assert weights.tolist() == pytest.approx((expected / expected.max()).tolist(), rel=1e-5)
        assert weights.max() == 1
        assert weights.dtype == torch.float32


def test_at_beta_one_the_weighted_mean_is_the_plain_one_up_to_a_factor():
    task = Toy(LOSSES + 0.01)
    running = start(HardMining(beta=1.0), task)
    see_all(task, running)
    sums = np.zeros(2)
    for index in range(1000):
        batch, weights = running.fresh_batch(index)
        losses = task.sample_losses(batch)
        # The factor common to a batch: the largest weight, (n min p)^-1.
        likely = probabilities(task.losses, 1.0, 0.1)[batch.indices]
        largest = (1 / (len(LOSSES) * likely)).max()
        sums += float((weights * losses).mean() * largest), float(losses.mean())
    assert sums[0] / 1000 == pytest.approx(float(task.losses.mean()), rel=0.02)
    assert sums[1] / 1000 > 1.2 * float(task.losses.mean())


def test_without_weights_the_choice_alone_changes_the_gradient():
    task = Toy(LOSSES)
    running = start(HardMining(), task)
    see_all(task, running)
    assert torch.equal(running.fresh_batch(0).weights, torch.ones(BATCH))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Return the list of priorities that a sampler draws by, by place in its population."""
    seen: list[np.ndarray] = []

    def spy(priorities: Tensor, count: int, draws: torch.Generator) -> Tensor:
        seen.append((priorities / priorities.sum()).numpy())
        return draw_distinct(priorities, count, draws)

    monkeypatch.setattr("repeatlab.methods.selection.draw_distinct", spy)
    return seen


def test_a_sample_never_seen_counts_as_the_hardest_so_far(monkeypatch):
    seen = spied(monkeypatch)
    task = Toy(LOSSES)
    running = start(HardMining(floor=0.5), task)
    running.fresh_batch(0)
    assert seen[-1] == pytest.approx(np.full(24, 1 / 24))
    running.observe(task.batch_of(torch.arange(10), 0), LOSSES[:10], None)
    assumed = torch.cat([LOSSES[:10], LOSSES[9].expand(14)])
    running.fresh_batch(1)
    assert seen[-1] == pytest.approx(probabilities(assumed, 1.0, 0.5))
    # The largest is remembered when it is no longer anybody's.
    running.observe(task.batch_of(torch.arange(10), 1), LOSSES[:10] / 2, None)
    assumed = torch.cat([LOSSES[:10] / 2, LOSSES[9].expand(14)])
    running.fresh_batch(2)
    assert seen[-1] == pytest.approx(probabilities(assumed, 1.0, 0.5))


def test_losses_of_nothing_leave_all_equally_likely(monkeypatch):
    seen = spied(monkeypatch)
    task = Toy(torch.zeros(24))
    running = start(HardMining(), task)
    see_all(task, running)
    running.fresh_batch(0)
    assert seen[-1] == pytest.approx(np.full(24, 1 / 24))


def test_the_last_loss_seen_is_the_one_that_counts(monkeypatch):
    seen = spied(monkeypatch)
    task = build("supervised", lr=0.1)
    running = start(HardMining(floor=1e-6), task)
    latest: dict[int, float] = {}
    for index in range(4):
        selection = running.fresh_batch(index)
        for _ in range(2):
            losses = functional.cross_entropy(
                task.model(selection.batch.images), selection.batch.labels, reduction="none"
            )
            latest |= dict(zip(selection.indices.tolist(), losses.tolist(), strict=True))
            visit(task, running, selection)
    running.fresh_batch(4)
    found = seen[-1] / seen[-1].max()
    numbers = list(latest)
    assert found[numbers] == pytest.approx(
        np.array([latest[n] for n in numbers]) / max(latest.values()), rel=1e-4
    )


# --- online batch selection -----------------------------------------------------------------------


@pytest.mark.parametrize("pressure", [1.0, 100.0])
def test_a_rank_is_drawn_as_often_as_its_closed_form_says(pressure, monkeypatch):
    seen = spied(monkeypatch)
    losses = torch.rand(40, generator=generator(0, "test"))
    task = Toy(losses)
    running = start(OnlineBatchSelection(pressure=pressure, sort_every=1), task)
    see_all(task, running)
    rank_of = np.argsort(np.argsort(-losses.numpy()))
    counts = np.zeros(40)
    for index in range(2000):
        indices = running.fresh_batch(index).indices
        assert len(indices.unique()) == BATCH
        counts[rank_of[indices[0]]] += 1
    closed = np.exp(-np.log(pressure) / 40 * np.arange(40))
    assert seen[0] == pytest.approx(closed / closed.sum())
    # Neighbours together, so that no count is too small to judge.
    grouped = counts.reshape(-1, 5).sum(1)
    assert chisquare(grouped, 2000 * (closed / closed.sum()).reshape(-1, 5).sum(1)).pvalue > 1e-3
    assert closed[0] / closed[-1] == pytest.approx(pressure ** (39 / 40))


def test_the_pressure_moves_exponentially_over_the_run(monkeypatch):
    seen = spied(monkeypatch)
    task = Toy(LOSSES)
    settings = OnlineBatchSelection(pressure=256.0, pressure_end=1.0)
    running = start(settings, task, progress=lambda: made / 4)
    for made, pressure in enumerate([256, 64, 16, 4, 1]):
        running.fresh_batch(made)
        ratio = seen[-1][0] / seen[-1][12]  # half the ranks apart
        assert ratio == pytest.approx(sqrt(pressure))


def test_what_was_never_seen_ranks_first_and_sorting_waits_its_turn():
    task = Toy(torch.linspace(1, 2, 24))
    running = start(OnlineBatchSelection(pressure=1e9, sort_every=3), task)
    assert running.order.tolist() == []
    running.fresh_batch(0)
    assert running.order.tolist() == list(range(24))
    running.observe(task.batch_of(torch.arange(8), 0), task.losses[:8], None)
    for index in (1, 2):
        running.fresh_batch(index)
        assert running.order.tolist() == list(range(24))
    running.fresh_batch(3)
    # The hardest of those seen shares its rank with the unseen, the others follow.
    assert set(running.order[:17].tolist()) == set(range(7, 24))
    assert running.order[17:].tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_every_sample_is_seen_before_an_easy_one_comes_again():
    task = Toy(torch.full((24,), 0.5))
    task.losses[0] = 1.0
    running = start(OnlineBatchSelection(pressure=1e9, sort_every=1), task)
    first = [running.fresh_batch(0)]
    visit(task, running, first[0])
    first.append(running.fresh_batch(1))
    visit(task, running, first[1])
    again = set(first[0].indices.tolist()) & set(first[1].indices.tolist())
    assert again <= {0}


# --- selective backprop ---------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "share"), [(0, 1.0), (1, 1 / 2), (2, 1 / 3)])
def test_selective_backprop_keeps_the_closed_form_s_share(beta, share):
    losses = torch.rand(40_000, generator=generator(0, "test")).exp()
    task = Toy(losses)
    running = start(SelectiveBackprop(beta=beta, history=1000), task)
    drawn = sum(len(running.fresh_batch(index).indices) for index in range(1200))
    kept = drawn + sum(len(rows) for *_, rows in running.waiting)
    scored = running.block * BATCH
    assert running.scored == scored
    if beta == 0:
        assert kept == scored == drawn
    else:
        # Percentiles in a history of R include the loss itself: half a step too high.
        slack = 0.5 / 1000 + 30 / scored  # and while the history fills, more
        assert abs(kept / scored - share) < 4 * sqrt(share * (1 - share) / scored) + slack


def test_kept_samples_are_trained_on_in_order_and_none_twice():
    losses = torch.rand(8000, generator=generator(0, "test"))
    task = Toy(losses)
    running = start(SelectiveBackprop(beta=2, history=30), task, seed=7)
    trained = torch.cat([running.fresh_batch(index).indices for index in range(60)]).tolist()
    kept, history = [], []
    for block in range(running.block):
        numbers = task.fresh_batch(block).indices.tolist()
        history += [float(losses[n]) for n in numbers]
        chances = torch.rand(
            BATCH, generator=generator(7, "sampler", block), dtype=torch.float64
        ).tolist()
        for number, chance in zip(numbers, chances, strict=True):
            below = sum(h <= float(losses[number]) for h in history[-30:]) / len(history[-30:])
            if chance < below**2:
                kept.append(number)
    assert len(trained) == 60 * BATCH
    assert trained == kept[: len(trained)]
    assert len(kept) - len(trained) < BATCH
    assert len(set(trained)) == len(trained)


def test_kept_samples_are_trained_on_as_they_were_scored():
    task, twin = build("supervised"), build("supervised")
    running = start(SelectiveBackprop(), task)
    scored = {}
    for index in range(4):
        batch, weights = running.fresh_batch(index)
        for block in range(running.block):
            candidates = twin.candidates(index, block)
            scored |= dict(zip(candidates.indices.tolist(), candidates.images, strict=True))
        for number, image in zip(batch.indices.tolist(), batch.images, strict=True):
            assert torch.equal(image, scored[number])
        assert torch.equal(weights, torch.ones(16))
        assert batch.index == index
        visit(task, running, Selection(batch, weights))


def test_a_percentile_is_the_share_not_above():
    history = np.array([3.0, 1.0, 2.0, 2.0])
    assert percentile(np.array([0.5, 1.0, 2.0, 2.5, 3.0, 9.0]), history).tolist() == [
        0,
        0.25,
        0.75,
        0.75,
        1,
        1,
    ]


# --- RHO-LOSS -------------------------------------------------------------------------------------


def test_the_most_reducible_samples_are_picked():
    draws = generator(0, "test")
    task = Toy(torch.rand(96, generator=draws))
    running = start(RhoLoss(presample=4, holdout_updates=1), task)
    running.irreducible = torch.rand(96, generator=draws)
    for index in range(3):
        batch, weights = running.fresh_batch(index)
        numbers = [(index * 4 * BATCH + i) % 96 for i in range(4 * BATCH)]
        reducible = {n: float(task.losses[n]) - float(running.irreducible[n]) for n in numbers}
        hardest = sorted(numbers, key=reducible.__getitem__, reverse=True)[:BATCH]
        assert batch.indices.tolist() == hardest
        assert torch.equal(weights, torch.ones(BATCH))
    assert running.scored == 3 * 4 * BATCH
    # The loss alone would have picked others.
    assert set(hardest) != set(sorted(numbers, key=task.losses.__getitem__)[-BATCH:])


def test_a_sample_s_irreducible_loss_is_that_of_a_model_that_never_saw_it():
    task = build("supervised", seed=3, **RHO_TASK)
    running = start(RhoLoss(holdout_updates=40), task, seed=3)
    models, make = [], running.rebuild

    class Noted:
        """A model that notes what it learns from and what it is asked about."""

        def __init__(self, model: Any) -> None:
            self.model, self.batch_size = model, model.batch_size
            self.learned, self.asked = set(), set()

        def step(self, batch: Any, report: Callable) -> None:
            self.learned |= set(batch.indices.tolist())
            self.model.step(batch, report)

        def sample_losses(self, batch: Any) -> Tensor:
            self.asked |= set(batch.indices.tolist())
            return self.model.sample_losses(batch)

    def rebuild(stream: str) -> Noted:
        models.append(Noted(make(stream)))
        return models[-1]

    running.rebuild = rebuild
    before = digest(task.state_dict())
    cost = running.prepare()
    assert digest(task.state_dict()) == before
    assert cost.keys() == {
        "holdout_updates",
        "holdout_forward_samples",
        "holdout_backward_samples",
        "holdout_fresh_batches",
        "holdout_seconds",
    }
    everything = set(task.population(0))
    first, second = models
    assert first.asked | second.asked == everything
    for model, other in ((first, second), (second, first)):
        assert not model.learned & model.asked
        assert model.learned <= other.asked
        assert abs(len(model.asked) - len(everything) / 2) <= 1
        # Against the labels that the run trains on, its noise included.
        asked = sorted(model.asked)
        batch = task.stream.batch_of(torch.tensor(asked), 0)
        with torch.no_grad():
            logits = model.model.model.eval()(batch.images)
        expected = functional.cross_entropy(logits, batch.labels, reduction="none")
        torch.testing.assert_close(running.irreducible[asked], expected, rtol=1e-4, atol=1e-5)
    assert digest(first.model.state_dict()) != digest(second.model.state_dict())


def test_what_is_mislabelled_is_not_reducible():
    # The models learn the true labels from the other half: a wrong one has a high loss there too.
    fields = {"label_noise": 0.3, "lr": 0.1, "augment": False}
    task = build("supervised", **fields)
    settings = RhoLoss(holdout_updates=100)
    running = settings.start(
        task,
        seed=0,
        progress=lambda: 0.0,
        rebuild=lambda s: build("supervised", derive(0, s), **fields),
    )
    running.prepare()
    wrong, right = running.irreducible[task.corrupted], running.irreducible[~task.corrupted]
    assert wrong.median() > 2 * right.median()


# --- resuming -------------------------------------------------------------------------------------


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_choice
def test_a_saved_sampler_goes_on_with_the_same_choices(task, name, monkeypatch):
    always_on(monkeypatch)
    fields = RHO_TASK if (task, name) == ("supervised", "rho_loss") else SMALL.get(task, {})
    unbroken = build(task, **fields)
    running = start(CHOICES[name], unbroken, progress=lambda: index / 12)
    if name == "rho_loss":
        running.rebuild = lambda stream: build(task, seed=derive(0, stream), **fields)
        running.prepare()
    for index in range(5):
        selection = running.fresh_batch(index)
        visit(unbroken, running, selection)
        visit(unbroken, running, selection)
    resumed = build(task, **fields)
    resumed.load_state_dict(through_file(unbroken.state_dict()))
    again = start(CHOICES[name], resumed, progress=lambda: index / 12)
    again.load_state_dict(through_file(running.state_dict()))
    running.drain()  # what was recorded before is not part of the state
    for index in range(5, 12):
        mine, theirs = running.fresh_batch(index), again.fresh_batch(index)
        for first, second in zip(mine.batch, theirs.batch, strict=True):
            assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
        assert torch.equal(mine.weights, theirs.weights)
        visit(unbroken, running, mine)
        visit(resumed, again, theirs)
    assert (running.scored, running.host_reads) == (again.scored, again.host_reads)
    assert digest(running.state_dict()) == digest(again.state_dict())
    first, second = running.drain(), again.drain()
    assert first.keys() == second.keys()
    assert all(first[column].tolist() == second[column].tolist() for column in first)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (HardMining, {"alpha": -0.1}, "alpha must lie between 0 and 10, not -0.1"),
        (HardMining, {"floor": 0.0}, "floor must lie between 1e-06 and 1, not 0.0"),
        (HardMining, {"beta": 1.5}, "beta must lie between 0 and 1, not 1.5"),
        (HardMining, {"beta": 0.5, "beta_end": 0.4}, "beta_end must exceed beta, but 0.4 <= 0.5"),
        (HardMining, {"alpha": float("nan")}, "alpha must lie between 0 and 10, not nan"),
        (OnlineBatchSelection, {"pressure": 0.5}, "pressure must lie between 1 and"),
        (OnlineBatchSelection, {"pressure_end": 0.5}, "pressure_end must lie between 1 and"),
        (OnlineBatchSelection, {"sort_every": 0}, "sort_every must be an integer of at least 1"),
        (Importance, {"presample": 1}, "presample must be an integer of at least 2, not 1"),
        (Importance, {"k": 0.0}, "k must lie between 0.01 and 100, not 0.0"),
        (Importance, {"ema": 1.0}, "ema must lie between 0 and 0.9999, not 1.0"),
        (SelectiveBackprop, {"beta": 21}, "beta must lie between 0 and 20, not 21"),
        (SelectiveBackprop, {"history": True}, "history must be an integer of at least 1"),
        (RhoLoss, {"presample": 1.5}, "presample must be an integer of at least 2, not 1.5"),
        (RhoLoss, {"holdout_updates": 0}, "holdout_updates must be an integer of at least 1"),
    ],
)
def test_parameters_out_of_range_are_named(kind, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(**fields)


@pytest.mark.parametrize(
    ("task", "sampler", "message"),
    [
        ("semisupervised", {"name": "rho_loss"}, "method.sampler: rho_loss is not for the task se"),
        ("selfsupervised", {"name": "importance"}, "method.sampler: importance is not for the tas"),
        (
            "selfsupervised",
            {"name": "hard_mining", "beta": 0.5},
            "method.sampler: weighted hard_mining is not for the task selfsupervised",
        ),
        (
            "selfsupervised",
            {"name": "hard_mining", "score": "gradient_norm"},
            "method.sampler.score: gradient_norm is not for the task selfsupervised",
        ),
        (
            "reinforcement",
            {"name": "hard_mining"},
            "method.sampler: unweighted hard_mining is not for the task reinforcement: here it is "
            "prioritized replay",
        ),
        ("generative", {"name": "rho_loss"}, "method.sampler: rho_loss is not for the task gener"),
    ],
)
def test_what_means_nothing_on_a_task_is_refused_with_the_reason(task, sampler, message):
    fields = {"task": {"name": task}, "method": {"sampler": sampler}, "max_updates": 9}
    with pytest.raises(ConfigError) as error:
        parse(RunConfig, fields)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) > len(message) + 10


def test_the_table_in_the_docs_names_every_sampler():
    assert all(f"| `{name}`" in sampling.__doc__ for name in SAMPLERS)
