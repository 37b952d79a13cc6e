"""repeatlab: loss-driven dynamic batch repetition, compared fairly.

`BatchRepeater` and its mappings need torch and numpy alone; the laboratory that compares them, all
else, needs what `pip install 'repeatlab[lab]'` brings. Nothing is imported before it is asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "repetition.repeater": "BatchRepeater",
    "repetition.grouped": "grouped",
    "repetition.loss_stats": "LossStats",
    "repetition.visit_log": "NonFiniteLoss",
    "repetition.mappings": "Constant ControlLimit CosineRepeats Linear LinearRepeats Mapping "
    "Quantile Threshold Trace Uniform Until ZScore",
    "cost.model": "CostModel",
    "analysis.frames": "load",
    "studies.study": "Study run_study",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [*sorted(_HOME_OF), "__version__"]  # noqa: PLE0604 - all of them are strings


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'repeatlab' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"repeatlab.{_HOME_OF[name]}"), name)
    except ModuleNotFoundError as error:
        raise missing_extra(f"repeatlab.{name}", error) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def missing_extra(what: str, error: ModuleNotFoundError) -> ImportError:
    """Return what to say where a module of the laboratory's dependencies is not installed."""
    return ImportError(f"{what} needs {error.name}: pip install 'repeatlab[lab]'")
