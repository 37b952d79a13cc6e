"""The random states that an order may be drawn from: the process's, and those inside a loader."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

States = dict[str, Any]
# A pipeline, its list, a loader, its data set, that one's list, a stage. Longer lists are data.
_DEPTH, _MOST_ITEMS = 6, 16
_DATA = (torch.Tensor, torch.nn.Module, np.ndarray, type, ModuleType)


@cache
def _kinds() -> tuple[type, ...]:
    """Return the kinds of generators; numpy's are imported when they are first asked for."""
    return (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def parts_of(loader: Any) -> dict[str, Any]:
    """Return the loader and what it is made of, by path: samplers, data set, loaders within."""
    found, level = {"": loader}, {"": loader}
    seen = {id(loader)}
    for _ in range(_DEPTH):
        below = {}
        for path, owner in level.items():
            for name, value in _contents(owner):
                holds = hasattr(value, "__dict__") or isinstance(value, (list, tuple, dict))
                # A loader's live iterator is no part of it: it is what the parts make.
                if holds and id(value) not in seen and name != "_iterator":
                    seen.add(id(value))
                    below[f"{path}.{name}"] = value
        level = {
            path: value for path, value in below.items() if not isinstance(value, _DATA + _kinds())
        }
        found |= level
    return found


def _contents(owner: Any) -> list[tuple[Any, Any]]:
    """Return names and values of what `owner` holds, properties left alone."""
    if isinstance(owner, (list, tuple, dict)):
        items = owner.items() if isinstance(owner, dict) else enumerate(owner)
        return list(items) if len(owner) <= _MOST_ITEMS else []
    return list(getattr(owner, "__dict__", {}).items())


def states_within(loader: Any) -> States:
    """Return the states of the generators that a loader and its parts hold, and their `epoch`.

    What counts its epochs in an attribute of that name draws its order from it.
    """
    states = {}
    for path, owner in parts_of(loader).items():
        for name, value in _contents(owner):
            if isinstance(value, _kinds()) and not isinstance(value, random.SystemRandom):
                states[f"{path}.{name}"] = _state(value)
            elif (name == "epoch" and type(value) is int) or (name == "generator" and not value):
                states[f"{path}.{name}"] = value
    return states


def restore_within(loader: Any, states: States) -> None:
    """Restore `states_within`; a generator that was made, or not, by then is made, or not."""
    parts = parts_of(loader)
    for place, state in states.items():
        path, _, name = place.rpartition(".")
        owner = parts.get(path)
        values = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
        if name not in values:
            continue
        if state is None or type(state) is int:
            values[name] = state
        else:
            values[name] = values[name] or _generator(state)
            _set(values[name], state)


def process_states() -> States:
    """Return the states of the process's own generators: torch's on the CPU, `random`, numpy's."""
    return {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": _lists(np.random.get_state(legacy=False)),  # noqa: NPY002 - that very state
        "rank": _rank(),
    }


def restore_process(states: States) -> None:
    """Restore `process_states`, unless another rank saved them: ranks draw apart."""
    if states["rank"] == _rank():
        torch.set_rng_state(states["torch"].cpu())
        random.setstate(states["random"])
        np.random.set_state(states["numpy"])  # noqa: NPY002


def states_of(loader: Any) -> States:
    """Return all that the loader's order may be drawn from."""
    return {"process": process_states(), "within": states_within(loader)}


def restore(loader: Any, states: States) -> None:
    """Restore `states_of`."""
    restore_process(states["process"])
    restore_within(loader, states["within"])


@contextmanager
def kept_process_states() -> Iterator[None]:
    """Leave the process's random states as they were found."""
    states = process_states()
    try:
        yield
    finally:
        restore_process(states)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _state(generator: Any) -> Any:
    """Return a generator's state in types that a checkpoint holds."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _lists(generator.get_state(legacy=False))
    return _lists(generator.bit_generator.state)


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _generator(state: Any) -> Any:
    """Return a new generator of the kind that a state is of."""
    if isinstance(state, torch.Tensor):
        return torch.Generator()
    if isinstance(state, tuple):
        return random.Random()
    if "gauss" in state:
        return np.random.RandomState()
    return np.random.Generator(getattr(np.random, state["bit_generator"])())


def _lists(state: Any) -> Any:
    """Return a numpy state with lists for arrays."""
    if isinstance(state, dict):
        return {name: _lists(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state
