"""Ensembles of networks that runs have kept: evaluated beside the single ones, or distilled.

The members may be runs of several seeds or several moments of one run, with the averages (EMA) of
weights in place of the weights. An ensemble predicts the mean of its members' softmax
probabilities, as in Lakshminarayanan et al. 2017 (arXiv 1612.01474), so that its negative
log-likelihood is at most its members' mean (Jensen's inequality); its accuracy need not be higher.

    runs = runs_of(Store("runs"), "my-study", method="standard")  # with evaluation.keep >= 1
    print(evaluate(of_seeds(runs)))
    print(evaluate(of_checkpoints(runs[0])))                      # with evaluation.keep >= 2

`repeatlab ensemble` does the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from repeatlab.core.schema import ConfigError, did_you_mean
from repeatlab.cost.ledger import PARTS, Ledger, spent_on
from repeatlab.data import ImageSet, iter_batches
from repeatlab.store.records import Run, Store
from repeatlab.tasks import TASKS, Task, load_task
from repeatlab.tasks.distillation import Distilled
from repeatlab.training import weights
from repeatlab.training.config import RunConfig

EVALUATION_BATCH = 500
CLASSIFIERS = ("supervised", "semisupervised")


@dataclass(frozen=True)
class Member:
    """One network of one run.

    Attributes:
        run: The run, with `evaluation.keep` of at least 1.
        update: After how many updates, one of `weights.kept(run)`.
        network: Its name in the task: "model", or "ema" for the average of its weights.
    """

    run: Run
    update: int
    network: str

    def __str__(self) -> str:
        seed = self.run.config["seed"]
        return f"seed {seed}, update {self.update}, {self.network} of {self.run.path.name[:6]}"


@dataclass(frozen=True)
class EnsembleReport:
    """What an ensemble and its members are on a split.

    Attributes:
        table: A row for each member, one for the mean of these and one for the ensemble. Columns:
            accuracy; nll, the mean negative log-likelihood in nats; what its training cost in
            `updates`, `cost_units` (forward equivalents) and `seconds`, everything that was
            prepared for it included; `networks`, how many go forward
            for a prediction. A run's cost stands in full beside each of its moments, and once in
            the ensemble's.
        log_probabilities: float64, (samples, classes): the ensemble's.
    """

    table: pd.DataFrame
    log_probabilities: np.ndarray

    def __str__(self) -> str:
        return self.table.round({"accuracy": 4, "nll": 4, "seconds": 2}).to_string()

    def _repr_html_(self) -> str:
        return self.table.to_html()


def runs_of(
    store: Store,
    study: str,
    *,
    task: str | None = None,
    method: str | None = None,
    seeds: Sequence[int] = (),
) -> list[Run]:
    """Return the runs of one arm of a study, in the order of its seeds.

    Args:
        store: Where the study is.
        study: Its name.
        task: What it calls the task; to be given where it has several.
        method: The arm; likewise.
        seeds: Which; by default all.

    Raises:
        StoreError: there is no such study.
        ConfigError: it has no such task, method or seed, or several and it must be said which.
    """
    planned = store.read_study(study)["runs"]
    for what, name in (("task", task), ("method", method)):
        known = list(dict.fromkeys(run[what] for run in planned))
        if name is None and len(known) > 1:
            raise ConfigError(f"{what}: say which of those of '{study}': {', '.join(known)}")
        if name is not None and name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{what}: '{study}' has no {what} {name!r}; {hint}")
        planned = [run for run in planned if name in (None, run[what])]
    there = {run["seed"]: store.run(*run["run"]) for run in planned}
    for seed in seeds:
        if seed not in there:
            known = ", ".join(map(str, there))
            raise ConfigError(f"seed: '{study}' has no seed {seed} (known: {known})")
    return [there[seed] for seed in seeds or there]


def of_seeds(runs: Sequence[Run], *, network: str | None = None) -> list[Member]:
    """Return the last kept network of every run; see `of_checkpoints`."""
    return [of_checkpoints(run, network=network)[-1] for run in runs]


def of_checkpoints(run: Run, *, network: str | None = None) -> list[Member]:
    """Return the network of one run at every update at which it was kept.

    Args:
        run: The run.
        network: Which; by default what the task evaluates, the average where there is one.

    Raises:
        StoreError: it keeps no weights, or they are damaged.
    """
    evaluated = "ema" if "ema" in weights.load(run) else "model"
    return [Member(run, update, network or evaluated) for update in weights.kept(run)]


def evaluate(
    members: Sequence[Member], split: str = "validation", *, k: float = 2.0, device: str = "cpu"
) -> EnsembleReport:
    """Return what the members and their ensemble are on a split of their data.

    Args:
        members: At least one, all different and of one dataset.
        split: "validation", or "test", which is to be read once.
        k: A backward's time in forwards, as `repeatlab measure` finds it, for `cost_units`.
        device: Where the networks run.

    Raises:
        ValueError: a task without classes, members of different data, no such network or split.
        StoreError: a run keeps no weights, or they are damaged.
    """
    if not members:
        raise ValueError("an ensemble needs at least one member")
    if split not in ("validation", "test"):
        raise ValueError(f"split must be 'validation' or 'test', not {split!r}")
    if len(set(members)) < len(members):
        raise ValueError("members must differ: one that is there twice counts twice")
    datasets = {_config(member.run).task.dataset for member in members}
    if len(datasets) > 1:
        raise ValueError(f"members must be of one dataset, not of {', '.join(sorted(datasets))}")
    every, data = member_log_probabilities(members, split, device=device)
    labels = data.labels.cpu()
    together = mean_log_probabilities(every)
    ledgers = {member.run.path: _ledger(member.run) for member in members}
    rows = {
        str(member): _scores(found, labels) | _cost([ledgers[member.run.path]], k) | {"networks": 1}
        for member, found in zip(members, every, strict=True)
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.loc["mean of members"] = table.mean()
    row = _scores(together, labels) | _cost(ledgers.values(), k) | {"networks": len(members)}
    table.loc["ensemble"] = row
    table = table.astype({"updates": float, "networks": int})
    return EnsembleReport(table, together.numpy())


def member_log_probabilities(
    members: Sequence[Member], split: str, *, device: str = "cpu"
) -> tuple[Tensor, ImageSet]:
    """Return every member's log-probabilities, float64 (members, samples, classes), and the data.

    "train" means the whole train split here, not augmented. See `evaluate` for the errors.
    """

    @cache  # the data are loaded once
    def built(config: Any) -> Any:
        return load_task(TASKS[config.name])(config, seed=0, device=device)

    tasks = [built(_config(member.run).task) for member in members]
    found = [_log_probabilities(*pair, split) for pair in zip(tasks, members, strict=True)]
    return torch.stack(found), getattr(tasks[0].data, split)


def mean_log_probabilities(members: Tensor) -> Tensor:
    """Return the logarithm of the members' mean probabilities.

    Args:
        members: (members, samples, classes) of log-probabilities.
    """
    return members.logsumexp(0) - log(len(members))


def distilled_task(config: RunConfig, teachers: Sequence[Run], *, device: str) -> Task:
    """Return the task of a distilled run, with what its teachers say of every training image.

    The soft targets are the mean of the teachers' distributions at the temperature. All that the
    teachers, ordinary runs (`prerequisites.teacher_runs`), cost is charged to the run.
    """
    start = perf_counter()
    settings = config.method.distillation
    log_probabilities, data = member_log_probabilities(of_seeds(teachers), "train", device=device)
    targets = (log_probabilities / settings.temperature).softmax(2).mean(0)
    spent = Counter()
    for run in teachers:
        spent.update(spent_on("holdout", run.summary["ledger"]))
    spent["holdout_forward_samples"] += len(teachers) * len(data)
    spent["holdout_seconds"] += perf_counter() - start
    task = Distilled(config.task, seed=config.stream_seed, device=device)
    task.imitate(targets, temperature=settings.temperature, share=settings.share, spent=spent)
    return task


@torch.no_grad()
def _log_probabilities(task: Any, member: Member, split: str) -> Tensor:
    """Return float64 (samples, classes) on the CPU."""
    networks, kept = weights.networks(task), weights.load(member.run, member.update)
    if member.network not in kept:
        raise ValueError(
            f"{member.run.path} keeps no network {member.network!r} (known: {', '.join(kept)})"
        )
    network = networks[member.network]
    network.load_state_dict(kept[member.network])
    network.eval()
    data = getattr(task.data, split)
    batches = iter_batches(data, EVALUATION_BATCH, task.data.mean, task.data.std)
    logits = torch.cat([task.precision(network, batch.images) for batch in batches])
    return logits.cpu().double().log_softmax(1)


def _config(run: Run) -> RunConfig:
    config = RunConfig.from_json(run.config)
    if config.task.name not in CLASSIFIERS:
        raise ValueError(
            f"the task of an ensemble must be {' or '.join(CLASSIFIERS)}, whose networks give "
            f"probabilities of classes; not {config.task.name}"
        )
    if config.task.split == "by_seed":
        raise ValueError(
            "task.split: by_seed makes no ensembles: each member validates on images "
            "that others were trained on"
        )
    return config


def _ledger(run: Run) -> Ledger:
    if not run.done:
        raise ValueError(f"{run.path} is not done: what it costs is not known")
    return Ledger(**run.summary["ledger"])


def _scores(log_probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    right = log_probabilities.argmax(1) == labels
    nll = -log_probabilities.gather(1, labels.unsqueeze(1)).mean()
    return {"accuracy": right.double().mean().item(), "nll": nll.item()}


def _cost(ledgers: Iterable[Ledger], k: float) -> dict[str, float]:
    """Return what these runs cost together."""
    spent = Counter()
    for ledger in ledgers:
        updates, seconds = (
            sum(getattr(ledger, part + column) for part in PARTS)
            for column in ("updates", "seconds")
        )
        spent.update(updates=updates, cost_units=ledger.cost_units(k), seconds=seconds)
    return dict(spent)
