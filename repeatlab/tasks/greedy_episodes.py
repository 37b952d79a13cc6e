"""Greedy episodes on CartPole-v1, those of many agents played side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import gymnasium
import numpy as np
import torch
from torch import Tensor

from repeatlab.replay import Transitions, episode_transitions
from repeatlab.seeding import derive

if TYPE_CHECKING:
    from repeatlab.tasks.reinforcement import ReinforcementConfig

ENVIRONMENT = "CartPole-v1"


@torch.no_grad()
def greedy_episodes(
    config: ReinforcementConfig,
    split: str,
    greedy: Callable[[Tensor], Tensor],
    *,
    device: str,
    agents: int = 1,
) -> list[list[Transitions]]:
    """Return the greedy episodes of every agent, all played side by side, each until it first ends.

    Args:
        config: The agents' task.
        split: "validation" or "test"; it says where the episodes begin, the same for every agent.
        greedy: From observations, float32, (agents * episodes, 4), agent by agent, to the actions
            of the highest value, int64, (agents * episodes,).
        device: Where `greedy` wants the observations.
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
    observations, actions = [raw * scale], []
    lengths, failed = np.zeros(agents * count, dtype=int), np.zeros(agents * count, dtype=bool)
    while not lengths.all():
        actions.append(greedy(torch.from_numpy(observations[-1]).to(device)).cpu().numpy())
        raw, _, terminated, truncated, _ = environments.step(actions[-1])
        observations.append(raw * scale)
        ended = (terminated | truncated) & (lengths == 0)
        lengths[ended], failed[ended] = len(actions), terminated[ended]
    environments.close()
    seen, done = np.stack(observations, axis=1), np.stack(actions, axis=1)
    episodes = [
        episode_transitions(
            seen[i, : length + 1],
            done[i, :length],
            _rewards(config, length, failed[i]),
            terminated=bool(failed[i]),
            n_steps=config.n_steps,
            gamma=config.gamma,
        )
        for i, length in enumerate(lengths)
    ]
    return [episodes[i : i + count] for i in range(0, len(episodes), count)]


def _side_by_side(count: int) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(ENVIRONMENT, num_envs=count, vectorization_mode="vector_entry_point")


def _rewards(config: ReinforcementConfig, length: int, failed: bool) -> np.ndarray:
    if not config.sutton_barto_reward:
        return np.ones(length)
    return np.where(np.arange(length) == length - 1, -float(failed), 0.0)
