"""CartPole-v1: the environment that an agent lives in, and the episodes that it is judged by.

Return is the number of steps that the pole stays up, at most 500; it counts as solved at 475.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Self

import gymnasium
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from repeatlab.core.seeding import derive
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.optimization import OptimizationConfig

ENVIRONMENT = "CartPole-v1"
OBSERVED, ACTIONS = 4, 2  # numbers in an observation, actions to choose from
RECENT_EPISODES = 20


class CartPoleConfig(TaskConfig, OptimizationConfig):
    """Fields of a task in this environment."""

    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)]
    """Widths of the hidden layers."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    sutton_barto_reward: bool = True
    """0, and -1 for the failure, in place of 1 for every step."""
    observation_scale: Annotated[tuple[float, float, float, float], Field(strict=False)] = (
        2.0,
        1.0,
        10.0,
        1.0,
    )
    """Factors on position, velocity, angle and angular velocity: all are then of the order of 1."""
    evaluation_episodes: Annotated[int, Field(ge=1)] = 20

    @model_validator(mode="after")
    def _trains_an_agent(self) -> Self:
        if self.ema_decay:
            raise ValueError("ema_decay: the agent is judged as it acts, so it must be 0")
        if self.channels_last:
            raise ValueError("channels_last: observations are no images")
        return self


class TwoActions(gymnasium.spaces.Discrete):
    """The space of CartPole's actions, which is asked at every step.

    gymnasium's own looks up each time what numbers its type can hold.
    """

    def contains(self, x: Any) -> bool:
        """Return whether `x` is 0 or 1."""
        return x in (0, 1)


class CartPole:
    """The environment of one agent. How an episode begins is a function of (seed, its number).

    Args:
        config: The agent's task.
        seed: The run's.

    Attributes:
        observation: float32, (4,), scaled: what the agent sees now.
        episode: Number of the episode under way.
        actions: What was done in it.
        recent_returns: Steps of the latest episodes that have ended.
    """

    def __init__(self, config: CartPoleConfig, seed: int) -> None:
        self.seed, self.scale = seed, np.array(config.observation_scale, dtype=np.float32)
        self._simulator = gymnasium.make(
            ENVIRONMENT,
            sutton_barto_reward=config.sutton_barto_reward,
            disable_env_checker=True,
        )
        self._simulator.unwrapped.action_space = TwoActions(ACTIONS)
        self.recent_returns: deque[int] = deque(maxlen=RECENT_EPISODES)
        self._begin(0)

    def step(self, action: int) -> tuple[float, bool, bool]:
        """Act, and return the reward and whether the episode terminated or was cut off."""
        raw, reward, terminated, truncated, _ = self._simulator.step(action)
        self.observation = raw * self.scale
        self.actions.append(action)
        return reward, terminated, truncated

    def next_episode(self) -> None:
        """Begin anew, after an episode has ended."""
        self.recent_returns.append(len(self.actions))
        self._begin(self.episode + 1)

    def _begin(self, episode: int) -> None:
        self.episode, self.actions = episode, []
        raw, _ = self._simulator.reset(seed=derive(self.seed, "episode", episode))
        self.observation = raw * self.scale

    def state_dict(self) -> dict[str, Any]:
        """Return where the agent is in its life."""
        return {
            "episode": self.episode,
            "episode_actions": list(self.actions),
            "recent_returns": list(self.recent_returns),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` of an environment with the same settings and seed."""
        self.recent_returns = deque(state["recent_returns"], maxlen=RECENT_EPISODES)
        # The simulator is deterministic: the same start and actions lead to the same state.
        self._begin(state["episode"])
        for action in state["episode_actions"]:
            self.step(action)


class GreedyEpisodes(NamedTuple):
    """Episodes of one agent that were played side by side, each until it first ended.

    Attributes:
        observations: float32, (episodes, steps + 1, 4), scaled.
        values: float32, (episodes, steps + 1, 2): the agent's, of the actions.
        actions: int64, (episodes, steps), with anything after an episode's end.
        lengths: int64, (episodes,): steps of each.
        failed: bool, (episodes,): whether the pole fell.
    """

    observations: np.ndarray
    values: np.ndarray
    actions: np.ndarray
    lengths: np.ndarray
    failed: np.ndarray

    def rewards(self, config: CartPoleConfig) -> np.ndarray:
        """Return what the steps bring: float64, (episodes, steps)."""
        if not config.sutton_barto_reward:
            return np.ones(self.actions.shape)
        last = np.arange(self.actions.shape[1]) == self.lengths[:, None] - 1
        return np.where(last, -self.failed[:, None].astype(float), 0.0)


@torch.no_grad()
def greedy_episodes(
    config: CartPoleConfig,
    split: str,
    values: Callable[[Tensor], Tensor],
    *,
    device: str | torch.device,
    agents: int = 1,
) -> list[GreedyEpisodes]:
    """Return the greedy episodes of every agent, those of all agents played side by side.

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
    parts = [slice(i, i + count) for i in range(0, agents * count, count)]
    return [GreedyEpisodes(*(whole[part] for whole in (*steps, lengths, failed))) for part in parts]


def _side_by_side(count: int) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(ENVIRONMENT, num_envs=count, vectorization_mode="vector_entry_point")
