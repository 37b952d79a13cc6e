"""Every kind of loader that a repeater is given; as a script it goes on from saved states.

Batches of about four a pass, of the numbers 0 to 8. A kind is a function without arguments, so that
another process makes the same loader anew.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from functools import partial

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from repeatlab.repetition.grouped import grouped
from repeatlab.repetition.mappings import Trace
from repeatlab.repetition.repeater import BatchRepeater

LENGTH = 9
DATA = TensorDataset(torch.arange(float(LENGTH)))


# --- Loaders of one's own -------------------------------------------------------------------------


class SelfIterating:
    """Rewinds where it is iterated, and is its own iterator."""

    def __iter__(self):
        self.next = 0
        return self

    def __next__(self):
        if self.next == 4:
            raise StopIteration
        self.next += 1
        return self.next


class BareIterator:
    """Has no `__iter__`, which a `for` does not ask an iterator for."""

    def __init__(self):
        self.left = [1, 2, 3]

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop()


class GivesBareIterators:
    def __iter__(self):
        return BareIterator()


class Shuffling:
    """Shuffles batches by one of the process's generators, as each pass begins."""

    def __init__(self, shuffle):
        self.shuffle = shuffle

    def __iter__(self):
        order = list(range(5))
        self.shuffle(order)
        return iter(order)


class SetEpochLoader:
    """Knows its epoch because it is told, and tells what it was told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([(self.epoch, i) for i in range(3)])


class IterFrom:
    def __iter__(self):
        return self.iter_from(0)

    def iter_from(self, position):
        return iter(range(position, 4))


class WithState:
    """Goes through all that it has, and wants to be restored by its own state alone."""

    def __init__(self):
        self.epoch_seed, self.place, self.resumed = 0, 0, False

    def __iter__(self):
        if not self.resumed:
            self.epoch_seed, self.place = self.epoch_seed + 1, 0
        self.resumed = False
        order = np.random.default_rng(self.epoch_seed).permutation(4)
        while self.place < 4:
            self.place += 1
            yield int(order[self.place - 1])

    def state_dict(self):
        return {"epoch_seed": self.epoch_seed, "place": self.place}

    def load_state_dict(self, state):
        self.epoch_seed, self.place, self.resumed = state["epoch_seed"], state["place"], True


# --- Samplers and data sets -----------------------------------------------------------------------


class OrderBy(Sampler):
    """Draws its order by `draw`, a function of this sampler, as its first index is asked for."""

    def __init__(self, draw, **attributes):
        self.draw = draw
        vars(self).update(attributes)

    def __iter__(self):
        yield from self.draw(self)

    def __len__(self):
        return LENGTH


class EagerBatches(OrderBy):
    """A batch sampler that draws its order where `iter` is called on it."""

    def __iter__(self):
        order = list(self.draw(self))
        return iter([order[i : i + 3] for i in range(0, LENGTH, 3)])


class ToldEpoch(OrderBy):
    def set_epoch(self, epoch):
        self.epoch = epoch


def by_epoch(sampler):
    return np.random.default_rng(sampler.epoch).permutation(LENGTH).tolist()


def count_epochs(sampler):
    sampler.epoch += 1
    return by_epoch(sampler)


def late_generator(sampler):
    if sampler.generator is None:
        sampler.generator = torch.Generator().manual_seed(7)
    return torch.randperm(LENGTH, generator=sampler.generator).tolist()


def one_by_one(_):
    return (random.randrange(LENGTH) for _ in range(LENGTH))


class Stream(IterableDataset):
    """A data set without indices, a worker's share of it."""

    def __init__(self, shuffles=False, generator=None):
        self.shuffles, self.epoch, self.generator = shuffles, 0, generator

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.arange(LENGTH)
        if self.shuffles:
            order = np.random.default_rng(self.epoch).permutation(LENGTH)
        if self.generator is not None:
            order = self.generator.permutation(LENGTH)
        worker = get_worker_info()
        order = order[worker.id :: worker.num_workers] if worker else order
        return iter(order.tolist())


class SizedStream(Stream):
    def __len__(self):
        return LENGTH


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sampled(sampler, **options):
    return DataLoader(DATA, batch_size=2, sampler=sampler, **options)


# --- Loaders of other libraries -------------------------------------------------------------------


def stateful(data=DATA, **options):
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(data, batch_size=2, **options)


def prepared(**settings):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
    return accelerator.prepare(DataLoader(DATA, batch_size=2, shuffle=True))


def combined():
    from lightning.pytorch.utilities import CombinedLoader

    loaders = {"a": DataLoader(DATA, batch_size=3, shuffle=True, generator=seeded(3)), "b": [1, 2]}
    return CombinedLoader(loaders, "max_size_cycle")


def streamed(**options):
    from datasets import Dataset

    data = Dataset.from_dict({"x": list(range(LENGTH))}).to_iterable_dataset(num_shards=3)
    return DataLoader(data.shuffle(seed=1, buffer_size=4), batch_size=2, **options)


def shards():
    import webdataset

    class Shards(IterableDataset):
        def __iter__(self):
            yield from ({"x": i} for i in range(LENGTH))

    pipeline = webdataset.DataPipeline(Shards(), webdataset.detshuffle(5, seed=2))
    return webdataset.WebLoader(pipeline, batch_size=2, num_workers=0)


LOADERS = {
    "list": lambda: [torch.tensor(float(i)) for i in range(4)],
    "tensor": lambda: torch.arange(4.0),
    "self-iterating": SelfIterating,
    "bare iterators": GivesBareIterators,
    "function": lambda: lambda: zip("abc", range(3), strict=True),
    "by random": lambda: Shuffling(random.shuffle),
    "by numpy": lambda: Shuffling(np.random.shuffle),
    "set_epoch": SetEpochLoader,
    "iter_from": IterFrom,
    "own state": WithState,
    "in order": lambda: DataLoader(DATA, batch_size=3),
    "no batches": lambda: DataLoader(DATA, batch_size=None, shuffle=True),
    "shuffle": lambda: DataLoader(DATA, batch_size=2, shuffle=True),
    "generator": lambda: DataLoader(DATA, batch_size=2, shuffle=True, generator=seeded(3)),
    "sampler's generator": lambda: sampled(RandomSampler(DATA, True, generator=seeded(4))),
    "weighted": lambda: sampled(WeightedRandomSampler([1.0, 2.0, 3.0] * 3, 8)),
    "distributed": lambda: sampled(DistributedSampler(DATA, num_replicas=2, rank=1)),
    "told epoch": lambda: sampled(ToldEpoch(by_epoch, epoch=0)),
    "counts epochs": lambda: sampled(OrderBy(count_epochs, epoch=5)),
    "late generator": lambda: sampled(OrderBy(late_generator, generator=None)),
    "random.sample": lambda: sampled(OrderBy(lambda _: random.sample(range(LENGTH), LENGTH))),
    "index by index": lambda: sampled(OrderBy(one_by_one)),
    "np.random": lambda: sampled(OrderBy(lambda _: np.random.permutation(LENGTH))),  # noqa: NPY002
    "own random": lambda: sampled(
        OrderBy(lambda s: s.own.sample(range(LENGTH), LENGTH), own=random.Random(1))
    ),
    "own default_rng": lambda: sampled(
        OrderBy(lambda s: s.own.permutation(LENGTH), own=np.random.default_rng(1))
    ),
    "own RandomState": lambda: sampled(
        OrderBy(lambda s: s.own.permutation(LENGTH), own=np.random.RandomState(1))
    ),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(range(8), 3, True)),
    "eager batches": lambda: DataLoader(
        DATA, batch_sampler=EagerBatches(lambda _: torch.randperm(LENGTH).tolist())
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "sized stream": lambda: DataLoader(SizedStream(shuffles=True), batch_size=2),
    "stream's generator": lambda: DataLoader(
        Stream(generator=np.random.default_rng(3)), batch_size=2
    ),
    "grouped": lambda: grouped(DataLoader(DATA, batch_size=2, shuffle=True), 2),
    "grouped list": lambda: grouped([0, 1, 2, 3, 4], 2),
    # With workers.
    "workers": lambda: DataLoader(DATA, batch_size=3, shuffle=True, num_workers=2),
    "workers, eager batches": lambda: DataLoader(
        DATA,
        batch_sampler=EagerBatches(lambda _: torch.randperm(LENGTH).tolist()),
        num_workers=1,
    ),
    "persistent": lambda: DataLoader(DATA, 3, True, num_workers=1, persistent_workers=True),
    "persistent, generator": lambda: DataLoader(
        DATA, 3, True, num_workers=1, persistent_workers=True, generator=seeded(3)
    ),
    "workers' stream": lambda: DataLoader(Stream(shuffles=True), batch_size=4, num_workers=2),
}
LIBRARIES = {
    "torchdata": ("torchdata", partial(stateful, shuffle=True)),
    "torchdata in order": ("torchdata", stateful),
    "torchdata generator": ("torchdata", lambda: stateful(shuffle=True, generator=seeded(3))),
    "torchdata workers": ("torchdata", partial(stateful, shuffle=True, num_workers=1)),
    "torchdata stream": ("torchdata", lambda: stateful(Stream(shuffles=True))),
    "accelerate": ("accelerate", prepared),
    "accelerate, seedable": (
        "accelerate",
        partial(prepared, use_seedable_sampler=True, data_seed=3),
    ),
    "accelerate, stateful": (
        "torchdata",
        partial(prepared, use_stateful_dataloader=True, use_seedable_sampler=True, data_seed=3),
    ),
    "lightning": ("lightning", combined),
    "datasets": ("datasets", streamed),
    "webdataset": ("webdataset", shards),
}
FOUND = {
    name: make
    for name, (module, make) in LIBRARIES.items()
    if importlib.util.find_spec(module) and importlib.util.find_spec("accelerate")
}
KINDS = LOADERS | FOUND
PASSES = 3


def plain(batch):
    """Return a batch as plain numbers."""
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(item) for item in batch]
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - loaders draw from it


def by_hand(loader, passes=PASSES):
    """The plain loop over `passes` epochs, that tells each to whoever wants to know."""
    batches = []
    for epoch in range(passes):
        batch_sampler = getattr(loader, "batch_sampler", None)
        for part in (
            getattr(loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
            getattr(loader, "dataset", None),
            loader,
        ):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches += [plain(batch) for batch in (loader() if callable(loader) else loader)]
    return batches


def noise():
    """Draw from the process's generators, as dropout and augmentation do."""
    return float(torch.rand(())), float(np.random.random())  # noqa: NPY002


def run(repeater, states=None):
    """Go to the end; return (batch, repeat, what was drawn) of each visit, and collect states."""
    visits = []
    with repeater:
        for batch in repeater:
            visits.append((plain(batch), repeater.fresh_batch, repeater.repeat, *noise()))
            repeater.report(visits[-1][3])
            if states is not None:
                states.append(repeater.state_dict())
    return [*visits, ("end", random.random(), *noise())]


COUNTS = Trace((1, 3, 2, 1) * 20)


def repeater_of(name, updates, mapping=COUNTS):
    return BatchRepeater(KINDS[name](), mapping, max_updates=updates)


def resume_all(path):
    """Answer the file of {kind: (updates, states)} with {kind: visits from each state on}."""
    answers = {}
    for name, (updates, states) in torch.load(path, weights_only=True).items():
        answers[name] = []
        for number, state in enumerate(states):
            seed_all(1_000 + number)
            repeater = repeater_of(name, updates)
            try:
                repeater.load_state_dict(state)
                answers[name].append(run(repeater))
            except Exception as error:  # the test of this kind says it, not those of all others
                answers[name].append(repr(error))
    torch.save(answers, path)


if __name__ == "__main__":
    resume_all(sys.argv[1])
