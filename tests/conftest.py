"""Fixtures shared by the tests."""

from __future__ import annotations

import pytest

from repeatlab.study import Study


@pytest.fixture
def small_study():
    """Return a function that makes a study of seconds on digits, with the given fields changed."""

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
