"""Autocast, memory layout and compilation: what changes, and what must not."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from test_optimization import SIX, advance, build, ignore, refusal, weights
from torch import nn

from repeatlab.core.schema import parse
from repeatlab.tasks import precision
from repeatlab.tasks.precision import Precision
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

every_task = pytest.mark.parametrize("name", SIX)


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


def test_float16_is_refused_by_an_error_that_names_bfloat16():
    run = {"task": {"name": "supervised", "precision": "float16"}, "max_updates": 1}
    found = refusal(RunConfig, run)
    assert found == "task.precision: must be 'float32' or 'bfloat16'; not 'float16'"


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
