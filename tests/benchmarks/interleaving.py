"""Loops that take turns, so that what they take can be compared where the machine is not steady."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TypeVar

from repeatlab.core.stopwatch import Stopwatch
from repeatlab.training.one_run import Training

T = TypeVar("T")
# What makes some updates, yields, and goes on when it has the turn again; at its end it returns.
Turns = Generator[None, None, T]


def in_turns(loops: Mapping[str, Turns[T]]) -> dict[str, T]:
    """Let loops go on in turn, and return what each of them returns."""
    returned, going = {}, dict(loops)
    while going:
        for name, loop in list(going.items()):
            try:
                next(loop)
            except StopIteration as end:
                returned[name] = end.value
                del going[name]
    return returned


def train_in_turns(training: Training, stopwatch: Stopwatch, *, turn: int) -> Turns[None]:
    """Run a training, `turn` updates at a time; its clock, `stopwatch`, stands between them."""
    with stopwatch.running():
        training.begin()
        visit = training.visit()
        for number, batch in enumerate(training.visits(), 1):
            visit(batch)
            if number % turn == 0:
                with stopwatch.standing():
                    yield
        training.end()
