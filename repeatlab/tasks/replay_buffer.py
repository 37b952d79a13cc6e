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

    def to(self, device: str | torch.device) -> Transitions:
        """Return the batch on `device`."""
        return Transitions(*(t.to(device, non_blocking=True) for t in self[:-1]), self.index)


# A transition in one row: both observations, and these three.
RETURN, DISCOUNT, ACTION = -3, -2, -1


def in_columns(rows: Tensor, indices: Tensor, index: int) -> Transitions:
    """Return transitions of which each is a row, (..., b, width), as views but for the actions.

    Args:
        rows: float32, as `ReplayBuffer.copy_rows` gives them.
        indices: Their numbers.
        index: Which fresh batch this is.
    """
    size = (rows.shape[-1] - 3) // 2
    return Transitions(
        observations=rows[..., :size],
        actions=rows[..., ACTION].long(),
        returns=rows[..., RETURN],
        next_observations=rows[..., size : 2 * size],
        discounts=rows[..., DISCOUNT],
        indices=indices,
        index=index,
    )


class ReplayBuffer:
    """The last `capacity` transitions of one environment, in an array allocated once.

    The n - 1 latest transitions wait for rewards that are still to come, and cannot be sampled.

    Args:
        capacity: Transitions kept, at least `n_steps`; the oldest are overwritten.
        observation_size: Numbers in one observation.
        n_steps: n, at least 1.
        gamma: Discount of one step.

    Attributes:
        steps: Transitions added so far, those overwritten included.
        width: Numbers in the row of a transition.
    """

    def __init__(self, capacity: int, observation_size: int, *, n_steps: int, gamma: float) -> None:
        self.capacity, self.n_steps, self.gamma = capacity, n_steps, gamma
        self.steps = 0
        # What the latest n transitions make of a reward, and of the value after it: oldest first.
        self._weights = np.array([gamma**age for age in reversed(range(n_steps))])
        self._powers = np.array([gamma ** (age + 1) for age in reversed(range(n_steps))])
        self._open = 0  # latest transitions of the running episode that the next reward belongs to
        # numpy's zeros, unlike torch's, take no memory and no time before they are written to, and
        # writing a number into a tensor takes 20 times as long as into an array.
        self.width = 2 * observation_size + 3
        self._rows = np.zeros((capacity, self.width), dtype=np.float32)
        self._begins = slice(0, observation_size)
        self._ends = slice(observation_size, 2 * observation_size)

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
        rows, slot, open_ = self._rows, self.steps % self.capacity, self._open + 1
        row = rows[slot]
        row[self._begins] = observation
        row[RETURN], row[ACTION] = 0.0, action
        first = slot + 1 - open_
        slots = slice(first, slot + 1)
        if first < 0:
            slots = np.arange(first, slot + 1) % self.capacity
        rows[slots, self._ends] = next_observation
        rows[slots, DISCOUNT] = 0.0 if terminated else self._powers[-open_:]
        if reward:
            rows[slots, RETURN] += (reward * self._weights[-open_:]).astype(np.float32)
        self.steps += 1
        self._open = 0 if terminated or truncated else min(open_, self.n_steps - 1)

    def samples_at(self, steps: int) -> range:
        """Return the numbers of the transitions that could be sampled after `steps` steps."""
        return range(max(0, steps - self.capacity), max(0, steps - self.n_steps + 1))

    def uniform(self, draws: np.ndarray, steps: Sequence[int]) -> np.ndarray:
        """Return the numbers of transitions, int64, (k, b), that are drawn uniformly.

        Args:
            draws: float64, (k, b), uniform in [0, 1).
            steps: k numbers: each row is of what could be sampled after so many, one at least.
        """
        after = np.asarray(steps)[:, None]
        first = np.maximum(0, after - self.capacity)  # as in `samples_at`, of all rows at once
        return first + (draws * (after - self.n_steps + 1 - first)).astype(np.int64)

    def batch(self, indices: Tensor, index: int) -> Transitions:
        """Return the transitions with these numbers.

        Args:
            indices: int64, (b,), all within `samples_at(self.steps)`.
            index: The fresh batch this is.
        """
        rows = np.empty((len(indices), self.width), dtype=np.float32)
        self.copy_rows(indices, rows)
        return in_columns(torch.from_numpy(rows), indices, index)

    def copy_rows(self, indices: Tensor, place: np.ndarray) -> None:
        """Copy the transitions with these numbers, each as a row, into an array.

        Args:
            indices: As in `batch`.
            place: float32, (b, width); see `in_columns`.
        """
        slots = indices.numpy()
        if self.steps > self.capacity:
            slots = slots % self.capacity
        # All slots are inside: "clip" only spares a copy.
        self._rows.take(slots, 0, out=place, mode="clip")

    def state_dict(self) -> dict[str, Any]:
        """Return everything the buffer holds, without the places that are still empty."""
        filled = min(self.steps, self.capacity)
        rows = torch.from_numpy(self._rows[:filled].copy())
        return {"steps": self.steps, "open": self._open, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` of a buffer of the same capacity."""
        self.steps, self._open = state["steps"], state["open"]
        self._rows[: len(state["rows"])] = state["rows"].numpy()


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
