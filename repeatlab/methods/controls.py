"""Controls: a recorded trace of N, changed so that one thing about it is broken.

Each control keeps the counts of its source, or their local mean, and breaks their tie to the batch,
to time or to consecutive visits. The difference between the real run and a control is what the
broken thing was worth.

| control       | keeps                         | breaks                        |
|---------------|-------------------------------|-------------------------------|
| `permuted`    | histogram                     | time trend, batch association |
| `windowed`    | histogram, time trend         | batch association             |
| `time_only`   | time trend                    | batch association, dispersion |
| `anti_hard`   | histogram, time trend         | sign of the association       |
| `spaced`      | visits of each batch          | that they are consecutive     |
| `falling`     | mean                          | all else: N falls by a clock  |

A trace is an int array (fresh batches,) of counts N >= 1 in the order of the fresh batches.
"""

from __future__ import annotations

import numpy as np


def _trace(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != 1 or not len(counts) or counts.dtype.kind not in "iu" or counts.min() < 1:
        raise ValueError("a trace must be a non-empty, one-dimensional array of counts N >= 1")
    return counts.astype(np.int64)


def _windows(length: int, window: int) -> list[slice]:
    if window < 1:
        raise ValueError(f"window must be at least 1 fresh batch; not {window}")
    return [slice(start, start + window) for start in range(0, length, window)]


def permuted(counts: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the counts in a random order of the whole run."""
    return np.random.default_rng(seed).permutation(_trace(counts))


def windowed(counts: np.ndarray, *, window: int, seed: int) -> np.ndarray:
    """Return the counts in a random order within each window of `window` fresh batches.

    Every window keeps its sum. The difference to the real run isolates hardness itself.
    """
    counts, random = _trace(counts), np.random.default_rng(seed)
    return np.concatenate([random.permutation(counts[w]) for w in _windows(len(counts), window)])


def time_only(counts: np.ndarray, *, window: int) -> np.ndarray:
    """Return the local mean of N as counts: a schedule without a look at the batch.

    Within a window the mean is met by error diffusion, so that its counts are as equal as integers
    can be and the total is kept to within one update.
    """
    counts = _trace(counts)
    means = [np.full(len(counts[w]), counts[w].mean()) for w in _windows(len(counts), window)]
    # Rounding the running total, not each mean, keeps what rounding would lose. Half up, so that
    # the result does not depend on whether a total is even.
    totals = np.floor(np.cumsum(np.concatenate(means)) + 0.5).astype(np.int64)
    return np.diff(totals, prepend=0)


def anti_hard(counts: np.ndarray, losses: np.ndarray, *, window: int) -> np.ndarray:
    """Return the counts with their ranks reversed against the losses within each window.

    The window's highest loss gets its smallest count, and so on: the histogram and the time trend
    stay, the sign of the rank correlation turns.

    Args:
        counts: The trace.
        losses: First loss of every fresh batch, (fresh batches,).
        window: Fresh batches in a window.
    """
    counts, losses = _trace(counts), np.asarray(losses, dtype=np.float64)
    if losses.shape != counts.shape:
        raise ValueError(f"losses must have the trace's shape {counts.shape}; not {losses.shape}")
    result = np.empty_like(counts)
    for w in _windows(len(counts), window):
        order = np.argsort(losses[w], kind="stable")
        result[w][order] = np.sort(counts[w])[::-1]
    return result


def spaced(counts: np.ndarray, *, gap: int) -> np.ndarray:
    """Return the order of visits in which repeats come `gap` fresh batches later.

    The visits of each batch are kept, their consecutiveness is broken: visit j of batch i comes
    right after batch `i + j * gap` is fresh, and what is due after the last fresh batch comes at
    the end.

    Returns:
        int array (updates,): the fresh batch that each update visits.
    """
    counts = _trace(counts)
    if gap < 1:
        raise ValueError(f"gap must be at least 1 fresh batch; not {gap}")
    batch = np.repeat(np.arange(len(counts)), counts)
    visit = np.arange(len(batch)) - np.repeat(np.cumsum(counts) - counts, counts)
    due = batch + visit * gap
    # At one time the fresh batch goes first, then the repeats that have waited longest.
    return batch[np.lexsort((batch, visit > 0, due))]


def falling(counts: np.ndarray, *, shape: str) -> np.ndarray:
    """Return counts that fall by a clock from high to low around the trace's mean, with its total.

    The loss-free schedule of the same mean: with m the mean, N goes from 2 m - 1 to 1, linearly or
    by a half cosine, over as many fresh batches; rounding is carried on, so that the total is kept.

    Args:
        counts: The trace.
        shape: "linear" or "cosine".
    """
    counts = _trace(counts)
    place = (np.arange(len(counts)) + 0.5) / len(counts)
    if shape not in ("linear", "cosine"):
        raise ValueError(f"shape must be 'linear' or 'cosine'; not {shape!r}")
    share = 1 - place if shape == "linear" else (1 + np.cos(np.pi * place)) / 2
    targets = 1 + 2 * (counts.mean() - 1) * share
    totals = np.floor(np.cumsum(targets) + 0.5).astype(np.int64)
    totals[-1] = counts.sum()  # whatever the cosine's sum was rounded to
    return np.diff(totals, prepend=0)
