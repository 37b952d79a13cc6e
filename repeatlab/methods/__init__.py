"""What an arm may choose beside the mapping: samplers, schedules, controls.

The samplers' functions for a loop of one's own can be imported from here; see
`repeatlab.methods.selection`. Importing this module imports nothing else.
"""

from importlib import import_module
from typing import Any

_SELECTION = (
    "Chosen",
    "ImportanceSwitch",
    "LastScores",
    "draws",
    "hard_mining",
    "importance_sampling",
    "online_selection",
    "rho_loss",
    "selective_backprop",
    "tau",
)


def __getattr__(name: str) -> Any:
    if name in _SELECTION:
        return getattr(import_module("repeatlab.methods.selection"), name)
    if name == "tau_threshold":  # a formula of cost, which a switch needs
        return getattr(import_module("repeatlab.cost"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
