"""The recipes of docs/frameworks.md, one small problem to run them on, and the loop by hand."""

import copy
import re
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repeatlab import BatchRepeater, Linear

PAGE = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text(encoding="utf-8")
T, BATCH, CLASSES = 23, 8, 3
REPEATS = Linear(t=0.3, max_repeats=4)
random = torch.Generator().manual_seed(1)
IMAGES = torch.randn(36, 4, generator=random) * torch.linspace(0.1, 2.5, 36)[:, None]
LABELS = torch.randint(CLASSES, (36,), generator=random)
DATA = TensorDataset(IMAGES, LABELS)  # a pass is five batches, the last a half


def sections():
    """Return the blocks of code under each heading."""
    parts = re.split(r"^##+ (.+)\n", PAGE, flags=re.MULTILINE)
    blocks = [re.findall(r"^```python\n(.*?)^```", part, re.M | re.S) for part in parts[2::2]]
    return dict(zip(parts[1::2], blocks, strict=True))


def run(title, names, block=0):
    """Execute one block of the page with these names, and return what it leaves."""
    exec(compile(sections()[title][block], f"docs/frameworks.md, {title}", "exec"), names)
    return names


def count_of(repeats, loss):
    """Return N for a loss, in the words of the definition."""
    return repeats if isinstance(repeats, int) else max(1, min(4, int(loss / 0.3)))


class Stopped(Exception):
    pass


class Partial(BatchRepeater):
    """One that loads `state` before it begins, and stops after the update number `until`."""

    state, until = None, None

    def __iter__(self):
        if self.state is not None:
            self.state(self)
        batches = super().__iter__()
        return batches if self.until is None else islice(batches, self.until - self.updates)


def partial(state=None, until=None):
    return type("Partial", (Partial,), {"state": state and staticmethod(state), "until": until})


def problem(*, optimizer=None, seed=0):
    """Return a script's own names, and a list that counts its optimizer's steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    make = optimizer or (lambda weights: torch.optim.SGD(weights, lr=0.2, momentum=0.9))
    optimizer, steps = make(model.parameters()), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    loader = DataLoader(DATA, BATCH, shuffle=True)
    loss_fn = nn.functional.cross_entropy
    script = {"model": model, "optimizer": optimizer, "loader": loader, "loss_fn": loss_fn}
    return script | {"T": T, "torch": torch, "steps": steps, "repeats": REPEATS}


def one_update(names):
    """Return the update of a plain script, a function of a batch that returns its loss."""

    def update(batch):
        loss = names["loss_fn"](names["model"](batch[0]), batch[1])
        names["optimizer"].zero_grad()
        loss.backward()
        names["optimizer"].step()
        return loss.item()

    return update


def by_hand(loader, update, repeats=REPEATS, updates=T):
    """Make the updates in a plain loop; return N of every batch."""
    counts, epoch = [], 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for batch in loader:
            loss = update(batch)
            counts.append(min(count_of(repeats, loss), updates - sum(counts)))
            for _ in range(counts[-1] - 1):
                update(batch)
            if sum(counts) == updates:
                return counts
        epoch += 1


def counts(repeater):
    rows = repeater.drain()
    return rows["repeats"][rows["repeat"] == 0].tolist()


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def same(model, other):
    return torch.equal(weights(model), weights(other))


def state_of(names, *parts):
    """Return a function that gives a fresh script the state of this one, the repeater last."""
    saved = {part: copy.deepcopy(names[part].state_dict()) for part in (*parts, "repeater")}

    def load(fresh, repeater):
        for part in parts:
            fresh[part].load_state_dict(saved[part])
        repeater.load_state_dict(saved["repeater"])

    return load


def check_loop(title, make, update_of, *, parts=("model", "optimizer"), block=0, hand=None):
    """Hold a recipe of a plain loop to the loop by hand: T, N, N = 1 and a resume anywhere.

    Args:
        title: The recipe's heading.
        make: Returns the names of a fresh script.
        update_of: The script's own update, a function of its names.
        parts: What is saved beside the repeater.
        block: Which block under the heading it is.
        hand: The loader to loop over by hand, a function of the names.
    """
    hand = hand or (lambda names: names["loader"])

    def go(repeats=REPEATS, **partly):
        names = make() | {"repeats": repeats}
        state = partly.pop("state", None)
        load = state and (lambda repeater: state(names, repeater))
        return run(title, names | {"BatchRepeater": partial(load, **partly)}, block)

    for repeats in (1, REPEATS):
        plain = make()
        expected = by_hand(hand(plain), update_of(plain), repeats)
        names = go(repeats)
        assert counts(names["repeater"]) == expected
        assert len(names["steps"]) == T
        assert same(names["model"], plain["model"])
    assert len(set(expected)) > 1  # or it shows nothing
    for stop in (2, 9, 17):
        first = go(until=stop)
        rest = go(state=state_of(first, *parts))
        assert len(first["steps"]) == stop
        assert len(rest["steps"]) == T - stop
        assert same(rest["model"], names["model"])
