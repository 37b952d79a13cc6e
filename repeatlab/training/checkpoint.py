"""Checkpoints: the whole state of a run on disk, so that a killed run goes on where it was.

A checkpoint is written beside the last one, synced and renamed into its place; the last one is kept
as the previous, so that one is whole whatever of the renames outlives a power cut. One that is
truncated or damaged, which its digest tells, is passed over.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from repeatlab.core.files import StoreError, replacing
from repeatlab.core.tensor_files import read_tensors, write_tensors

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save(directory: Path, state: dict[str, Any]) -> None:
    """Write `state`, of tensors, numbers, strings, lists and dicts, as the current checkpoint.

    Raises:
        StoreError: it cannot be written; the checkpoints there are stay as they are.
    """
    current = directory / CURRENT
    with replacing(current) as temporary:
        write_tensors(temporary, state)
        if current.exists():
            current.replace(directory / PREVIOUS)


def load(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the states of the checkpoints that are whole, the latest first, on the CPU.

    What is passed over is named in the log.
    """
    for path in (directory / CURRENT, directory / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = read_tensors(path)
        except StoreError as error:
            logging.getLogger(__name__).warning("%s; the run goes on from what lies before", error)
            continue
        yield state


def remove(directory: Path) -> None:
    """Delete the checkpoints of a run that is done."""
    for name in (CURRENT, PREVIOUS):
        (directory / name).unlink(missing_ok=True)


def digest(state: Any) -> str:
    """Return a SHA-256 over every tensor and number of a state dict, in order."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(str(key).encode())
                feed(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        else:
            sha.update(repr(value).encode())

    feed(state)
    return sha.hexdigest()
