"""The loop reads nothing from the device but the loss that drives it, and leaves nothing behind.

On the CPU every tensor is at hand, so what would be a read from a device is followed instead: a
value is the device's if it was computed from weights or data. Draws of random numbers, which are
made on the host, are not.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repeatlab.core.schema import parse
from repeatlab.tasks import TASKS
from repeatlab.tasks.supervised import Supervised
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.one_run import Training
from repeatlab.training.weights import networks

T, BATCH = 12, 16
# What makes the host wait for a device: a value, a truth, a shape that depends on values.
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.bincount.default,
}
# With a mask as the index.
INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}
# What would copy to the host; where tensors are there already, no operation comes of it.
COPIES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}


class DeviceReads(TorchDispatchMode):
    """Counts operations that read what was computed from some first tensors.

    Attributes:
        count: How many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._on_device: set[int] = set()  # addresses of storages

    def begin(self, tensors: list[torch.Tensor]) -> None:
        """Take these as the device's, and count from now on."""
        self._on_device |= set(_addresses(tensors))
        self.count = 0

    def has(self, *values: Any) -> bool:
        """Whether any tensor among these is the device's."""
        return not self._on_device.isdisjoint(_addresses(values))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None) -> Any:
        given = _addresses([args, kwargs])
        derived = self.has(args, kwargs)
        self.count += derived and operation in READS
        self.count += operation in INDEXING and self.has(
            [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        )
        result = operation(*args, **(kwargs or {}))
        made = set(_addresses(result))
        # A new storage may lie where another was before.
        self._on_device = self._on_device | made if derived else self._on_device - (made - {*given})
        return result


class DeviceCopies(TorchFunctionMode):
    """Counts copies to the host together with the reads of `reads`."""

    def __init__(self, reads: DeviceReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        self._reads.count += function in COPIES and self._reads.has(args[0])
        return function(*args, **(kwargs or {}))


def _addresses(values: Any) -> list[int]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


def tensors(data: Any) -> list[torch.Tensor]:
    """Return what a data set's samples lie in, whatever holds them."""
    found = []
    for leaf in tree_leaves(data):
        inside = list(vars(leaf).values()) if hasattr(leaf, "__dict__") else []
        found += [leaf] if isinstance(leaf, torch.Tensor) else tensors(inside)
    return found


def run_config(
    task: str, method: dict[str, Any] | None = None, *, lr: float = 1e-3, **fields: Any
) -> RunConfig:
    data = {
        "task": {"name": task, "batch_size": BATCH, "lr": lr},
        "method": method or {},
        "max_updates": T,
        "evaluation": {"splits": [], "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


@contextmanager
def counted(monkeypatch) -> Iterator[list[int]]:
    """Yield a list that gets how many reads every run makes from its first to its last update."""
    found: list[int] = []
    mode = DeviceReads()
    begin, end = Training.begin, Training.end

    def begun(self, state=None):
        begin(self, state)
        weights = [t for n in networks(self.task).values() for t in n.state_dict().values()]
        drawn = getattr(getattr(self.task, "stream", None), "data", None)
        mode.begin([*weights, *tensors([getattr(self.task, "data", None), drawn])])
        within.enter_context(mode)
        within.enter_context(DeviceCopies(mode))

    def ended(self, *error):
        within.close()
        found.append(mode.count)
        end(self, *error)

    with monkeypatch.context() as patch, ExitStack() as within:
        patch.setattr(Training, "begin", begun)
        patch.setattr(Training, "end", ended)
        yield found


METHODS = {
    "standard": {},
    "fixed3": {"mapping": {"name": "constant", "repeats": 3}, "schedule": {"name": "cosine"}},
    "linear": {
        "mapping": {"name": "linear", "t": 0.5},
        "schedule": {"name": "constant", "warm_up": 0.2},
    },
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_an_update_reads_its_loss_and_nothing_else(task, method, tmp_path, monkeypatch):
    with counted(monkeypatch) as reads:
        run = train(run_config(task, METHODS[method]), tmp_path)
    ledger = run.summary["ledger"]
    assert ledger["updates"] == T
    # To act, the host has to know what the network says.
    assert T <= reads[-1] <= T + ledger["environment_steps"]


HIDDEN = {
    "truth": lambda weight: bool(weight.abs().max() > 1),
    "value": lambda weight: float(weight.detach().sum()),
    "shape": lambda weight: weight[weight > 0],
    "copy": lambda weight: weight.detach().cpu(),
    "array": lambda weight: weight.detach().numpy(),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_read_that_is_hidden_in_a_step_is_counted(kind, tmp_path, monkeypatch):
    step = Supervised.step

    def logging(self, *given, **named):
        step(self, *given, **named)
        HIDDEN[kind](self.model[0].weight)

    monkeypatch.setattr(Supervised, "step", logging)
    with counted(monkeypatch) as reads:
        train(run_config("supervised"), tmp_path)
    assert reads == [2 * T]


def test_draws_on_the_host_are_no_reads():
    with DeviceReads() as mode, DeviceCopies(mode):
        weights = torch.ones(5)
        mode.begin([weights])
        draws = torch.rand(5)
        assert draws.max().item() < 1
        assert mode.count == 0
        assert (weights[:2] * draws[:2]).sum().item() < 2
        assert mode.count == 1
        (draws > 2).nonzero()
        assert mode.count == 1
        draws.tolist()
        assert mode.count == 1
        draws.copy_(weights).nonzero()
        assert mode.count == 2
        draws.tolist()
        assert mode.count == 3


# --- memory -------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch) -> list[weakref.ref]:
    """Return a list that gets a weak reference to the task and to every weight of every run."""
    found: list[weakref.ref] = []
    original = Training.__init__

    def init(self, config, task, *given, **named):
        original(self, config, task, *given, **named)
        found.append(weakref.ref(task))
        for network in networks(task).values():
            found.extend(weakref.ref(weight) for weight in network.parameters())

    monkeypatch.setattr(Training, "__init__", init)
    return found


MORE = {
    "standard": {},
    "hard_mining": {"sampler": {"name": "hard_mining"}},
    "diverged": {"mapping": {"name": "linear", "t": 0.5}},
}


def alive(references: list[weakref.ref]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_is_over_holds_no_memory(task, watched, tmp_path):
    train(run_config(task), tmp_path)
    assert len(watched) > 1
    assert alive(watched) == 0


@pytest.mark.parametrize("method", MORE)
def test_nor_does_one_of_another_method_or_end(method, watched, tmp_path):
    lr = 1e20 if method == "diverged" else 0.01
    loader = {"delay_ms": 0.1} if method == "standard" else {}
    evaluation = {"splits": ["validation"], "keep": 2, "early_stopping": {"patience": 2}}
    config = run_config("supervised", MORE[method], lr=lr, loader=loader, evaluation=evaluation)
    run = train(config, tmp_path)
    assert run.status["status"] == ("diverged" if method == "diverged" else "complete")
    assert len(watched) > 1
    assert alive(watched) == 0


def test_a_task_that_somebody_holds_is_seen(watched, tmp_path, monkeypatch):
    held = []
    finish = Training.end
    monkeypatch.setattr(
        Training,
        "end",
        lambda self, *given, **n: (held.append(self), finish(self, *given, **n)),
    )
    train(run_config("supervised"), tmp_path)
    assert alive(watched) == len(watched)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_that_is_over_leaves_the_device_s_memory_as_it_was(tmp_path):
    train(run_config("supervised", device="cuda", seed=1), tmp_path)  # what CUDA itself keeps
    gc.collect()
    before = torch.cuda.memory_allocated()
    for seed in (2, 3):
        train(run_config("supervised", device="cuda", seed=seed), tmp_path)
        gc.collect()
        assert torch.cuda.memory_allocated() == before
