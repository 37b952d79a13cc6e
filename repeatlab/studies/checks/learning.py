"""Whether a task starts where it should, and what its updates make of twenty samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from repeatlab.studies.checks.probe import Probe, Subject
from repeatlab.studies.checks.report import Result, Verdict, worst

BATCHES = 4  # over which first losses are averaged
MEMORY = 20  # samples
MEMORY_UPDATES = 3000
NEAR_ZERO = 0.05  # of the first loss
DIVERGED = 100  # times the first loss
# Of the learning rate, where a batch cannot be learnt at the task's own.
FACTORS = {10: "low", 0.1: "high"}
WINDOW = 10  # losses averaged: where noise is redrawn, one may be low by chance
DECAY, DECAYED_UPDATES = 1.0, 100


def initial_loss(subject: Subject) -> Result:
    """Hold each optimizer's first loss, in training mode, against what theory says of it.

    A warning outside the tolerance, a failure outside twice that or below 0.
    """
    if isinstance(subject.expected.initial, str):
        return Result("initial loss", "not applicable", note=subject.expected.initial)
    task = subject.build()
    found, theory = [], []
    for index in range(BATCHES):
        batch = task.fresh_batch(index)
        found.append(Probe(task, batch).evaluate().objectives)
        theory.append(subject.expected.initial(task, batch))
    numbers: dict[str, float | str] = {}
    verdicts: list[Verdict] = []
    for name, loss in zip(theory[0], np.mean(found, axis=0), strict=True):
        value, tolerance = np.mean([of_batch[name] for of_batch in theory], axis=0)
        numbers |= {name: float(loss), f"{name} by theory": float(value)}
        off = abs(loss - value) / tolerance
        verdicts.append("pass" if off <= 1 else "warn" if off <= 2 and loss >= 0 else "fail")
    note = (
        "the sign and the reduction (mean or sum) of the loss, the scale of the first weights, the "
        "number of outputs, the scale of the inputs"
    )
    return Result("initial loss", worst(verdicts), numbers, note)


def overfitting(subject: Subject) -> Result:
    """Learn twenty samples by heart, with the task's own optimizer, on a batch that never changes.

    Until the loss is a twentieth of the first. A warning where that takes ten times the learning
    rate, or a tenth of it.
    """
    if isinstance(subject.expected.memory, str):
        return Result("overfitting", "not applicable", note=subject.expected.memory)
    losses = _learn_by_heart(subject, {})
    verdict: Verdict = "pass" if _learnt(losses) else "fail"
    note = (
        "the learning rate; whether loss and labels belong together, whether the output can take "
        "every value needed, whether some part does not learn"
    )
    for factor, what in FACTORS.items() if verdict == "fail" else ():
        others = _learn_by_heart(subject, {"lr": factor * subject.config.lr})
        if _learnt(others):
            verdict, losses = "warn", others
            note = (
                f"the learning rate, {what} for one batch, which is learnt at {factor} times it; "
                "nothing is to be mended where it was chosen by the validation loss"
            )
            break
    numbers = {"first loss": losses[0], "last": _last(losses), "updates": len(losses)}
    return Result("overfitting", verdict, numbers, note)


def _learn_by_heart(
    subject: Subject, changes: Mapping[str, Any], updates: int | None = None
) -> list[float]:
    """Return the driver losses on one small batch until it is learnt, or of so many updates."""
    task, losses = subject.quiet(MEMORY, changes), []
    memory = subject.expected.memory
    batch = task.fresh_batch(0)
    batch = batch if isinstance(memory, str) else memory(batch)
    while len(losses) < (updates or MEMORY_UPDATES):
        task.step(batch, lambda loss, *others: losses.append(loss.item()))
        if not losses[-1] <= DIVERGED * losses[0] or (updates is None and _learnt(losses)):
            break
    return losses


def _last(losses: list[float]) -> float:
    return float(np.mean(losses[-WINDOW:]))


def _learnt(losses: list[float]) -> bool:
    return _last(losses) <= NEAR_ZERO * losses[0]


def regularisation(subject: Subject) -> Result:
    """See whether the regulariser raises the loss of twenty samples that are learnt by heart.

    Weight decay, if the task has an optimizer of its choice; else a part of the driver.
    """
    without, having = subject.expected.penalty, {}
    if without is None and hasattr(subject.config, "optimizer"):
        decaying = subject.config.optimizer.model_copy(update={"weight_decay": DECAY})
        without, having = {}, {"optimizer": decaying}  # by itself a quiet task has none
    if not isinstance(without, Mapping):
        why = without or "it has no optimizer of its choice"
        return Result("regularisation", "not applicable", note=why)
    low, high = (
        _last(_learn_by_heart(subject, changes, DECAYED_UPDATES)) for changes in (without, having)
    )
    note = "whether the setting reaches the optimizer, or the penalty the loss, and with which sign"
    numbers = {"loss without": low, "with": high}
    return Result("regularisation", "pass" if high > low else "fail", numbers, note)
