"""Whether backpropagation gives the derivative of the loss: central differences in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import isnan, nan
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repeatlab.core.seeding import generator
from repeatlab.studies.checks.probe import Probe, Subject, double_precision, trained
from repeatlab.studies.checks.report import Result

STEPS = (1e-5, 1e-6, 1e-4)
FINE, WRONG = 1e-4, 1e-2
STEEPEST, RANDOM = 2, 3  # numbers of each tensor
ROUNDING = 100 * np.finfo(np.float64).eps  # of a loss, relative: it is a sum of many terms

NOTE = (
    "the backward pass of the layer named: a custom autograd function, a detach or no_grad in the "
    "wrong place, an in-place change, a weight that the loss does not reach"
)


class Comparison(NamedTuple):
    """One derivative, analytic against numeric.

    Attributes:
        error: |a - n| / max(|a|, |n|), 0 where both are below rounding; None at a kink.
        analytic: From backpropagation.
        numeric: By central differences.
    """

    error: float | None
    analytic: float
    numeric: float


def gradient(subject: Subject) -> Result:
    """Compare sampled derivatives of every weight tensor, each for its own optimizer's loss.

    A weight that no optimizer moves, or that is frozen, is a failure. After a short burn-in, on few
    samples, in float64, without weight decay and augmentation. What a loss takes
    for given (pseudo-labels, target networks, the other side of an adversarial pair)
    stays as it is but where a weight decides it, which then shows as a kink.

    Relative errors above 1e-2 are wrong, up to 1e-4 fine, 1e-7 is ideal. At a kink (a ReLU or a
    maximum that changes sides between x - h and x + h) the differences to both sides disagree, and
    the number is reported but not judged.
    """
    with double_precision(subject) as probe:
        compared = list(_comparisons(probe))
        names = {id(weight): name for name, weight in trained(probe.task).items()}  # each once
        unreached = set(names.values()) - {name for name, _ in compared}
    judged = [(name, found) for name, found in compared if found.error is not None]
    tensors = len({name for name, _ in compared})
    kinks = len(compared) - len(judged)
    numbers = {"derivatives": len(compared), "tensors": tensors, "kinks": kinks}
    if unreached or not judged:
        numbers |= {"without a derivative": " ".join(sorted(unreached))} if unreached else {}
        return Result("gradient", "fail" if unreached else "warn", numbers, NOTE)
    # A NaN is the worst of all.
    name, worst = max(judged, key=lambda one: (isnan(one[1].error), one[1].error))
    numbers = {"largest error": worst.error, "at": name, **numbers}
    if worst.error <= FINE:
        return Result("gradient", "pass", numbers, NOTE)
    numbers |= {"by backpropagation": worst.analytic, "by differences": worst.numeric}
    return Result("gradient", "warn" if worst.error <= WRONG else "fail", numbers, NOTE)


def _comparisons(probe: Probe) -> Iterator[tuple[str, Comparison]]:
    """Compare every sampled derivative, with the name of its weight."""
    analytic = probe.evaluate(gradients=True)
    names = {id(weight): name for name, weight in trained(probe.task).items()}
    for which, gradients in enumerate(analytic.gradients):
        for group in probe.task.optimizers[which].param_groups:
            for weight in group["params"]:
                gradient = gradients.get(id(weight))
                if gradient is None:  # frozen
                    continue
                name = names.get(id(weight), f"optimizer {which}")
                for place in _sample(gradient, name):
                    loss = partial(_loss, probe, which, weight, place)
                    slope = gradient[place].item()
                    yield name, compare(slope, analytic.objectives[which], loss)


def compare(analytic: float, middle: float, loss: Callable[[float], float]) -> Comparison:
    """Compare a derivative with central differences, over several widths h.

    Args:
        analytic: The derivative to be checked.
        middle: The loss at x.
        loss: From an offset to the loss at x + offset.
    """
    errors, numeric = [], nan
    for h in STEPS:
        above, below = loss(h), loss(-h)
        numeric = (above - below) / (2 * h)
        gap, size = abs(analytic - numeric), max(abs(analytic), abs(numeric))
        rounding = ROUNDING * max(1.0, abs(middle)) / h
        if gap <= rounding and size <= rounding / FINE:
            return Comparison(0.0, analytic, numeric)  # too small to be told any better
        error = gap / size
        if error <= FINE:
            return Comparison(error, analytic, numeric)
        # To one side of a kink the slope is the analytic one, so that the gap is half the jump of
        # the slope. Where the loss is smooth, the jump is h times its curvature.
        jump = abs((above - middle) / h - (middle - below) / h)
        if not jump > gap:
            errors.append(error)
    return Comparison(min(errors) if errors else None, analytic, numeric)


def _sample(gradient: Tensor, name: str) -> list[tuple[int, ...]]:
    """Return places in a tensor: where the gradient is steepest, and some at random."""
    steepest = gradient.abs().flatten().topk(min(STEEPEST, gradient.numel())).indices
    drawn = torch.randperm(gradient.numel(), generator=generator(0, f"places/{name}"))[:RANDOM]
    flat = sorted({*steepest.tolist(), *drawn.tolist()})
    return [tuple(map(int, np.unravel_index(place, gradient.shape))) for place in flat]


def _loss(probe: Probe, which: int, weight: Tensor, place: tuple[int, ...], offset: float) -> float:
    """Return the loss that optimizer `which` descends, with one number of a weight moved."""
    return probe.evaluate(lambda: weight[place].add_(offset)).objectives[which]
