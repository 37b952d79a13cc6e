"""Lightning: automatic and manual optimisation, its checkpoints, two processes."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from recipes import BATCH, CLASSES, DATA, REPEATS, T, by_hand, counts, run, same, weights
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from repeatlab import BatchRepeater

lightning = pytest.importorskip("lightning", reason="lightning is not installed")


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def train_dataloader(self):
        torch.manual_seed(1)
        return DataLoader(DATA, BATCH, shuffle=True)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.update(self.optimizers(), self.loss(batch))

    def update(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def recipe(manual, repeats):
    """Return the page's module over ours, which keeps its repeater for the test to drain."""
    names = {"Module": Manual if manual else Module, "BatchRepeater": BatchRepeater}
    names |= {"repeats": repeats, "DataLoader": DataLoader, "data": DATA, "batch_size": BATCH}
    names |= {"DistributedSampler": DistributedSampler}
    run("Lightning", names, block=int(manual))
    names["update"] = lambda optimizer, loss: names["module"].update(optimizer, loss)
    return names


def fit(module, *, resume=None, callbacks=(), checkpointing=False, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=T,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=checkpointing,
            callbacks=list(callbacks),
            **options,
        )
        trainer.fit(module, ckpt_path=resume)
    assert trainer.global_step == T or "devices" in options
    return trainer


@pytest.mark.parametrize("manual", [False, True])
def test_once_each_it_trains_the_same_weights(manual):
    plain = (Manual if manual else Module)()
    fit(plain)
    names = recipe(manual, 1)
    ours = names["module"] = names["Repeated"]()
    repeater = fit(ours).train_dataloader
    assert counts(repeater) == [1] * T
    assert same(ours, plain)


@pytest.mark.parametrize("manual", [False, True])
def test_it_repeats_as_a_loop_by_hand_and_resumes(manual, tmp_path):
    names = recipe(manual, REPEATS)
    ours = names["module"] = names["Repeated"]()
    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    repeater = fit(ours, callbacks=[keep], checkpointing=True).train_dataloader

    plain = Module()
    optimizer = plain.configure_optimizers()

    def update(batch):
        loss = plain.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    expected = by_hand(plain.train_dataloader(), update)
    assert counts(repeater) == expected
    assert len(set(expected)) > 1
    assert same(ours, plain)

    for stop in (2, 9, 17):
        rest = names["module"] = names["Repeated"]()
        repeater = fit(rest, resume=tmp_path / f"step={stop}.ckpt").train_dataloader
        assert repeater.drain()["update"].tolist() == list(range(stop, T))
        assert same(rest, ours)


class WithSampler(Module):
    def train_dataloader(self):
        return DataLoader(DATA, BATCH, shuffle=True)  # Lightning shards it


class Keep(lightning.Callback):
    """Every rank writes down what it made."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, module):
        loader = trainer.train_dataloader
        made = {"weights": weights(module).tolist(), "steps": trainer.global_step}
        if isinstance(loader, BatchRepeater):
            made |= {name: column.tolist() for name, column in loader.drain().items()}
        Path(f"{self.path}-{trainer.global_rank}.json").write_text(json.dumps(made))


def in_two_processes(folder):
    """Train without the repeater, once each, and as the losses ask, on two ranks."""
    options = {"devices": 2, "strategy": "ddp_fork"}
    fit(WithSampler(), callbacks=[Keep(f"{folder}/plain")], **options)
    for name, repeats in {"once": 1, "repeated": REPEATS}.items():
        names = recipe(False, repeats)
        run("Lightning", names, block=2)
        fit(names["Sharded"](), callbacks=[Keep(f"{folder}/{name}")], **options)


def test_two_processes(tmp_path):
    subprocess.run([sys.executable, __file__, tmp_path], check=True, timeout=120)
    made = {
        (name, rank): json.loads((tmp_path / f"{name}-{rank}.json").read_text())
        for name in ("plain", "once", "repeated")
        for rank in (0, 1)
    }
    assert made["once", 0]["weights"] == made["plain", 0]["weights"] == made["plain", 1]["weights"]
    first, second = made["repeated", 0], made["repeated", 1]
    assert first["steps"] == second["steps"] == T
    assert first["repeats"] == second["repeats"]
    assert first["weights"] == second["weights"]

    # By hand: the mean gradient of the two ranks' batches, and N by their mean loss.
    plain = Module()
    optimizer = plain.configure_optimizers()
    samplers = [DistributedSampler(DATA, 2, rank) for rank in (0, 1)]

    class Pairs:
        def set_epoch(self, epoch):
            for sampler in samplers:
                sampler.set_epoch(epoch)

        def __iter__(self):
            return zip(*(DataLoader(DATA, BATCH, sampler=s) for s in samplers), strict=True)

    def update(pair):
        losses = [plain.loss(batch) for batch in pair]
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
        return float(sum(losses).detach()) / 2

    expected = by_hand(Pairs(), update)
    rows = zip(first["repeat"], first["repeats"], strict=True)
    assert [n for repeat, n in rows if repeat == 0] == expected
    assert len(set(expected)) > 1
    torch.testing.assert_close(torch.tensor(first["weights"]), weights(plain))


if __name__ == "__main__":
    in_two_processes(sys.argv[1])
