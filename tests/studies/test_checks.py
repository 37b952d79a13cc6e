"""The checks before training: all six tasks pass, and every planted fault is caught by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from math import log
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from repeatlab.cli import main
from repeatlab.core.schema import ConfigError
from repeatlab.core.seeding import generator
from repeatlab.data import ImageSet
from repeatlab.data.sequences import load
from repeatlab.studies import checks
from repeatlab.studies.checks import EXPECTATIONS, Expectations, Report, Result, check
from repeatlab.studies.checks.gradient import compare, gradient
from repeatlab.studies.checks.learning import overfitting, regularisation
from repeatlab.studies.checks.pipeline import inputs, labels
from repeatlab.studies.checks.probe import Probe, Subject
from repeatlab.tasks import TASKS, TaskConfig, load_task
from repeatlab.tasks.semisupervised import SemiSupervised
from repeatlab.tasks.supervised import Supervised

every_task = pytest.mark.parametrize("name", TASKS)


@cache
def report(name: str) -> Report:
    """Return the report of a task at its defaults."""
    return check({"name": name})


def subject(kind: type, **fields) -> Subject:
    """Return what single checks take."""
    config = kind.Config(**fields)
    return Subject(config, kind, EXPECTATIONS.get(config.name, Expectations()))


# --- all tasks --------------------------------------------------------------------------------


@every_task
def test_every_task_passes_at_its_defaults(name):
    verdicts = {result.name: result.verdict for result in report(name).results}
    assert list(verdicts) == [
        "inputs",
        "labels",
        "initial loss",
        "gradient",
        "overfitting",
        "regularisation",
    ]
    assert set(verdicts.values()) <= {"pass", "not applicable"}
    assert not report(name).failed


@every_task
def test_what_does_not_apply_says_why(name):
    absent = {r.name for r in report(name).results if r.verdict == "not applicable"}
    assert (
        absent
        == {
            "supervised": set(),
            "semisupervised": set(),
            "selfsupervised": {"labels", "overfitting"},
            "reinforcement": {"labels"},
            "unsupervised": {"labels", "overfitting"},
            "generative": {"labels", "overfitting", "regularisation"},
            "ppo": {"labels", "overfitting", "regularisation"},
            "continual": {"initial loss"},
            "noisy_labels": set(),
            "single_index": {"labels"},
            "language": {"inputs", "labels", "overfitting"},
        }.get(name, {"labels", "initial loss", "overfitting"})  # of which theory says nothing
    )
    assert all(report(name)[check].found for check in absent)


@pytest.mark.parametrize(
    ("name", "theory"),
    [
        ("supervised", {"loss": 2.302585}),
        ("semisupervised", {"loss": 2.302585}),
        ("selfsupervised", {"loss": 4.844187}),  # ln 127, 64 images
        ("unsupervised", {"loss": 44.3614}),
        ("generative", {"D's loss": 1.386294, "G's loss": 0.693147}),
        ("noisy_labels", {"loss": 2.302585}),
        ("language", {"loss": log(load("english", context=64, numbers=10, base=10).classes)}),
    ],
)
def test_first_losses_are_held_against_theory(name, theory):
    numbers = report(name)["initial loss"].numbers
    stated = {key: numbers[f"{key} by theory"] for key in theory}
    assert stated == pytest.approx(theory, rel=1e-5)


@every_task
def test_every_weight_tensor_of_every_optimizer_has_derivatives_checked(name):
    kind = load_task(TASKS[name])
    task = kind(kind.Config(), seed=0, device="cpu")
    tensors = sum(len(g["params"]) for o in task.optimizers for g in o.param_groups)
    numbers = report(name)["gradient"].numbers
    assert numbers["tensors"] == tensors
    assert 2 * tensors <= numbers["derivatives"] <= 5 * tensors
    assert 0 < numbers["largest error"] <= 1e-4


def test_a_check_leaves_the_process_as_it_was_and_repeats():
    torch.manual_seed(3)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(3)
    again = check({"name": "reinforcement"})
    assert torch.equal(torch.rand(3), expected)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.float32, threads)
    assert again.results == report("reinforcement").results


# --- planted faults ---------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is 5 % too large."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.05 * gradient


def plant(module: nn.Module) -> None:
    module.register_forward_hook(lambda layer, given, output: Scaled.apply(output))


class WrongGradient(Supervised):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        plant(self.model[3])


class Maximizes(Supervised):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.optimizer.param_groups[0]["maximize"] = True


class NegatedLoss(Supervised):
    def step(self, batch, report, weights=None):
        loss = functional.cross_entropy(self.model(batch.images), batch.labels)
        report(loss)
        self.optimizer.zero_grad()
        (-loss).backward()
        self.optimizer.step()


class ShuffledLabels(Supervised):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        data = self.stream.data
        order = torch.randperm(len(data), generator=generator(0, "shuffled"))
        self.stream.data = ImageSet(data.images, data.labels[order])


class FrozenLayer(Supervised):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model[0].requires_grad_(False)


class ForgottenLayer(Supervised):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.optimizer.param_groups[0]["params"][:2]


class NotNormalised(Supervised):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stream._mean, self.stream._std = torch.zeros(1), torch.ones(1)


class LoudStart(Supervised):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            self.model[-1].weight *= 30


class ForgottenDecay(Supervised):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.optimizer.param_groups[0]["weight_decay"] = 0.0


class LabelsRedrawn(Supervised):
    def step(self, batch, report, weights=None):
        labels = batch.labels[torch.randperm(len(batch.labels))]
        super().step(batch._replace(labels=labels), report, weights)


@pytest.mark.parametrize(
    ("kind", "failed"),
    [
        (Supervised, set()),
        (WrongGradient, {"gradient"}),
        (Maximizes, {"overfitting"}),
        (NegatedLoss, {"initial loss", "overfitting"}),
        (ShuffledLabels, {"labels"}),
        (FrozenLayer, {"gradient"}),
        (ForgottenLayer, {"gradient"}),
        (NotNormalised, {"inputs"}),
        (LoudStart, {"initial loss"}),
        (ForgottenDecay, {"regularisation"}),
        (LabelsRedrawn, {"overfitting"}),
    ],
)
def test_a_planted_fault_is_caught_by_name(kind, failed, monkeypatch):
    monkeypatch.setattr("repeatlab.studies.checks.learning.MEMORY_UPDATES", 150)
    # As many as ten times the default rate needs to learn twenty samples.
    found = check({"name": "supervised"}, task=kind)
    assert set(found.failed) == failed
    for name in failed:
        assert "look at: " in found[name].found


@pytest.mark.parametrize("kind", [FrozenLayer, ForgottenLayer])
def test_a_layer_that_does_not_move_is_named(kind):
    numbers = gradient(subject(kind)).numbers
    assert numbers["without a derivative"] == "model.0.bias model.0.weight"


def first_layer(module: nn.Module) -> nn.Module:
    return next(m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("semisupervised", "model"),
        ("selfsupervised", "encoder"),
        ("selfsupervised", "head"),
        ("reinforcement", "model"),
        ("unsupervised", "model"),
        ("generative", "d"),
    ],
)
def test_a_wrong_gradient_is_found_in_every_task(name, network):
    class Faulty(load_task(TASKS[name])):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            plant(first_layer(getattr(self, network)))

    found = gradient(subject(Faulty))
    assert found.verdict == "fail"
    assert found.numbers["largest error"] == pytest.approx(0.05 / 1.05, rel=1e-2)


# The network whose first layer a fault is planted in, of every other task.
OTHERS = {
    "semisupervised": "model",
    "selfsupervised": "encoder",
    "reinforcement": "model",
    "unsupervised": "model",
    "generative": "d",
    "continual": "model",
    "noisy_labels": "model",
    "ppo": "model",
    "single_index": "model",
    "language": "model",
}


def faulty(name: str, plant_in: Callable[[Any], None]) -> Subject:
    """Return a task with a fault that is planted when it is built."""

    class Faulty(load_task(TASKS[name])):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            plant_in(self)

    return subject(Faulty)


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_that_stays_as_it_is_is_found_in_every_task_and_named(name):
    def freeze(task):
        # DCGAN itself switches what requires a gradient: there, too, this layer stays.
        layer = first_layer(getattr(task, OTHERS[name])).requires_grad_(False)
        kept = [id(weight) for weight in layer.parameters()]
        for optimizer in task.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in kept]

    found = gradient(faulty(name, freeze))
    assert found.verdict == "fail"
    assert "weight" in found.numbers["without a derivative"]


@pytest.mark.parametrize("name", ["semisupervised", "continual", "noisy_labels"])
def test_shuffled_labels_are_found_wherever_there_are_labels(name):
    def shuffle(task):
        data = task.stream.data
        order = torch.randperm(len(data), generator=generator(0, "shuffled"))
        task.stream.data = ImageSet(data.images, data.labels[order])

    assert labels(faulty(name, shuffle)).verdict == "fail"


def test_the_generators_gradient_is_checked_by_its_own_loss():
    class Faulty(load_task(TASKS["generative"])):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            plant(self.g[0])

    found = gradient(subject(Faulty))
    assert found.verdict == "fail"
    assert found.numbers["at"] == "g.0.weight"


def test_pseudo_labels_take_part_in_the_gradient_check():
    class Faulty(SemiSupervised):
        def losses(self, logits, batch):
            labelled, weak, strong = logits
            return super().losses((labelled, weak, Scaled.apply(strong)), batch)

    assert gradient(subject(Faulty)).verdict == "fail"


STANDARDISED = ("continual", "noisy_labels")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("unsupervised", lambda images: 255 * images),
        ("generative", lambda images: (images + 1) / 2),
        # Of a mean of a third and a deviation of 0.38, which is that of digits.
        *((name, lambda images: images * 0.38 + 0.33) for name in STANDARDISED),
        (
            "supervised",
            lambda images: images.new_tensor([-1.0, 1.0] * 32).view(1, 1, 8, 8).expand_as(images),
        ),
    ],
    ids=["not divided", "not symmetric", *STANDARDISED, "all alike"],
)
def test_inputs_that_cannot_be_right(name, damage):
    class Damaged(load_task(TASKS[name])):
        def fresh_batch(self, index):
            batch = super().fresh_batch(index)
            return batch._replace(images=damage(batch.images))

    assert inputs(subject(Damaged)).verdict == "fail"


def test_observations_without_their_scale_are_worth_a_look():
    kind = load_task(TASKS["reinforcement"])
    assert inputs(subject(kind, observation_scale=(1.0, 1.0, 1.0, 1.0))).verdict == "warn"
    assert inputs(subject(kind, observation_scale=(1e4, 1.0, 1.0, 1.0))).verdict == "fail"


def test_label_noise_does_not_look_like_shuffled_labels():
    assert labels(subject(Supervised, label_noise=0.4)).verdict == "pass"


def test_twenty_samples_that_need_a_larger_rate_are_worth_a_look(monkeypatch):
    monkeypatch.setattr("repeatlab.studies.checks.learning.MEMORY_UPDATES", 150)
    found = overfitting(subject(Supervised, lr=2e-3))
    assert found.verdict == "warn"
    assert "look at: the learning rate, low for one batch" in found.found


def test_twenty_samples_that_need_a_smaller_rate_are_worth_a_look(monkeypatch):
    """At 0.1 momentum throws them into one class for all, from where nothing moves."""
    monkeypatch.setattr("repeatlab.studies.checks.learning.MEMORY_UPDATES", 300)
    fields = {"labels": 100, "batch_size": 32, "mu": 1, "ema_decay": 0.98}
    found = overfitting(subject(SemiSupervised, lr=0.1, **fields))
    assert found.verdict == "warn"
    assert "the learning rate, high for one batch, which is learnt at 0.1 times it" in found.found
    assert found.numbers["last"] <= 0.05 * found.numbers["first loss"]
    assert overfitting(subject(SemiSupervised, lr=0.01, **fields)).verdict == "pass"


def test_a_penalty_with_the_wrong_sign():
    class Faulty(load_task(TASKS["unsupervised"])):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            terms = self.model.terms

            def negated(images, epsilon):
                logits, reconstruction, divergence = terms(images, epsilon)
                return logits, reconstruction, -divergence

            self.model.terms = negated

    assert regularisation(subject(Faulty)).verdict == "fail"


# --- a task of one's own ----------------------------------------------------------------------


class LinearConfig(TaskConfig):
    name: str = "linear"
    lr: float = 0.1
    batch_size: int = 4


class Points(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    index: int


class LinearTask:
    """Least squares, with a driver that is twice the loss and noise of its own in every update."""

    Config = LinearConfig

    def __init__(self, config, *, seed, device):
        self.model = nn.Linear(3, 1, bias=False)
        self.optimizers = [torch.optim.SGD(self.model.parameters(), lr=config.lr)]
        self.batch_size, self.noise = config.batch_size, generator(seed, "noise")

    def fresh_batch(self, index):
        draws = generator(0, "points", index)
        points = torch.randn(self.batch_size, 3, generator=draws)
        return Points(points, points.sum(1), torch.arange(self.batch_size), index)

    def population(self, index):
        return range(100)

    def step(self, batch, report, weights=None):
        shift = torch.randn((), generator=self.noise)
        residual = self.model(batch.inputs).squeeze(1) - batch.targets - shift
        loss = residual.square().mean()
        report(2 * loss.detach())
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()

    def state_dict(self):
        return {"model": self.model.state_dict(), "noise": self.noise.get_state()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.noise.set_state(state["noise"])


def test_a_probe_gives_losses_and_gradients_and_moves_nothing():
    task = LinearTask(LinearConfig(), seed=0, device="cpu")
    batch = task.fresh_batch(0)
    weight = task.model.weight.detach().clone()
    probe = Probe(task, batch)
    found = probe.evaluate(gradients=True)
    residual = (
        batch.inputs @ weight[0] - batch.targets - torch.randn((), generator=generator(0, "noise"))
    )
    assert found.objectives == pytest.approx([residual.square().mean().item()])
    expected = 2 / 4 * batch.inputs.T @ residual
    torch.testing.assert_close(found.gradients[0][id(task.model.weight)][0], expected)
    again = probe.evaluate()  # the same noise
    assert again.objectives == found.objectives
    assert torch.equal(task.model.weight, weight)


def test_a_task_that_nothing_is_stated_of_is_checked_for_what_holds_anywhere():
    found = check(LinearConfig(), task=LinearTask)
    assert {result.name: result.verdict for result in found.results} == {
        "inputs": "pass",
        "labels": "not applicable",
        "initial loss": "not applicable",
        "gradient": "pass",
        "overfitting": "not applicable",
        "regularisation": "not applicable",
    }
    assert not found.seen


# --- central differences ----------------------------------------------------------------------


@given(
    st.tuples(*[st.floats(-3, 3)] * 4),
    st.floats(-2, 2),
    st.sampled_from([0.5, 0.98, 1.02, 2.0, -1.0]),
)
def test_smooth_functions_agree_and_wrong_factors_do_not(coefficients, x, factor):
    function = np.polynomial.Polynomial(coefficients)
    slope = float(function.deriv()(x))

    def loss(offset):
        return float(function(x + offset))

    assert compare(slope, loss(0), loss).error <= 1e-4
    # Where the curvature is much larger than the slope, it looks like a kink.
    assume(abs(slope) > 1e-2)
    wrong = compare(factor * slope, loss(0), loss).error
    assert wrong == pytest.approx(abs(factor - 1) / max(abs(factor), 1), rel=1e-2)


@given(st.floats(-0.95e-6, 0.95e-6), st.floats(0.01, 10))
def test_a_kink_is_never_a_failure(x, slope):
    def relu(offset):
        return slope * max(0.0, x + offset)

    error = compare(slope if x > 0 else 0.0, relu(0), relu).error
    assert error is None or error <= 1e-4


def test_a_kink_that_a_smaller_step_avoids_is_judged():
    def bend(offset):
        return abs(5e-6 + offset)

    assert compare(1.0, bend(0), bend).error <= 1e-4


def test_a_slope_that_neither_side_of_a_kink_has_is_wrong():
    def bend(offset):
        return abs(3e-7 + offset)

    assert compare(1.0, bend(0), bend).error is None
    assert compare(5.0, bend(0), bend).error > 0.5


def test_a_jump_of_the_loss_is_a_kink():
    def jump(offset):
        return 2.0 + offset + (offset > 5e-7)

    assert compare(1.0, jump(0), jump).error is None


def test_slopes_below_rounding_agree_and_larger_ones_do_not():
    def flat(offset):
        return 2.3

    assert compare(0.0, 2.3, flat).error == 0
    assert compare(1e-12, 2.3, flat).error == 0
    assert compare(1e-3, 2.3, flat).error == pytest.approx(1)


def test_a_loss_that_is_not_finite_is_no_agreement():
    def broken(offset):
        return float("nan")

    assert np.isnan(compare(1.0, 1.0, broken).error)


# --- what is expected -------------------------------------------------------------------------


def test_mnist_starts_at_its_pixels_times_ln_2():
    batch = type("Batch", (), {"images": torch.zeros(2, 1, 28, 28)})
    ((expected, _),) = EXPECTATIONS["unsupervised"].initial(None, batch).values()
    assert expected == pytest.approx(543.4274, rel=1e-6)


def test_an_agent_without_values_has_the_huber_loss_of_its_rewards():
    batch = type("Batch", (), {"returns": torch.tensor([0.0, -1.0, 2.0, 0.0])})
    ((expected, _),) = EXPECTATIONS["reinforcement"].initial(None, batch).values()
    assert expected == pytest.approx((0.5 + 1.5) / 4)


# --- pictures ---------------------------------------------------------------------------------


def test_the_pictures_are_what_the_network_sees_in_the_order_of_labels():
    found = check({"name": "supervised", "augment": False, "lr": 0.02})
    (name,) = found.seen
    assert name == "images in the order of their labels"
    task = Supervised(Supervised.Config(augment=False), seed=0, device="cpu")
    batch = task.fresh_batch(0)
    order = np.argsort(batch.labels.numpy(), kind="stable")
    pixels = task.data.train.images[batch.indices[order], 0].numpy().astype(float)
    pictures = found.seen[name]
    assert pictures.dtype == np.uint8
    assert (pictures.min(), pictures.max()) == (0, 255)
    stretched = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())
    np.testing.assert_allclose(pictures, stretched, atol=1)


def test_without_unlabelled_images_there_are_no_views_of_them_to_look_at(monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", (inputs, labels, overfitting))
    found = check({"name": "semisupervised", "mu": 0, "lr": 0.01})
    assert {result.verdict for result in found.results} == {"pass"}
    assert set(found["inputs"].numbers) == {"labelled mean", "labelled deviation"}
    assert set(found.seen) == {"labelled in the order of their labels"}


def test_both_views_of_an_image_lie_at_the_same_place():
    seen = report("selfsupervised").seen
    assert {name: len(images) for name, images in seen.items()} == {
        "first views": 32,
        "second views": 32,
    }


# --- reports and the command line -------------------------------------------------------------


def test_a_report_prints_as_a_table():
    found = Report(
        "a < b",
        (
            Result("one", "pass", {"loss": 1 / 3, "updates": 20}, "the loss"),
            Result("two", "fail", {"at": "model.0"}, "layer <0>"),
            Result("three", "not applicable", note="it has none"),
        ),
    )
    assert str(found).splitlines() == [
        "a < b: failed: two",
        "one             pass            loss 0.3333, updates 20",
        "two             fail            at model.0; look at: layer <0>",
        "three           not applicable  it has none",
    ]
    html = found._repr_html_()
    assert "a &lt; b" in html
    assert "<td>at model.0; look at: layer &lt;0&gt;</td>" in html
    assert "the loss" not in html
    assert html.count("<tr>") == 4


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs the command line in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["repeatlab", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    return run


def test_the_command_prints_the_report_and_says_by_its_status_whether_one_failed(call, monkeypatch):
    code, out, _ = call("check", "reinforcement")
    assert (code, out) == (0, f"{report('reinforcement')}\n")
    monkeypatch.setattr(checks, "CHECKS", (lambda subject: Result("planted", "fail"),))
    code, out, _ = call("check", "reinforcement")
    assert code == 1
    assert out.startswith("reinforcement: failed: planted\n")


def test_the_command_checks_every_task_of_a_parameter_file_as_it_is_configured(
    call, monkeypatch, tmp_path
):
    path = tmp_path / "two.yaml"
    path.write_text(
        "notebook: 10_supervised\nparameters:\n  study:\n    name: two\n    max_updates: 10\n"
        "    methods: {standard: {}}\n    tasks:\n      slow: {name: supervised, lr: 1.0e-7}\n"
        "      usual: {name: supervised, lr: 0.01}\n"
    )
    monkeypatch.setattr(checks, "CHECKS", (overfitting,))
    monkeypatch.setattr("repeatlab.studies.checks.learning.MEMORY_UPDATES", 150)
    code, out, _ = call("check", str(path))
    assert code == 1
    titles = [line for line in out.splitlines() if "supervised on digits" in line]
    assert titles == [
        "slow: supervised on digits: failed: overfitting",
        "usual: supervised on digits: no check failed",
    ]
    code, _, err = call("check", str(path), "--dataset", "digits")
    assert code == 2
    assert "leave --dataset out" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("superviced",), "unknown task 'superviced'; did you mean 'supervised'?"),
        (("supervised", "--dataset", "digitz"), "unknown dataset 'digitz'; did you mean 'digits'?"),
        (("reinforcement", "--dataset", "digits"), "task.dataset: unknown key"),
    ],
)
def test_the_command_names_what_it_does_not_know(call, arguments, message):
    code, out, err = call("check", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_fields_are_validated():
    with pytest.raises(ConfigError, match=r"task\.lrr: unknown key; did you mean 'lr'"):
        check({"name": "supervised", "lrr": 1.0})
