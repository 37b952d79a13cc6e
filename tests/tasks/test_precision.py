"""Autocast, loss scaling, memory layout and compilation: what changes, and what must not."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from test_optimization import SIX, SMALL, TORCH, advance, build, ignore, refusal, weights
from torch import nn
from torch.nn import functional

from repeatlab.core.schema import parse
from repeatlab.tasks import precision
from repeatlab.tasks.optimization import OPTIMIZERS, OptimizerStep, chosen
from repeatlab.tasks.precision import Precision
from repeatlab.tasks.supervised import SupervisedConfig
from repeatlab.training import making
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

every_task = pytest.mark.parametrize("name", SIX)
# A float16 number has 11 significant bits and ends at 65504.
OVERFLOWING = 2.0**40


# --- bfloat16 -----------------------------------------------------------------------------------


@every_task
def test_bfloat16_s_drivers_are_float32_s_to_its_few_digits(name):
    losses = {}
    for kind in ("float32", "bfloat16"):
        task, found = build(name, precision=kind), []
        for index in (0, 0, 1):
            task.step(task.fresh_batch(index), found.append)
        assert {loss.dtype for loss in found} == {torch.float32}
        assert {weight.dtype for weight in weights(task)} == {torch.float32}
        losses[kind] = [loss.item() for loss in found]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"]


@every_task
def test_every_use_of_a_network_is_in_bfloat16(name):
    task = build(name, precision="bfloat16")
    seen = []
    for module in vars(task).values():
        if isinstance(module, nn.Module):
            for layer in module.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                    layer.register_forward_hook(lambda _, given, out: seen.append(out.dtype))
    batch = task.fresh_batch(1)
    task.step(batch, ignore)
    for _ in (task.sample_losses(batch), task.evaluate("validation"), task.pictures()):
        pass
    assert set(seen) == {torch.bfloat16}


@every_task
def test_a_saved_state_under_bfloat16_goes_on_bit_for_bit(name):
    fields = {"precision": "bfloat16", "channels_last": name != "reinforcement"}
    unbroken, resumed = build(name, **fields), build(name, **fields)
    advance(unbroken, 0)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for task in (unbroken, resumed):
        advance(task, 2)
    assert digest(resumed.state_dict()) == digest(unbroken.state_dict())


def test_a_network_without_a_format_runs_as_it_is():
    layer = nn.Linear(3, 2).double()
    inputs = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(Precision()(layer, inputs), layer(inputs))
    low = Precision(torch.bfloat16)(nn.Linear(3, 2), inputs.float())
    assert low.dtype is torch.float32


# --- float16 ------------------------------------------------------------------------------------


def test_float16_is_for_cuda_and_says_so_where_it_is_not():
    run = {"task": {"name": "supervised", "precision": "float16"}, "max_updates": 1}
    for device in ("cpu", "mps"):
        found = refusal(RunConfig, run | {"device": device})
        assert found.startswith(f"task.precision: float16 needs a CUDA device, not '{device}'")
    parse(RunConfig, run | {"device": "cuda"})
    with pytest.raises(ValueError, match=r"task\.precision: float16 needs a CUDA device"):
        build("supervised", precision="float16")


def test_where_auto_means_the_cpu_nothing_is_written_before_float16_is_refused(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(making, "pick_device", lambda name: "cpu")
    run = {"task": {"name": "supervised", "precision": "float16"}, "max_updates": 1}
    with pytest.raises(ValueError, match=r"task\.precision: float16 needs a CUDA device"):
        train(parse(RunConfig, run), tmp_path / "runs")
    assert not list(tmp_path.rglob("*.json"))


def settings_of(name: str) -> dict[str, Any]:
    return TORCH[name][1] if name in TORCH else {}


def scaled_step(name: str, model: nn.Module, clip: float | None = None) -> OptimizerStep:
    """Return updates with scaled losses, as on CUDA, of a model on the CPU."""
    config = SupervisedConfig(lr=0.05, optimizer=chosen(name, **settings_of(name)), clip_norm=clip)
    low = Precision(torch.float16, "cpu")
    return OptimizerStep(model.parameters(), config, low, device="cpu")


def loss_of(model: nn.Module, index: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(index)
    return functional.mse_loss(model(torch.randn(8, 5, generator=draws)), torch.ones(8, 3))


def linear() -> nn.Module:
    model = nn.Linear(5, 3)
    for weight in model.parameters():
        nn.init.constant_(weight, 0.1)
    return model


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_updates_are_the_plain_ones_and_overflowing_ones_are_left_out(name, clip):
    """A scale is a power of two, so that it changes no digit; the plain loop just skips 3."""
    model, plain = linear(), linear()
    step = scaled_step(name, model, clip)
    own = chosen(name, **settings_of(name)).build()  # in its own file held to torch's
    optimizer = own.make(plain.parameters(), lr=0.05, device="cpu")
    for index in range(8):
        loss = loss_of(model, index)
        step(loss * torch.inf if index == 3 else loss)
        assert step.skipped == (index >= 3)
        if index != 3:
            optimizer.zero_grad()
            loss_of(plain, index).backward()
            if clip:
                nn.utils.clip_grad_norm_(plain.parameters(), clip)
            optimizer.step()
        assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_the_scale_and_the_count_are_part_of_the_state():
    models, steps = [], []
    for _ in range(2):
        models.append(linear())
        steps.append(scaled_step("momentum", models[-1]))
    for index in range(3):
        steps[0](loss_of(models[0], index) * (torch.inf if index == 1 else 1))
    file = io.BytesIO()
    torch.save([models[0].state_dict(), steps[0].state_dict()], file)
    file.seek(0)
    weights_then, state = torch.load(file, weights_only=True)
    assert state["scaler"]["scale"] == 2.0**15
    models[1].load_state_dict(weights_then)
    steps[1].load_state_dict(state)
    assert steps[1].skipped == 1
    for model, step in zip(models, steps, strict=True):
        step(loss_of(model, 3) * torch.inf)
        step(loss_of(model, 4))
    assert digest(steps[0].state_dict()) == digest(steps[1].state_dict())
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert steps[1].skipped == 2


@pytest.fixture
def float16_on_the_cpu(monkeypatch):
    """Let runs on the CPU use float16, with a first scale that is far too high."""
    monkeypatch.setattr(precision, "check_device", lambda config, device: None)
    monkeypatch.setattr(
        Precision, "scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=OVERFLOWING)
    )


@every_task
def test_a_skipped_update_counts_against_t_and_stands_in_the_ledger(
    name, float16_on_the_cpu, tmp_path
):
    run = {
        "task": {"name": name, "batch_size": 8, "precision": "float16"} | SMALL[name],
        "method": {"mapping": {"name": "constant", "repeats": 2}},
        "max_updates": 5,
        "evaluation": {"splits": ["train"], "test": False, "every": 2},
        "device": "cpu",
    }
    made = train(parse(RunConfig, run), tmp_path)
    ledger = made.summary["ledger"]
    steps = 5 * (2 if name == "generative" else 1)
    assert made.status == {"status": "complete"}
    assert (ledger["updates"], ledger["fresh_batches"]) == (5, 3)
    # 2^40 halved four times is still too much for float16: all were skipped.
    assert ledger["skipped_steps"] == steps
    assert made.updates["update"].tolist() == [0, 1, 2, 3, 4]


def test_without_float16_nothing_is_skipped(tmp_path):
    run = {"task": {"name": "supervised"}, "max_updates": 2, "device": "cpu"}
    ledger = train(parse(RunConfig, run), tmp_path).summary["ledger"]
    assert ledger["skipped_steps"] == 0


# --- layout and compilation ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SIX if name != "reinforcement"])
def test_channels_last_is_another_layout_of_the_same_updates(name):
    drivers = {}
    for last in (False, True):
        task, found = build(name, channels_last=last), []
        for index in (0, 0, 1):
            task.step(task.fresh_batch(index), found.append)
        drivers[last] = [loss.item() for loss in found]
        kernels = [w for w in weights(task) if w.ndim == 4 and min(w.shape[1:3]) > 1]
        assert all(w.is_contiguous(memory_format=torch.channels_last) == last for w in kernels)
        assert kernels
    assert drivers[True] == pytest.approx(drivers[False], rel=1e-3)


@pytest.fixture
def graphs(monkeypatch):
    """Compile without a compiler: networks are traced, and run as traced. The graphs made."""
    made, original = [], nn.Module.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def compile_in_place(self):
        original(self, backend=backend)

    monkeypatch.setattr(precision, "cannot_compile", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    yield made
    torch.compiler.reset()


@every_task
def test_compiled_networks_are_used_and_keep_their_names(name, graphs):
    plain, compiled = build(name), build(name, compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    drivers = ([], [])
    for task, found in zip((plain, compiled), drivers, strict=True):
        for index in (0, 0, 1):
            task.step(task.fresh_batch(index), found.append)
    assert graphs
    for mine, theirs in zip(*drivers, strict=True):
        torch.testing.assert_close(mine, theirs)
    compiled.load_state_dict(plain.state_dict())
    plain.load_state_dict(compiled.state_dict())


def test_nothing_is_compiled_again_as_n_varies(graphs, tmp_path):
    counts = []
    for method in ({}, {"mapping": {"name": "trace", "counts": [3, 1, 2, 5, 1]}}):
        graphs.clear()
        torch.compiler.reset()
        run = {
            "task": {"name": "supervised", "compile": True, "width": 4},
            "method": method,
            "max_updates": 12,
            "evaluation": {"splits": [], "test": False},
            "device": "cpu",
        }
        train(parse(RunConfig, run), tmp_path)
        counts.append(len(graphs))
    assert counts == [1, 1]


def test_where_no_compiler_works_networks_run_as_they_are(monkeypatch):
    def fails(function: Any) -> Any:
        raise RuntimeError("no C++ compiler\nlong explanation")

    monkeypatch.setattr(torch, "compile", fails)
    precision.cannot_compile.cache_clear()
    with pytest.warns(UserWarning, match="nothing is compiled here: no C\\+\\+ compiler"):
        task = build("supervised", compile=True)
    precision.cannot_compile.cache_clear()
    plain = build("supervised")
    for each in (task, plain):
        each.step(each.fresh_batch(0), ignore)
    assert all(map(torch.equal, weights(task), weights(plain)))
