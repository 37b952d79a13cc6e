"""What BatchRepeater costs beside the leanest hand-written loop that repeats the same way.

Both loops run in one process, in turns (A B B A ...), on one thread; every number is the median
over the rounds. The clock covers all of the loop, the recording of every loss and the drain.

`python test_loop_overhead.py accelerate` (or lightning) prints one framework's ratio: measured in a
process of its own, since importing lightning slows every optimizer step of a process.
"""

import importlib.util
import json
import subprocess
import sys
from itertools import islice
from statistics import median
from time import perf_counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from repeatlab.repetition.mappings import ControlLimit, Linear, Quantile, ZScore
from repeatlab.repetition.repeater import BatchRepeater


def in_turns(first, second, rounds):
    """Return the seconds of two functions run alternately, shape (rounds, 2); warmed up once."""
    seconds = []
    for i in range(rounds + 1):
        row = [0.0, 0.0]
        for which in (0, 1) if i % 2 else (1, 0):
            start = perf_counter()
            (first, second)[which]()
            row[which] = perf_counter() - start
        seconds.append(row)
    return np.array(seconds[1:])


@pytest.fixture
def report(benchmark, capsys):
    """Measure once under pytest-benchmark, keep the numbers with it and print them."""
    torch.set_num_threads(1)

    def run(measure):
        numbers = benchmark.pedantic(measure, rounds=1, iterations=1)
        benchmark.extra_info.update(numbers)
        with capsys.disabled():
            for name, number in numbers.items():
                print(f"\n  {name:<76} {number:8.3f}", end="")

    return run


# --- Bookkeeping on a null update -----------------------------------------------------------------

NULL_UPDATES = 20_000


def replay_by_hand(batches, counts, updates):
    """Repeat each batch as often as `counts` says; record every loss and N."""
    losses, used, fresh_batch = [], [], 0
    while len(losses) < updates:
        for loss in batches:
            count = min(counts[fresh_batch], updates - len(losses))
            fresh_batch += 1
            used.append(count)
            for _ in range(count):
                losses.append(loss.item())
            if len(losses) == updates:
                break
    return losses, used


@pytest.mark.parametrize(
    "repeats",
    [1, 3, Linear(t=0.7), ControlLimit(k=1.0), ZScore(), Quantile()],
    ids=lambda m: repr(m)[:20],
)
def test_bookkeeping_per_null_update(report, repeats):
    values = np.random.default_rng(0).gamma(4.0, 0.25, 1_000)
    batches = list(torch.tensor(values, dtype=torch.float32))  # a batch is its own loss

    def by_repeater():
        repeater = BatchRepeater(batches, repeats=repeats, max_updates=NULL_UPDATES)
        for loss in repeater:
            repeater.report(loss)
        return repeater.drain()

    columns = by_repeater()
    counts = columns["repeats"][columns["repeat"] == 0].tolist()
    losses, used = replay_by_hand(batches, counts, NULL_UPDATES)
    assert (columns["loss"].tolist(), counts) == (losses, used)

    def measure():
        rounds = in_turns(
            by_repeater, lambda: replay_by_hand(batches, counts, NULL_UPDATES), rounds=25
        )
        bookkeeping = median(rounds[:, 0] - rounds[:, 1]) / NULL_UPDATES
        mean_count = NULL_UPDATES / len(counts)
        return {f"{repeats!r}, mean N {mean_count:.2f}: us an update": bookkeeping * 1e6}

    report(measure)


# --- A 10k-parameter MLP --------------------------------------------------------------------------

MLP_UPDATES = 300


class MLP:
    """4-120-84-2, Adam, batch 32: 10,934 parameters."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-4)
        inputs = torch.randn(100, 32, 4)
        self.batches = list(zip(inputs, torch.randn(100, 32, 2), strict=True))

    def loss(self, batch):
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def update(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def train_by_hand(task, count_of, updates):
    """The leanest loop with the same rule: yields after every update, returns losses and counts."""
    losses, counts, done = [], [], 0
    while done < updates:
        for batch in task.batches:
            loss = task.loss(batch)
            losses.append(loss.item())
            count = min(count_of(losses[-1]), updates - done)
            counts.append(count)
            task.update(loss)
            yield
            for _ in range(count - 1):
                loss = task.loss(batch)
                losses.append(loss.item())
                task.update(loss)
                yield
            done += count
            if done == updates:
                break
    return losses, counts


def train_by_repeater(task, repeats, updates):
    repeater = BatchRepeater(task.batches, repeats=repeats, max_updates=updates)
    for batch in repeater:
        loss = task.loss(batch)
        repeater.report(loss)
        task.update(loss)
        yield
    columns = repeater.drain()
    return columns["loss"].tolist(), columns["repeats"][columns["repeat"] == 0].tolist()


def finish(training):
    """Run a training to its end and return what it returns."""
    while True:
        try:
            next(training)
        except StopIteration as end:
            return end.value


MLP_RULES = [
    (1, lambda loss: 1),
    (3, lambda loss: 3),
    (Linear(t=0.35), lambda loss: max(1, min(5, int(loss / 0.35)))),
]


@pytest.mark.parametrize(("repeats", "count_of"), MLP_RULES, ids=["1", "3", "linear"])
def test_ratio_on_a_small_mlp(report, repeats, count_of):
    ours, hand = MLP(), MLP()
    expected = finish(train_by_hand(hand, count_of, MLP_UPDATES))
    assert finish(train_by_repeater(ours, repeats, MLP_UPDATES)) == expected

    def measure():
        rounds = in_turns(
            lambda: finish(train_by_repeater(ours, repeats, MLP_UPDATES)),
            lambda: finish(train_by_hand(hand, count_of, MLP_UPDATES)),
            rounds=30,
        )
        return {
            f"MLP, {repeats!r}: ratio to the hand-written loop": median(
                rounds[:, 0] / rounds[:, 1]
            ),
            f"MLP, {repeats!r}: us an update by hand": median(rounds[:, 1]) / MLP_UPDATES * 1e6,
        }

    report(measure)


# --- ResNet-18 ------------------------------------------------------------------------------------


class ResNet18:
    """CIFAR stem, SGD with momentum, batch 64 of 3 x 32 x 32."""

    def __init__(self):
        from torchvision.models import resnet18

        torch.manual_seed(0)
        self.model = resnet18(num_classes=10)
        self.model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.model.maxpool = nn.Identity()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        images, labels = torch.randn(4, 64, 3, 32, 32), torch.randint(10, (4, 64))
        self.batches = list(zip(images, labels, strict=True))

    def loss(self, batch):
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    update = MLP.update


def test_ratio_on_resnet18(report):
    updates, warm_up = 14, 2
    t = 1.0
    ours = train_by_repeater(ResNet18(), Linear(t=t), updates)
    hand = train_by_hand(ResNet18(), lambda loss: max(1, min(5, int(loss / t))), updates)

    def measure():
        for training in (ours, hand):
            list(islice(training, warm_up))
        rounds = in_turns(lambda: next(ours), lambda: next(hand), rounds=updates - warm_up - 1)
        ratio = median(rounds[:, 0] / rounds[:, 1])
        assert finish(ours) == finish(hand)
        return {
            "ResNet-18, Linear: ratio to the hand-written loop": ratio,
            "ResNet-18, Linear: ms an update by hand": median(rounds[:, 1]) * 1e3,
        }

    report(measure)


# --- Frameworks, every batch twice ----------------------------------------------------------------


def echoed_by(framework, task, updates):
    """Return a function that makes `updates` updates and returns the losses and its seconds."""
    echoed = [batch for batch in task.batches for _ in range(2)]
    batches = [echoed[i % len(echoed)] for i in range(updates)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    return {"accelerate": with_accelerate, "lightning": with_lightning}[framework](task, loader)


def with_accelerate(task, loader):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    task.model, task.optimizer, loader = accelerator.prepare(task.model, task.optimizer, loader)

    def run():
        losses = []
        start = perf_counter()
        for batch in loader:
            loss = task.loss(batch)
            losses.append(loss.item())
            task.optimizer.zero_grad()
            accelerator.backward(loss)
            task.optimizer.step()
        return losses, perf_counter() - start

    return run


def with_lightning(task, loader):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = task.model, []

        def training_step(self, batch):
            loss = task.loss(batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return task.optimizer

        def on_train_start(self):
            self.seconds = -perf_counter()

        def on_train_end(self):
            self.seconds += perf_counter()

    def run():
        module = Module()
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
        return module.losses, module.seconds

    return run


def compare_framework(framework, rounds=15):
    """Return framework / hand-written, repeater / hand-written; each in this process."""
    torch.set_num_threads(1)
    hand, ours, theirs = MLP(), MLP(), MLP()
    run_theirs = echoed_by(framework, theirs, MLP_UPDATES)
    ratios = []
    for _ in range(rounds):
        start = perf_counter()
        losses, _ = finish(train_by_hand(hand, lambda loss: 2, MLP_UPDATES))
        by_hand = perf_counter() - start
        start = perf_counter()
        our_losses, _ = finish(train_by_repeater(ours, 2, MLP_UPDATES))
        by_repeater = perf_counter() - start
        their_losses, by_framework = run_theirs()
        if not losses == our_losses == their_losses:
            raise RuntimeError(f"{framework} trained something else")
        ratios.append((by_framework / by_hand, by_repeater / by_hand))
    return dict(zip((framework, "repeater"), np.median(ratios[1:], axis=0).tolist(), strict=True))


@pytest.mark.parametrize("framework", ["accelerate", "lightning"])
def test_frameworks_beside_it(report, framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")

    def measure():
        process = subprocess.run(
            [sys.executable, __file__, framework], capture_output=True, text=True, timeout=600
        )
        assert process.returncode == 0, process.stderr
        ratios = json.loads(process.stdout.splitlines()[-1])
        return {
            f"MLP, N = 2, {name} ratio ({framework}'s process)": r for name, r in ratios.items()
        }

    report(measure)


if __name__ == "__main__":
    print(json.dumps(compare_framework(sys.argv[1])))
