"""What theory says of each task before it is trained. A task that is not named has the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

# Fields that add noise or a penalty to a loss, and what they are where there is none.
QUIET = {
    "augment": False,
    "label_noise": 0.0,
    "label_smoothing": 0.0,
    "clip_norm": None,
    "precision": "float32",
    "compile": False,
}
# Of losses by name, what each should be and how far off it may be.
First = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Expectations:
    """What is known of a task; a `str` says why a check does not apply.

    Attributes:
        initial: From the task and a batch to what each optimizer's loss should be, by name, and how
            far off it may be; in the loss's own unit (nats but for TD losses).
        inputs: From a batch to what the networks see, by name; images are (b, c, h, w).
        scale: What the pipeline makes of numbers: mean 0 and deviation 1 ("standard"), [0, 1]
            ("unit"), [-1, 1] ("symmetric"), or anything of the order of 1 ("order").
        labelled: From a batch to images, their labels and their sample numbers.
        differentiable: Fields for the gradient check, so that every part of the loss has weight.
        memory: From a batch to the one that a network can learn by heart, to a loss near zero.
        penalty: Fields that take out of the driver what regularises; None where weights decay.
    """

    initial: Callable[[Any, Any], First] | str = "no first loss is stated for this task"
    inputs: Callable[[Any], dict[str, Tensor]] = field(default=lambda batch: _floats(batch))
    scale: Literal["standard", "unit", "symmetric", "order"] = "order"
    labelled: Callable[[Any], tuple[Tensor, Tensor, Tensor]] | str = "it learns from no labels"
    differentiable: Mapping[str, Any] = field(default_factory=dict)
    memory: Callable[[Any], Any] | str = "no lowest loss is stated for this task"
    penalty: Mapping[str, Any] | str | None = None


def _floats(batch: Any) -> dict[str, Tensor]:
    tensors = {k: v for k, v in batch._asdict().items() if isinstance(v, Tensor)}
    # FixMatch without unlabelled images has no views of them.
    return {k: v for k, v in tensors.items() if v.is_floating_point() and v.ndim > 1 and len(v)}


def _near(value: float, share: float) -> tuple[float, float]:
    """Return a value, and the share of it by which it may be off."""
    return value, share * value


def _equal_classes(task: Any, batch: Any) -> First:
    """ln(classes): all are equally likely. FixMatch's mask is empty at first.

    torch's linear layer gives logits of variance 1/3 on features of variance 1, which adds 1/6.
    """
    return {"loss": _near(log(task.data.classes), 0.15)}


def _no_values(task: Any, batch: Any) -> First:
    """The Huber loss of an agent that values everything at 0: of the rewards themselves.

    First values are small beside the largest return, whose loss is the tolerance.
    """
    nothing = torch.zeros_like(batch.returns)
    losses = smooth_l1_loss(nothing, batch.returns, reduction="none")
    return {"loss": (losses.mean().item(), max(losses.max().item(), 0.1))}


def _first_policy(task: Any, batch: Any) -> First:
    """The critic's error on its own returns, less the entropy ln 2 of two equal actions.

    The policy is still the rollout's, so that the surrogate is the mean of normalised advantages.
    """
    error = (batch.returns - batch.values).square().mean().item() / 2
    config = task.config
    return {"loss": (config.value_weight * error - config.entropy_weight * log(2), 1e-3)}


def _one_companion(batch: Any) -> Any:
    """Leave each labelled image one unlabelled one: it is the labels that are learnt by heart."""
    mu = len(batch.weak) // len(batch.labelled)
    columns = ("weak", "strong", "unlabelled") if mu else ()
    return batch._replace(**{name: getattr(batch, name)[::mu] for name in columns})


# Of a batch of `data.Batch`.
_LABELLED: dict[str, Any] = {
    "scale": "standard",
    "labelled": lambda batch: (batch.images, batch.labels, batch.indices),
    "memory": lambda batch: batch,
}
EXPECTATIONS: dict[str, Expectations] = {
    "supervised": Expectations(initial=_equal_classes, **_LABELLED),
    "semisupervised": Expectations(
        initial=_equal_classes,
        scale="standard",
        labelled=lambda batch: (batch.labelled, batch.labels, batch.indices),
        # Every pseudo-label counts: after a short burn-in none would.
        differentiable={"threshold": 0.0},
        memory=_one_companion,
    ),
    "selfsupervised": Expectations(
        # The partner is no more alike than any other view.
        initial=lambda task, batch: {"loss": _near(log(len(batch.views) - 1), 0.1)},
        inputs=lambda batch: dict(
            zip(("first views", "second views"), batch.views.chunk(2), strict=True)
        ),
        scale="standard",
        memory="its least loss is not near zero: other images stay",
    ),
    "reinforcement": Expectations(
        initial=_no_values,
        # The returns alone: bootstrapped targets would move with the network.
        memory=lambda batch: batch._replace(discounts=torch.zeros_like(batch.discounts)),
    ),
    "unsupervised": Expectations(
        # Every pixel at p = 0.5, and hardly any divergence from the prior.
        initial=lambda task, batch: {"loss": _near(batch.images[0].numel() * log(2), 0.05)},
        scale="unit",
        memory="its least loss is not near zero: grey pixels have an entropy",
        penalty={"driver": "reconstruction"},
    ),
    "generative": Expectations(
        # D says 1/2 of everything, within the noise of its first weights.
        initial=lambda task, batch: {
            "D's loss": _near(2 * log(2), 0.25),
            "G's loss": _near(log(2), 0.25),
        },
        scale="symmetric",
        memory="D and G move against each other: no loss falls to its lowest value",
        penalty="D and G move against each other: no loss is to rise",
    ),
    "continual": Expectations(
        initial="it has learnt never to give the second half's labels", **_LABELLED
    ),
    "noisy_labels": Expectations(
        initial=_equal_classes,
        # The corrected loss, with a w that is no function of the network's weights.
        differentiable={"warm_up": 0, "per_sample": False},
        **_LABELLED,
    ),
    "ppo": Expectations(
        initial=_first_policy,
        memory="the policy's part has no least loss that is known",
        penalty="the policy's part is 0 at first and falls below it",
    ),
    "single_index": Expectations(
        # First outputs are small beside the targets.
        initial=lambda task, batch: {"loss": _near(batch.targets.square().mean().item(), 0.1)},
        labelled="its targets are numbers, not classes",
        memory=lambda batch: batch,
    ),
    "language": Expectations(
        initial=_equal_classes,
        memory="its least loss is not near zero: texts that begin alike go on differently",
    ),
}
