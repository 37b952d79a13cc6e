"""Replay memory: the transitions an agent has lived through, for off-policy learning.

Transitions are numbered in the order in which they happened, from 0, and a number stays the name of
its transition. n-step returns (Sutton 1988): the transition of step t holds the discounted rewards
of up to n steps, the observation where they end, and the discount of the value there, which is 0
where the episode has terminated. Where an episode ends, the returns before it are shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Transitions(NamedTuple):
    """A batch of b transitions.

    Attributes:
        observations: float32, (b, size): where the action was taken.
        actions: int64, (b,).
        returns: float32, (b,): sum of gamma^i r_i over the m <= n steps.
        next_observations: float32, (b, size): where the m steps end.
        discounts: float32, (b,): gamma^m, or 0 where the episode terminated within the m steps.
        indices: int64, (b,): the transitions' numbers.
        index: Which fresh batch this is, from 0.
    """

    observations: Tensor
    actions: Tensor
    returns: Tensor
    next_observations: Tensor
    discounts: Tensor
    indices: Tensor
    index: int

    def to(self, device: str) -> Transitions:
        """Return the batch on `device`."""
        return Transitions(*(t.to(device, non_blocking=True) for t in self[:-1]), self.index)


class ReplayBuffer:
    """The last `capacity` transitions of one environment, in arrays allocated once.

    The n - 1 latest transitions wait for rewards that are still to come, and cannot be sampled.

    Args:
        capacity: Transitions kept, at least `n_steps`; the oldest are overwritten.
        observation_size: Numbers in one observation.
        n_steps: n, at least 1.
        gamma: Discount of one step.

    Attributes:
        steps: Transitions added so far, those overwritten included.
    """

    def __init__(self, capacity: int, observation_size: int, *, n_steps: int, gamma: float) -> None:
        if n_steps < 1 or capacity < n_steps:
            raise ValueError(
                f"`n_steps` must be 1 or more and `capacity` at least that; not {n_steps} and"
                f" {capacity}."
            )
        self.capacity, self.n_steps, self.gamma = capacity, n_steps, gamma
        self.steps = 0
        self._powers = [gamma**age for age in range(n_steps + 1)]
        self._open = 0  # latest transitions of the running episode that the next reward belongs to
        # numpy's zeros, unlike torch's, take no memory and no time before they are written to.
        self._arrays = {
            "observations": np.zeros((capacity, observation_size), dtype=np.float32),
            "actions": np.zeros(capacity, dtype=np.int64),
            "returns": np.zeros(capacity, dtype=np.float32),
            "next_observations": np.zeros((capacity, observation_size), dtype=np.float32),
            "discounts": np.zeros(capacity, dtype=np.float32),
        }
        # The same memory for the network's side: writing a number into a tensor takes 20 times as
        # long as into an array.
        self._columns = {name: torch.from_numpy(array) for name, array in self._arrays.items()}

    def add(
        self,
        observation: np.ndarray,
        action: int,
        reward: float,
        next_observation: np.ndarray,
        *,
        terminated: bool,
        truncated: bool,
    ) -> None:
        """Append one step of the environment.

        Args:
            observation: float32, (size,).
            action: What was done there.
            reward: What it brought.
            next_observation: float32, (size,): where it led.
            terminated: The episode ended in a terminal state, whose value is 0.
            truncated: The episode was cut off; the value of its last state counts.
        """
        arrays, slot = self._arrays, self.steps % self.capacity
        arrays["observations"][slot] = observation
        arrays["actions"][slot] = action
        arrays["returns"][slot] = 0.0
        returns, discounts = arrays["returns"], arrays["discounts"]
        next_observations = arrays["next_observations"]
        for age in range(self._open + 1):
            slot = (self.steps - age) % self.capacity
            if reward:
                returns[slot] += self._powers[age] * reward
            next_observations[slot] = next_observation
            discounts[slot] = 0.0 if terminated else self._powers[age + 1]
        self.steps += 1
        self._open = 0 if terminated or truncated else min(self._open + 1, self.n_steps - 1)

    def samples_at(self, steps: int) -> range:
        """Return the numbers of the transitions that could be sampled after `steps` steps."""
        return range(max(0, steps - self.capacity), max(0, steps - self.n_steps + 1))

    def batch(self, indices: Tensor, index: int) -> Transitions:
        """Return the transitions with these numbers.

        Args:
            indices: int64, (b,), all within `samples_at(self.steps)`.
            index: The fresh batch this is.
        """
        # Below its capacity, the buffer holds transition i at place i.
        slots = indices if self.steps <= self.capacity else indices % self.capacity
        return Transitions(*(c[slots] for c in self._columns.values()), indices, index)

    def copy_batch(self, indices: Tensor, places: Sequence[np.ndarray]) -> None:
        """Copy the transitions with these numbers, as `batch` returns them, into arrays.

        Args:
            indices: As in `batch`.
            places: For the columns in their order, each (b,) or (b, size).
        """
        slots = indices.numpy() % self.capacity
        for column, place in zip(self._arrays.values(), places, strict=True):
            # All slots are inside: "clip" only spares a copy.
            column.take(slots, 0, out=place, mode="clip")

    def state_dict(self) -> dict[str, Any]:
        """Return everything the buffer holds, without the places that are still empty."""
        filled = min(self.steps, self.capacity)
        columns = {name: column[:filled].clone() for name, column in self._columns.items()}
        return {"steps": self.steps, "open": self._open, "columns": columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` of a buffer of the same capacity."""
        self.steps, self._open = state["steps"], state["open"]
        for name, column in state["columns"].items():
            self._columns[name][: len(column)] = column


class Episodes(NamedTuple):
    """Whole episodes as n-step transitions, end to end.

    Attributes:
        transitions: As `ReplayBuffer` would hold them; b is the sum of the lengths.
        episode: int64, (b,): the episode of each.
        first: int64, (b,): the step in its episode at which it begins.
        last: int64, (b,): the step at which its n steps end, at most the episode's length.
    """

    transitions: Transitions
    episode: np.ndarray
    first: np.ndarray
    last: np.ndarray


def whole_episodes(
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    lengths: np.ndarray,
    terminated: np.ndarray,
    *,
    n_steps: int,
    gamma: float,
) -> Episodes:
    """Return the n-step transitions of episodes that are over.

    Args:
        observations: (episodes, steps + 1, size), the last of each episode included.
        actions: (episodes, steps), with anything after an episode's end.
        rewards: (episodes, steps), likewise.
        lengths: int64, (episodes,): steps of each.
        terminated: bool, (episodes,): whether the last observation is a terminal state.
        n_steps: n.
        gamma: Discount of one step.
    """
    episode = np.repeat(np.arange(len(lengths)), lengths)
    first = np.arange(len(episode)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    length = lengths[episode]
    last = np.minimum(first + n_steps, length)
    returns = np.zeros(len(episode))
    for age in range(n_steps):
        inside = first + age < length
        returns[inside] += gamma**age * rewards[episode[inside], first[inside] + age]
    discounts = np.where((last == length) & terminated[episode], 0.0, gamma ** (last - first))
    transitions = Transitions(
        torch.as_tensor(observations[episode, first], dtype=torch.float32),
        torch.as_tensor(actions[episode, first], dtype=torch.int64),
        torch.as_tensor(returns, dtype=torch.float32),
        torch.as_tensor(observations[episode, last], dtype=torch.float32),
        torch.as_tensor(discounts, dtype=torch.float32),
        torch.from_numpy(first),
        0,
    )
    return Episodes(transitions, episode, first, last)
