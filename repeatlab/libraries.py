"""The libraries whose import is most of the first seconds of a worker, and their import at once.

Nothing here needs the rest of the package: the process whose copies become workers knows the
libraries alone, so that a notebook's next study trains with the package as it is then.
"""

from __future__ import annotations

import gc
from importlib import import_module

# Those that a first run would import late: torch's optimizers import its compiler.
LIBRARIES = (
    "distributed",
    "torch",
    "torch._dynamo",
    "sklearn.datasets",
    "sklearn.model_selection",
    "pyarrow.parquet",
)


def import_libraries() -> None:
    """Import them: no part of the run that needs them first, nor of its time limit.

    The garbage collector rests meanwhile, and leaves out afterwards what they hold. It would go
    through a million objects again and again, of which none is garbage: a third of the import.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        for module in LIBRARIES:
            import_module(module)
    finally:
        if collected:
            gc.enable()
