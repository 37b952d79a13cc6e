"""What a check found, as a row of a table, and all checks of a task together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from repeatlab.core.html_view import rows_table

Verdict = Literal["pass", "warn", "fail", "not applicable"]


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        name: The check.
        verdict: "warn" is worth a look, "fail" is a reason not to train.
        numbers: What was measured, and what it is held against.
        note: What to look at when it fails; for a check that does not apply, why.
    """

    name: str
    verdict: Verdict
    numbers: Mapping[str, float | str] = field(default_factory=dict)
    note: str = ""

    @property
    def found(self) -> str:
        """The numbers, and where something is wrong what to look at; or why it does not apply."""
        if self.verdict == "not applicable":
            return self.note
        numbers = [f"{name} {_short(value)}" for name, value in self.numbers.items()]
        advice = f"; look at: {self.note}" if self.verdict in ("warn", "fail") else ""
        return ", ".join(numbers) + advice


@dataclass(frozen=True, repr=False)
class Report:
    """The checks of one task, in the order in which they were made.

    Attributes:
        title: What was checked.
        results: One for each check.
        seen: What the network sees: name to uint8 images (n, height, width[, 3]), for
            `figures.picture_grid`; empty where it sees no images.
    """

    title: str
    results: tuple[Result, ...]
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(result.name for result in self.results if result.verdict == "fail")

    def __getitem__(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)

    def __repr__(self) -> str:
        rows = (f"{r.name:<16}{r.verdict:<16}{r.found}" for r in self.results)
        return "\n".join([f"{self.title}: {self._count()}", *rows])

    def _count(self) -> str:
        return f"failed: {', '.join(self.failed)}" if self.failed else "no check failed"

    def _repr_html_(self) -> str:
        rows = {f"{result.name}: {result.verdict}": result.found for result in self.results}
        return rows_table({self.title: self._count()} | rows)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the most serious of "pass", "warn" and "fail"."""
    return max(verdicts, key=("pass", "warn", "fail").index)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
