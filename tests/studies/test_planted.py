"""A task on which repeating hard batches helps, and one on which it cannot: what is found of each.

Both learn eight coordinates w_c, 0 at first, whose true value is 2, by SGD on 0.5 (w_c - label)^2.
One fresh batch in eight is rare and, at first or always, hard: its loss is about 2.

- *teaches*: a rare batch shows one of seven coordinates that nothing else shows, and one visit
  moves that coordinate by a tenth of its way; all other batches show the eighth, which is soon
  learnt. Loss tells what is left to learn, so visits that go to high losses are taken from batches
  with nothing left to teach. At T updates the rare coordinates are several visits further.
- *contradicts*: every batch shows all coordinates equally, and in a rare batch half of the labels
  are too high and half too low by as much. That raises its loss and cancels in its gradient; what
  noise a gradient has is drawn anew for each visit. So w after u updates has one distribution,
  whichever batches were repeated: no choice of N can help or hurt.

Evaluated is the expected loss of a fresh batch above what no w can remove; nothing is weighted in
favour of the rare. t is 0.4, at which the loss at the start asks for the full five visits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import Field
from torch import Tensor

from repeatlab.analysis.comparison import comparison_table
from repeatlab.analysis.frames import Records, load
from repeatlab.analysis.paired_differences import Endpoint, pairs
from repeatlab.core.seeding import derive, generator
from repeatlab.studies.study import run_study
from repeatlab.tasks import TASKS, TaskConfig

COORDINATES, TRUTH = 8, 2.0
RARE = 1 / 8  # of the fresh batches
CLASH = 2.0  # by how much the labels of a contradictory batch are off
JITTER = 0.3  # sd of a label's noise, at each visit anew
UPDATES, SEEDS = 200, 24


class PlantedConfig(TaskConfig):
    """Settings of the planted task."""

    name: Literal["planted"] = "planted"
    lr: Annotated[float, Field(gt=0)] = 0.1
    batch_size: Annotated[int, Field(ge=1)] = 2 * COORDINATES
    rare: Literal["teaches", "contradicts"]
    """What makes a rare batch hard."""


class PlantedBatch(NamedTuple):
    """Samples that show a coordinate each: `shown`, `labels` and `indices` are (batch,)."""

    shown: Tensor
    labels: Tensor
    indices: Tensor
    index: int


class Planted:
    """See the module's docstring; what only samplers ask of a task is left out."""

    Config: ClassVar[type[TaskConfig]] = PlantedConfig
    environment_steps = 0

    def __init__(self, config: PlantedConfig, *, seed: int, device: str) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.w = torch.zeros(COORDINATES, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.w], lr=config.lr)
        self.optimizers = [self.optimizer]
        self.batch_size = self.forward_samples = self.backward_samples = config.batch_size
        self.scoring_samples = self.bound_samples = config.batch_size
        self.visited, self.visit = -1, 0

    def fresh_batch(self, index: int) -> PlantedBatch:
        rare, numbers = is_rare(self.seed, index), torch.arange(self.batch_size)
        if self.config.rare == "teaches":
            draws = generator(self.seed, "coordinate", index)
            place = torch.randint(1, COORDINATES, (1,), generator=draws) if rare else 0
            shown = torch.zeros_like(numbers) + place
            labels = torch.full((self.batch_size,), TRUTH)
        else:
            shown = numbers % COORDINATES
            # One sample above the truth and one below it for each coordinate.
            sign = 1.0 - 2.0 * (numbers >= COORDINATES)
            labels = TRUTH + rare * CLASH * sign
        return PlantedBatch(shown, labels, index * self.batch_size + numbers, index)

    def step(
        self, batch: PlantedBatch, report: Callable[..., None], weights: Tensor | None = None
    ) -> None:
        self.visit = self.visit + 1 if batch.index == self.visited else 0
        self.visited = batch.index
        draws = generator(self.seed, f"jitter/{self.visit}", batch.index)
        jitter = JITTER * torch.randn(self.batch_size, generator=draws)
        loss = 0.5 * (self.w[batch.shown] - batch.labels - jitter).square().mean()
        report(loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return the expected loss of a fresh batch above that of the true coordinates."""
        shares = torch.full((COORDINATES,), 1 / COORDINATES)
        if self.config.rare == "teaches":
            shares = torch.tensor([1 - RARE] + [RARE / (COORDINATES - 1)] * (COORDINATES - 1))
        return {"loss": float((shares * 0.5 * (self.w - TRUTH).square()).sum())}

    def pictures(self) -> dict[str, np.ndarray]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"w": self.w.detach().clone(), "visited": self.visited, "visit": self.visit}


def is_rare(seed: int, index: int) -> bool:
    """Whether fresh batch `index` is one of the rare ones."""
    return float(torch.rand((), generator=generator(seed, "rare", index))) < RARE


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Records:
    """Return the runs of both tasks, trained in this process."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "planted", f"{__name__}:Planted")
        run_study(
            {
                "name": "planted",
                "tasks": {w: {"name": "planted", "rare": w} for w in ("teaches", "contradicts")},
                "methods": {
                    "standard": {},
                    "linear": {"mapping": {"name": "linear", "t": TRUTH**2 / 2 / 5}},
                    "windowed": {
                        "mapping": {"name": "trace", "of": "linear", "control": "windowed"}
                    },
                },
                "seeds": SEEDS,
                "max_updates": UPDATES,
                "evaluation": {"every": UPDATES, "splits": ["validation"], "test": False},
                "device": "cpu",
            },
            runs,
            workers=0,
        )
    return load(runs, "planted")


@pytest.fixture(scope="module")
def table(records) -> pd.DataFrame:
    """Return what the comparison says of `linear`, by task and other arm."""
    endpoints = dict.fromkeys(("teaches", "contradicts"), Endpoint(metric="loss"))
    arms = ("standard", "windowed")
    frames = [pairs(records, endpoints, methods=["linear"], against=arm) for arm in arms]
    return comparison_table(pd.concat(frames)).set_index(["task", "against"]).sort_index()


def test_what_repeating_hard_batches_does_is_found(table):
    found = table.loc["teaches"]
    assert found["n"].eq(SEEDS).all()
    assert found["low"].gt(0).all()
    assert found["decision"].eq("better").all()


def test_nothing_is_found_where_nothing_is(table, records):
    """And not for want of runs: an effect a fifth of the planted one would lie outside."""
    missed = table.loc["contradicts"]
    assert missed["n"].eq(SEEDS).all()
    assert missed["low"].lt(0).all()
    assert missed["high"].gt(0).all()
    assert missed["decision"].eq("undecided").all()
    final = records.runs.groupby(["task", "method"])["validation.loss"].mean()
    for arm, row in missed.iterrows():
        planted = table.loc[("teaches", arm), "difference"] / final["teaches", arm]
        assert max(-row["low"], row["high"]) / final["contradicts", arm] < planted / 5


def extra_visits(records: Records, task: str, method: str) -> tuple[int, float]:
    """Return how many visits were not the first to their batch, and the share of rare batches."""
    updates = records.updates
    of_arm = updates[(updates["task"] == task) & (updates["method"] == method)]
    extra = of_arm[of_arm["repeat"] > 0]
    seeds = {seed: derive(seed, "task planted") for seed in range(SEEDS)}  # of a run's streams
    rare = [is_rare(seeds[visit.seed], visit.fresh_batch) for visit in extra.itertuples()]
    return len(extra), float(np.mean(rare))


def test_the_extra_visits_go_to_hard_batches_and_in_the_control_to_any(records):
    """On both tasks: the null is not that of an arm that has stopped to repeat."""
    for task in ("teaches", "contradicts"):
        count, share = extra_visits(records, task, "linear")
        of_control, share_of_control = extra_visits(records, task, "windowed")
        assert count == of_control > 0.1 * SEEDS * UPDATES
        assert share > 2 * share_of_control


def test_a_contradictory_batch_is_harder_and_teaches_what_any_other_does():
    index = next(index for index in range(1000) if is_rare(0, index))
    tasks = [Planted(PlantedConfig(rare="contradicts"), seed=0, device="cpu") for _ in range(2)]
    batch, losses = tasks[0].fresh_batch(index), []
    for task, labels in zip(tasks, (batch.labels, torch.full((16,), TRUTH)), strict=True):
        task.step(batch._replace(labels=labels), lambda loss: losses.append(loss.item()))
    assert losses[0] > losses[1] + 1
    torch.testing.assert_close(tasks[0].w, tasks[1].w)
