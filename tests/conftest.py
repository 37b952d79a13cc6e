"""Fixtures shared by the tests."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest

# The laboratory is imported where it is used: the primitive's tests pass without it.
if TYPE_CHECKING:
    from repeatlab.studies.study import Study

# A shell's background job ignores Ctrl-C, and so would every process that a test presses it in.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As nohup's children do that the terminal is closed.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def one_thread():
    """Let torch use one thread in a module's tests: small updates are no faster with more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refused():
    """Return a function that sees a task's sizes refused: by its configuration and by itself."""
    from repeatlab.core.schema import ConfigError

    def check(config, kind, message: str) -> None:
        for attempt in (config.prepare, lambda: kind(config, seed=0, device="cpu")):
            with pytest.raises(ConfigError, match=re.escape(message)):
                attempt()

    return check


@pytest.fixture
def small_study():
    """Return a function that makes a study of seconds on digits, with the given fields changed."""
    from repeatlab.studies.study import Study

    def make(**changes) -> Study:
        fields = {
            "name": "small",
            "tasks": {"digits": {"name": "supervised", "lr": 0.05}},
            "methods": {
                "standard": {},
                "fixed2": {"mapping": {"name": "constant", "repeats": 2}},
                "linear": {"mapping": {"name": "linear", "t": "auto"}},
            },
            "seeds": 2,
            "max_updates": 25,
            "evaluation": {"every": 10},
            "calibration": {"updates": 8},
        }
        return Study.of(**fields | changes)

    return make
