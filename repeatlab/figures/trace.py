"""A long trace of numbers, thinned to what a screen can show. Never imports torch."""

from __future__ import annotations

import numpy as np


def binned(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return edges (k + 1,) and means (k,) of at most `most` bins of consecutive `values`.

    All bins have the same size but the last, which takes the rest.
    """
    size = max(1, -(-len(values) // most))
    starts = np.arange(0, len(values), size)
    edges = np.append(starts, len(values))
    return edges, np.add.reduceat(values, starts) / np.diff(edges)
