"""How a DQN agent lives in its environment: epsilon-greedy steps, remembered in a replay buffer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch

from repeatlab.core.seeding import EndlessDraws, derive
from repeatlab.tasks.greedy_episodes import ENVIRONMENT
from repeatlab.tasks.replay_buffer import ReplayBuffer

if TYPE_CHECKING:
    from repeatlab.tasks.reinforcement import ReinforcementConfig

RECENT_EPISODES = 20


class TwoActions(gymnasium.spaces.Discrete):
    """The space of CartPole's actions, which is asked at every step.

    gymnasium's own looks up each time what numbers its type can hold.
    """

    def contains(self, x: Any) -> bool:
        """Return whether `x` is 0 or 1."""
        return x in (0, 1)


class Actor:
    """An agent's environment, and what it remembers of its steps in it.

    All draws, and how an episode begins, are functions of (seed, number): what the agent does
    depends on its network alone.

    Args:
        config: The agent's task.
        seed: The run's.
        greedy: From an observation, float32, (4,), to the action of the highest value.
        updates: Returns how many updates the network has made.
        beginning: What `state_dict()` was after the first `learning_starts` steps of an equal agent
            with the same seed, in place of making them again.

    Attributes:
        buffer: The replay buffer.
        recent_returns: Steps of the latest training episodes.
        episode_actions: What was done in the episode under way.
    """

    def __init__(
        self,
        config: ReinforcementConfig,
        seed: int,
        *,
        greedy: Callable[[np.ndarray], int],
        updates: Callable[[], int],
        beginning: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.seed = config, seed
        self._greedy, self._updates = greedy, updates
        self.buffer = ReplayBuffer(config.capacity, 4, n_steps=config.n_steps, gamma=config.gamma)
        self.environment = gymnasium.make(
            ENVIRONMENT,
            sutton_barto_reward=config.sutton_barto_reward,
            disable_env_checker=True,
        )
        self.environment.unwrapped.action_space = TwoActions(2)
        self.scale = np.array(config.observation_scale, dtype=np.float32)
        self.recent_returns: deque[int] = deque(maxlen=RECENT_EPISODES)
        self._draws = EndlessDraws(
            seed, "explore", lambda g, numbers: torch.rand(len(numbers), 2, generator=g).tolist()
        )
        if beginning is None:
            self._begin_episode(0)
            self.act(config.learning_starts)
        else:
            self.load_state_dict(beginning)

    @property
    def steps(self) -> int:
        """Steps made in the environment."""
        return self.buffer.steps

    def epsilon(self) -> float:
        """Return the probability of a random action at the next step."""
        config, clock = self.config, self.steps
        if config.epsilon_clock == "updates" and clock > config.learning_starts:
            clock = config.learning_starts + self._updates()
        fraction = min(1.0, clock / config.epsilon_steps)
        return config.epsilon_start + fraction * (config.epsilon_end - config.epsilon_start)

    def act(self, steps: int) -> None:
        """Make steps with the epsilon-greedy policy, and remember them."""
        for _ in range(steps):
            chance, choice = self._draws[self.steps]
            before = self.observation
            action = int(choice * 2) if chance < self.epsilon() else self._greedy(before)
            raw, reward, terminated, truncated, _ = self.environment.step(action)
            self.observation = raw * self.scale
            self.buffer.add(
                before,
                action,
                reward,
                self.observation,
                terminated=terminated,
                truncated=truncated,
            )
            self.episode_actions.append(action)
            if terminated or truncated:
                self.recent_returns.append(len(self.episode_actions))
                self._begin_episode(self.episode + 1)

    def _begin_episode(self, episode: int) -> None:
        """Reset the environment: how an episode begins is a function of (seed, its number)."""
        self.episode = episode
        self.episode_actions: list[int] = []
        raw, _ = self.environment.reset(seed=derive(self.seed, "episode", episode))
        self.observation = raw * self.scale

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, and what is remembered."""
        return {
            "buffer": self.buffer.state_dict(),
            "episode": self.episode,
            "episode_actions": list(self.episode_actions),
            "recent_returns": list(self.recent_returns),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` of an agent with the same settings and seed."""
        self.buffer.load_state_dict(state["buffer"])
        self.recent_returns = deque(state["recent_returns"], maxlen=RECENT_EPISODES)
        # The simulator is deterministic: the same start and actions lead to the same state.
        self._begin_episode(state["episode"])
        for action in state["episode_actions"]:
            self.observation = self.environment.step(action)[0] * self.scale
            self.episode_actions.append(action)
