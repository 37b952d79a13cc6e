"""Measuring: every second goes to the part that took it, and nothing is left changed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from math import inf
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, NamedTuple

import pytest
import torch
from every_method import SIX
from torch import nn
from torch.nn.utils import parameters_to_vector

import repeatlab.studies.diagnostics.measure
from repeatlab.analysis.frames import load
from repeatlab.cli import ROOT, main
from repeatlab.core.schema import ConfigError
from repeatlab.store.measurements import Measurement, read_measurements, write_measurement
from repeatlab.store.records import Store
from repeatlab.studies.diagnostics.measure import Bench, measure, measured
from repeatlab.studies.diagnostics.prediction import predict, with_prediction
from repeatlab.studies.parameter_files import read_profile
from repeatlab.studies.study import Study
from repeatlab.tasks import TASKS, TaskConfig
from repeatlab.tasks.optimization import OptimizerStep
from repeatlab.tasks.reinforcement import ReinforcementConfig
from repeatlab.tasks.replay_buffer import ReplayBuffer
from repeatlab.tasks.supervised import Supervised, SupervisedConfig

# --- a task whose parts take what a clock on paper says ----------------------------------------

TAKES = {
    "data": 11.0,
    "forward": 5.0,
    "backward": 10.0,
    "zero_grad": 1.0,
    "step": 4.0,
    "after": 2.0,  # a moving average, say
    "weights": 0.5,
    "scoring": 2.0,
    "refresh": 7.0,
    "resample": 6.0,
    "cold": 100.0,
}


class Clock:
    """Goes on only when somebody says what has taken its time."""

    now = 0.0

    @classmethod
    def take(cls, what: str) -> None:
        cls.now += TAKES[what]


class Passes(torch.autograd.Function):
    @staticmethod
    def forward(context, value):
        Clock.take("forward")
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        Clock.take("backward")
        return gradient.clone()


class SlowSGD(torch.optim.SGD):
    def zero_grad(self, set_to_none: bool = True) -> None:
        Clock.take("zero_grad")
        super().zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        Clock.take("step")
        super().step(closure)


class SlowSettings:
    """What stands for an optimizer's configuration."""

    def build(self) -> SlowSettings:
        return self

    def make(self, weights: Any, *, lr: float, device: str) -> SlowSGD:
        return SlowSGD(weights, lr=lr)


class ToyBatch(NamedTuple):
    values: torch.Tensor
    indices: torch.Tensor
    index: int


class ToyConfig(TaskConfig):
    name: Literal["toy"] = "toy"
    lr: float = 1e6  # would diverge at once
    batch_size: int = 2
    networks: int = 1
    """Forward, backward and step of each in turn, as in a GAN."""
    cold: int = 0
    """Updates of a loop, the first ones, that take longer."""
    refused: tuple[str, ...] = ("prefetch",)  # the clock on paper is not for two threads

    def refusals(self) -> dict[str, str]:
        return dict.fromkeys(self.refused, "for the test")


class Toy:
    Config: ClassVar[type[TaskConfig]] = ToyConfig
    device, environment_steps = "cpu", 0

    def __init__(self, config: ToyConfig, *, seed: int, device: str) -> None:
        self.weights = [nn.Parameter(torch.ones(())) for _ in range(config.networks)]
        how = SimpleNamespace(optimizer=SlowSettings(), lr=config.lr, clip_norm=None)
        self.optimizer_steps = [OptimizerStep([w], how, device=device) for w in self.weights]
        self.optimizers = [step.optimizer for step in self.optimizer_steps]
        self.batch_size, self.cold = config.batch_size, config.cold
        self.forward_samples, self.backward_samples = 3 * self.batch_size, self.batch_size
        self.steps = 0

    def fresh_batch(self, index: int) -> ToyBatch:
        Clock.take("data")
        STEPS_AT.append((index, self.steps))
        return ToyBatch(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), index)

    def batch_of(self, indices, index):
        return self.fresh_batch(index)

    def refresh(self, batch, visit):
        Clock.take("refresh")
        return batch

    def resample(self, batch, visit):
        Clock.take("resample")
        return batch

    def step(self, batch, report, weights=None):
        for number, (weight, step) in enumerate(
            zip(self.weights, self.optimizer_steps, strict=True)
        ):
            loss = Passes.apply(weight) ** 2
            if weights is not None:
                Clock.take("weights")
            if number == 0:
                report(loss.detach(), *(() if weights is None else (batch.values, batch.values)))
            step(loss)
        Clock.take("after")
        if 0 < self.steps < 1 + self.cold:  # of a loop; one was made before any
            Clock.take("cold")
        self.steps += 1

    def sample_losses(self, batch):
        Clock.take("scoring")
        return batch.values

    def evaluate(self, split):
        raise AssertionError("nothing is evaluated")

    def pictures(self):
        return {}

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


STEPS_AT: list[tuple[int, int]] = []  # (fresh batch made, steps before)


@pytest.fixture
def toy(monkeypatch):
    """Return a function that measures the toy by its own clock."""
    monkeypatch.setitem(TASKS, "toy", f"{__name__}:Toy")

    def run(threads: int = 1, **fields: Any) -> Measurement:
        settings = {"device": "cpu", "threads": threads, "blocks": 4, "block_seconds": 300}
        return measure(ToyConfig(**fields), **settings, clock=lambda: Clock.now)

    return run


def test_every_second_goes_to_the_part_that_took_it(toy):
    found = toy()
    assert found.parts == {
        "data": 11,
        "forward": 5,
        "backward": 10,
        "optimizer": 1 + 4 + 2,
        "recording": 0,
        "scoring": 2,
        "refresh": 7,
        "resample": 6,
    }
    assert found.loops == {"once": 22 + 11, "repeated": 22 + 11 / 4}
    assert max(found.spread.values()) == pytest.approx(0, abs=1e-9)
    assert found.backward_ratio == 2
    assert found.sample_ratio == 6
    assert (found.model.update, found.model.data) == (22, 11)


def test_a_loop_is_timed_once_it_is_going(toy, monkeypatch):
    warm = toy().loops
    assert toy(cold=8).loops != warm
    monkeypatch.setattr(repeatlab.studies.diagnostics.measure, "LEAD_IN", 3000)
    assert toy(cold=8).loops == pytest.approx(warm)


def test_an_update_with_two_networks_adds_up_too(toy):
    parts = toy(networks=2).parts
    assert (parts["forward"], parts["backward"], parts["optimizer"]) == (10, 20, 12)


def test_blocks_have_the_size_that_was_asked_for(toy):
    # At N = 4 an update takes 22 + 11 / 4 seconds; whole batches of four updates each.
    bench = Bench(ToyConfig(), device="cpu", block_seconds=300, clock=lambda: Clock.now)
    assert bench.updates == 4 * -(-300 // (4 * 33))


def test_every_loop_begins_where_the_others_do(toy):
    bench = Bench(ToyConfig(), device="cpu", first_batch=100, clock=lambda: Clock.now)
    STEPS_AT.clear()
    bench.round()
    begins = [steps for index, steps in STEPS_AT if index == 101]
    assert begins == 4 * [1]  # two kinds, the parts, the singles
    assert min(STEPS_AT)[0] == 101


def weights(task: Any) -> torch.Tensor:
    return parameters_to_vector(task.model.parameters()).detach().clone()


def test_what_is_measured_has_learnt_a_little_and_learns_no_more(monkeypatch):
    monkeypatch.setattr(repeatlab.studies.diagnostics.measure, "LEARNING", inf)
    config = SupervisedConfig(width=2, batch_size=8, lr=0.1)
    plain = Supervised(config, seed=0, device="cpu")
    for index in range(20):
        plain.step(plain.fresh_batch(index), lambda loss: None)
    # As many threads as the loop above had: sums are rounded by how they are shared out.
    options = {"threads": torch.get_num_threads(), "block_seconds": 0.001}
    bench = Bench(config, device="cpu", first_batch=20, **options)
    assert torch.equal(weights(bench.task), weights(plain))
    bench.round()
    assert torch.equal(weights(bench.task), weights(plain))


@pytest.mark.parametrize("first", [1, 20])
def test_what_diverges_is_measured_as_it_begins(monkeypatch, first):
    monkeypatch.setattr(repeatlab.studies.diagnostics.measure, "LEARNING", inf)
    config = SupervisedConfig(width=2, batch_size=8, lr=1e30)
    bench = Bench(config, device="cpu", first_batch=first, block_seconds=0.001)
    assert torch.equal(weights(bench.task), weights(Supervised(config, seed=0, device="cpu")))


def test_measuring_leaves_nothing_behind(toy):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    toy(threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


# --- real tasks --------------------------------------------------------------------------------

QUICK = {"device": "cpu", "blocks": 2, "block_seconds": 1e-4}


@pytest.mark.parametrize("name", [name for name in TASKS if name != "toy"])
def test_every_task_can_be_measured(name, request):
    fields = {"name": name} | ({"learning_starts": 40} if name == "reinforcement" else {})
    study = Study.of(name="s", tasks={"t": fields}, methods={"standard": {}}, max_updates=1)
    found = measure(study.tasks["t"], **QUICK)
    assert Measurement(**json.loads(json.dumps(asdict(found)))) == found
    assert all(value > 0 for value in (*found.parts.values(), *found.loops.values()))
    assert ("resample" in found.parts) == (name == "reinforcement")


def test_every_fresh_batch_is_acted_for(monkeypatch):
    config = ReinforcementConfig(learning_starts=40)
    bench = Bench(config, device="cpu", first_batch=10, block_seconds=0.02)
    assert bench.task.buffer.steps >= 40 + 11
    steps, add = [], ReplayBuffer.add

    def counting(buffer, *args, **kwargs):
        steps.append(buffer.steps)
        add(buffer, *args, **kwargs)

    monkeypatch.setattr(ReplayBuffer, "add", counting)
    bench.round()
    made = bench.lead + bench.updates
    # N = 1 in two loops, N = 4 in one, and one batch for what is done outside of updates
    assert len(steps) == 2 * made + made / 4 + 1
    assert (min(steps), max(steps)) == (40 + 11, 40 + 11 + made - 1)


def test_a_task_is_measured_once_for_a_processor(tmp_path, monkeypatch):
    fields = {
        "name": "timed",
        "tasks": {"digits": {"name": "supervised", "lr": 0.05}},
        "methods": {"standard": {}},
        "max_updates": 10,
        "device": "cpu",
    }
    asked = []

    def counting(task, **settings):
        asked.append(settings)
        return measure(task, **settings, block_seconds=0.01)

    monkeypatch.setattr(repeatlab.studies.diagnostics.measure, "measure", counting)
    first = measured(fields, tmp_path, blocks=1)
    assert first.keys() == {"digits"}
    assert asked == [{"first_batch": 5, "device": "cpu", "threads": 1, "blocks": 1}]
    assert measured(fields, tmp_path, blocks=1) == first
    assert len(asked) == 1
    store = Store(tmp_path)
    ((_, kept),) = read_measurements(store).items()
    kept.environment["processor"] = "another"
    write_measurement(store, kept)
    measured(fields, tmp_path, blocks=1)
    assert len(asked) == 2
    with pytest.raises(ConfigError, match="max_updates"):
        measured(fields | {"max_updates": 0}, tmp_path)


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that calls `repeatlab measure` in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["repeatlab", "measure", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    return call


STUDY = {
    "name": "tiny",
    "tasks": {"digits": {"name": "supervised", "lr": 5e-2}},
    "methods": {"standard": {}, "twice": {"mapping": {"name": "constant", "repeats": 2}}},
    "seeds": 1,
    "max_updates": 8,
    "evaluation": {"every": 8},
}


def test_the_command_writes_what_tables_then_show(tmp_path, monkeypatch, command, capsys):
    fast = partial(measure, block_seconds=1e-4)
    monkeypatch.setattr(repeatlab.studies.diagnostics.measure, "measure", fast)
    parameters = {"notebook": "10_supervised", "parameters": {"study": STUDY}}
    (tmp_path / "tiny.yaml").write_text(json.dumps(parameters))
    code, out, _ = command("tiny.yaml")
    assert code == 0
    assert out.splitlines()[-1].startswith("tiny: digits")
    (found,) = read_measurements(Store("runs")).values()

    Study.of(**STUDY).run("runs", workers=0)
    runs = with_prediction(load("runs", "tiny").runs, Store("runs"))
    assert runs["predicted_seconds"].tolist() == [
        pytest.approx(predict(found, {"updates": 8, "fresh_batches": batches}))
        for batches in (8, 4)
    ]
    monkeypatch.setattr("sys.argv", ["repeatlab", "status", "--all"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, run in zip(lines, runs.itertuples(), strict=True):
        assert line.endswith(
            f"): trained {run.seconds:.3g} s, predicted {run.predicted_seconds:.3g} s"
        )


def test_by_default_the_quick_tasks_are_measured(monkeypatch, command):
    example, begins = measure(SupervisedConfig(), **QUICK), {}

    def fake(config, *, device, threads, blocks, first_batch):
        begins.setdefault(config.name, set()).add(first_batch)
        return replace(example, task=config.model_dump(mode="json"))

    monkeypatch.setattr(repeatlab.studies.diagnostics.measure, "measure", fake)
    assert command()[0] == 0
    jobs = [
        job.parameters["study"] for job in read_profile("quick", ROOT) if "study" in job.parameters
    ]
    assert begins.keys() == {task["name"] for study in jobs for task in study["tasks"].values()}
    assert begins.keys() >= set(SIX)
    assert set().union(*begins.values()) == {study["max_updates"] // 2 for study in jobs}
    assert {m.task["name"] for m in read_measurements(Store("runs")).values()} == begins.keys()


def test_a_file_that_trains_nothing_is_named(tmp_path, command):
    (tmp_path / "views.yaml").write_text("notebook: 20_convergence\nparameters: {}\n")
    code, out, err = command("views.yaml")
    assert (code, out) == (2, "")
    assert err == "Error: views.yaml: parameters.study is missing: this file trains nothing\n"
