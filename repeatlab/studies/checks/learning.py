"""Whether a task starts where it should, and whether its updates go where they should."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from repeatlab.studies.checks.probe import (
    BURN_IN,
    Probe,
    Subject,
    burn_in,
    double_precision,
    trained,
)
from repeatlab.studies.checks.report import Result, Verdict, worst
from repeatlab.tasks import Task

BATCHES = 4  # over which first losses are averaged
SMALL_RATE = 0.01  # of the task's own: only the direction is judged
MEMORY = 20  # samples
MEMORY_UPDATES = 3000
DIVERGED = 100  # times the first loss
# Of the learning rate, where a batch cannot be learnt at the task's own.
FACTORS = {
    10: "low for one batch: it is learnt at ten times this rate, and not at this one",
    0.1: "high for one batch: it is learnt at a tenth of this rate, and not at this one; there is "
    "nothing to mend where the rate is chosen by the validation loss",
}
WINDOW = 10  # losses averaged: where noise is redrawn, one may be low by chance
DECAY = 1.0
RATIO_UPDATES = 10
# Whose first update moves a weight by lr weight_decay w more than without a decay.
PULLING = ("sgd", "momentum", "nesterov", "adamw")
# DCGAN's recipe makes 1e-2: steps of 2e-4 on weights of 0.02.
RATIOS = {"pass": (3e-5, 3e-2), "warn": (3e-6, 3e-1)}


def initial_loss(subject: Subject) -> Result:
    """Hold each optimizer's first loss, in training mode, against what theory says of it.

    A warning outside the tolerance, a failure outside twice that or below 0.
    """
    if isinstance(subject.expected.initial, str):
        return Result("initial loss", "not applicable", note=subject.expected.initial)
    task = subject.build()
    found, expected = [], []
    for index in range(BATCHES):
        batch = task.fresh_batch(index)
        found.append(Probe(task, batch).evaluate().objectives)
        expected.append(subject.expected.initial(task, batch))
    numbers: dict[str, float | str] = {}
    verdicts: list[Verdict] = []
    for which, loss in enumerate(np.mean(found, axis=0)):
        theory = [batch[which] for batch in expected]
        value, tolerance = np.mean([(e.value, e.tolerance) for e in theory], axis=0)
        name = theory[0].name
        numbers |= {name: float(loss), f"{name} by theory": float(value)}
        off = abs(loss - value) / tolerance
        inside = loss >= 0 and off <= 2
        verdicts.append(("pass" if off <= 1 else "warn") if inside else "fail")
    note = (
        "the sign and the reduction (mean or sum) of the loss, the scale of the first weights, the "
        "number of outputs, the scale of the inputs"
    )
    return Result("initial loss", worst(verdicts), numbers, note)


def descent(subject: Subject) -> Result:
    """Make one small update, and see whether the loss on its batch falls.

    In float64, at a hundredth of the rate, without momentum from before. With one optimizer it is
    the reported driver that must fall; with several, each one's own loss when only its own weights
    move.
    """
    with double_precision(subject) as probe:
        task = probe.task
        for optimizer in task.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= SMALL_RATE
        probe = Probe(task, probe.batch)
        before, after = probe.evaluate(gradients=True), probe.step()
        numbers, fell = {}, []
        for which, gradients in enumerate(before.gradients):
            weights = [w for w in trained(task).values() if id(w) in gradients]
            slope = sum((gradients[id(w)] * (after[id(w)] - w.detach())).sum() for w in weights)
            reached = probe.evaluate(partial(_move, weights, after))
            if len(before.gradients) == 1:
                change, loss = reached.driver - before.driver, ""
            else:
                change = reached.objectives[which] - before.objectives[which]
                loss = f" of loss {which + 1}"
            numbers |= {f"change{loss}": change, f"to first order{loss}": float(slope)}
            fell.append(change < 0)
    note = (
        "signs: the loss, a custom backward pass, an optimizer that maximizes; that the loss "
        "reported is the one descended; that the optimizer holds these weights"
    )
    return Result("descent", "pass" if all(fell) else "fail", numbers, note)


def _move(weights: Sequence[Tensor], to: Mapping[int, Tensor]) -> None:
    for weight in weights:
        weight.copy_(to[id(weight)])


def updates(subject: Subject) -> Result:
    """Relate the size of an update to that of the weights, for every matrix and kernel.

    Around 1e-3 is usual. The median over tensors, each the mean over ten updates after a short
    burn-in, is fine within a factor of 30 of that, a failure beyond 300. A weight tensor of which
    no number moves at all is a failure.
    """
    task = subject.build()
    first = _weights(task)
    burn_in(task)
    ratios: dict[str, list[float]] = {name: [] for name in first if first[name].ndim > 1}
    for index in range(BURN_IN, BURN_IN + RATIO_UPDATES):
        before = _weights(task)
        task.step(task.fresh_batch(index), lambda *losses: None)
        after = _weights(task)
        for name, of_one in ratios.items():
            moved = (after[name] - before[name]).norm() / before[name].norm()
            of_one.append(moved.item())
    means = [float(np.mean(values)) for values in ratios.values()]
    median = float(np.median(means))
    numbers = {"median": median, "lowest": min(means), "highest": max(means)}
    still = [name for name, weight in _weights(task).items() if weight.equal(first[name])]
    verdict = next((v for v, (low, high) in RATIOS.items() if low <= median <= high), "fail")
    if still:
        verdict, numbers = "fail", numbers | {"never moved:": " ".join(still)}
    return Result("updates", verdict, numbers, _about_updates(median, still))


def _about_updates(median: float, still: Sequence[str]) -> str:
    """Return what to look at where the size of updates is not as usual."""
    if still:
        return "weights that never move: requires_grad, the optimizer's list, a detach"
    if median > RATIOS["pass"][1]:
        return (
            "the learning rate, high for these weights (1e-3 is usual): whether the loss jumps or "
            "ends above its least; where it falls steadily, as at a rate chosen by the validation "
            "loss for a run of few updates, there is nothing to mend"
        )
    return (
        "the learning rate, low for these weights (1e-3 is usual): whether the loss falls at all "
        "within the budget; a loss or an input scaled down"
    )


def overfitting(subject: Subject) -> Result:
    """Learn twenty samples by heart, with the task's own optimizer, on a batch that never changes.

    A warning where that takes ten times the learning rate, or a tenth of it.
    """
    goal = subject.expected.goal
    if isinstance(goal, str):
        return Result("overfitting", "not applicable", note=goal)
    note = (
        "the learning rate; whether loss and labels belong together, whether the output can take "
        "every value needed, whether some part does not learn"
    )
    reached, numbers = _learn_by_heart(subject, goal, factor=1)
    if reached:
        return Result("overfitting", "pass", numbers, note)
    for factor, what in FACTORS.items():
        reached, others = _learn_by_heart(subject, goal, factor=factor)
        if reached:
            return Result("overfitting", "warn", others, f"the learning rate, {what}")
    return Result("overfitting", "fail", numbers, note)


def _learn_by_heart(
    subject: Subject, goal: Callable[[Any, Any, float], float], *, factor: float
) -> tuple[bool, dict[str, float]]:
    """Return whether a batch could be learnt at `factor` times the learning rate, and how far."""
    task = subject.quiet(MEMORY, {"lr": factor * subject.config.lr})
    batch = subject.expected.memory(task.fresh_batch(0))
    losses = [_update(task, batch)]
    aim = goal(task, batch, losses[0])
    while np.mean(losses[-WINDOW:]) > aim and len(losses) < MEMORY_UPDATES:
        losses.append(_update(task, batch))
        if not losses[-1] <= DIVERGED * losses[0]:
            break
    last = float(np.mean(losses[-WINDOW:]))
    numbers = {
        "first loss": losses[0],
        "last": last,
        "goal": aim,
        "updates": len(losses),
        "samples": len(batch.indices),
    }
    return last <= aim, numbers


def regularisation(subject: Subject) -> Result:
    """See whether the regulariser raises the loss that is descended.

    Weight decay shows in the first update alone, as the pull of every matrix and kernel towards 0
    that an update without decay does not have: the decay that an update has made, times half the
    squared weights, is what it adds to the loss. Another penalty: the driver after a short burn-in,
    against the driver without it.
    """
    note = "whether the setting reaches the optimizer, or the penalty the loss, and with which sign"
    if getattr(getattr(subject.config, "optimizer", None), "name", None) in PULLING:
        found, numbers = _decay(subject)
    elif not isinstance(subject.expected.penalty, str):
        found = [_after_burn_in(subject, changes) for changes in (subject.expected.penalty, {})]
        numbers = {}
    else:
        return Result("regularisation", "not applicable", note=subject.expected.penalty)
    numbers |= {"loss without": found[0], "with": found[1]}
    fine = found[1] > found[0] and numbers.get("least decay seen", 1.0) > 0
    return Result("regularisation", "pass" if fine else "fail", numbers, note)


def _decay(subject: Subject) -> tuple[list[float], dict[str, float]]:
    """Return the first loss without and with a decay, and the decays that the updates show."""
    after = []
    for decay in (0.0, DECAY):
        optimizer = subject.config.optimizer.model_copy(update={"weight_decay": decay})
        task = subject.quiet(MEMORY, {"optimizer": optimizer})
        first = _weights(task)
        loss = _update(task, task.fresh_batch(0))
        after.append(_weights(task))
    seen, penalty = [], 0.0
    for name, weight in first.items():
        moves = not after[0][name].equal(weight) or not after[1][name].equal(weight)
        if weight.ndim > 1 and moves:
            square = weight.square().sum().item()
            pull = ((after[0][name] - after[1][name]) * weight).sum().item()
            seen.append(pull / square / subject.config.lr)
            penalty += seen[-1] * square / 2
    decays = {"decay": DECAY, "least decay seen": min(seen), "largest": max(seen)}
    return [loss, loss + penalty], decays


def _weights(task: Task) -> dict[str, Tensor]:
    """Return copies of a task's trained weights, by name."""
    return {name: weight.detach().clone() for name, weight in trained(task).items()}


def _update(task: Task, batch: Any) -> float:
    """Make one update and return its driver loss."""
    driver: list[float] = []
    task.step(batch, lambda loss, *others: driver.append(loss.item()))
    return driver[0]


def _after_burn_in(subject: Subject, changes: Mapping[str, Any]) -> float:
    task = subject.quiet(MEMORY, changes)
    burn_in(task)
    return Probe(task, task.fresh_batch(BURN_IN)).evaluate().driver
