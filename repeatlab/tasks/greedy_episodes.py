"""Greedy episodes on CartPole-v1, those of many agents played side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

from repeatlab.core.seeding import derive
from repeatlab.tasks.replay_buffer import Transitions, whole_episodes

if TYPE_CHECKING:
    from repeatlab.tasks.reinforcement import ReinforcementConfig

ENVIRONMENT = "CartPole-v1"


class Played(NamedTuple):
    """The greedy episodes of one agent.

    Attributes:
        lengths: int64, (episodes,): steps of each.
        transitions: Of all episodes, end to end; b in all.
        values: float32, (b, 2): of the actions, where each transition begins.
        next_values: float32, (b, 2): where it ends.
    """

    lengths: np.ndarray
    transitions: Transitions
    values: Tensor
    next_values: Tensor


@torch.no_grad()
def greedy_episodes(
    config: ReinforcementConfig,
    split: str,
    values: Callable[[Tensor], Tensor],
    *,
    device: str,
    agents: int = 1,
) -> list[Played]:
    """Return the greedy episodes of every agent, all played side by side, each until it first ends.

    Args:
        config: The agents' task.
        split: "validation" or "test"; it says where the episodes begin, the same for every agent.
        values: From observations, float32, (agents * episodes, 4), agent by agent, to the values
            of the actions, float32, (agents * episodes, 2).
        device: Where `values` wants the observations.
        agents: How many there are.
    """
    count, scale = config.evaluation_episodes, np.array(config.observation_scale, dtype=np.float32)
    environments = _side_by_side(agents * count)
    raw, _ = environments.reset(seed=derive(0, f"evaluation/{split}"))
    if agents > 1:
        alone = _side_by_side(count)
        raw, _ = alone.reset(seed=derive(0, f"evaluation/{split}"))
        environments.unwrapped.state = np.tile(alone.unwrapped.state, agents)
        raw = np.tile(raw, (agents, 1))
    observations, valued, actions = [raw * scale], [], []
    lengths, failed = np.zeros(agents * count, dtype=int), np.zeros(agents * count, dtype=bool)
    while True:
        valued.append(values(torch.from_numpy(observations[-1]).to(device)).cpu().numpy())
        if lengths.all():
            break
        actions.append(valued[-1].argmax(1))
        raw, _, terminated, truncated, _ = environments.step(actions[-1])
        observations.append(raw * scale)
        ended = (terminated | truncated) & (lengths == 0)
        lengths[ended], failed[ended] = len(actions), terminated[ended]
    environments.close()
    steps = [np.stack(rows, axis=1) for rows in (observations, valued, actions)]
    parts = np.arange(0, agents * count, count)
    return [
        _played(config, *(of[i : i + count] for of in (*steps, lengths, failed))) for i in parts
    ]


def _played(
    config: ReinforcementConfig,
    observations: np.ndarray,
    values: np.ndarray,
    actions: np.ndarray,
    lengths: np.ndarray,
    failed: np.ndarray,
) -> Played:
    """Return an agent's episodes out of what was seen, (episodes, steps + 1, ...), and done."""
    if config.sutton_barto_reward:
        last = np.arange(actions.shape[1]) == lengths[:, None] - 1
        rewards = np.where(last, -failed[:, None].astype(float), 0.0)
    else:
        rewards = np.ones(actions.shape)
    transitions, episode, first, last = whole_episodes(
        observations, actions, rewards, lengths, failed, n_steps=config.n_steps, gamma=config.gamma
    )
    of = (torch.from_numpy(values[episode, step]) for step in (first, last))
    return Played(lengths, transitions, *of)


def _side_by_side(count: int) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(ENVIRONMENT, num_envs=count, vectorization_mode="vector_entry_point")
