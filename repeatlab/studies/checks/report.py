"""What a check found, as a row of a table, and all checks of a task together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import numpy as np

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
        """The numbers in one line; instead of them, why the check does not apply."""
        if self.verdict == "not applicable":
            return self.note
        return ", ".join(f"{name} {_short(value)}" for name, value in self.numbers.items())

    @property
    def advice(self) -> str:
        """What to look at; nothing where all is well."""
        return self.note if self.verdict in ("warn", "fail") else ""

    def __str__(self) -> str:
        row = f"{self.name:<16}{self.verdict:<16}{self.found}"
        return f"{row}\n{'':<16}look at: {self.advice}" if self.advice else row

    def _repr_html_(self) -> str:
        return _table([self])


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

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __repr__(self) -> str:
        return "\n".join([f"{self.title}: {self._count()}", *map(str, self.results)])

    def _count(self) -> str:
        return f"failed: {', '.join(self.failed)}" if self.failed else "no check failed"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.title)}: {escape(self._count())}</p>" + _table(self.results)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the most serious of "pass", "warn" and "fail"."""
    return max(verdicts, key=("pass", "warn", "fail").index)


def _table(results: Iterable[Result]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("check", "verdict", "found", "look at"))
    rows = (
        "".join(f"<td>{escape(cell)}</td>" for cell in (r.name, r.verdict, r.found, r.advice))
        for r in results
    )
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
