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
  `target_clock: fresh_batches` counts steps / `train_frequency`, which are the fresh batches;
- a repeat sees the same transitions, and nothing is redrawn, but its TD targets are computed anew:
  the network that picks the action in s' has moved. There is no augmentation, so `fresh_views`
  is refused. `replay(index, visit)` draws other transitions from the same buffer, for the
  control that replaces repeats by new samples (a higher update-to-data ratio).

`replay_ratio` makes that many fresh batches after the same steps, with all else as it is: the
field's own way to more updates a step. What it costs, networks that fit their first experience and
learn no longer, is mended by resets (Nikishin et al. 2022, arXiv 2205.07802): `reset_every` draws
the last `reset_layers` anew in both networks, forgets their moments in the optimizer, and leaves
the buffer.

Forward samples of an update: the batch through the network at s, and through both at s'. The single
observations on which the agent acts are not counted; they go with environment steps.

Return is the number of steps that the pole stays up, at most 500; CartPole-v1 counts as solved at
475. The reward learnt from is 0, and -1 for the failure (`sutton_barto_reward`), so that Q-values
lie in [-1, 0]. Public reference: CleanRL's DQN reaches 488.69 +- 16.11 after 500,000 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.seeding import EndlessDraws, generator
from repeatlab.tasks import Report, TaskConfig
from repeatlab.tasks.cartpole import ACTIONS, OBSERVED, CartPole, CartPoleConfig, greedy_episodes
from repeatlab.tasks.learner import Learner, LearningTask
from repeatlab.tasks.models import drawn_from
from repeatlab.tasks.optimization import OptimizerChoice, chosen
from repeatlab.tasks.replay_buffer import ReplayBuffer, Transitions, whole_episodes

PROBED_TRANSITIONS = 1000


class ReinforcementConfig(CartPoleConfig):
    """Settings of the reinforcement task; the defaults are the plan's.

    The plan's recipe also lets the learning rate fall to 0 linearly: that is the method's choice,
    `schedule: {name: linear}`.
    """

    name: Literal["reinforcement"] = "reinforcement"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    optimizer: OptimizerChoice = chosen("adam")
    batch_size: Annotated[int, Field(ge=1)] = 32
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = (120, 84)
    n_steps: Annotated[int, Field(ge=1)] = 3
    learning_starts: Annotated[int, Field(ge=1)] = 500
    """Environment steps before the first update."""
    train_frequency: Annotated[int, Field(ge=1)] = 1
    """Environment steps for each fresh batch, or for `replay_ratio` of them."""
    replay_ratio: Annotated[int, Field(ge=1)] = 1
    """Fresh batches for each `train_frequency` steps."""
    reset_every: Annotated[int, Field(ge=1)] | None = None
    """Updates between two resets; null leaves the networks as they are."""
    reset_layers: Annotated[int, Field(ge=1)] = 1
    """How many of the last layers a reset draws anew, at most all."""
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
        return self


class Reinforcement(LearningTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        environment: Where the agent lives.
        buffer: What it remembers of it.
        updates: Made so far.
    """

    Config: ClassVar[type[TaskConfig]] = ReinforcementConfig
    saved: ClassVar[Mapping[str, str]] = {
        "model": "model",
        "target": "target",
        "optimizer": "learner.optimizer_step",
        "updates": "updates",
    }

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
            beginning: What `lived()` was before the first update of an agent that is equal but for
                the learning rate, in place of living through it again.
        """
        self.config, self.seed, self.device = config, seed, torch.device(device)
        with drawn_from(seed):
            model = q_network(config.hidden)
        self.train_with(Learner(model, config, device=device))
        self.target = deepcopy(self.model).requires_grad_(False)
        self.batch_size = self.backward_samples = config.batch_size
        self.forward_samples = 3 * config.batch_size
        self.updates = 0

        self.environment = CartPole(config, seed)
        self.buffer = ReplayBuffer(
            config.capacity, OBSERVED, n_steps=config.n_steps, gamma=config.gamma
        )
        self._draws: dict[int, EndlessDraws] = {}
        self._chances = EndlessDraws(
            seed, "explore", lambda g, numbers: torch.rand(len(numbers), 2, generator=g).tolist()
        )
        if beginning is None:
            self.act(config.learning_starts)
        else:
            self.relive(beginning)

    # --- acting -----------------------------------------------------------------------------------

    @property
    def environment_steps(self) -> int:
        return self.buffer.steps

    def epsilon(self) -> float:
        """Return the probability of a random action at the next step."""
        config, clock = self.config, self.environment_steps
        if config.epsilon_clock == "updates" and clock > config.learning_starts:
            clock = config.learning_starts + self.updates
        fraction = min(1.0, clock / config.epsilon_steps)
        return config.epsilon_start + fraction * (config.epsilon_end - config.epsilon_start)

    def act(self, steps: int) -> None:
        """Make steps with the epsilon-greedy policy, and remember them."""
        environment = self.environment
        for _ in range(steps):
            chance, choice = self._chances[self.environment_steps]
            seen = environment.observation
            explores = chance < self.epsilon()
            action = int(choice * ACTIONS) if explores else self.greedy_action(seen)
            reward, terminated, truncated = environment.step(action)
            self.buffer.add(
                seen,
                action,
                reward,
                environment.observation,
                terminated=terminated,
                truncated=truncated,
            )
            if terminated or truncated:
                environment.next_episode()

    @torch.no_grad()
    def greedy_action(self, seen: np.ndarray) -> int:
        """Return the action of the highest value where `seen`, float32, (4,), is observed."""
        observation = torch.from_numpy(seen).to(self.device, non_blocking=True)
        return greedy(self.learner(observation))

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
            ticks = index // config.replay_ratio
            if config.target_clock == "fresh_batches" and ticks % config.target_every == 0:
                self._copy_target()
            self.act(missing)

    def _steps_at(self, index: int) -> int:
        config = self.config
        return config.learning_starts + (index // config.replay_ratio + 1) * config.train_frequency

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

    def step(self, batch: Transitions, report: Report, weights: Tensor | None = None) -> None:
        values, targets = self.outputs(batch)
        if weights is None:
            loss = functional.smooth_l1_loss(values, targets)
            huber = self.config.driver == "huber"
            report(loss if huber else (values.detach() - targets).abs().mean())
            self.learner.step(loss)
        else:
            drivers, losses = self.losses((values, targets), batch)
            self.learner.descend(
                losses,
                report,
                weights,
                drivers=drivers,
                bounds=lambda: self.bounds((values, targets), batch),
            )
        self.count_update()

    def count_update(self) -> None:
        """See one more update of the network, which the target network may follow."""
        self.updates += 1
        config = self.config
        if config.target_clock == "updates" and self.updates % config.target_every == 0:
            self._copy_target()
        if config.reset_every is not None and self.updates % config.reset_every == 0:
            self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        with drawn_from(self.seed, f"reset/{self.updates}"):
            first = q_network(self.config.hidden)
        networks = (self.model, self.target, first)
        rows = list(zip(*(network.parameters() for network in networks), strict=True))
        for weight, copy, new in rows[-2 * self.config.reset_layers :]:
            weight.copy_(new)
            copy.copy_(new)
            self.optimizer.state.pop(weight, None)

    def outputs(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """Return Q(s, a) and the double DQN targets of it, both (batch,)."""
        with torch.no_grad():
            next_values = self.learner(batch.next_observations)
            targets = double_q_targets(batch, next_values, self._target_values(batch))
        return taken(self.learner(batch.observations), batch), targets

    def _target_values(self, batch: Transitions) -> Tensor:
        """Return what the target network says of where transitions end, (batch, 2)."""
        return self.precision(self.target, batch.next_observations)

    def losses(self, outputs: tuple[Tensor, Tensor], batch: Transitions) -> tuple[Tensor, Tensor]:
        """Return the driver loss and the Huber loss of every transition, (batch,) each."""
        values, targets = outputs
        losses = functional.smooth_l1_loss(values, targets, reduction="none")
        return losses if self.config.driver == "huber" else (values - targets).abs(), losses

    def bounds(self, outputs: tuple[Tensor, Tensor], batch: Transitions) -> Tensor:
        """Return min(1, |delta|), (batch,): the Huber loss's gradient, and what replay ranks by."""
        values, targets = outputs
        return (values - targets).abs().clamp(max=1.0)

    @torch.no_grad()
    def _copy_target(self) -> None:
        for copy, weight in zip(self.target.parameters(), self.model.parameters(), strict=True):
            copy.copy_(weight)

    def _target_is_equal(self) -> bool:
        pairs = zip(self.target.parameters(), self.model.parameters(), strict=True)
        return all(torch.equal(copy, weight) for copy, weight in pairs)

    # --- evaluating -------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return mean return (steps), driver loss and the greedy Q-value, each a mean.

        "validation" and "test" play `evaluation_episodes` greedy episodes each in environments of
        their own, from starts that are the same for every run and differ between the two. "train"
        is how the agent fared while it learnt: the last 20 training episodes, exploration included,
        and 1000 transitions spread evenly over the replay buffer.
        """
        lengths, *lived = self._latest() if split == "train" else self.play(split)
        seen, values, next_values = (part.to(self.device) for part in lived)
        # Evaluations are mostly made when the target network has just been copied.
        later = next_values if self._target_is_equal() else self._target_values(seen)
        targets = double_q_targets(seen, next_values, later)
        drivers, _ = self.losses((taken(values, seen), targets), seen)
        return {
            "return": float(np.mean(lengths)),
            "loss": drivers.cpu().double().mean().item(),
            "q_value": values.amax(1).cpu().double().mean().item(),
        }

    def _latest(self) -> Played:
        """Return the latest training episodes, and transitions from all over the buffer."""
        # Until the first episode has ended: how long it has lasted.
        lengths = np.array(self.environment.recent_returns or [len(self.environment.actions)])
        numbers = self.buffer.samples_at(self.environment_steps)
        spread = torch.linspace(numbers[0], numbers[-1], min(len(numbers), PROBED_TRANSITIONS))
        seen = self.buffer.batch(spread.long(), 0).to(self.device)
        both = (seen.observations, seen.next_observations)
        return Played(lengths, seen, *map(self.learner, both))

    def play(self, split: str) -> Played:
        """Return the split's greedy episodes."""
        return play_greedily(self.config, split, self.learner, device=self.device)[0]

    # --- resuming ---------------------------------------------------------------------------------

    def lived(self) -> dict[str, Any]:
        """Return what the agent has lived through: all that its next steps depend on."""
        return {"buffer": self.buffer.state_dict(), **self.environment.state_dict()}

    def relive(self, state: dict[str, Any]) -> None:
        """Restore `lived()` of an agent with the same settings and seed."""
        self.buffer.load_state_dict(state["buffer"])
        self.environment.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"actor": self.lived()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.relive(state["actor"])


# --- double Q-learning ----------------------------------------------------------------------------


def q_network(hidden: tuple[int, ...]) -> nn.Sequential:
    """Return the MLP from an observation, (..., 4), to the values of the actions, (..., 2)."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((OBSERVED, *hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((OBSERVED, *hidden)[-1], ACTIONS))


def double_q_targets(batch: Transitions, next_values: Tensor, later: Tensor) -> Tensor:
    """Return the targets of double Q-learning, (..., b) (van Hasselt et al. 2016).

    Args:
        batch: Transitions, b of each agent.
        next_values: What the agents' networks say of where they end, (..., b, actions): it picks
            the action.
        later: What the target networks say of the same, likewise: it gives the action's value.
    """
    best = next_values.argmax(-1, keepdim=True)
    return batch.returns + batch.discounts * later.gather(-1, best).squeeze(-1)


def taken(values: Tensor, batch: Transitions) -> Tensor:
    """Return the values of the actions that were taken, (..., b), out of (..., b, actions)."""
    return values.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)


def greedy(values: Tensor) -> int:
    """Return the action of the highest of the values, (actions,): the first of equal ones."""
    of_actions = values.tolist()  # faster than a tensor's own argmax
    return of_actions.index(max(of_actions))


class Played(NamedTuple):
    """The greedy episodes of one agent, as the transitions that they were.

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


def play_greedily(
    config: ReinforcementConfig,
    split: str,
    values: Callable[[Tensor], Tensor],
    *,
    device: str | torch.device,
    agents: int = 1,
) -> list[Played]:
    """Return the greedy episodes of every agent; arguments as of `cartpole.greedy_episodes`."""
    played = []
    for seen in greedy_episodes(config, split, values, device=device, agents=agents):
        transitions, episode, first, last = whole_episodes(
            seen.observations,
            seen.actions,
            seen.rewards(config),
            seen.lengths,
            seen.failed,
            n_steps=config.n_steps,
            gamma=config.gamma,
        )
        of = (torch.from_numpy(seen.values[episode, step]) for step in (first, last))
        played.append(Played(seen.lengths, transitions, *of))
    return played
