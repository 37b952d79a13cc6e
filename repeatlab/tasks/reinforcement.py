"""Reinforcement learning: DQN with target network and replay on CartPole-v1.

The agent of Mnih et al. 2015 with double Q-learning (van Hasselt et al. 2016), 3-step returns and a
two-layer MLP of 10,934 parameters. One update is one step on the mean Huber loss of the TD
errors of a minibatch from the replay buffer, which is also the driver loss:

    delta = R + gamma^m Q_target(s', argmax_a Q(s', a)) - Q(s, a)

with R the discounted rewards of the m <= 3 steps from s to s', and no value beyond a terminal
state. `driver: td_error` drives with the mean of |delta| instead, what prioritized replay ranks by
(Schaul et al. 2015); the gradient is that of the Huber loss either way. TD losses scale with the
Q-values and follow the target network: they need not fall while the agent improves.

A *fresh batch* is `train_frequency` steps in the environment, then `batch_size` transitions drawn
uniformly from the buffer; which of them is a function of (seed, index), and so the same for every
arm of a seed, while their content is what that arm's policy has lived through. The first
`learning_starts` steps are made when the task is built, outside the clock.

Under repetition, and so at a fixed number of updates:

- the environment starves: N updates on a fresh batch still come with `train_frequency` steps. The
  ledger's `environment_steps` says how many there were;
- epsilon falls with environment steps, so that a repeating arm explores as long in the environment
  as the standard one; `epsilon_clock: updates` makes it fall with updates;
- the target network is copied every `target_every` updates, that is after fewer steps;
  `target_clock: fresh_batches` counts fresh batches, which are steps / `train_frequency`;
- a repeat sees the same transitions, and nothing is redrawn, but its TD targets are computed anew:
  the network that picks the action in s' has moved. There is no augmentation, so `fresh_views`
  is refused. `replay(index, visit)` draws other transitions from the same buffer, for the
  control that replaces repeats by new samples (a higher update-to-data ratio).

Forward samples of an update: the batch through the network at s, and through both at s'. The single
observations on which the agent acts are not counted; they go with environment steps.

Return is the number of steps that the pole stays up, at most 500; CartPole-v1 counts as solved at
475. The reward learnt from is 0, and -1 for the failure (`sutton_barto_reward`), so that Q-values
lie in [-1, 0]. Public reference: CleanRL's DQN reaches 488.69 +- 16.11 after 500,000 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from repeatlab.core.seeding import EndlessDraws, derive, generator
from repeatlab.data import gather
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.actor import Actor
from repeatlab.tasks.greedy_episodes import Played, greedy_episodes
from repeatlab.tasks.optimization import Descent, OptimizationConfig, OptimizerChoice, chosen
from repeatlab.tasks.precision import Precision, place
from repeatlab.tasks.q_learning import double_q_targets, greedy, huber_bounds, q_network, taken
from repeatlab.tasks.replay_buffer import Transitions

PROBED_TRANSITIONS = 1000


class ReinforcementConfig(TaskConfig, OptimizationConfig):
    """Settings of the reinforcement task; the defaults are the plan's.

    The plan's recipe also lets the learning rate fall to 0 linearly: that is the method's choice,
    `schedule: {name: linear}`.
    """

    unshared: ClassVar[str | None] = (
        "every process would live through an environment and a replay buffer of its own"
    )
    name: Literal["reinforcement"] = "reinforcement"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    optimizer: OptimizerChoice = chosen("adam")
    batch_size: Annotated[int, Field(ge=1)] = 32
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = (120, 84)
    """Widths of the hidden layers."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    n_steps: Annotated[int, Field(ge=1)] = 3
    learning_starts: Annotated[int, Field(ge=1)] = 500
    """Environment steps before the first update."""
    train_frequency: Annotated[int, Field(ge=1)] = 1
    """Environment steps for each fresh batch."""
    capacity: Annotated[int, Field(ge=1)] = 100_000
    """Transitions that the replay buffer keeps: by default all that the plan's budget makes."""
    target_every: Annotated[int, Field(ge=1)] = 100
    """Ticks of `target_clock` between two copies into the target network."""
    target_clock: Literal["updates", "fresh_batches"] = "updates"
    epsilon_start: Annotated[float, Field(ge=0, le=1)] = 1.0
    epsilon_end: Annotated[float, Field(ge=0, le=1)] = 0.02
    epsilon_steps: Annotated[int, Field(ge=1)] = 6_000
    """Ticks of `epsilon_clock` over which epsilon falls linearly."""
    epsilon_clock: Literal["environment_steps", "updates"] = "environment_steps"
    """`updates` begins to count them at `learning_starts`."""
    driver: Literal["huber", "td_error"] = "huber"
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

    def refusals(self) -> dict[str, str]:
        return {
            "rho_loss": "a TD error has no irreducible part: its target moves with the agent",
            "unweighted": "here it is prioritized replay, which needs its weights: give it score: "
            "gradient_norm, alpha: 0.6, beta: 0.4 and beta_end: 1.0",
            "fresh_views": "transitions are not augmented, so that there is one view of each",
            "prefetch": "the agent acts with its latest weights, so no batch can be made ahead",
        }

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.learning_starts < self.n_steps or self.capacity < self.n_steps:
            raise ValueError("learning_starts and capacity must not be less than n_steps")
        if self.ema_decay:
            raise ValueError(
                "ema_decay: the agent is judged as it acts, and its slow copy is the target network"
            )
        if self.channels_last:
            raise ValueError("channels_last: observations are no images")
        return self


class Reinforcement:
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods."""

    Config: ClassVar[type[TaskConfig]] = ReinforcementConfig

    def __init__(
        self,
        config: ReinforcementConfig,
        *,
        seed: int,
        device: str,
        beginning: dict[str, Any] | None = None,
    ) -> None:
        """Make the agent and let it live through `learning_starts` steps.

        Args:
            config: Its settings.
            seed: Its weights, its environment and all draws follow from it.
            device: Where its networks are.
            beginning: What `actor.state_dict()` was before the first update of an agent that is
                equal but for the learning rate, in place of living through it again.
        """
        self.config, self.seed, self.device = config, seed, device
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(derive(seed, "weights"))
            self.model = place(q_network(config.hidden), config, device)
        self.target = deepcopy(self.model).requires_grad_(False)
        self.precision = Precision.of(config, device)
        self.descent = Descent(self.model.parameters(), config, self.precision, device=device)
        self.descents, self.optimizer = [self.descent], self.descent.optimizer
        self.optimizers = [self.optimizer]
        self.batch_size = config.batch_size
        self.forward_samples = 3 * config.batch_size
        self.scoring_samples = self.bound_samples = self.forward_samples
        self.backward_samples = config.batch_size
        self.updates = 0

        self._draws: dict[int, EndlessDraws] = {}
        self.actor = Actor(
            config,
            seed,
            # Looked up at every step: in lock-step another function stands in its place.
            greedy=lambda seen: self.greedy_action(seen),
            updates=lambda: self.updates,
            beginning=beginning,
        )
        self.buffer = self.actor.buffer

    @property
    def environment_steps(self) -> int:
        return self.actor.steps

    @property
    def skipped_steps(self) -> int:
        return self.descent.skipped

    @torch.no_grad()
    def greedy_action(self, seen: np.ndarray) -> int:
        """Return the action of the highest value where `seen`, float32, (4,), is observed."""
        observation = torch.from_numpy(seen).to(self.device, non_blocking=True)
        return greedy(self.precision(self.model, observation))

    # --- learning ---------------------------------------------------------------------------------

    def fresh_batch(self, index: int) -> Transitions:
        """Act until the environment has made the steps that this batch comes after, and sample.

        Asked again for a batch that it has made, it returns the same without acting.
        """
        self._reach(index)
        return self.replay(index)

    def _reach(self, index: int) -> None:
        missing = self._steps_at(index) - self.environment_steps
        if missing > 0:
            config = self.config
            if config.target_clock == "fresh_batches" and index % config.target_every == 0:
                self._copy_target()
            self.actor.act(missing)

    def _steps_at(self, index: int) -> int:
        return self.config.learning_starts + (index + 1) * self.config.train_frequency

    def replay(self, index: int, visit: int = 0) -> Transitions:
        """Return a uniform sample of what the buffer held at fresh batch `index`.

        Args:
            index: A fresh batch that has been made.
            visit: 0 for the fresh batch itself; other numbers draw other transitions.
        """
        if visit not in self._draws:
            stream = f"replay/{visit}" if visit else "replay"
            self._draws[visit] = EndlessDraws(self.seed, stream, self._uniform)
        return self.fetch(torch.from_numpy(self._draws[visit][index]), index)

    def _uniform(self, generator: torch.Generator, numbers: range) -> np.ndarray:
        """Return, int64, the transitions drawn for the fresh batches `numbers`, a row for each."""
        shape = (len(numbers), self.config.batch_size)
        draws = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
        return self.buffer.uniform(draws, [self._steps_at(index) for index in numbers])

    def fetch(self, indices: Tensor, index: int) -> Transitions:
        """Return the transitions `indices`, int64, (batch,), as fresh batch `index`."""
        return self.buffer.batch(indices, index).to(self.device)

    def refresh(self, batch: Transitions, visit: int) -> Transitions:
        return batch

    def resample(self, batch: Transitions, visit: int) -> Transitions:
        return self.replay(batch.index, visit)

    def population(self, index: int) -> range:
        self._reach(index)
        return self.buffer.samples_at(self._steps_at(index))

    def candidates(self, index: int, block: int) -> Transitions:
        if block == index:
            return self.fresh_batch(index)
        self._reach(index)
        drawn = self._uniform(generator(self.seed, "candidates", block), range(index, index + 1))
        return self.batch_of(torch.from_numpy(drawn[0]), index)

    def batch_of(self, indices: Tensor, index: int) -> Transitions:
        return self.buffer.batch(indices.cpu(), index).to(self.device)

    def pick(self, blocks: Sequence[Transitions], picks: Tensor, index: int) -> Transitions:
        return gather(blocks, picks, index)

    def step(
        self, batch: Transitions, report: Callable[..., None], weights: Tensor | None = None
    ) -> None:
        values, targets = self._values_and_targets(batch)
        if weights is None:
            loss = functional.smooth_l1_loss(values, targets)
            huber = self.config.driver == "huber"
            report(loss if huber else (values.detach() - targets).abs().mean())
        else:
            losses = functional.smooth_l1_loss(values, targets, reduction="none")
            loss = (weights * losses).mean()
            drivers = self._driver_losses(values.detach(), targets)
            report(drivers.mean(), drivers, huber_bounds(values.detach(), targets))
        self.descent(loss)
        self.count_update()

    def count_update(self) -> None:
        """See one more update of the network, which the target network may follow."""
        self.updates += 1
        config = self.config
        if config.target_clock == "updates" and self.updates % config.target_every == 0:
            self._copy_target()

    def _values_and_targets(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """Return Q(s, a) and the double DQN targets of it, both (batch,)."""
        with torch.no_grad():
            next_values = self.precision(self.model, batch.next_observations)
            targets = double_q_targets(batch, next_values, self._target_values(batch))
        return taken(self.precision(self.model, batch.observations), batch), targets

    def _target_values(self, batch: Transitions) -> Tensor:
        """Return what the target network says of where transitions end, (batch, 2)."""
        return self.precision(self.target, batch.next_observations)

    def _driver_losses(self, values: Tensor, targets: Tensor) -> Tensor:
        if self.config.driver == "td_error":
            return (values - targets).abs()
        return functional.smooth_l1_loss(values, targets, reduction="none")

    @torch.no_grad()
    def _copy_target(self) -> None:
        for copy, weight in zip(self.target.parameters(), self.model.parameters(), strict=True):
            copy.copy_(weight)

    def _target_is_equal(self) -> bool:
        pairs = zip(self.target.parameters(), self.model.parameters(), strict=True)
        return all(torch.equal(copy, weight) for copy, weight in pairs)

    @torch.no_grad()
    def sample_losses(self, batch: Transitions) -> Tensor:
        """Return the driver loss of every transition, (batch,); their mean is the driver."""
        return self._driver_losses(*self._values_and_targets(batch))

    @torch.no_grad()
    def gradient_bounds(self, batch: Transitions) -> Tensor:
        return huber_bounds(*self._values_and_targets(batch))

    # --- evaluating -------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return mean return (steps), driver loss and the greedy Q-value, each a mean.

        "validation" and "test" play `evaluation_episodes` greedy episodes each in environments of
        their own, from starts that are the same for every run and differ between the two. "train"
        is how the agent fared while it learnt: the last 20 training episodes, exploration included,
        and 1000 transitions spread evenly over the replay buffer.
        """
        lengths, *lived = self._lived() if split == "train" else self.play(split)
        seen, values, next_values = (part.to(self.device) for part in lived)
        # Evaluations are mostly made when the target network has just been copied.
        later = next_values if self._target_is_equal() else self._target_values(seen)
        targets = double_q_targets(seen, next_values, later)
        losses = self._driver_losses(taken(values, seen), targets)
        return {
            "return": float(np.mean(lengths)),
            "loss": losses.double().mean().item(),
            "q_value": values.amax(1).double().mean().item(),
        }

    def _lived(self) -> Played:
        """Return the latest training episodes, and transitions from all over the buffer."""
        # Until the first episode has ended: how long it has lasted.
        lengths = np.array(self.actor.recent_returns or [len(self.actor.episode_actions)])
        numbers = self.buffer.samples_at(self.environment_steps)
        spread = torch.linspace(numbers[0], numbers[-1], min(len(numbers), PROBED_TRANSITIONS))
        seen = self.buffer.batch(spread.long(), 0).to(self.device)
        both = (seen.observations, seen.next_observations)
        return Played(lengths, seen, *(self.precision(self.model, part) for part in both))

    def play(self, split: str) -> Played:
        """Return the split's greedy episodes."""
        values = partial(self.precision, self.model)
        return greedy_episodes(self.config, split, values, device=self.device)[0]

    def pictures(self) -> dict[str, np.ndarray]:
        return {}

    # --- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.descent.state_dict(),
            "updates": self.updates,
            "actor": self.actor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.target.load_state_dict(state["target"])
        self.descent.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self.actor.load_state_dict(state["actor"])
