"""A batch that is visited more than once: every visit gets it as the loader gave it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from operator import is_
from typing import Any

import torch


def view(batch: Any, found: list[torch.Tensor]) -> Any:
    """Return `batch` in containers of its own, so that a visit may pop, append and assign.

    Dicts, lists and tuples are copied, and those within them; what they hold is shared. A batch in
    which nothing can be replaced is returned itself.

    Args:
        batch: What the loader yielded.
        found: Gets its tensors.
    """
    kind = type(batch)
    if kind is tuple:
        if {type(item) for item in batch} == {torch.Tensor}:  # most are
            found += batch
            return batch
    elif isinstance(batch, torch.Tensor):
        found.append(batch)
        return batch
    if isinstance(batch, tuple):
        items = [view(item, found) for item in batch]
        if all(map(is_, items, batch)):
            return batch
        return kind(*items) if hasattr(batch, "_fields") else kind(items)
    if kind is list:
        return [view(item, found) for item in batch]
    if kind is dict:
        return {key: view(item, found) for key, item in batch.items()}
    if isinstance(batch, (MutableMapping, list)):
        found += [tensor for _, tensor in tensors(batch)]
        return copy.copy(batch)
    return batch


def versions(found: list[torch.Tensor]) -> list[int]:
    """Return a number for each tensor, which an in-place change raises."""
    try:
        return [tensor._version for tensor in found]  # torch has no public name for it
    except RuntimeError:  # a tensor made for inference keeps none
        return [0 if tensor.is_inference() else tensor._version for tensor in found]


def tensors(batch: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a batch's tensors and where they are, in the order of `view`: `['image']`, `[0][1]`."""
    if isinstance(batch, torch.Tensor):
        yield key, batch
    elif isinstance(batch, Mapping):
        for name, item in batch.items():
            yield from tensors(item, f"{key}[{name!r}]")
    elif isinstance(batch, (tuple, list)):
        names = getattr(batch, "_fields", None)
        for place, item in enumerate(batch):
            yield from tensors(item, f"{key}.{names[place]}" if names else f"{key}[{place}]")


def changed(batch: Any, before: list[int]) -> str:
    """Return where the first tensor is that has another version than `before`."""
    for (key, tensor), version in zip(tensors(batch), before, strict=False):
        if versions([tensor]) != [version]:
            return f"batch{key}"
    return "batch"
