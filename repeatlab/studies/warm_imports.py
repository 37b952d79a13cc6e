"""The libraries whose import is most of the first seconds of a worker, and their import at once.

Nothing here needs the rest of the package: the process whose copies become workers knows the
libraries alone, so that a notebook's next study trains with the package as it is then.
"""

from __future__ import annotations

import gc
from importlib import import_module

# Those that a first run would import late: torch's optimizers import its compiler.
LIBRARIES = (
    "torch",
    "torch._dynamo",
    "sklearn.datasets",
    "sklearn.model_selection",
    "pyarrow.parquet",
)


def import_libraries(*more: str) -> None:
    """Import them, and `more`: no part of the run that needs them first, nor of its time limit.

    The garbage collector rests meanwhile: it would go through all that they hold again and again,
    and find no garbage.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        for module in (*LIBRARIES, *more):
            import_module(module)
    finally:
        if collected:
            gc.enable()
