"""The repeater in loops and with loaders as people write them: what is asked, said and refused."""

import copy
import itertools
import multiprocessing
import pickle
from collections import UserDict, namedtuple
from math import ceil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from repeatlab.repetition.grouped import grouped
from repeatlab.repetition.mappings import (
    Constant,
    ControlLimit,
    CosineRepeats,
    Linear,
    Quantile,
    Threshold,
    Trace,
    Uniform,
    Until,
    ZScore,
)
from repeatlab.repetition.repeater import BatchRepeater

DATA = TensorDataset(torch.arange(8.0))


def go(repeater, limit=None):
    """Return the batches of the loop, or of its first `limit` updates."""
    seen = []
    for batch in itertools.islice(repeater, limit):
        seen.append(batch)
        repeater.report(1.0)
    return seen


def numbers(batches):
    return [batch[0].tolist() for batch in batches]


# --- Epochs ---------------------------------------------------------------------------------------


def test_a_repeater_made_anew_for_every_epoch_keeps_the_sampler_s_own():
    sampler = DistributedSampler(range(38), num_replicas=2, rank=0, seed=1)
    loader = DataLoader(range(38), batch_size=5, sampler=sampler)
    seen, expected = [], []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        repeater = BatchRepeater(loader, max_updates=len(loader))
        seen.append([batch.tolist() for batch in go(repeater)])
        assert repeater.epoch == epoch
        sampler.set_epoch(epoch)
        expected.append([batch.tolist() for batch in loader])
    assert seen == expected
    assert len({str(order) for order in seen}) == 5


def test_an_epoch_that_is_set_between_making_and_iterating_counts():
    sampler = DistributedSampler(DATA, num_replicas=1, rank=0)
    loader = DataLoader(DATA, batch_size=4, sampler=sampler)
    repeater = BatchRepeater(loader, max_updates=4)
    sampler.set_epoch(5)
    seen = numbers(go(repeater))
    expected = []
    for epoch in (5, 6):
        sampler.set_epoch(epoch)
        expected += numbers(loader)
    assert seen == expected
    assert repeater.epoch == 6


def test_a_finished_repeater_is_not_iterated_again():
    repeater = BatchRepeater("abc", max_updates=3)
    assert go(repeater) == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match=r"all max_updates=3 updates are made.*epochs\(n\)"):
        iter(repeater)
    # Also where the loop was left right after the last update.
    left = BatchRepeater("abc", max_updates=3)
    go(left, 3)
    with pytest.raises(RuntimeError, match="max_updates=3"):
        iter(left)


def test_one_that_was_saved_at_its_end_has_nothing_left_to_do():
    finished = BatchRepeater("abc", max_updates=3)
    go(finished)
    resumed = BatchRepeater("abc", max_updates=3)
    resumed.load_state_dict(finished.state_dict())
    assert len(resumed) == 0
    assert go(resumed) == []


@pytest.mark.parametrize(("updates", "n"), [(12, 3), (10, 4), (3, 5)])
@pytest.mark.parametrize("stop", range(12))
def test_epochs_divide_the_updates_and_a_resume_goes_on_in_the_middle(updates, n, stop):
    def run(repeater, until=99):
        parts = []
        for epoch, batches in repeater.epochs(n):
            left = len(batches)
            made = 0
            for batch in batches:
                parts.append((epoch, batch, repeater.epoch))
                repeater.report(1.0)
                made += 1
                if repeater.updates == until:
                    return parts
            assert made == left
        return parts

    def make():
        return BatchRepeater("abc", repeats=Trace((1, 2, 3) * 4), max_updates=updates)

    whole = run(make())
    assert len(whole) == updates
    bounds = [updates * part // n for part in range(n + 1)]
    assert [part for part, *_ in whole] == [
        part for part in range(n) for _ in range(bounds[part], bounds[part + 1])
    ]
    assert [batch for _, batch, _ in whole] == go(make())
    if stop and stop < updates:
        first = make()
        seen = run(first, until=stop)
        second = make()
        second.load_state_dict(first.state_dict())
        assert seen + run(second) == whole


def test_an_epoch_left_early_is_made_up_for_by_the_next():
    repeater = BatchRepeater("ab", max_updates=6)
    made = []
    for epoch, batches in repeater.epochs(3):
        for _ in batches:
            repeater.report(1.0)
            made.append(epoch)
            if epoch == 0:
                break
    assert made == [0, 1, 1, 1, 2, 2]


def test_the_length_of_a_resumed_one_is_what_is_left():
    first = BatchRepeater("abc", max_updates=6)
    go(first, 4)
    assert len(first) == 6
    second = BatchRepeater("abc", max_updates=6)
    second.load_state_dict(first.state_dict())
    assert len(second) == 2 == len(go(second))
    assert len(second) == 2


# --- Batches --------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["image", "info"])
CONTAINERS = {
    "dict": lambda: {"x": torch.zeros(2), "labels": torch.ones(2)},
    "UserDict": lambda: UserDict(x=torch.zeros(2), labels=torch.ones(2)),
    "in a list": lambda: [{"x": torch.zeros(2), "labels": 1}],
    "in a tuple": lambda: (0, {"x": torch.zeros(2), "labels": 1}),
    "in a named tuple": lambda: Pair(torch.zeros(2), {"labels": 1}),
    "deep": lambda: {"all": [({"labels": 1},)]},
}


def pop_labels(batch):
    while not hasattr(batch, "pop") or not hasattr(batch, "keys"):
        batch = batch[-1]
    return batch.pop("labels") if "labels" in batch else pop_labels(batch["all"])


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_visit_may_take_its_batch_apart(name):
    given = CONTAINERS[name]()
    repeater = BatchRepeater([given], repeats=3, max_updates=6)
    for batch in repeater:
        assert type(batch) is type(given)
        pop_labels(batch)
        repeater.report(1.0)
    pop_labels(given)  # the loader's own is whole, too


IN_PLACE = {
    "batch": torch.zeros(2),
    "batch['x']": {"y": torch.ones(1), "x": torch.zeros(2)},
    "batch[1]": [torch.ones(1), torch.zeros(2)],
    "batch.image": Pair(torch.zeros(2), "a"),
    "batch[0]['x'][1]": ({"x": [1, torch.zeros(2)]},),
}


@pytest.mark.parametrize("place", IN_PLACE)
@pytest.mark.parametrize("repeats", [2, Until(t=0.5)])
def test_a_tensor_changed_in_place_between_visits_is_named(place, repeats):
    batch = IN_PLACE[place]
    repeater = BatchRepeater([batch], repeats, max_updates=4)

    def loop():
        for given in repeater:
            eval(place, {"batch": given}).sub_(1)
            repeater.report(1.0)

    with pytest.raises(RuntimeError, match=r"\(fresh batch 0\) was changed in place") as error:
        loop()
    assert str(error.value).startswith(f"{place} ")
    assert repeater.updates == 1


def test_what_is_changed_between_batches_or_never_visited_again_is_the_loop_s_own():
    single = BatchRepeater([torch.zeros(1)], max_updates=3)
    for batch in single:
        batch.sub_(1)
        single.report(1.0)
    with torch.inference_mode():
        made = {"x": torch.zeros(1)}  # keeps no count of its changes
    assert len(go(BatchRepeater([made], repeats=2, max_updates=4))) == 4
    leaf = torch.zeros(2)
    repeater = BatchRepeater([leaf], repeats=2, max_updates=4)
    for batch in repeater:
        loss = (batch.requires_grad_() ** 2).sum()
        loss.backward()
        repeater.report(loss)


# --- Loaders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: zip("ab", "cd", strict=True),
        lambda: enumerate("ab"),
        lambda: (i for i in range(3)),
        lambda: map(str, range(3)),
        lambda: iter([1, 2]),
        lambda: itertools.chain([1], [2]),
        lambda: iter(DataLoader(DATA)),
    ],
    ids=["zip", "enumerate", "generator", "map", "iterator", "chain", "DataLoader's iterator"],
)
def test_what_can_be_read_only_once_is_refused(make):
    with pytest.raises(ValueError, match=r"can be read again, not a \w+: .*lambda: zip"):
        BatchRepeater(make(), max_updates=2)


def test_what_is_no_loader_is_refused():
    with pytest.raises(ValueError, match="the loader must be an iterable of batches, not 3"):
        BatchRepeater(3, max_updates=2)


class Counting(Dataset):
    def __init__(self):
        self.asked = []

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.asked.append(index)
        return index


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_a_resumed_dataloader_loads_nothing_that_is_thrown_away(stop):
    def make(data):
        loader = DataLoader(data, batch_size=2, shuffle=True)
        return BatchRepeater(loader, repeats=2, max_updates=12)

    torch.manual_seed(1)
    first = make(Counting())
    go(first, stop)
    rest = go(first)
    torch.manual_seed(1)
    again = make(Counting())
    go(again, stop)
    data = Counting()
    second = make(data)
    second.load_state_dict(again.state_dict())
    assert [batch.tolist() for batch in go(second)] == [batch.tolist() for batch in rest]
    assert len(data.asked) == 2 * ceil((12 - stop) / 2)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("leave", ["close", "with"])
def test_workers_end_when_the_repeater_is_closed(persistent, leave):
    before = set(multiprocessing.active_children())
    loader = DataLoader(DATA, batch_size=2, num_workers=1, persistent_workers=persistent)
    repeater = BatchRepeater(loader, repeats=2, max_updates=12)
    if leave == "with":
        with repeater:
            seen = go(repeater, 3)
            assert set(multiprocessing.active_children()) - before
    else:
        seen = go(repeater, 3)
        repeater.close()
    assert set(multiprocessing.active_children()) <= before
    seen += go(repeater)  # goes on from there
    assert numbers(seen[::2]) == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1], [2, 3]]
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("ways", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
@pytest.mark.parametrize("stop", range(1, 12))
@pytest.mark.parametrize("shuffled", [True, False])
def test_a_copy_goes_on_by_itself(ways, stop, shuffled):
    loader = DataLoader(DATA, batch_size=2, shuffle=True) if shuffled else [[torch.ones(1)]] * 3
    mapping = ZScore(window=3, step=0.2)
    torch.manual_seed(3)
    repeater = BatchRepeater(loader, mapping, max_updates=14)

    def run(one, limit=None):
        seen = []
        for batch in itertools.islice(one, limit):
            seen.append((batch[0].tolist(), one.fresh_batch, one.repeat, one.stats.progress))
            one.report(float(batch[0].sum()) + one.updates)
        return seen

    run(repeater, stop)
    states = torch.get_rng_state()
    copied = ways(repeater)
    rest = run(repeater)
    assert copied.updates == stop
    torch.set_rng_state(states)
    assert run(copied) == rest
    assert copied.drain()["loss"].tolist() == repeater.drain()["loss"].tolist()


# --- Numbers --------------------------------------------------------------------------------------


def test_numpy_s_numbers_are_numbers():
    pairs = [
        (Constant(np.int64(3)), Constant(3)),
        (Uniform(np.int8(1), np.int8(4), np.int64(7)), Uniform(1, 4, 7)),
        (Linear(t=np.float32(0.5)), Linear(t=0.5)),
        (Threshold(t=np.float64(2), repeats=np.uint8(2)), Threshold(t=2.0)),
        (Until(t=np.int64(2), max_repeats=np.int64(3)), Until(t=2.0, max_repeats=3)),
        (CosineRepeats(high=np.int64(4)), CosineRepeats(high=4)),
        (ControlLimit(k=np.float32(2), window=np.int32(5)), ControlLimit(k=2.0, window=5)),
        (Quantile(levels=np.array([0.5, 0.75])), Quantile(levels=(0.5, 0.75))),
        (Trace(np.array([1, 2, 3])), Trace((1, 2, 3))),
    ]
    for numpy_s, python_s in pairs:
        assert numpy_s == python_s
        assert repr(numpy_s) == repr(python_s)  # no np.int64(3) in it
    repeater = BatchRepeater("ab", repeats=np.int64(3), max_updates=np.int64(6), block=np.int8(4))
    assert go(repeater) == list("aaabbb")
    assert type(repeater.max_updates) is int
    rows = repeater.drain()
    replay = Trace(rows["repeats"][rows["repeat"] == 0])
    assert go(BatchRepeater("ab", replay, max_updates=6)) == list("aaabbb")
    # Of a float32 t, N is the one of its value, not of a division in float32.
    t = np.float32(0.1)
    losses = np.float32([0.3, 0.7, 0.9]).tolist()
    stats = repeater.stats
    assert [Linear(t, 9)(x, stats) for x in losses] == [
        Linear(float(t), 9)(x, stats) for x in losses
    ]


@pytest.mark.parametrize(
    "loss",
    [
        torch.empty((), device="meta"),
        torch.tensor(1 + 2j),
        1 + 2j,
        np.complex64(1),
        10**400,
    ],
    ids=["meta", "complex tensor", "complex", "numpy's complex", "huge"],
)
@pytest.mark.parametrize("repeats", [2, Linear(t=1.0), Until(t=0.1)])
@pytest.mark.parametrize("at", [0, 1])
def test_a_loss_that_is_no_real_number_changes_nothing(loss, repeats, at):
    repeater = BatchRepeater("abc", repeats=repeats, max_updates=6)
    for _ in repeater:
        if repeater.updates == at:
            with pytest.raises(ValueError, match="the loss of fresh batch 0 must be a scalar"):
                repeater.report(loss)
        repeater.report(2.0)
    assert repeater.drain()["loss"].tolist() == [2.0] * 6


def test_a_report_whose_reduction_fails_can_be_made_again():
    calls = []

    def reduce(loss):
        calls.append(loss)
        if len(calls) == 1:
            raise OSError("the network is away")
        return loss

    repeater = BatchRepeater("ab", repeats=Linear(t=1.0), max_updates=4, reduce=reduce)
    for _ in repeater:
        if not calls:
            with pytest.raises(OSError, match="away"):
                repeater.report(2.0)
        repeater.report(2.0)
    assert repeater.drain()["fresh_batch"].tolist() == [0, 0, 1, 1]


def test_visits_that_nobody_drains_take_bounded_memory_after_a_word():
    repeater = BatchRepeater(range(7), Trace((1, 3, 2) * 400), max_updates=2_000, history=100)

    def loop():
        for _ in repeater:
            repeater.report(float(repeater.updates))

    with pytest.warns(UserWarning, match=r"forgotten: call repeater.drain"):
        loop()
    rows = repeater.drain()
    kept = len(rows["update"])
    assert 100 <= kept <= 200 + 3
    whole = BatchRepeater(range(7), Trace((1, 3, 2) * 400), max_updates=2_000)
    for _ in whole:
        whole.report(float(whole.updates))
    for name, column in whole.drain().items():
        assert rows[name].tolist() == column[-kept:].tolist(), name


# --- Skipping and grouping ------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [2, lambda loss, stats: 2, Until(t=0.5, max_repeats=2)])
def test_a_batch_that_is_skipped_makes_no_update(repeats):
    repeater = BatchRepeater("abcd", repeats=repeats, max_updates=6)
    seen = []
    for batch in repeater:
        if batch == "b" or (batch == "c" and repeater.repeat == 1):
            repeater.skip()
            continue
        seen.append(batch)
        repeater.report(1.0)
    assert seen == list("aacdda")
    rows = repeater.drain()
    assert rows["fresh_batch"].tolist() == [0, 0, 1, 2, 2, 3]
    assert rows["repeats"].tolist() == [2, 2, 1, 2, 2, 1]
    assert rows["update"].tolist() == list(range(6))
    with pytest.raises(RuntimeError, match=r"skip\(\) has no batch"):
        repeater.skip()


@pytest.mark.parametrize("at", range(5))
def test_a_resume_after_a_skip_goes_on_the_same(at):
    def run(repeater, visits=99):
        seen = []
        for batch in itertools.islice(repeater, visits):
            seen.append(batch)
            repeater.skip() if batch == "b" else repeater.report(1.0)
        return seen

    def make():
        return BatchRepeater("abcd", repeats=2, max_updates=9)

    whole = run(make())
    first = make()
    seen = run(first, at)
    second = make()
    second.load_state_dict(first.state_dict())
    assert seen + run(second) == whole


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_a_group_has_at_least_one_batch(size):
    with pytest.raises(ValueError, match="size must be an integer of at least 1"):
        grouped("abc", size)


def test_groups_accumulate_gradients_as_one_batch_would():
    data = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    weights = {}
    for name, loader in {
        "whole": DataLoader(data, batch_size=4),
        "in parts": grouped(DataLoader(data, batch_size=2), 2),
    }.items():
        assert len(loader) == 3
        weight = torch.ones(3, requires_grad=True)
        repeater = BatchRepeater(loader, Trace((1, 3, 2)), max_updates=6)
        for batch in repeater:
            parts = batch if name == "in parts" else [batch]
            losses = [(part @ weight).square().mean() / len(parts) for part in parts]
            repeater.report(sum(loss.detach() for loss in losses))
            (gradient,) = torch.autograd.grad(sum(losses), [weight])
            weight = (weight - 0.1 * gradient).detach().requires_grad_()
        weights[name] = weight.tolist()
        assert repeater.drain()["fresh_batch"].tolist() == [0, 1, 1, 1, 2, 2]
    assert weights["in parts"] == pytest.approx(weights["whole"], rel=1e-5)
