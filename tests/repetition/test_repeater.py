"""BatchRepeater: exact updates, order, recording, resume and errors."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import (
    Constant,
    ControlLimit,
    Linear,
    LinearRepeats,
    Threshold,
    Trace,
    Uniform,
    Until,
    ZScore,
)
from repeatlab.repetition.repeater import BatchRepeater, NonFiniteLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def reference_visits(batches, rule, total):
    """The plainest loop: rows (batch, fresh batch, repeat, N), `total` of them."""
    rows, fresh_batch = [], 0
    while True:
        for batch in batches:
            count = min(rule(fresh_batch), total - len(rows))
            rows += [(batch, fresh_batch, repeat, count) for repeat in range(count)]
            fresh_batch += 1
            if len(rows) == total:
                return rows


def as_rows(columns):
    names = ("update", "fresh_batch", "repeat", "repeats", "loss")
    assert tuple(columns) == names
    assert [columns[name].dtype for name in names] == [np.int64] * 4 + [np.float64]
    return list(zip(*(columns[name].tolist() for name in names), strict=True))


def visited(repeater, loss=lambda batch: 1.0):
    """Run the loop to its end and return the batches it was given."""
    batches = []
    for batch in repeater:
        batches.append(batch)
        repeater.report(loss(batch))
    return batches


# --- Exactly T updates, in the reference's order --------------------------------------------------


def test_the_last_repeat_is_cut():
    repeater = BatchRepeater(["a", "b", "c", "d"], repeats=3, max_updates=7)
    assert visited(repeater) == ["a", "a", "a", "b", "b", "b", "c"]
    columns = repeater.drain()
    assert columns["update"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert columns["fresh_batch"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert columns["repeat"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert columns["repeats"].tolist() == [3, 3, 3, 3, 3, 3, 1]
    assert columns["loss"].tolist() == [1.0] * 7
    assert (repeater.updates, repeater.fresh_batch) == (7, 2)


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 6),
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    total=st.integers(1, 40),
    as_mapping=st.sampled_from(["trace", "function", "loss"]),
)
@example(length=3, counts=[3], total=7, as_mapping="loss")
def test_visits_are_those_of_a_plain_loop(length, counts, total, as_mapping):
    def rule(fresh_batch):
        return counts[fresh_batch % len(counts)]

    mapping = {
        "trace": Trace(counts=tuple(rule(i) for i in range(total))),
        "function": lambda loss, stats: rule(stats.index),
        "loss": Linear(t=0.1, max_repeats=7),
    }[as_mapping]
    batches = [f"batch {i}" for i in range(length)]
    repeater = BatchRepeater(batches, repeats=mapping, max_updates=total)
    seen, losses = [], []
    for update, batch in enumerate(repeater):
        # The first loss on a fresh batch asks for the rule's count; those of repeats differ.
        first = repeater.repeat == 0
        losses.append(0.1 * rule(repeater.fresh_batch) if first else 100.0 + update)
        repeater.report(torch.tensor(losses[-1], dtype=torch.float64))
        seen.append((batch, repeater.fresh_batch, repeater.repeat, repeater.repeats))
        assert repeater.updates == update + 1
    expected = reference_visits(batches, rule, total)
    assert seen == expected
    assert as_rows(repeater.drain()) == [
        (update, *row[1:], losses[update]) for update, row in enumerate(expected)
    ]
    assert len(repeater) == total


def test_the_mapping_sees_only_the_losses_before():
    seen = []

    def mapping(loss, stats):
        seen.append((loss, stats.index, stats.count, sorted(stats.recent)))
        return 2

    repeater = BatchRepeater([0.5, 1.5, 2.5], repeats=mapping, max_updates=6)
    assert visited(repeater, loss=lambda batch: batch) == [0.5, 0.5, 1.5, 1.5, 2.5, 2.5]
    assert seen == [(0.5, 0, 0, []), (1.5, 1, 1, [0.5]), (2.5, 2, 2, [0.5, 1.5])]


def test_stats_hold_the_window_of_the_mapping():
    windows = {
        BatchRepeater([1], repeats=mapping, max_updates=1).stats.window
        for mapping in (ControlLimit(window=17), ZScore(window=17))
    }
    assert windows == {17}


def test_a_numpy_integer_is_a_count():
    repeater = BatchRepeater("ab", repeats=lambda loss, stats: np.int64(2), max_updates=4)
    assert visited(repeater) == ["a", "a", "b", "b"]
    assert type(repeater.repeats) is int


@pytest.mark.parametrize(
    "loss",
    [2.0, 2, np.float32(2), np.float64(2), np.array(2.0), torch.tensor(2.0), torch.tensor(2)],
    ids=repr,
)
def test_a_loss_may_be_a_number_or_a_0d_tensor(loss):
    repeater = BatchRepeater("ab", repeats=Linear(t=1.0), max_updates=4)
    assert visited(repeater, loss=lambda batch: loss) == ["a", "a", "b", "b"]
    assert repeater.drain()["loss"].tolist() == [2.0] * 4
    torch.load(saved(repeater.state_dict()), weights_only=True)


def test_a_later_change_of_the_loss_does_not_change_the_record():
    repeater = BatchRepeater("a", repeats=2, max_updates=4)
    for _ in repeater:
        loss = torch.tensor(3.0)
        repeater.report(loss)
        loss.zero_()
    assert repeater.drain()["loss"].tolist() == [3.0] * 4


# --- The loader -----------------------------------------------------------------------------------


class CountingLoader:
    """Yields 0..length-1 and counts how often a pass begins."""

    def __init__(self, length):
        self.length, self.passes = length, 0

    def __iter__(self):
        self.passes += 1
        return iter(range(self.length))


def test_the_loader_is_iterated_again():
    loader = CountingLoader(3)
    assert visited(BatchRepeater(loader, max_updates=8)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert loader.passes == 3


def test_no_pass_begins_before_it_is_needed():
    loader = CountingLoader(3)
    repeater = BatchRepeater(loader, max_updates=6)
    assert loader.passes == 0
    assert visited(repeater) == [0, 1, 2, 0, 1, 2]
    assert loader.passes == 2


class EpochSampler(Sampler):
    """Shuffles by the epoch it is told, as torch's DistributedSampler does."""

    def __init__(self, length):
        self.length, self.epoch, self.epochs = length, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())

    def __len__(self):
        return self.length


class EpochBatchSampler(EpochSampler):
    def __iter__(self):
        order = list(super().__iter__())
        return iter([order[i : i + 2] for i in range(0, len(order), 2)])

    def __len__(self):
        return -(-self.length // 2)


DATA = TensorDataset(torch.arange(8.0))


@pytest.mark.parametrize("place", ["sampler", "batch_sampler", "sampler of batch_sampler"])
def test_set_epoch_is_called_once_before_every_pass(place):
    if place == "sampler":
        sampler = EpochSampler(8)
        loader = DataLoader(DATA, batch_size=2, sampler=sampler)
    elif place == "batch_sampler":
        sampler = EpochBatchSampler(8)
        loader = DataLoader(DATA, batch_sampler=sampler)
    else:
        sampler = EpochSampler(8)
        loader = DataLoader(DATA, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    batches = visited(BatchRepeater(loader, repeats=3, max_updates=30))  # 4 batches a pass
    assert sampler.epochs == [0, 1, 2]
    indices = [int(value) for batch in batches[::3] for value in batch[0]]
    expected = [i for epoch in range(3) for i in permutation(epoch)][: len(indices)]
    assert indices == expected


def permutation(epoch):
    return torch.randperm(8, generator=torch.Generator().manual_seed(epoch)).tolist()


def test_torchs_distributed_sampler_shuffles_anew_every_pass():
    sampler = DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=True, seed=5)
    loader = DataLoader(DATA, batch_size=2, sampler=sampler)
    batches = visited(BatchRepeater(loader, repeats=2, max_updates=12))
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += [batch[0].tolist() for batch in loader]
    assert [batch[0].tolist() for batch in batches[::2]] == expected
    assert expected[:2] != expected[2:4]


def test_refresh_gives_a_new_view_to_repeats_only():
    calls = []

    def refresh(batch):
        calls.append(batch)
        return f"{batch}'"

    repeater = BatchRepeater("abc", repeats=Trace((1, 3, 2)), max_updates=6, refresh=refresh)
    assert visited(repeater) == ["a", "b", "b'", "b'", "c", "c'"]
    assert calls == ["b", "b", "c"]  # always the view that came from the loader


# --- Training: the same weights as loops written by hand ------------------------------------------


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_batches(count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 6, generator=generator) * (1 + i % 3),
            torch.randint(3, (8,), generator=generator),
        )
        for i in range(count)
    ]


def train_step(model, optimizer, batch, report=lambda loss: None):
    inputs, targets = batch
    loss = functional.cross_entropy(model(inputs), targets)
    report(loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train_repeating(repeats, updates, **options):
    model, optimizer = make_model()
    repeater = BatchRepeater(make_batches(), repeats=repeats, max_updates=updates, **options)
    for batch in repeater:
        train_step(model, optimizer, batch, repeater.report)
    return model, repeater


def assert_same_weights(first, second):
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


@pytest.mark.parametrize("repeats", [1, Constant(1), Threshold(t=1e9), Uniform(low=1, high=1)])
def test_one_update_per_batch_is_the_plain_loop(repeats):
    model, optimizer = make_model()
    losses = []
    for update in range(12):
        losses.append(train_step(model, optimizer, make_batches()[update % 5]))
    repeated, repeater = train_repeating(repeats, 12)
    assert_same_weights(repeated, model)
    assert repeater.drain()["loss"].tolist() == losses


@pytest.mark.parametrize("count", [2, 3, 5])
def test_fixed_count_is_a_loader_that_yields_each_batch_as_often(count):
    model, optimizer = make_model()
    echoed = [batch for batch in make_batches() * 3 for _ in range(count)][:13]
    losses = [train_step(model, optimizer, batch) for batch in echoed]
    repeated, repeater = train_repeating(count, 13)
    assert_same_weights(repeated, model)
    assert repeater.drain()["loss"].tolist() == losses


def test_linear_is_a_hand_written_loop():
    model, optimizer = make_model()
    losses, counts = [], []
    for batch in make_batches() * 20:
        first = train_step(model, optimizer, batch)
        losses.append(first)
        counts.append(min(max(1, min(4, math.floor(first / 0.5))), 40 - len(losses) + 1))
        losses += [train_step(model, optimizer, batch) for _ in range(counts[-1] - 1)]
        if len(losses) == 40:
            break
    repeated, repeater = train_repeating(Linear(t=0.5, max_repeats=4), 40)
    assert_same_weights(repeated, model)
    columns = repeater.drain()
    assert columns["loss"].tolist() == losses
    assert columns["repeats"][columns["repeat"] == 0].tolist() == counts
    assert len(set(counts)) > 1


@pytest.mark.parametrize("repeats", [1, 3, Linear(t=0.4), ZScore(window=3, step=0.2), Uniform()])
@pytest.mark.parametrize("updates", [1, 7, 23])
def test_steps_and_forwards_are_exactly_as_many_as_updates(repeats, updates):
    model, optimizer = make_model()
    calls = {"step": 0, "forward": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    optimizer.register_step_post_hook(count("step"))
    model.register_forward_hook(count("forward"))
    repeater = BatchRepeater(make_batches(), repeats=repeats, max_updates=updates)
    for batch in repeater:
        train_step(model, optimizer, batch, repeater.report)
    assert calls == {"step": updates, "forward": updates}
    assert len(repeater.drain()["update"]) == updates


def test_a_schedule_by_update_ends_at_the_same_rate_whatever_is_repeated():
    ends = {}
    for repeats in (1, 3, Linear(t=0.4), Uniform()):
        model, optimizer = make_model()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: (1 - u / 20) ** 2)
        repeater = BatchRepeater(make_batches(), repeats=repeats, max_updates=15)
        rates = []
        for batch in repeater:
            rates.append(optimizer.param_groups[0]["lr"])
            train_step(model, optimizer, batch, repeater.report)
            scheduler.step()
        ends[repeats] = [*rates, optimizer.param_groups[0]["lr"]]
    expected = [0.1 * (1 - u / 20) ** 2 for u in range(16)]
    assert all(rates == pytest.approx(expected) for rates in ends.values())


def test_bf16_autocast_with_a_grad_scaler_counts_skipped_steps():
    model, optimizer = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    repeater = BatchRepeater(make_batches(), repeats=Linear(t=0.5), max_updates=12)
    for batch in repeater:
        inputs, targets = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = functional.cross_entropy(model(inputs), targets)
        repeater.report(loss)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if repeater.updates in (3, 4):  # overflowing gradients: the scaler skips the step
            next(model.parameters()).grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**2
    assert len(steps) == 10
    rows = as_rows(repeater.drain())
    assert [row[0] for row in rows] == list(range(12))
    assert all(math.isfinite(row[-1]) for row in rows)


def test_gradient_accumulation_repeats_the_macro_batch():
    macro_batches = [make_batches(4, seed=s) for s in range(3)]

    def accumulate(model, optimizer, macro_batch):
        optimizer.zero_grad()
        total = 0.0
        for inputs, targets in macro_batch:
            loss = functional.cross_entropy(model(inputs), targets) / len(macro_batch)
            loss.backward()
            total = total + loss.detach()
        return total

    model, optimizer = make_model()
    for macro_batch in [macro_batches[i] for i in (0, 0, 1, 1, 2)]:
        accumulate(model, optimizer, macro_batch)
        optimizer.step()
    repeated, optimizer = make_model()
    repeater = BatchRepeater(macro_batches, repeats=2, max_updates=5)
    for macro_batch in repeater:
        repeater.report(accumulate(repeated, optimizer, macro_batch))
        optimizer.step()
    assert_same_weights(repeated, model)
    assert repeater.drain()["fresh_batch"].tolist() == [0, 0, 1, 1, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_is_not_compiled_again_as_the_count_varies():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, optimizer = make_model()

    @torch.compile(backend="aot_eager")
    def compiled_loss(inputs, targets):
        return functional.cross_entropy(model(inputs), targets)

    counts = Trace(counts=(1, 4, 2, 5, 3, 1, 2))
    repeater = BatchRepeater(make_batches(), repeats=counts, max_updates=18)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for inputs, targets in repeater:
            loss = compiled_loss(inputs, targets)
            repeater.report(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(repeater.drain()["loss"]) == 18


def test_on_the_cpu_the_host_waits_for_no_device():
    assert train_repeating(Linear(t=0.4), 9)[1].host_reads == 0


# --- Asking again after every visit ---------------------------------------------------------------


def visits_until(losses, t, most, total):
    """The plainest loop: rows (fresh batch, repeat, N, loss), `total` of them."""
    rows, fresh_batch = [], 0
    while len(rows) < total:
        seen = []
        while True:
            seen.append(losses[len(rows) + len(seen)])
            done = len(rows) + len(seen) == total
            if seen[-1] <= t or len(seen) == most or done:
                break
        rows += [(fresh_batch, repeat, len(seen), loss) for repeat, loss in enumerate(seen)]
        fresh_batch += 1
    return rows


@settings(max_examples=150, deadline=None)
@given(
    losses=st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0]), min_size=30, max_size=30),
    most=st.integers(1, 5),
    total=st.integers(1, 30),
    drains=st.sets(st.tuples(st.integers(0, 29), st.sampled_from(["before report", "after"]))),
)
@example([2.0] * 30, 3, 7, {(1, "after"), (2, "before report")})
@example([2.0, 0.5] * 15, 5, 30, {(update, "after") for update in range(30)})
def test_until_is_a_loop_that_looks_again_after_every_update(losses, most, total, drains):
    repeater = BatchRepeater("abc", repeats=Until(t=1.0, max_repeats=most), max_updates=total)
    batches, rows = [], []
    for update, batch in enumerate(repeater):
        batches.append(batch)
        if (update, "before report") in drains:
            rows += as_rows(repeater.drain())
        repeater.report(torch.tensor(losses[update]))
        if (update, "after") in drains:
            rows += as_rows(repeater.drain())
            # What is kept back is a batch that is not finished, as a whole.
            assert repeater.held == repeater.updates - len(rows)
            assert repeater.held in (0, repeater.repeat + 1)
    rows += as_rows(repeater.drain())
    assert repeater.held == 0
    expected = visits_until(losses, 1.0, most, total)
    assert rows == [(update, *row) for update, row in enumerate(expected)]
    assert batches == ["abc"[row[0] % 3] for row in expected]
    assert as_rows(repeater.drain()) == []


def test_until_trains_as_a_plain_loop_does():
    trained, repeater = train_repeating(Until(t=0.6, max_repeats=4), 25)
    model, optimizer = make_model()
    batches, index, update, counts = make_batches(), 0, 0, []
    while update < 25:
        counts.append(0)
        loss = math.inf
        while loss > 0.6 and counts[-1] < 4 and update < 25:
            reported = []
            train_step(model, optimizer, batches[index % len(batches)], reported.append)
            loss, counts[-1], update = reported[0].item(), counts[-1] + 1, update + 1
        index += 1
    assert_same_weights(trained, model)
    columns = repeater.drain()
    assert columns["repeats"][columns["repeat"] == 0].tolist() == counts
    assert len(set(counts)) > 1


def test_only_the_first_loss_of_a_batch_goes_into_the_statistics():
    seen = []

    class Watching(Until):
        window = 10

        def repeats_for(self, loss, stats):
            seen.append((stats.index, sorted(stats.recent.tolist())))
            return super().repeats_for(loss, stats)

    losses = iter([2.0, 3.0, 0.5, 4.0, 0.25, 5.0])
    repeater = BatchRepeater("ab", repeats=Watching(t=1.0), max_updates=6)
    assert visited(repeater, loss=lambda batch: next(losses)) == list("aaabba")
    # The last loss asks for nothing: there is no update left to make.
    firsts = [[], [2.0], [2.0], [2.0], [2.0, 4.0], [2.0, 4.0]]
    assert [index for index, _ in seen] == [0, 0, 0, 1, 1, 2]
    assert [recent for _, recent in seen] == firsts


def test_a_visit_that_is_asked_for_again_gets_a_fresh_view():
    views = []
    repeater = BatchRepeater(
        ["a", "b"],
        repeats=Until(t=1.0, max_repeats=3),
        max_updates=5,
        refresh=lambda batch: (batch, len(views)),
    )
    for batch in repeater:
        views.append(batch)
        repeater.report(2.0)
    assert views == ["a", ("a", 1), ("a", 2), "b", ("b", 4)]


@pytest.mark.parametrize("wrap", [float, torch.tensor])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_later_loss_that_is_not_finite_ends_the_asking(wrap, bad):
    losses = iter([2.0, 2.0, bad])
    repeater = BatchRepeater("ab", repeats=Until(t=1.0), max_updates=9)
    with pytest.raises(NonFiniteLoss, match="at update 2 "):
        visited(repeater, loss=lambda batch: wrap(next(losses)))
    rows = as_rows(repeater.drain())
    assert [row[:4] for row in rows] == [(0, 0, 0, 3), (1, 0, 1, 3), (2, 0, 2, 3)]
    assert not math.isfinite(rows[-1][4])


# --- Stopping early -------------------------------------------------------------------------------

STOPPED = {
    "fixed": Constant(3),
    "by loss": lambda loss, stats: int(loss),
    "until": Until(t=1.5, max_repeats=4),
}


@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize("moment", ["before report", "after report"])
@pytest.mark.parametrize("last", range(12))
def test_a_stop_makes_the_visit_under_way_the_last_one(name, moment, last):
    losses = [3.0, 2.0, 1.0, 2.0, 4.0, 4.0, 4.0, 1.0, 1.0, 3.0, 3.0, 3.0]

    def run(stop):
        repeater = BatchRepeater("abcd", repeats=STOPPED[name], max_updates=12)
        seen = []
        for update, batch in enumerate(repeater):
            seen.append(batch)
            if stop and (update, moment) == (last, "before report"):
                repeater.stop()
            repeater.report(losses[update])
            if stop and (update, moment) == (last, "after report"):
                repeater.stop()
        return seen, as_rows(repeater.drain()), repeater

    whole, all_rows, _ = run(stop=False)
    seen, rows, repeater = run(stop=True)
    assert seen == whole[: last + 1]
    assert len(repeater) == repeater.max_updates == repeater.updates == last + 1
    # As planned, but for the last batch: its N is what it got.
    final = all_rows[last][1]
    made = [row for row in all_rows[: last + 1] if row[1] == final]
    expected = [(*row[:3], len(made) if row[1] == final else row[3], row[4]) for row in all_rows]
    assert rows == expected[: last + 1]
    assert repeater.repeats == repeater.repeat + 1 == len(made)


def test_a_stop_after_draining_until_s_batch_tells_its_n():
    repeater = BatchRepeater("ab", repeats=Until(t=1.0, max_repeats=5), max_updates=9)
    rows = []
    for _ in repeater:
        repeater.report(2.0)
        rows += as_rows(repeater.drain())
        assert rows == []
        if repeater.updates == 3:
            repeater.stop()
    assert as_rows(repeater.drain()) == [(u, 0, u, 3, 2.0) for u in range(3)]


# --- Recording ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=25, max_size=25),
    needs_loss=st.booleans(),
    drains=st.sets(st.tuples(st.integers(0, 24), st.sampled_from(["before report", "after"]))),
    total=st.integers(1, 25),
)
@example([2] * 25, False, {(2, "before report")}, 5)
@example([3] * 25, True, {(0, "before report"), (1, "after"), (1, "before report")}, 5)
def test_draining_at_any_moment_gives_the_same_rows(counts, needs_loss, drains, total):
    def run(drains):
        mapping = Trace(tuple(counts)) if not needs_loss else lambda _, stats: counts[stats.index]
        repeater = BatchRepeater(range(3), repeats=mapping, max_updates=total)
        rows = as_rows(repeater.drain())
        assert rows == []
        for update, _ in enumerate(repeater):
            if (update, "before report") in drains:
                rows += as_rows(repeater.drain())
            repeater.report(0.5 * update)
            if (update, "after") in drains:
                rows += as_rows(repeater.drain())
                assert rows[-1][0] == update
        rows += as_rows(repeater.drain())
        assert as_rows(repeater.drain()) == []
        return rows

    visits = reference_visits(range(3), counts.__getitem__, total)
    expected = [(update, *row[1:], 0.5 * update) for update, row in enumerate(visits)]
    assert run(drains) == expected
    assert run({(update, "after") for update in range(25)}) == expected


# --- Resume ---------------------------------------------------------------------------------------


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def through_file(state):
    return torch.load(saved(state), weights_only=True)


class IterFromLoader:
    """Five batches, which can begin anywhere; replaying from the start would be noticed."""

    def __init__(self):
        self.starts = []

    def __iter__(self):
        raise AssertionError("iter_from must be preferred")

    def iter_from(self, position):
        self.starts.append(position)
        return iter([torch.tensor(float(i)) for i in range(position, 5)])


def sampler_loader(sampler):
    return DataLoader(DATA, batch_size=2, sampler=sampler)


LOADERS = {
    "list": lambda: [torch.tensor(float(i)) for i in range(4)],
    "iter_from": IterFromLoader,
    "in order": lambda: DataLoader(DATA, batch_size=3),
    "shuffle": lambda: DataLoader(DATA, batch_size=2, shuffle=True),
    "shuffle with generator": lambda: DataLoader(
        DATA, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "sampler with generator": lambda: sampler_loader(
        RandomSampler(DATA, replacement=True, generator=torch.Generator().manual_seed(4))
    ),
    "weighted": lambda: sampler_loader(WeightedRandomSampler([1.0, 2.0] * 4, 8)),
    "set_epoch": lambda: sampler_loader(EpochSampler(8)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=EpochBatchSampler(8)),
    "distributed": lambda: sampler_loader(DistributedSampler(DATA, num_replicas=2, rank=0)),
}
RESUMED_MAPPINGS = {
    "fixed": 3,
    "uniform": Uniform(low=1, high=3),
    "zscore": ZScore(step=0.4, max_repeats=4, window=3),
    "until": Until(t=0.45, max_repeats=4),
    "ramp": LinearRepeats(high=3),
}
TOTAL = 21


class Stop(Exception):
    """Raised in the loop's body, as a killed run would stop there."""


def run_from(checkpoint, make_loader, mapping, stop=None):
    """Run from `checkpoint` to the end, or to `stop`: an update and a moment in the loop's body.

    Returns the visits (batch, loss) completed, the drained rows, and the checkpoint at `stop`. The
    loss depends on batch and update, and draws from the global generator as dropout does.
    """
    repeater = BatchRepeater(make_loader(), repeats=mapping, max_updates=TOTAL)
    torch.manual_seed(11)
    if checkpoint is not None:
        repeater.load_state_dict(checkpoint["repeater"])
        torch.set_rng_state(checkpoint["rng"])
    visits = []

    def take_checkpoint(moment):
        if (repeater.updates, moment) == stop:
            state = {"repeater": repeater.state_dict(), "rng": torch.get_rng_state()}
            raise Stop(through_file(state))

    try:
        take_checkpoint("before the loop")
        for batch in repeater:
            take_checkpoint("before report")
            values = torch.stack(list(batch) if isinstance(batch, list) else [batch]).flatten()
            noise = float(torch.rand(()))
            loss = float((values * 3.7 + repeater.updates * 1.3).sin().mean()) + noise
            repeater.report(loss)
            take_checkpoint("after report")
            visits.append((values.tolist(), loss))
            take_checkpoint("end of body")
    except Stop as stopped:
        if stop[1] == "after report":
            visits.append((values.tolist(), loss))
        return visits, as_rows(repeater.drain()), stopped.args[0]
    return visits, as_rows(repeater.drain()), None


@pytest.mark.parametrize("mapping", RESUMED_MAPPINGS.values(), ids=RESUMED_MAPPINGS)
@pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS)
def test_resumed_at_every_point_the_run_goes_on_the_same(make_loader, mapping):
    whole_visits, whole_rows, _ = run_from(None, make_loader, mapping)
    assert len(whole_visits) == TOTAL
    points = [(0, "before the loop"), *((u, "before report") for u in range(TOTAL))]
    points += [(u, m) for u in range(1, TOTAL + 1) for m in ("after report", "end of body")]
    for point in points:
        visits, rows, checkpoint = run_from(None, make_loader, mapping, stop=point)
        assert len(visits) == point[0]
        more_visits, more_rows, _ = run_from(checkpoint, make_loader, mapping)
        assert visits + more_visits == whole_visits, point
        assert rows + more_rows == whole_rows, point


def test_resumed_twice_without_a_step_between_it_is_still_the_same():
    make_loader, mapping = LOADERS["shuffle"], RESUMED_MAPPINGS["zscore"]
    whole_visits, _, _ = run_from(None, make_loader, mapping)
    for update in range(1, TOTAL):
        visits, _, checkpoint = run_from(None, make_loader, mapping, stop=(update, "end of body"))
        stop = (update, "before the loop")
        _, _, again = run_from(checkpoint, make_loader, mapping, stop=stop)
        assert visits + run_from(again, make_loader, mapping)[0] == whole_visits


def test_taking_a_state_changes_nothing():
    repeater = BatchRepeater(LOADERS["shuffle"](), repeats=ZScore(window=3), max_updates=TOTAL)
    torch.manual_seed(11)
    plain = visited(
        BatchRepeater(LOADERS["shuffle"](), repeats=ZScore(window=3), max_updates=TOTAL)
    )
    torch.manual_seed(11)
    seen = []
    for batch in repeater:
        repeater.state_dict()
        seen.append(batch)
        repeater.report(1.0)
        assert repeater.state_dict()["updates"] == len(seen)
    assert [b[0].tolist() for b in seen] == [b[0].tolist() for b in plain]


def test_a_loader_with_iter_from_is_not_replayed():
    loader = IterFromLoader()
    first = BatchRepeater(LOADERS["iter_from"](), repeats=2, max_updates=20)
    for _ in first:
        first.report(1.0)
        if first.updates == 7:
            break
    second = BatchRepeater(loader, repeats=2, max_updates=20)
    second.load_state_dict(first.state_dict())
    assert [float(b) for b in visited(second)][:4] == [3.0, 4.0, 4.0, 0.0]
    assert loader.starts == [3, 0]


@pytest.mark.parametrize("stop", [1, 4, 5, 10, 14])
def test_resumed_training_ends_at_the_same_weights(stop):
    whole, _ = train_repeating(Linear(t=0.5), 15)
    model, optimizer = make_model()
    repeater = BatchRepeater(make_batches(), repeats=Linear(t=0.5), max_updates=15)
    for batch in repeater:
        train_step(model, optimizer, batch, repeater.report)
        if repeater.updates == stop:
            break
    parts = {"model": model, "optimizer": optimizer, "repeater": repeater}
    state = through_file({k: v.state_dict() for k, v in parts.items()})
    rng = torch.get_rng_state()

    model, optimizer = make_model(seed=99)
    repeater = BatchRepeater(make_batches(), repeats=Linear(t=0.5), max_updates=15)
    parts = {"model": model, "optimizer": optimizer, "repeater": repeater}
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(rng)
    for batch in repeater:
        train_step(model, optimizer, batch, repeater.report)
    assert_same_weights(model, whole)


def test_a_repeat_after_a_resume_is_refreshed():
    first = BatchRepeater("ab", repeats=3, max_updates=6)
    for _ in first:
        first.report(1.0)
        break
    second = BatchRepeater("ab", repeats=3, max_updates=6, refresh=str.upper)
    second.load_state_dict(first.state_dict())
    assert visited(second) == ["A", "A", "b", "B", "B"]


def test_a_numpy_generator_on_a_sampler_is_left_alone():
    class NumpySampler(EpochSampler):
        generator = np.random.default_rng(0)

    repeater = BatchRepeater(sampler_loader(NumpySampler(8)), repeats=2, max_updates=4)
    assert len(visited(repeater)) == 4


def test_a_state_of_another_window_or_a_shorter_loader_is_refused():
    first = BatchRepeater(range(5), repeats=ZScore(window=3), max_updates=9)
    for _ in first:
        first.report(1.0)
        if first.updates == 4:
            break
    state = first.state_dict()
    with pytest.raises(ValueError, match="window of 3 losses, the mapping asks for 4"):
        BatchRepeater(range(5), repeats=ZScore(window=4), max_updates=9).load_state_dict(state)
    shorter = BatchRepeater(range(2), repeats=ZScore(window=3), max_updates=9)
    shorter.load_state_dict(state)
    with pytest.raises(ValueError, match="the loader ended before batch 4 of epoch 0"):
        visited(shorter)


def test_a_state_of_more_updates_than_max_updates_is_refused_and_changes_nothing():
    first = BatchRepeater(range(5), repeats=2, max_updates=9)
    for _ in first:
        first.report(1.0)
        if first.updates == 7:
            break
    state = first.state_dict()
    short = BatchRepeater(range(5), repeats=2, max_updates=6)
    with pytest.raises(ValueError, match="state holds 7 updates, max_updates is 6: resume with"):
        short.load_state_dict(state)
    assert (len(short), len(visited(short))) == (6, 6)
    for max_updates in (7, 8, 30):  # all made, and any number left
        longer = BatchRepeater(range(5), repeats=2, max_updates=max_updates)
        longer.load_state_dict(state)
        assert len(longer) == len(visited(longer)) == max_updates - 7


def test_break_and_enter_again():
    repeater = BatchRepeater("abcd", repeats=3, max_updates=8)
    seen = []
    for batch in repeater:  # left before the report: the same visit comes again
        assert batch == "a"
        break
    while len(seen) < 8:
        for batch in repeater:
            seen.append(batch)
            repeater.report(1.0)
            if len(seen) % 2:
                break
    assert seen == list("aaabbbcc")
    assert len(repeater.drain()["update"]) == 8


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, True, 5.0, 2.5, "7", None, math.nan])
def test_bad_max_updates(value):
    with pytest.raises(ValueError, match="max_updates must be an integer of at least 1") as error:
        BatchRepeater([1], max_updates=value)
    assert str(error.value).endswith(f"not {value!r}")


@pytest.mark.parametrize("value", [0, -2, True, False])
def test_bad_fixed_counts(value):
    with pytest.raises(ValueError, match=f"repeats must be an integer of at least 1, not {value}"):
        BatchRepeater([1], repeats=value, max_updates=1)


@pytest.mark.parametrize("value", [1.5, "linear", None])
def test_repeats_that_is_neither_a_count_nor_a_mapping(value):
    with pytest.raises(ValueError, match=f"repeats must be an integer or a mapping, not {value!r}"):
        BatchRepeater([1], repeats=value, max_updates=1)


@pytest.mark.parametrize("value", [0, -1, 1.5, np.float64(2.5)])
def test_a_mapping_that_returns_no_count_is_named(value):
    def my_mapping(loss, stats):
        return value if stats.index == 1 else 2

    repeater = BatchRepeater("abc", repeats=my_mapping, max_updates=9)
    with pytest.raises(ValueError, match=r"my_mapping.* asked for .* on fresh batch 1: a mapping"):
        visited(repeater)
    assert as_rows(repeater.drain()) == [(0, 0, 0, 2, 1.0), (1, 0, 1, 2, 1.0), (2, 1, 0, 0, 1.0)]


def test_a_trace_that_ends_too_early():
    repeater = BatchRepeater("abc", repeats=Trace((2, 1)), max_updates=9)
    with pytest.raises(ValueError, match="holds 2 counts, but fresh batch 2 was asked for"):
        visited(repeater)
    assert len(repeater.drain()["update"]) == 3


def test_a_missing_report():
    repeater = BatchRepeater("abc", repeats=2, max_updates=9)

    def forgetful_loop():
        for _ in repeater:
            if repeater.updates < 3:
                repeater.report(1.0)

    with pytest.raises(RuntimeError, match=r"no loss was reported for update 3 \(fresh batch 1\)"):
        forgetful_loop()


@pytest.mark.parametrize("repeats", [1, Linear(t=1.0)])
def test_a_second_report(repeats):
    repeater = BatchRepeater("abc", repeats=repeats, max_updates=3)
    for _ in repeater:
        repeater.report(1.0)
        with pytest.raises(RuntimeError, match=r"last: update \d, fresh batch \d.*once for each"):
            repeater.report(1.0)
    assert len(repeater.drain()["update"]) == 3


def test_a_report_outside_the_loop():
    repeater = BatchRepeater("abc", max_updates=2)
    with pytest.raises(RuntimeError, match=r"report\(\) has no batch to report on"):
        repeater.report(1.0)
    visited(repeater)
    with pytest.raises(RuntimeError, match=r"last: update 1, fresh batch 1"):
        repeater.report(1.0)


@pytest.mark.parametrize("shape", [(1,), (64,), (2, 3)])
def test_a_loss_that_is_not_a_scalar(shape):
    repeater = BatchRepeater("abc", repeats=1, max_updates=3)
    with pytest.raises(ValueError, match="fresh batch 1 must be a scalar") as error:
        visited(repeater, loss=lambda batch: 1.0 if batch == "a" else torch.ones(shape))
    assert f"shape {shape}" in str(error.value)


@pytest.mark.parametrize("loss", [None, "high", [1.0, 2.0], np.ones(3), {"loss": 1.0}], ids=repr)
@pytest.mark.parametrize("repeats", [2, Linear(t=1.0)])
def test_a_loss_that_is_no_number(loss, repeats):
    repeater = BatchRepeater("abc", repeats=repeats, max_updates=3)
    with pytest.raises(ValueError, match="the loss of fresh batch 0 must be a scalar, not"):
        visited(repeater, loss=lambda batch: loss)
    assert repeater.updates == 0


def test_a_refused_loss_can_be_reported_again():
    repeater = BatchRepeater("ab", repeats=Linear(t=1.0), max_updates=2)
    for _ in repeater:
        with pytest.raises(ValueError, match="must be a scalar"):
            repeater.report(torch.ones(3))
        repeater.report(torch.ones(3).mean())
    assert repeater.drain()["loss"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("loader", [[], DataLoader(DATA, batch_size=9, drop_last=True)])
def test_an_empty_loader(loader):
    with pytest.raises(ValueError, match=r"no batch in epoch 0: .*at least one"):
        visited(BatchRepeater(loader, max_updates=3))


BAD_LOSSES = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD_LOSSES)
@pytest.mark.parametrize("wrap", [float, torch.tensor])
@pytest.mark.parametrize("repeats", [3, Linear(t=1.0), ControlLimit(window=2)])
@pytest.mark.parametrize("update", [0, 4, 6])
def test_a_loss_that_is_not_finite_is_named_before_its_update(bad, wrap, repeats, update):
    repeater = BatchRepeater("abcd", repeats=repeats, max_updates=12)
    steps, fresh_batches = 0, []

    def loop():
        nonlocal steps
        for _ in repeater:
            fresh_batches.append(repeater.fresh_batch)
            repeater.report(wrap(bad if repeater.updates == update else 3.0))
            steps += 1

    with pytest.raises(NonFiniteLoss) as error:
        loop()
    assert steps == update
    assert (error.value.update, error.value.fresh_batch) == (update, fresh_batches[-1])
    assert error.value.loss == pytest.approx(bad, nan_ok=True)
    expected = f"the loss is {bad} at update {update} (fresh batch {fresh_batches[-1]})"
    assert str(error.value) == expected
    rows = repeater.drain()
    assert rows["update"].tolist() == list(range(update + 1))
    assert rows["fresh_batch"].tolist() == fresh_batches
    assert rows["loss"].tolist() == pytest.approx([3.0] * update + [bad], nan_ok=True)
    decided_by_it = rows["repeat"][-1] == 0 and repeats != 3
    assert (rows["repeats"][-1] == 0) == decided_by_it
    assert (rows["repeats"][:-1] >= 1).all()


def test_non_finite_loss_reads_well_and_can_be_pickled():
    error = pickle.loads(pickle.dumps(NonFiniteLoss(math.inf, 7, 3)))
    assert str(error) == "the loss is inf at update 7 (fresh batch 3)"
    assert (error.loss, error.update, error.fresh_batch) == (math.inf, 7, 3)
    assert isinstance(error, ArithmeticError)
    assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("drained", [True, False])
def test_a_loop_that_skips_a_bad_batch_goes_on(drained):
    repeater = BatchRepeater("abcd", repeats=Linear(t=1.0), max_updates=6)
    losses = {"a": 2.0, "b": math.nan, "c": 3.0, "d": 1.0}
    rows, seen = [], []
    for batch in repeater:
        seen.append(batch)
        if batch != "b":
            repeater.report(losses[batch])
            continue
        with pytest.raises(NonFiniteLoss, match=r"at update 2 \(fresh batch 1\)"):
            repeater.report(losses[batch])
        rows += as_rows(repeater.drain()) if drained else []
    rows += as_rows(repeater.drain())
    assert seen == list("aabccc")
    assert [row[1:4] for row in rows] == [
        (0, 0, 2), (0, 1, 2), (1, 0, 0), (2, 0, 3), (2, 1, 3), (2, 2, 3)
    ]  # fmt: skip
    assert repeater.stats.count == 2  # the bad loss is no part of the statistics


def test_the_loss_stats_of_a_mapping_without_window_keep_nothing():
    repeater = BatchRepeater("ab", repeats=Linear(t=1.0), max_updates=4)
    visited(repeater)
    assert isinstance(repeater.stats, LossStats)
    assert repeater.stats.recent.size == 0
