"""repeatlab: loss-driven dynamic batch repetition, compared fairly.

`BatchRepeater` and its mappings need torch and numpy alone; the laboratory that compares them, all
else, needs what `pip install 'repeatlab[lab]'` brings. Nothing is imported before it is asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "repetition.repeater": "BatchRepeater",
    "repetition.grouped": "grouped",
    "repetition.loss_stats": "LossStats",
    "repetition.visit_log": "NonFiniteLoss",
    "repetition.mappings": "Constant ControlLimit CosineRepeats Linear LinearRepeats Mapping "
    "Quantile Threshold Trace Uniform Until While ZScore",
    "cost.model": "CostModel",
    "analysis.frames": "load",
    "studies.study": "Study run_study",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'repeatlab' has no attribute {name!r}")
    value = getattr(import_module(f"repeatlab.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def require_lab() -> None:
    """Say what to install where the laboratory is imported without its dependencies."""
    for name in ("click", "pydantic", "pandas"):
        if find_spec(name) is None:
            raise ImportError(f"the laboratory needs {name}: pip install 'repeatlab[lab]'")
