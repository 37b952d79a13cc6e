"""The weights that a run comes back to, or keeps for ensembles, distillation and use elsewhere.

    runs/<task>/<run id>/weights-<update>.pt   of every network of the task, by name

Such a file is written in one step, loaded without unpickling code, and held to the digest that it
carries.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repeatlab.core.files import StoreError, temporary_beside
from repeatlab.store.records import Run
from repeatlab.training.checkpoint import digest

# Of one network, as its `load_state_dict` takes them.
Weights = dict[str, Tensor]
_UNREADABLE = (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError)


def networks(task: Any) -> dict[str, nn.Module]:
    """Return a task's networks by name, averages of weights included."""
    return {name: part for name, part in vars(task).items() if isinstance(part, nn.Module)}


def copied(task: Any) -> dict[str, Weights]:
    """Return the weights of a task's networks as they are now, on the CPU."""
    # Copies also of what is there already: a view would be written with all that it is a view of.
    return {
        name: {key: tensor.detach().cpu().clone() for key, tensor in network.state_dict().items()}
        for name, network in networks(task).items()
    }


def restore(task: Any, weights: dict[str, Weights]) -> None:
    """Give a task's networks the weights that `copied` has returned."""
    for name, network in networks(task).items():
        network.load_state_dict(weights[name])


def keep(directory: Path, task: Any, *, update: int, last: int) -> None:
    """Write the weights after so many updates; of what was kept before, the `last` newest stay.

    Raises:
        StoreError: they cannot be written.
    """
    weights = copied(task)
    path = directory / f"weights-{update:09d}.pt"
    temporary = temporary_beside(path)
    try:
        torch.save({"update": update, "weights": weights, "digest": digest(weights)}, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{path} cannot be written: {reason}") from error
    for earlier in _files(directory)[:-last]:
        earlier.unlink()


def kept(run: Run) -> list[int]:
    """Return after how many updates weights were kept, ascending; none where none were."""
    return [int(path.stem.removeprefix("weights-")) for path in _files(run.path)]


def load(run: Run, update: int | None = None) -> dict[str, Weights]:
    """Return the weights of a run's networks by name, on the CPU.

    Args:
        run: The run.
        update: One of `kept`; by default the last.

    Raises:
        StoreError: there are none, or the file is damaged.
    """
    updates = kept(run)
    if not updates or update not in (None, *updates):
        asked = "no weights" if update is None else f"no weights after update {update}"
        raise StoreError(f"{run.path} keeps {asked}: set evaluation.keep (kept: {updates})")
    path = run.path / f"weights-{updates[-1] if update is None else update:09d}.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        whole = saved["digest"] == digest(saved["weights"])
    except _UNREADABLE as error:
        raise StoreError(f"{path} cannot be read: {type(error).__name__}") from error
    if not whole:
        raise StoreError(f"{path} is damaged: its content does not fit its digest")
    return saved["weights"]


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("weights-*.pt"))
