"""What a search found: its trials, the best of them, what it cost and what to be wary of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from repeatlab.studies.search.space import Point, Space

# What a run's ledger says of the models that its sampler trained beforehand is added.
_ADDED = {
    "updates": "holdout_updates",
    "forward_samples": "holdout_forward_samples",
    "backward_samples": "holdout_backward_samples",
    "scoring_samples": None,
    "environment_steps": None,
    "seconds": "holdout_seconds",
}


def cost_of(
    ledger: Mapping[str, float], teachers: Sequence[Mapping[str, float]] = ()
) -> dict[str, float]:
    """Return what one run has spent, without what are runs of their own: calibration and teachers.

    Args:
        ledger: The run's.
        teachers: Those of the runs that it was distilled from.
    """
    spent = {name: ledger.get(name, 0) + ledger.get(more, 0) for name, more in _ADDED.items()}
    charged = [name for name, more in _ADDED.items() if more]
    return spent | {name: spent[name] - sum(t.get(name, 0) for t in teachers) for name in charged}


@dataclass(frozen=True)
class Trial:
    """One trial and what became of it.

    Attributes:
        number: Counts from 0.
        params: Dotted paths and the values tried.
        status: "complete", "diverged" or "failed"; "open" where nothing has been made of it.
        value: Mean of the metric over seeds; None unless complete.
        reason: Why it is not complete, such as "diverged at update 7 (seed 0)".
        runs: Ids of its runs, seed by seed.
        costs: Run id to what that run has spent, its calibration runs included.
    """

    number: int
    params: Point
    status: str = "open"
    value: float | None = None
    reason: str = ""
    runs: list[str] = field(default_factory=list)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchReport:
    """The result of a search.

    Attributes:
        metric: What the trials are valued by, such as "validation.loss".
        direction: "minimize" or "maximize".
        space: Where the search looked.
        trials: All trials, by number.
        trained: How many runs were trained now; the others were in the store.
    """

    metric: str
    direction: str
    space: Space
    trials: tuple[Trial, ...]
    trained: int = 0

    @cached_property
    def best(self) -> Trial | None:
        """The complete trial with the best value, the first of equals; None without any.

        Its value is the best of many and so flatters: train anew, with other seeds, to report one.
        """
        sign = 1 if self.direction == "minimize" else -1
        complete = [trial for trial in self.trials if trial.status == "complete"]
        return min(complete, key=lambda trial: (sign * trial.value, trial.number), default=None)

    @cached_property
    def warnings(self) -> list[str]:
        """One line for each of the best values that lies on the boundary of where was looked."""
        if self.best is None:
            return ["no trial is complete: there is no best one"]
        ends = {p: self.space[p].boundary(value) for p, value in self.best.params.items()}
        return [
            f"the best {path}, {self.best.params[path]}, lies at the {end} end of what was searched"
            f" ({self.space[path]}): look further there"
            for path, end in ends.items()
            if end is not None
        ]

    @cached_property
    def cost(self) -> dict[str, float]:
        """The runs of all trials, and the sums of their ledgers.

        Diverged trials and calibration runs count; a run that several trials share counts once,
        and one that the store had before counts too.
        """
        runs = {run: cost for trial in self.trials for run, cost in trial.costs.items()}
        sums = {name: sum(cost[name] for cost in runs.values()) for name in _ADDED}
        return {"runs": len(runs)} | sums

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per trial: trial, the values tried, the metric, status."""
        rows = [
            {"trial": t.number, **t.params, self.metric: t.value, "status": _status(t)}
            for t in self.trials
        ]
        return pd.DataFrame(rows, columns=["trial", *self.space, self.metric, "status"])

    def to_json(self) -> dict[str, Any]:
        """Return metric, best, warnings, cost and all trials as JSON-safe values."""
        return {
            "metric": self.metric,
            "direction": self.direction,
            "best": self.best and asdict(self.best),
            "warnings": self.warnings,
            "cost": self.cost,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def __str__(self) -> str:
        shown = self.table.astype(object).map(_short)
        lines = [shown.to_string(index=False)]
        if self.best is not None:
            values = ", ".join(f"{path} = {value}" for path, value in self.best.params.items())
            lines.append(f"best: trial {self.best.number} with {self.metric} {self.best.value:.6g}")
            lines.append(f"  {values}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        cost = self.cost
        lines.append(
            f"cost: {len(self.trials)} trials, {cost['runs']} runs, {cost['updates']} updates, "
            f"{cost['forward_samples']} forward samples, {cost['seconds']:.1f} s of training "
            f"({self.trained} runs trained now)"
        )
        return "\n".join(lines)


def _status(trial: Trial) -> str:
    if trial.status == "failed":
        return f"failed: {trial.reason}"
    return trial.reason or trial.status


def _short(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
