"""One run over several gloo processes is the run of one process on the joined batches."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from click.testing import CliRunner
from every_method import METHODS, config
from test_resume import same_record
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from repeatlab import cli
from repeatlab.core.schema import ConfigError
from repeatlab.repetition.loss_reader import LossReader
from repeatlab.repetition.mappings import Linear, Mapping, Threshold, Until, to_dict
from repeatlab.repetition.repeater import BatchRepeater, NonFiniteLoss
from repeatlab.store.records import Store
from repeatlab.tasks import TASKS
from repeatlab.training import data_parallel
from repeatlab.training.config import RunConfig
from repeatlab.training.data_parallel import (
    GradientSum,
    JoinedLosses,
    SilentWriter,
    TeamBroken,
    losses_with_gradients,
)
from repeatlab.training.loop import together, train
from repeatlab.training.one_run import CheckpointPlan, Training

TIMEOUT = 60  # seconds until a hanging rank fails its test
EVERY_UPDATE = CheckpointPlan(updates=1)
LEFT = 3  # exit code of a rank that a stop has made leave
BROKEN = 4  # of one whose run failed


# --- Processes ------------------------------------------------------------------------------------


def in_ranks(size: int, work: Callable, *arguments, folder: Path) -> tuple[list, list[int]]:
    """Call work(rank, *arguments) in `size` forked processes of one gloo group.

    Returns:
        What each returned, of tensors, numbers and lists; None where one did not return.
        The exit codes: minus the signal of a killed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, size, folder, work, arguments))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(TIMEOUT)
            assert rank.exitcode is not None, "a rank hangs"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    answers = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path) if path.exists() else None for path in answers], [
        rank.exitcode for rank in ranks
    ]


def _rank(rank: int, size: int, folder: Path, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    try:
        answer = work(rank, *arguments)
    except KeyboardInterrupt:
        os._exit(LEFT)
    except (TeamBroken, RuntimeError):
        os._exit(BROKEN)
    torch.save(answer, folder / f"{rank}.pt")
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves breaks the connections of those that still talk
    os._exit(0)


def shared_run(rank: int, data: dict, runs: Path, after: Callable | None = None) -> dict:
    """Train as one of several ranks; `after(rank, updates)` is called after every update.

    Returns:
        This rank's updates, N of every batch, the losses that it started to read, the messages
        that it summed, and weights.
    """
    kept: dict = {"local": [], "training": None, "messages": 0}
    start, visit, update = LossReader.start, Training.visit, SilentWriter.updates

    def spied_start(self, loss):
        kept["local"].append(float(loss))
        return start(self, loss)

    def spied_visit(self):
        kept["training"], make = self, visit(self)

        def counted(batch):
            make(batch)
            if after is not None:
                after(rank, self.repeater.updates)

        return counted

    def spied_updates(self, columns):
        kept["repeats"] = kept.get("repeats", []) + columns["repeats"].tolist()
        update(self, columns)

    def counted_sum(*arguments, **options):
        kept["messages"] += 1
        return all_reduce(*arguments, **options)

    all_reduce, dist.all_reduce = dist.all_reduce, counted_sum
    LossReader.start, Training.visit, SilentWriter.updates = (
        spied_start,
        spied_visit,
        spied_updates,
    )
    together(lambda: train(RunConfig.from_json(data), runs, plan=EVERY_UPDATE))
    training = kept["training"]
    return {
        "updates": training.repeater.updates,
        "repeats": kept.get("repeats"),
        "local": kept["local"],
        "messages": kept["messages"],
        "weights": flat(training.task.model),
    }


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def over(run: RunConfig, size: int) -> RunConfig:
    """Return the run over `size` processes."""
    return RunConfig.from_json(run.to_json() | {"processes": size})


def small(name: str = "supervised", method: str | dict = "linear", **fields) -> RunConfig:
    """Return a run of some updates of a network without BatchNorm, evaluated now and then."""
    data = config(name, method).to_json() | {"max_updates": 12}
    data["task"] |= fields | {"lr": 0.05 if name != "unsupervised" else 5e-3}
    data["evaluation"] = {"every": 4, "splits": ["train", "validation"], "test": True}
    return RunConfig.from_json(data)


# --- The same run ---------------------------------------------------------------------------------


@pytest.fixture
def single(monkeypatch):
    """Return a function that trains a run in this process: its record and final weights."""
    trained = []
    run = Training.run
    monkeypatch.setattr(
        Training, "run", lambda self, state: trained.append(self) or run(self, state)
    )

    def made(config: RunConfig, runs: Path):
        return train(config, runs), flat(trained[-1].task.model)

    return made


@pytest.mark.parametrize(
    ("size", "name", "mapping"),
    [
        (2, "supervised", Threshold(t=2.35, repeats=3)),
        (3, "supervised", Threshold(t=2.35, repeats=3)),
        (2, "semisupervised", Threshold(t=2.3, repeats=3)),
        (3, "unsupervised", Threshold(t=41.25, repeats=3)),
        (2, "supervised", Until(t=2.28)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Mapping) else value,
)
def test_several_processes_make_the_run_of_one(size, name, mapping, single, tmp_path):
    run = small(name, {"mapping": to_dict(mapping)})
    alone, weights = single(run, tmp_path / "one")
    shared = over(run, size)
    answers, codes = in_ranks(
        size, shared_run, shared.to_json(), tmp_path / "runs", folder=tmp_path / "ranks"
    )
    assert codes == [0] * size
    record = Store(tmp_path / "runs").run(name, shared.run_id)

    # All ranks make T updates with the same N on every batch, though their own losses differ.
    counts = ["update", "fresh_batch", "repeat", "repeats"]
    assert record.updates[counts].equals(alone.updates[counts])
    assert len(set(alone.updates["repeats"])) > 1
    assert [answer["updates"] for answer in answers] == [run.max_updates] * size
    for follower in answers[1:]:
        assert follower["repeats"] == alone.updates["repeats"].tolist()
    by_itself = [[mapping(loss, None) for loss in answer["local"]] for answer in answers]
    assert len({tuple(decisions) for decisions in by_itself}) > 1

    # The joined batches' losses, gradients and so weights; on all ranks bit for bit the same.
    # Adam divides by the gradient's size: near 0 it makes more of what rounding leaves.
    atol = 1e-4 if name == "unsupervised" else 1e-6
    np.testing.assert_allclose(record.updates["loss"], alone.updates["loss"], rtol=2e-5)
    assert all(torch.equal(answer["weights"], answers[0]["weights"]) for answer in answers)
    torch.testing.assert_close(answers[0]["weights"], weights, rtol=1e-3, atol=atol)

    # One record, which counts what all of them did.
    assert [path.name for path in (tmp_path / "runs" / name).glob("[!.]*")] == [shared.run_id]
    ledgers = [
        {n: c for n, c in r.summary["ledger"].items() if "seconds" not in n and n != "host_reads"}
        for r in (record, alone)
    ]
    assert ledgers[0] == ledgers[1]
    pairs = record.evals.merge(alone.evals, on=["update", "split", "metric"])
    assert len(pairs) == len(alone.evals) == len(record.evals)
    np.testing.assert_allclose(pairs["value_x"], pairs["value_y"], rtol=2e-3, atol=2e-3)


def test_clipping_and_a_stop_of_the_patient_act_on_all_alike(single, tmp_path):
    run = small(method="fixed3", clip_norm=0.5).to_json()
    run["evaluation"]["early_stopping"] = {"patience": 1, "min_delta": 100.0}
    run = RunConfig.from_json(run)
    alone, weights = single(run, tmp_path / "one")
    answers, codes = in_ranks(
        2, shared_run, over(run, 2).to_json(), tmp_path / "runs", folder=tmp_path / "ranks"
    )
    assert codes == [0, 0]
    assert len(alone.updates) == 4
    assert [answer["updates"] for answer in answers] == [4, 4]
    for answer in answers:
        torch.testing.assert_close(answer["weights"], weights, rtol=1e-4, atol=1e-5)


def test_all_go_on_to_the_end_and_the_one_that_leads_comes_back_to_the_best(single, tmp_path):
    run = small(method="fixed3").to_json()
    rule = {"patience": 9, "min_delta": 100.0, "restore_best": True}  # the first is the best
    run["evaluation"]["early_stopping"] = rule
    run = RunConfig.from_json(run)
    alone, _ = single(run, tmp_path / "one")
    runs = tmp_path / "runs"
    _, codes = in_ranks(2, shared_run, over(run, 2).to_json(), runs, folder=tmp_path / "ranks")
    assert codes == [0, 0]
    record = Store(runs).run("supervised", over(run, 2).run_id)
    assert record.summary["early_stopping"]["restored_update"] == 0
    assert record.summary["ledger"]["updates"] == 12
    # Initial weights are those of a single process to the bit.
    assert record.summary["final"] == alone.summary["final"]


def test_a_decision_sends_no_message_of_its_own(tmp_path):
    sent = {}
    for name, method in {
        "standard": {},
        "decided": {"mapping": {"name": "threshold", "t": 1e9}},  # at every update, N = 1
    }.items():
        run = over(small(method=method), 2).to_json()
        answers, codes = in_ranks(2, shared_run, run, tmp_path / "runs", folder=tmp_path / name)
        assert codes == [0, 0]
        assert answers[0]["weights"].equal(answers[1]["weights"])
        sent[name] = answers[0]["messages"]
    # The gradients of 12 updates, and at the pause for each one's checkpoint whether to stop; the
    # losses that decide go with the gradients, others are sent at the pauses.
    assert sent == {"standard": 12 + 12 + 12, "decided": 12 + 12}


def test_a_run_that_diverges_does_so_on_all(single, tmp_path):
    run = small(method="fixed3")
    run = run.model_copy(update={"task": run.task.model_copy(update={"lr": 1e12})})
    alone, _ = single(run, tmp_path / "one")
    shared = over(run, 2)
    _, codes = in_ranks(
        2, shared_run, shared.to_json(), tmp_path / "runs", folder=tmp_path / "ranks"
    )
    record = Store(tmp_path / "runs").run("supervised", shared.run_id)
    assert codes == [0, 0]
    assert record.status == alone.status
    assert record.status["status"] == "diverged"
    assert len(record.updates) == len(alone.updates)


# --- The primitive, with shares -------------------------------------------------------------------

SHARES = [0.25, 0.75]
LOSSES = np.array([[0.5, 4.0, 1.0, 3.0], [3.5, 1.0, 1.5, 0.5]])


def report_shares(rank: int, nan_at: tuple[int, int] | None) -> dict:
    losses = JoinedLosses(SHARES[rank])
    ways = {"reduce": losses.start, "join": losses.join, "block": 3}
    repeater = BatchRepeater(range(4), repeats=Linear(t=1.0), max_updates=20, **ways)
    error = None
    try:
        for batch in repeater:
            loss = float(LOSSES[rank, batch]) + repeater.repeat
            if (rank, repeater.updates) == nan_at:
                loss = float("nan")
            repeater.report(torch.tensor(loss))
            dist.all_reduce(torch.ones(1))  # the gradients of this update
    except NonFiniteLoss as found:
        error = [found.update, found.fresh_batch]
    rows = repeater.drain()
    return {name: column.tolist() for name, column in rows.items()} | {"error": error}


def test_every_loss_is_the_weighted_mean_over_ranks(tmp_path):
    answers, codes = in_ranks(2, report_shares, None, folder=tmp_path)
    assert codes == [0, 0]
    joined = np.array(SHARES) @ LOSSES  # quarters and eighths: exact
    expected, batch = [], 0
    while len(expected) < 20:
        count = min(5, max(1, int(joined[batch % 4])), 20 - len(expected))
        expected += [(batch, i, count, joined[batch % 4] + i) for i in range(count)]
        batch += 1
    for answer in answers:
        columns = (answer[name] for name in ("fresh_batch", "repeat", "repeats", "loss"))
        assert list(zip(*columns, strict=True)) == expected


def test_a_nan_of_one_rank_ends_all_at_the_same_update(tmp_path):
    # Joined losses of 2.75, 1.75: update 1 is a repeat of batch 0, whose loss is read later.
    answers, codes = in_ranks(2, report_shares, (1, 1), folder=tmp_path)
    assert codes == [0, 0]
    for answer in answers:
        assert answer["error"] == [1, 0]
        assert len(answer["loss"]) == 2
        assert np.isnan(answer["loss"][1])


def report_before_the_other(rank: int) -> int:
    """Rank 1 has no loss until rank 0's `report` has returned."""
    store = dist.distributed_c10d._get_default_store()
    repeater = BatchRepeater(range(3), repeats=Linear(t=1.0), max_updates=6)
    for batch in repeater:
        fresh = repeater.repeat == 0
        if rank == 1 and fresh:
            store.wait([f"reported {batch} {repeater.updates}"])
        key = f"reported {batch} {repeater.updates}"
        repeater.report(torch.tensor(2.0))
        if rank == 0 and fresh:
            store.set(key, "yes")
        dist.all_reduce(torch.ones(1))
    return repeater.updates


def test_report_does_not_wait_for_the_other_ranks(tmp_path):
    answers, codes = in_ranks(2, report_before_the_other, folder=tmp_path)
    assert (answers, codes) == ([6, 6], [0, 0])


def train_under_ddp(rank: int, way: str) -> dict:
    """Train a small network on batches of this rank's own; count the messages with a loss alone."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 1))
    # So that there are two buckets, and the loss has to find one.
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(rank))
    ways = {}
    if way == "with gradients":
        losses = losses_with_gradients(model)
        ways = {"reduce": losses.start, "join": losses.join}
    all_reduce, alone = dist.all_reduce, []

    def counted(tensor, *arguments, **options):
        alone.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    repeater = BatchRepeater(data, Linear(t=0.8), max_updates=24, **ways)
    for inputs in repeater:
        loss = functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
        repeater.report(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decisions = alone.count(1)
    rows = repeater.drain()
    dist.all_reduce = all_reduce
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    columns = {name: torch.from_numpy(column) for name, column in rows.items()}
    return columns | {"weights": weights, "decisions": decisions}


@pytest.mark.parametrize("size", [2, 3])
def test_under_ddp_losses_can_travel_with_the_gradients(size, tmp_path):
    """The run is the same as with messages of their own, but for how sums are rounded."""
    apart, codes = in_ranks(size, train_under_ddp, "apart", folder=tmp_path / "apart")
    joined, more = in_ranks(size, train_under_ddp, "with gradients", folder=tmp_path / "joined")
    assert codes == more == [0] * size
    first = (joined[0]["repeat"] == 0).numpy()
    assert 1 < joined[0]["repeats"].max() <= 5
    assert apart[0]["decisions"] == first.sum()
    for one, other in zip(apart, joined, strict=True):
        assert other["decisions"] == 0
        for name in ("update", "fresh_batch", "repeat", "repeats"):
            assert other[name].equal(one[name])
            assert other[name].equal(joined[0][name])
        torch.testing.assert_close(other["weights"], one["weights"])
        assert other["weights"].equal(joined[0]["weights"])
        torch.testing.assert_close(other["loss"][first], one["loss"][first])
    # Of repeats, too, the mean over the ranks: apart, each has recorded its own.
    mean = torch.stack([rank["loss"] for rank in apart]).mean(0)
    torch.testing.assert_close(joined[0]["loss"], mean)


def hook_twice(rank: int) -> str:
    model = DistributedDataParallel(nn.Linear(2, 1))
    losses_with_gradients(model)
    try:
        losses_with_gradients(model)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_ddp_model_takes_losses_along_once(tmp_path):
    answers, codes = in_ranks(1, hook_twice, folder=tmp_path)
    assert codes == [0]
    assert "register_comm_hook" in answers[0]


# --- Kills, stops, errors -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return a run over two processes, and its record when nothing disturbs it."""
    run = over(small(method={"mapping": {"name": "quantile", "window": 2}}), 2)
    folder = tmp_path_factory.mktemp("unbroken")
    _, codes = in_ranks(2, shared_run, run.to_json(), folder / "runs", folder=folder / "ranks")
    assert codes == [0, 0]
    return run, Store(folder / "runs").run("supervised", run.run_id)


def broken_off(run: RunConfig, tmp_path: Path, after: Callable) -> tuple[list[int], str]:
    """Disturb a run, go on with it; return the first exit codes and the status in between."""
    arguments = (run.to_json(), tmp_path / "runs")
    _, codes = in_ranks(2, shared_run, *arguments, after, folder=tmp_path / "first")
    record = Store(tmp_path / "runs").run("supervised", run.run_id)
    assert not record.done
    status = record.status["status"]
    _, again = in_ranks(2, shared_run, *arguments, folder=tmp_path / "second")
    assert again == [0, 0]
    assert record.environment["attempts"] == 2
    return codes, status


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_and_the_run_goes_on(victim, unbroken, tmp_path):
    def kill(rank, updates):
        if (rank, updates) == (victim, 5):
            os.kill(os.getpid(), signal.SIGKILL)

    run, record = unbroken
    codes, _ = broken_off(run, tmp_path, kill)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == BROKEN
    same_record(record, Store(tmp_path / "runs").run("supervised", run.run_id))


def test_an_error_on_one_rank_fails_the_run(unbroken, tmp_path):
    def fail(rank, updates):
        if (rank, updates) == (1, 5):
            raise RuntimeError("out of memory")

    run, record = unbroken
    assert broken_off(run, tmp_path, fail) == ([BROKEN, BROKEN], "failed")
    same_record(record, Store(tmp_path / "runs").run("supervised", run.run_id))


def test_a_stop_of_one_rank_makes_all_leave_at_the_same_update(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(data_parallel, "AGREE_UPDATES", 3)

    def stop(rank, updates):
        if (rank, updates) == (1, 5):
            signal.raise_signal(signal.SIGINT)

    run, record = unbroken
    # Without checkpoints of every update: the one that goes on is that of the stop.
    monkeypatch.setattr(sys.modules[__name__], "EVERY_UPDATE", CheckpointPlan())
    assert broken_off(run, tmp_path, stop) == ([LEFT, LEFT], "interrupted")
    same_record(record, Store(tmp_path / "runs").run("supervised", run.run_id))


def test_a_step_without_all_gradients_is_refused():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([used, unused], lr=0.1)
    GradientSum(optimizer, JoinedLosses(0.5))
    used.sum().backward()
    with pytest.raises(RuntimeError, match="1 of 2 parameters have a gradient"):
        optimizer.step()


# --- The command line -----------------------------------------------------------------------------


def torchrun(rank: int, port: int, arguments: list[str]) -> list:
    """Run the command line as a process that torchrun has started."""
    dist.barrier()
    dist.destroy_process_group()  # that of the test: the command makes its own
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "none",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    result = CliRunner().invoke(cli.cli, arguments)
    return [result.exit_code, result.output, str(result.exception)]


def test_torchrun_trains_studies_with_all_that_they_need(tmp_path, small_study):
    study = small_study(
        methods={
            "linear": {"mapping": {"name": "linear", "t": "auto"}},
            "permuted": {"mapping": {"name": "trace", "of": "linear", "control": "permuted"}},
        },
        seeds=1,
        max_updates=12,
    )
    fields = study.model_dump(mode="json", exclude_unset=True)
    parameters = tmp_path / "study.yaml"
    parameters.write_text(
        yaml.safe_dump({"notebook": "10_supervised", "parameters": {"study": fields}})
    )
    command = ["run", str(parameters), "--runs", str(tmp_path / "runs")]
    for made, stored in ((2, 0), (0, 2)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        answers, codes = in_ranks(2, torchrun, port, command, folder=tmp_path / str(made))
        assert codes == [0, 0], answers
        (status, output, error), (other_status, other_output, _) = answers
        assert (status, other_status) == (0, 0), error
        assert f"2 runs: 2 complete ({made} trained now, {stored} in the store)" in output
        assert other_output == ""
    runs = [
        Store(tmp_path / "runs").run("supervised", p.name)
        for p in (tmp_path / "runs" / "supervised").glob("[!.]*")
    ]
    assert len(runs) == 3  # with the short run of `t: auto`
    assert {run.config["processes"] for run in runs} == {2}


def test_torchrun_leaves_no_choice_of_workers(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    result = CliRunner().invoke(cli.cli, ["run", "study.yaml", "--workers", "2"])
    assert result.exit_code == 2
    assert "torchrun decides" in result.output


# --- What is refused ------------------------------------------------------------------------------


def test_a_run_of_several_processes_needs_them(tmp_path):
    with pytest.raises(ValueError, match=re.escape("torchrun --nproc-per-node 2")):
        train(over(small(), 2), tmp_path)
    assert not list(tmp_path.iterdir())


REASONS = {
    "selfsupervised": "compares it with all others of its batch",
    "reinforcement": "a replay buffer of its own",
}
SHARED = {"supervised", "semisupervised", "unsupervised"}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_whose_batches_cannot_be_shared_says_why(name):
    if name in SHARED:
        assert over(config(name), 2).processes == 2
        return
    with pytest.raises(ConfigError, match=REASONS.get(name, "not built for it")):
        over(config(name), 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": METHODS["hard_mining"]}, "a sampler chooses by the losses of samples"),
        ({"method": METHODS["step_size"]}, "apply: step_size scales an update before"),
        ({"budget": {"unit": "seconds", "seconds": 5.0}}, "budget.unit: seconds would end each"),
        (
            {"method": {"distillation": {"teachers": 2}}},
            "method.distillation: the teachers' answers",
        ),
        ({"processes": 17}, "batch_size 16 has fewer samples"),
    ],
)
def test_what_cannot_agree_is_refused(changes, reason):
    data = config("supervised").to_json() | {"processes": 2} | changes
    with pytest.raises(ConfigError, match=rf"processes: \d+: {reason}"):
        RunConfig.from_json(data)
