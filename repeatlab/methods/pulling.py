"""What N can do besides N plain updates: repeats that are held near the weights of the first visit.

With w_0 a batch's weights at its first visit, whose update is an ordinary one, and L its loss:

| way            | what a repeat descends                                  | with                |
|----------------|---------------------------------------------------------|---------------------|
| `proximal`     | L(w) + strength / 2 |w - w_0|^2                          | the run's optimizer |
| `conservative` | 1/2 (L(w) - limit)^2 + epsilon / (2 n) |w - w_0|^2, with | plain steps of zeta |
|                | n weights, while L is above the limit of its mapping    |                     |

This module never imports torch: a configuration is read without it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any


class Pull:
    """Base of the ways; fields must be positive and finite."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive, finite number, not {value!r}")


@dataclass(frozen=True)
class Proximal(Pull):
    """Proximal echo (Agarwal et al. 2020, arXiv 2010.13639), its subproblem solved by N updates.

    Attributes:
        strength: 1 / eta of the proximal step: large keeps w near w_0, 0 would be plain repetition.
    """

    strength: float = 1.0

    def apply(self, weight: Any, first: Any, excess: Any, count: int) -> None:
        """Turn the gradient of L at a weight into that of what is descended.

        Args:
            weight: A tensor with its gradient.
            first: w_0, likewise.
            excess: 0-d, L - limit, where the mapping has one.
            count: n.
        """
        weight.grad.add_(weight - first, alpha=self.strength)


@dataclass(frozen=True)
class Conservative(Pull):
    """The subproblem of ISGD (Wang et al. 2016, arXiv 1603.05544): for the mapping `until_limit`.

    A visit that finds the loss at its limit or below ends the batch and moves nothing.

    Attributes:
        zeta: The constant learning rate of the extra updates, which no schedule moves.
        epsilon: Of the pull to w_0.
    """

    zeta: float = 0.01
    epsilon: float = 0.1

    def apply(self, weight: Any, first: Any, excess: Any, count: int) -> None:
        """Move a weight, and leave nothing to the run's optimizer; see `Proximal`."""
        step = excess * weight.grad + self.epsilon / count * (weight - first)
        weight.sub_(self.zeta * (excess > 0) * step)
        weight.grad = None


PULLS: dict[str, type[Pull]] = {"proximal": Proximal, "conservative": Conservative}
