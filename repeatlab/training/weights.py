"""The weights that a run comes back to, or keeps for use elsewhere.

    runs/<task>/<run id>/weights-<update>.pt   of every network of the task, by name

Such a file is written in one step, and held to its digest when it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repeatlab.core.files import StoreError, replacing
from repeatlab.core.tensor_files import read_tensors, write_tensors
from repeatlab.store.records import Run

# Of one network, as its `load_state_dict` takes them.
Weights = dict[str, Tensor]


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
    path = directory / f"weights-{update:09d}.pt"
    with replacing(path) as temporary:
        write_tensors(temporary, copied(task))
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
    return read_tensors(run.path / f"weights-{updates[-1] if update is None else update:09d}.pt")


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("weights-*.pt"))
