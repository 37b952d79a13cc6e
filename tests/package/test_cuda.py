"""On a CUDA device: what the host waits for and what it reads late, and tasks in low precision."""

import io
import math
import warnings

import numpy as np
import pytest
import torch
from test_optimization import SIX, ignore
from test_optimization import build as build_task
from torch import nn
from torch.nn import functional

from repeatlab.core.schema import parse
from repeatlab.repetition.mappings import Constant, Linear, Threshold, Trace, Uniform
from repeatlab.repetition.repeater import BatchRepeater, NonFiniteLoss
from repeatlab.store.records import Store
from repeatlab.studies.lockstep import train_group
from repeatlab.studies.lockstep.functional import FunctionalStack
from repeatlab.tasks import TASKS, load_task
from repeatlab.tasks.precision import cannot_compile
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train as train_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def scalar(value, dtype=torch.float32):
    return torch.tensor(float(value), dtype=dtype, device="cuda")


def run(repeater, losses):
    """Report losses[update] from the device, and return the batches."""
    batches = []
    for batch in repeater:
        batches.append(batch)
        repeater.report(scalar(losses[repeater.updates]))
    return batches


def train(repeats, device, updates=30):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(5, 8, 6, generator=generator).to(device)
    targets = torch.randint(3, (5, 8), generator=generator).to(device)
    batches = list(zip(inputs, targets, strict=True))
    repeater = BatchRepeater(batches, repeats=repeats, max_updates=updates)
    losses = []
    for x, y in repeater:
        loss = functional.cross_entropy(model(x), y)
        repeater.report(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, repeater, [loss.item() for loss in losses]


# Losses 2, 3, 1, 2, ... on fresh batches; Linear(t=1) then asks for as many updates.
COUNTS = [2, 3, 1, 2, 4, 1, 1, 3]
FIRST_AND_REPEATS = [
    count if repeat == 0 else 100.0 + 10 * batch + repeat
    for batch, count in enumerate(COUNTS)
    for repeat in range(count)
]


def test_counts_and_losses_are_those_reported():
    total = sum(COUNTS)
    repeater = BatchRepeater("abcd", repeats=Linear(t=1.0), max_updates=total)
    expected = [letter for letter, n in zip("abcdabcd", COUNTS, strict=True) for _ in range(n)]
    assert run(repeater, FIRST_AND_REPEATS) == expected
    columns = repeater.drain()
    assert columns["loss"].tolist() == FIRST_AND_REPEATS
    assert columns["repeats"][columns["repeat"] == 0].tolist() == COUNTS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype_is_read(dtype):
    repeater = BatchRepeater("ab", repeats=Linear(t=1.0), max_updates=5)
    for _ in repeater:
        repeater.report(scalar(2.5, dtype))
    assert repeater.drain()["loss"].tolist() == [2.5] * 5
    assert repeater.fresh_batch == 2


def test_reporting_makes_the_host_wait_for_nothing():
    for warm in (False, True):  # the first round loads kernels and allocates pinned memory
        repeater = BatchRepeater("ab", repeats=Linear(t=1.0), max_updates=6)
        for _ in repeater:
            loss = scalar(3.0)
            torch.cuda.synchronize()
            torch.cuda._sleep(400_000_000)  # keeps the device busy for some 0.2 s
            busy = torch.cuda.Event()
            busy.record()
            torch.cuda.set_sync_debug_mode("error" if warm else "default")
            try:
                repeater.report(loss + 0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert not (warm and busy.query()), "report() waited for the device"
        assert repeater.drain()["repeats"].tolist() == [3] * 6


def test_the_wait_ends_before_backward_and_step_do():
    repeater = BatchRepeater("ab", repeats=Threshold(t=1.0), max_updates=2)
    busy = torch.cuda.Event()
    for _ in repeater:
        if repeater.updates == 1:
            # The loss has been read, while what was enqueued after the report still runs.
            assert repeater.repeats == 2
            assert not busy.query()
        loss = scalar(3.0)
        repeater.report(loss)
        if repeater.updates == 1:
            assert repeater.repeats == 0  # not read yet
            torch.cuda._sleep(1_000_000_000)
            busy.record()
    torch.cuda.synchronize()


@pytest.mark.parametrize("block", [1, 3, 256])
def test_one_read_per_fresh_batch_and_one_per_block(block):
    total = sum(COUNTS)
    repeater = BatchRepeater("abcd", repeats=Linear(t=1.0), max_updates=total, block=block)
    run(repeater, FIRST_AND_REPEATS)
    repeats = total - len(COUNTS)
    assert repeater.host_reads == len(COUNTS) + math.ceil(repeats / block)
    assert repeater.drain()["loss"].tolist() == FIRST_AND_REPEATS
    assert repeater.host_reads == len(COUNTS) + math.ceil(repeats / block)  # nothing left to read


@pytest.mark.parametrize("mapping", [Constant(1), Constant(3), Uniform(), Trace((2, 1, 5) * 10)])
def test_a_mapping_that_needs_no_loss_reads_nothing_until_the_end(mapping):
    repeater = BatchRepeater("abcd", repeats=mapping, max_updates=30)
    losses = [float(update) for update in range(30)]
    reads = []
    for _ in repeater:
        reads.append(repeater.host_reads)
        repeater.report(scalar(losses[repeater.updates]))
    assert reads == [0] * 30
    assert repeater.host_reads == 1
    assert repeater.drain()["loss"].tolist() == losses


def test_draining_in_the_middle_of_a_block():
    total = sum(COUNTS)
    repeater = BatchRepeater("abcd", repeats=Linear(t=1.0), max_updates=total, block=4)
    losses, fresh_batches = [], []
    for update, _ in enumerate(repeater):
        repeater.report(scalar(FIRST_AND_REPEATS[update]))
        if update % 5 == 2:
            columns = repeater.drain()
            assert columns["update"][-1] == update
            losses += columns["loss"].tolist()
            fresh_batches += columns["fresh_batch"].tolist()
    columns = repeater.drain()
    assert losses + columns["loss"].tolist() == FIRST_AND_REPEATS
    expected = [batch for batch, count in enumerate(COUNTS) for _ in range(count)]
    assert fresh_batches + columns["fresh_batch"].tolist() == expected


@pytest.mark.parametrize("needs_loss", [True, False])
@pytest.mark.parametrize("block", [2, 256])
def test_the_first_loss_of_repeats_that_is_not_finite_is_named(needs_loss, block):
    # Updates 0, 1 | 2, 3, 4 | 5 | 6, 7 | ...: update 4 is the second repeat of fresh batch 1.
    losses = list(FIRST_AND_REPEATS)
    losses[4] = losses[7] = math.nan  # both are repeats; 7 on fresh batch 3
    total = sum(COUNTS)
    mapping = Linear(t=1.0) if needs_loss else Trace(tuple(COUNTS))
    repeater = BatchRepeater("abcd", repeats=mapping, max_updates=total, block=block)
    with pytest.raises(NonFiniteLoss) as error:
        run(repeater, losses)
    assert (error.value.update, error.value.fresh_batch) == (4, 1)
    assert math.isnan(error.value.loss)
    columns = repeater.drain()
    assert columns["update"].tolist() == [0, 1, 2, 3, 4]
    assert columns["fresh_batch"].tolist() == [0, 0, 1, 1, 1]
    assert columns["repeats"].tolist() == [2, 2, 3, 3, 3]
    assert columns["loss"][:4].tolist() == losses[:4]
    assert math.isnan(columns["loss"][4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_is_named_before_the_next_batch(bad):
    losses = list(FIRST_AND_REPEATS)
    losses[5] = bad  # the only visit to fresh batch 2
    repeater = BatchRepeater("abcd", repeats=Linear(t=1.0), max_updates=sum(COUNTS))
    with pytest.raises(NonFiniteLoss) as error:
        run(repeater, losses)
    assert (error.value.update, error.value.fresh_batch) == (5, 2)
    assert repeater.updates == 6
    columns = repeater.drain()
    assert columns["update"].tolist() == [0, 1, 2, 3, 4, 5]
    assert columns["repeats"].tolist() == [2, 2, 3, 3, 3, 0]
    assert columns["loss"].tolist() == pytest.approx(losses[:6], nan_ok=True)


def test_a_last_loss_that_is_not_finite_ends_the_loop_with_an_error():
    repeater = BatchRepeater("ab", repeats=Linear(t=1.0), max_updates=1)
    with pytest.raises(NonFiniteLoss, match=r"at update 0 \(fresh batch 0\)"):
        run(repeater, [math.nan])


@pytest.mark.parametrize("stop", [1, 2, 4, 6, 9])
def test_resume_with_losses_still_on_the_device(stop):
    total = sum(COUNTS)
    first = BatchRepeater("abcd", repeats=Linear(t=1.0), max_updates=total)
    for update, _ in enumerate(first):
        first.report(scalar(FIRST_AND_REPEATS[update]))
        if first.updates == stop:
            state = first.state_dict()
            break
    second = BatchRepeater("abcd", repeats=Linear(t=1.0), max_updates=total)
    second.load_state_dict(state)
    run(second, FIRST_AND_REPEATS)
    rows = [first.drain(), second.drain()]
    assert [x for columns in rows for x in columns["loss"].tolist()] == FIRST_AND_REPEATS
    expected = [batch for batch, count in enumerate(COUNTS) for _ in range(count)]
    assert [x for columns in rows for x in columns["fresh_batch"].tolist()] == expected


def test_losses_of_a_training_run_are_recorded_exactly():
    _, repeater, losses = train(Linear(t=0.5), "cuda")
    columns = repeater.drain()
    assert columns["loss"].tolist() == losses
    first = columns["repeat"] == 0
    left = 30 - columns["update"][first]
    wanted = [max(1, min(5, math.floor(x / 0.5))) for x in columns["loss"][first]]
    assert columns["repeats"][first].tolist() == np.minimum(wanted, left).tolist()
    assert repeater.host_reads == first.sum() + (not first.all())


def test_a_later_change_of_the_loss_does_not_change_the_record():
    repeater = BatchRepeater("a", repeats=3, max_updates=6)
    for _ in repeater:
        loss = scalar(3.0)
        repeater.report(loss)
        loss.zero_()
    assert repeater.drain()["loss"].tolist() == [3.0] * 6


def test_a_loss_that_a_cuda_graph_overwrites():
    inputs, loss = scalar(0.0), scalar(0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss.copy_(inputs * 2)
    repeater = BatchRepeater("abc", repeats=Linear(t=1.0), max_updates=9)
    for _ in repeater:
        inputs.fill_(1.5 if repeater.repeat == 0 else 10.0 + repeater.updates)
        graph.replay()
        repeater.report(loss)
    first_and_repeats = [3.0, 22.0, 24.0, 3.0, 28.0, 30.0, 3.0, 34.0, 36.0]
    assert repeater.drain()["loss"].tolist() == first_and_repeats


# --- whole tasks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIX)
def test_an_update_makes_the_host_wait_for_nothing(name, precision):
    """Once kernels are loaded: whatever an update needs of the device stays there."""
    task = build_task(name, "cuda", precision=precision, clip_norm=1.0)
    batch = task.fresh_batch(0)
    for _ in range(3):
        task.step(batch, ignore)
    torch.cuda.set_sync_debug_mode("error")
    try:
        task.step(batch, ignore)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SIX)
def test_bfloat16_s_drivers_are_float32_s_to_its_few_digits(name):
    losses = {}
    for kind in ("float32", "bfloat16"):
        last = name != "reinforcement"
        task, found = build_task(name, "cuda", precision=kind, channels_last=last), []
        for index in (0, 0, 1):
            task.step(task.fresh_batch(index), found.append)
        assert {loss.dtype for loss in found} == {torch.float32}
        losses[kind] = [loss.item() for loss in found]
    # Another representation may act otherwise where values are close.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


def test_a_run_records_its_peak_memory(tmp_path):
    run = {
        "task": {"name": "supervised", "channels_last": True},
        "method": {"mapping": {"name": "constant", "repeats": 2}},
        "max_updates": 40,
        "device": "cuda",
    }
    torch.empty(2**28, device="cuda")  # what was allocated before is no part of the run's peak
    torch.cuda.empty_cache()
    summary = train_run(parse(RunConfig, run), tmp_path).summary
    assert 0 < summary["peak_memory_bytes"] < 2**28
    assert summary["ledger"]["updates"] == 40


def test_compiled_updates_are_the_plain_ones():
    if (reason := cannot_compile("cuda")) is not None:
        pytest.skip(f"torch.compile: {reason}")
    drivers = ([], [])
    for compiled, found in enumerate(drivers):
        task = build_task("supervised", "cuda", compile=bool(compiled))
        for index in (0, 0, 1):
            task.step(task.fresh_batch(index), found.append)
    for mine, theirs in zip(*drivers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


STEPPED = {
    "supervised": {"name": "supervised", "width": 4, "batch_size": 16, "lr": 0.02},
    "unsupervised": {"name": "unsupervised", "width": 4, "latent": 3, "batch_size": 16},
    "language": {"name": "language", "width": 8, "layers": 1, "batch_size": 8},
}


def stepped(tasks, graphs, rates, updates=30):
    """Return the losses, (updates, arms), of tasks in lock-step, or alone where `graphs` is None.

    Arm number a is on every fresh batch a + 1 times.
    """
    stack = None if graphs is None else FunctionalStack(tasks, graphs=graphs)
    losses = []
    for update in range(updates):
        for task, rate in zip(tasks, rates, strict=True):
            task.optimizer.param_groups[0]["lr"] = rate * (1 - update / updates)  # as a schedule
        if stack is None:
            found = []
            for arm, task in enumerate(tasks):
                task.step(task.fresh_batch(update // (arm + 1)), found.append)
            losses.append([loss.item() for loss in found])
            continue
        for arm, task in enumerate(tasks):
            if update % (arm + 1) == 0:
                stack.stage(arm, task.fresh_batch(update // (arm + 1)))
        losses.append(stack.losses())
        stack.step()
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("name", STEPPED)
def test_lock_step_as_graphs_is_lock_step_and_each_run_alone(name, optimizer):
    kind = load_task(TASKS[name])
    config = kind.Config.model_validate(STEPPED[name] | {"optimizer": {"name": optimizer}})
    rates, found = [1e-3, 3e-3, 1e-3], {}
    for graphs in (None, False, True):
        tasks = [kind(config, seed=seed, device="cuda") for seed in range(len(rates))]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="no CUDA graphs")  # it is to be captured
            found[graphs] = stepped(tasks, graphs, rates)
        found[graphs].append([weights.norm().item() for weights in first_weights(tasks)])
    assert np.isfinite(found[None]).all()
    np.testing.assert_allclose(found[False], found[None], rtol=2e-3)
    np.testing.assert_allclose(found[True], found[False], rtol=2e-3)


def first_weights(tasks):
    return [next(task.model.parameters()).detach() for task in tasks]


def test_a_study_s_runs_in_lock_step_on_the_device_are_those_alone(tmp_path):
    """With an arm that diverges, so that the others are stacked and captured again."""
    fields = {"task": STEPPED["supervised"], "max_updates": 40, "device": "cuda"}
    mappings = [{"name": "constant", "repeats": 2}, {"name": "uniform"}, {"name": "linear", "t": 1}]
    methods = [{}, *({"mapping": mapping} for mapping in mappings)]
    runs = [parse(RunConfig, fields | {"method": method}) for method in methods]
    wild = parse(RunConfig, fields | {"task": STEPPED["supervised"] | {"lr": 1e18}})
    outcomes = train_group([*runs, wild], tmp_path / "together")
    assert set(outcomes.values()) == {None}
    for config in runs:
        alone = train_run(config, tmp_path / "alone")
        one = Store(tmp_path / "together").run("supervised", config.run_id)
        assert one.environment["lockstep"] == len(runs) + 1
        assert one.updates["repeats"].equals(alone.updates["repeats"])
        np.testing.assert_allclose(one.updates["loss"], alone.updates["loss"], rtol=2e-3)
    diverged = Store(tmp_path / "together").run("supervised", wild.run_id)
    assert diverged.status["status"] == "diverged"


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_state_that_was_loaded_onto_the_device_is_resumed(stop):
    def run_from(state, until=99):
        generator = torch.Generator().manual_seed(2)
        loader = torch.utils.data.DataLoader(range(8), 2, shuffle=True, generator=generator)
        repeater = BatchRepeater(loader, repeats=2, max_updates=12)
        if state is not None:
            repeater.load_state_dict(state)
        seen = []
        for batch in repeater:
            seen.append((batch.tolist(), float(torch.rand(()))))
            repeater.report(scalar(1.0))
            if repeater.updates == until:
                break
        return seen, repeater

    torch.manual_seed(4)
    whole, _ = run_from(None)
    torch.manual_seed(4)
    seen, repeater = run_from(None, until=stop)
    buffer = io.BytesIO()
    torch.save(repeater.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(5)
    state = torch.load(buffer, map_location="cuda", weights_only=True)
    assert seen + run_from(state)[0] == whole
