"""How good a run is: its evaluations, whether they still get better, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repeatlab.tasks import Task
from repeatlab.training import weights
from repeatlab.training.config import EvaluationConfig
from repeatlab.training.early_stopping import Patience
from repeatlab.training.recorder import Recorder
from repeatlab.training.stand_ins import StandIn

Metrics = dict[str, dict[str, float]]  # by split and name


class Evaluator:
    """Evaluates one run, and keeps the weights that may be asked for.

    Args:
        settings: What is evaluated, and what is kept.
        recorder: Of the run.
        through: The task, or what stands for it, for evaluations.

    Attributes:
        last: The metrics of the last evaluation.
        patience: What early stopping has seen, where there is any.
        best: Weights and metrics of the best evaluation, where the run ends with it.
    """

    def __init__(
        self, settings: EvaluationConfig, recorder: Recorder, through: Task | StandIn
    ) -> None:
        self._settings, self._recorder = settings, recorder
        self._task, self._evaluate = recorder.task, through.evaluate
        rule = settings.early_stopping
        self.patience = Patience(rule) if rule else None
        self._restores = rule is not None and rule.restore_best
        self.last: Metrics = {}
        self.best: dict[str, Any] = {}

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.patience.exhausted

    def evaluate(self) -> None:
        """Evaluate every split, and keep these weights where they may be asked for."""
        splits, keep = self._settings.splits, self._settings.keep
        updates = self._recorder.ledger.updates
        self.last = {split: self._evaluate(split) for split in splits}
        if splits:
            self._recorder.evaluation(self.last)
        if self.patience is not None:
            self.patience.see(updates, self.last["validation"])
        kept = updates > 0
        if self._restores:
            kept = self.patience.at_best
            if kept:
                self.best = {"weights": weights.copied(self._task), "metrics": self.last}
        if keep and kept:
            weights.keep(self._recorder.directory, self._task, update=updates, last=keep)

    def final(self) -> Metrics:
        """Return the metrics at the end, test split included, with the weights that go with it."""
        final = dict(self.last)
        if self.best:
            weights.restore(self._task, self.best["weights"])
            final = dict(self.best["metrics"])
        if self._settings.test:
            final["test"] = self._evaluate("test")
            self._recorder.evaluation({"test": final["test"]})
        return final

    def early_stopping(self, *, complete: bool) -> dict[str, Any] | None:
        """Return what the rule has seen, for the run's summary; None without one."""
        seen = self.patience
        if seen is None:
            return None
        summary = {"stopped": seen.exhausted, "best": seen.best, "best_update": seen.best_update}
        if self._restores:
            summary["restored_update"] = seen.best_update if complete and self.best else None
        return summary

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs."""
        patience = self.patience.state_dict() if self.patience else None
        return {"last": self.last, "best": self.best, "patience": patience}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.last, self.best = state["last"], state["best"]
        if self.patience is not None:
            self.patience.load_state_dict(state["patience"])
