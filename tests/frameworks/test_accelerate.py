"""Accelerate: its prepared loader, accumulation, and checkpoints of its own."""

from contextlib import nullcontext

import pytest
from recipes import (
    REPEATS,
    T,
    by_hand,
    counts,
    partial,
    problem,
    run,
    same,
)

from repeatlab import BatchRepeater, grouped

pytest.importorskip("accelerate", reason="accelerate is not installed")


def fresh_accelerator(seedable=False):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DataLoaderConfiguration

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    configuration = DataLoaderConfiguration(use_seedable_sampler=seedable)
    return Accelerator(cpu=True, dataloader_config=configuration)


@pytest.fixture(params=[False, True], ids=["", "seedable"])
def make(request):
    def script():
        accelerator = fresh_accelerator(request.param)
        return problem() | {"accelerator": accelerator, "BatchRepeater": BatchRepeater}

    return script


def own_update(names):
    """Return the update of a script with Accelerate."""

    def update(batch):
        loss = names["loss_fn"](names["model"](batch[0]), batch[1])
        names["optimizer"].zero_grad()
        names["accelerator"].backward(loss)
        names["optimizer"].step()
        return loss.item()

    return update


def prepared(names):
    made = names["accelerator"].prepare(*(names[x] for x in ("model", "optimizer", "loader")))
    return names | dict(zip(("model", "optimizer", "loader"), made, strict=True))


@pytest.mark.parametrize("repeats", [1, REPEATS])
def test_a_prepared_loader_and_its_checkpoints(make, repeats, tmp_path):
    plain = prepared(make())
    expected = by_hand(plain["loader"], own_update(plain), repeats)
    names = run("Accelerate", make() | {"repeats": repeats})
    assert counts(names["repeater"]) == expected
    assert len(names["steps"]) == T
    assert same(names["model"], plain["model"])
    for stop in (2, 9, 17):
        first = make() | {"repeats": repeats, "BatchRepeater": partial(until=stop)}
        run("Accelerate", first)["accelerator"].save_state(tmp_path / str(stop))
        rest = make() | {"repeats": repeats}

        def load(repeater, names=rest, stop=stop):
            names["accelerator"].load_state(tmp_path / str(stop))

        run("Accelerate", rest | {"BatchRepeater": partial(load)})
        assert len(rest["steps"]) == T - stop
        assert same(rest["model"], names["model"])


def test_accumulation():
    k = 2

    def make():
        names = prepared(problem() | {"accelerator": fresh_accelerator()})
        return names | {"nullcontext": nullcontext}

    class Groups:
        def __init__(self, loader):
            self.loader = loader

        def set_epoch(self, epoch):
            self.loader.set_epoch(epoch)

        def __iter__(self):
            batches = list(self.loader)
            return (batches[i : i + k] for i in range(0, len(batches), k))

    for repeats in (1, REPEATS):
        plain = make()

        def update(group, names=plain):
            names["optimizer"].zero_grad()
            losses = [names["loss_fn"](names["model"](x), y) / len(group) for x, y in group]
            for loss in losses:
                names["accelerator"].backward(loss)
            names["optimizer"].step()
            return float(sum(losses).detach())

        expected = by_hand(Groups(plain["loader"]), update, repeats)
        names = make()
        names["repeater"] = BatchRepeater(grouped(names["loader"], k), repeats, max_updates=T)
        run("Accelerate", names, block=1)
        assert counts(names["repeater"]) == expected
        assert len(names["steps"]) == T
        assert same(names["model"], plain["model"])
