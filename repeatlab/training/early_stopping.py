"""When a run has stopped getting better: patience over its evaluations.

The rule of most libraries, "UP" with s = 1 and a patience in Prechelt 1998 ("Early stopping, but
when?"): the run ends with the evaluation that is the `patience`-th in a row without a new best. A
new best is better than the last one by more than `min_delta`; the evaluation before the first
update is the first best. A metric that is not a number is never one. A batch whose visits the end
cuts short keeps in the record the N that was planned.

A run is tested with the weights at its end unless `restore_best` says otherwise. That is the
default because it is how runs without this rule are read: after what they have spent. The best of
many looks at the validation split is a choice by that split: it flatters what is read there, and
most of all the arm with the roughest curve, which may be a repeating one. Restoring is fair to the
test split, which has no part in the choice, where all arms are evaluated at the same updates.
Restored weights decide the final metrics and the test split alone: curves, and comparisons at equal
updates or cost (`repeatlab.analysis.paired_differences`) with the verdicts, read what a run was
on its way.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import Annotated, Any, Literal

from pydantic import Field

from repeatlab.core.schema import Model


class EarlyStopping(Model):
    """The rule: a run without a new best for a while ends before T."""

    patience: Annotated[int, Field(ge=1)]
    """Evaluations in a row without a new best that end the run."""
    metric: str = "loss"
    """Of the validation split."""
    mode: Literal["min", "max"] = "min"
    """Whether less of the metric is better, or more."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A new best exceeds the last one by more than this."""
    restore_best: bool = False
    """Whether the run ends with the weights of its best evaluation, stopped early or not: with them
    it is tested, the final metrics are theirs, and `evaluation.keep` keeps the last new bests."""


class Patience:
    """What the rule has seen of one run.

    Attributes:
        best: The best value; None before the first.
        best_update: After how many updates it was seen.
        waited: Evaluations since.
    """

    def __init__(self, rule: EarlyStopping) -> None:
        self.rule = rule
        self.best: float | None = None
        self.best_update = 0
        self.waited = 0

    @property
    def at_best(self) -> bool:
        """Whether the last evaluation was a new best."""
        return self.best is not None and self.waited == 0

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return self.waited >= self.rule.patience

    def see(self, update: int, metrics: Mapping[str, float]) -> None:
        """Take in the validation metrics after so many updates.

        Raises:
            ValueError: the rule's metric is not among them.
        """
        if self.rule.metric not in metrics:
            raise ValueError(
                f"evaluation.early_stopping.metric: the validation split has no metric "
                f"{self.rule.metric!r} (known: {', '.join(sorted(metrics))})"
            )
        value = float(metrics[self.rule.metric])
        if self._is_better(value):
            self.best, self.best_update, self.waited = value, update, 0
        else:
            self.waited += 1

    def _is_better(self, value: float) -> bool:
        if isnan(value) or self.best is None:
            return not isnan(value)
        gain = value - self.best if self.rule.mode == "max" else self.best - value
        return gain > self.rule.min_delta

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs."""
        return {"best": self.best, "best_update": self.best_update, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`."""
        for name in ("best", "best_update", "waited"):
            setattr(self, name, state[name])
