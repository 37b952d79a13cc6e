"""Checkpoints: the whole state of a run on disk, so that a killed run goes on where it was.

A checkpoint is written beside the last one, synced and renamed into its place; the last one is kept
as the previous. It is loaded without unpickling code, and held to the digest that it carries: one
that is truncated or damaged is passed over.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from repeatlab.core.files import StoreError, temporary_beside

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
_DAMAGED = (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError)


def save(directory: Path, state: dict[str, Any]) -> None:
    """Write `state`, of tensors, numbers, strings, lists and dicts, as the current checkpoint.

    Raises:
        StoreError: it cannot be written; the checkpoints there are stay as they are.
    """
    temporary = temporary_beside(directory / CURRENT)
    try:
        with temporary.open("wb") as file:
            torch.save({"state": state, "digest": digest(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        if (directory / CURRENT).exists():
            (directory / CURRENT).replace(directory / PREVIOUS)
        temporary.replace(directory / CURRENT)
        _sync(directory)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"the checkpoint in {directory} cannot be written: {reason}") from error


def load(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the states of the checkpoints that can be read, the latest first, on the CPU."""
    for name in (CURRENT, PREVIOUS):
        try:
            saved = torch.load(directory / name, map_location="cpu", weights_only=True)
            whole = saved["digest"] == digest(saved["state"])
        except _DAMAGED:
            continue
        if whole:
            yield saved["state"]


def remove(directory: Path) -> None:
    """Delete the checkpoints of a run that is done."""
    for name in (CURRENT, PREVIOUS):
        (directory / name).unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Make the renames themselves durable, where the system can."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # not every file system syncs directories
    finally:
        os.close(handle)


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
