"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) on CartPole-v1.

A *fresh batch* is one rollout: `batch_size` steps of `environments` environments side by side, made
with the policy of the moment. A *visit* is one pass over it, one update on all of its steps, and N
is the number of passes. Here repetition is the method itself, not an addition to it: the field's
default is a constant K from 4 to 20, its adaptive K is the KL stop (`mapping: {name: while,
t: 0.02, max_repeats: 10}` with `driver: kl`), and N = 1 is the policy gradient without reuse. The
field often cuts a rollout into minibatches that each pass deals out anew. Then no batch would ever
be repeated, and no loss be one that N belongs to; so a small rollout is taken whole, as the
settings tuned for CartPole do, with as many updates for each step of the environment as a large
one in minibatches of its size. The loss of a step is

    L = max(-A r, -A clip(r, 1 - c, 1 + c)) + c_v (V(s) - R)^2 / 2 - c_e H(pi(. | s))

with r the probability of the action now / when it was taken, and A the advantage by GAE(lambda)
(Schulman et al. 2016, arXiv 1506.02438), normalised over the rollout; R is A, before that, plus the
value of then. An episode that was cut off counts the value where it was; a fallen pole counts 0.
Other details are those of Huang et al. 2022 ("The 37 implementation details of PPO"): tanh networks
apart for policy and value, orthogonal first weights, Adam with eps 1e-5, gradients clipped at norm
0.5; the rate falls to 0 by `schedule: {name: linear}`.

What drives, by `driver`, each a mean over the rollout's steps:

- `loss`: L, as it is descended;
- `value`: (V(s) - R)^2 / 2, how far the rollout was from what the critic had expected;
- `surrogate`: the first term alone. At the first visit it is 0 on every rollout, as r = 1 and A is
  normalised: a mapping that looks at first losses alone has nothing to go by;
- `kl`: (r - 1) - ln r, by which implementations stop (Schulman 2020, "Approximating KL
  divergence"). It is 0 at the first visit too, and always the KL before the visit's update: that
  after the last update is not looked at.

Under repetition at a fixed number of updates the environment starves, as in `reinforcement`: the
ledger's `environment_steps` is `batch_size` a rollout, of which the first is made when the task is
built. Steps that are visited again come from a policy that is gone, which r corrects for and the
clip limits. Draws are functions of (seed, rollout, step): arms act alike until they have learnt
otherwise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from repeatlab.core.seeding import EndlessDraws, derive
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.cartpole import ACTIONS, OBSERVED, CartPole, CartPoleConfig, greedy_episodes
from repeatlab.tasks.learner import Learner, LearningTask
from repeatlab.tasks.models import drawn_from
from repeatlab.tasks.optimization import OptimizerChoice, chosen

ALL_OF_IT = "a batch is all that its rollout has lived through: there are no others to choose from"


class PPOConfig(CartPoleConfig):
    """Settings of the task; the defaults are those that RL Baselines3 Zoo has tuned for CartPole.

    But for the scale of observations and the clip, which does not fall. It has K = 20 there, and
    the rate falls to 0.
    """

    name: Literal["ppo"] = "ppo"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    optimizer: OptimizerChoice = chosen("adam", eps=1e-5)
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.5
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Steps of a rollout, of all environments together."""
    environments: Annotated[int, Field(ge=1)] = 8
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = (64, 64)
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.98
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.8
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far r may be from 1 before its step pulls no further."""
    clip_value: Annotated[float, Field(gt=0)] | None = None
    """How far a value may move from that of the rollout before its step pulls no further."""
    value_weight: Annotated[float, Field(ge=0)] = 0.5
    entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    sutton_barto_reward: bool = False
    driver: Literal["loss", "value", "surrogate", "kl"] = "loss"

    def refusals(self) -> dict[str, str]:
        samplers = ("hard_mining", "online", "importance", "selective", "rho_loss", "gradient_norm")
        return dict.fromkeys(samplers, ALL_OF_IT) | {
            "fresh_samples": "N rollouts in place of N passes are standard training: use `{}`",
            "fresh_views": "observations are not augmented, so that there is one view of each",
            "spaced": "a rollout is of the policy of the moment: it is used, and gone",
            "prefetch": "the agent acts with its latest weights, so no batch can be made ahead",
        }

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_size % self.environments:
            many = f"a multiple of environments, {self.environments}"
            raise ValueError(f"batch_size must be {many}; not {self.batch_size}")
        return self


class Rollout(NamedTuple):
    """A batch of b steps, environment by environment, each in its order.

    Attributes:
        observations: float32, (b, 4): where the action was taken.
        actions: int64, (b,).
        log_probabilities: float32, (b,): of the actions, when they were taken.
        values: float32, (b,): V(s) then.
        advantages: float32, (b,): A, normalised.
        returns: float32, (b,): R.
        indices: int64, (b,): the steps' numbers.
        index: Which fresh batch this is, from 0.
    """

    observations: Tensor
    actions: Tensor
    log_probabilities: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    indices: Tensor
    index: int

    def to(self, device: str | torch.device) -> Rollout:
        """Return the batch on `device`."""
        return Rollout(*(t.to(device, non_blocking=True) for t in self[:-1]), self.index)


class PPO(LearningTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        environments: Where the agent lives.
        rollout: The latest.
    """

    Config: ClassVar[type[TaskConfig]] = PPOConfig
    saved = LearningTask.saved | {
        "environments": "environments",
        "environment_steps": "environment_steps",
    }

    def __init__(self, config: PPOConfig, *, seed: int, device: str) -> None:
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.batch_size = self.forward_samples = self.backward_samples = config.batch_size
        with drawn_from(seed):
            model = ActorCritic(config.hidden)
        self.train_with(Learner(model, config, device=device))
        count = range(config.environments)
        self.environments = [CartPole(config, derive(seed, "environment", e)) for e in count]
        self._chances = EndlessDraws(
            seed,
            "act",
            lambda g, numbers: torch.rand(len(numbers), len(count), generator=g).numpy(),
        )
        self.rollout = self._live(0)

    # --- acting -----------------------------------------------------------------------------------

    def fresh_batch(self, index: int) -> Rollout:
        """Return rollout `index`, made now unless it is the latest."""
        if index != self.rollout.index:
            self.rollout = self._live(index)
        return self.rollout

    @torch.no_grad()
    def _live(self, index: int) -> Rollout:
        """Act for a rollout with the policy of the moment."""
        steps = self.batch_size // len(self.environments)
        lived = np.zeros((len(self.environments), steps, 2 * OBSERVED + 4), dtype=np.float32)
        for step in range(steps):
            seen = np.stack([world.observation for world in self.environments])
            policy = self._policy(torch.from_numpy(seen).to(self.device)).softmax(1).cpu().numpy()
            actions = self._chances[index * steps + step] >= policy[:, 0]
            for e, world in enumerate(self.environments):
                reward, fell, cut = world.step(int(actions[e]))
                ends = fell or cut
                lived[e, step] = (*seen[e], *world.observation, actions[e], reward, fell, ends)
                if ends:
                    world.next_episode()
        self.environment_steps += self.batch_size
        return self._judged(lived, index)

    def _policy(self, observations: Tensor) -> Tensor:
        return self.precision(self.model.actor, observations)

    def _judged(self, lived: np.ndarray, index: int) -> Rollout:
        """Return the rollout that was lived through, with what its steps were worth.

        `lived` is (environments, steps, 12): observations where a step begins and where it led, the
        action, the reward, and whether the step led to a terminal state and ended an episode.
        """
        parts = torch.from_numpy(lived).flatten(0, 1).split((OBSERVED, OBSERVED, 4), dim=1)
        here, there = (part.contiguous().to(self.device) for part in parts[:2])
        taken, rewards, terminated, ended = np.moveaxis(lived[..., 2 * OBSERVED :], -1, 0)
        outputs, actions = self.learner(here).cpu(), torch.from_numpy(taken.flatten()).long()
        values = outputs[:, ACTIONS]
        later = self.precision(self.model.critic, there).cpu().numpy().reshape(ended.shape)
        now = values.numpy().reshape(ended.shape)
        found = advantages(rewards, now, later, terminated, ended, self.config)
        raw = torch.from_numpy(found).flatten()
        return Rollout(
            here,
            actions,
            log_probability(outputs, actions),
            values,
            (raw - raw.mean()) / (raw.std(correction=0) + 1e-8),
            raw + values,
            torch.tensor(self.population(index)),
            index,
        ).to(self.device)

    def population(self, index: int) -> range:
        return range(index * self.batch_size, (index + 1) * self.batch_size)

    # --- learning ---------------------------------------------------------------------------------

    def outputs(self, batch: Rollout) -> Tensor:
        """Return the logits of the actions, and V(s), (b, 3)."""
        return self.learner(batch.observations)

    def losses(self, outputs: Tensor, batch: Rollout) -> tuple[Tensor, Tensor]:
        """Return what drives and what is descended, of every step, (b,) each."""
        config = self.config
        change = log_probability(outputs, batch.actions) - batch.log_probabilities
        ratio = change.exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        surrogate = -torch.minimum(batch.advantages * ratio, batch.advantages * clipped)
        error = (outputs[:, ACTIONS] - batch.returns).square()
        if config.clip_value is not None:
            moved = (outputs[:, ACTIONS] - batch.values).clamp(
                -config.clip_value, config.clip_value
            )
            error = torch.maximum(error, (batch.values + moved - batch.returns).square())
        value = error / 2
        loss = surrogate + config.value_weight * value - config.entropy_weight * entropy(outputs)
        parts = {"loss": loss, "value": value, "surrogate": surrogate, "kl": ratio - 1 - change}
        return parts[config.driver], loss

    def bounds(self, outputs: Tensor, batch: Rollout) -> Tensor:
        """Return zeros: no sampler asks for bounds here."""
        return torch.zeros_like(batch.returns)

    # --- evaluating -------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return mean return (steps), the critic's loss (V(s) - R)^2 / 2 and the mean entropy.

        "validation" and "test" play greedy episodes, as in `reinforcement`. "train" is how the
        agent fared while it learnt: the last 20 episodes of each environment, and the last rollout.
        """
        if split == "train":
            played = [n for e in self.environments for n in e.recent_returns]
            # Until the first episode has ended: how long they have lasted.
            lengths = played or [len(e.actions) for e in self.environments]
            outputs = self.outputs(self.rollout).cpu()
            errors = (outputs[:, ACTIONS] - self.rollout.returns.cpu()).numpy()
        else:
            lengths, outputs, errors = self._played(split)
        return {
            "return": float(np.mean(lengths)),
            "loss": float(np.mean(np.square(errors, dtype=float)) / 2),
            "entropy": entropy(outputs).mean().item(),
        }

    def _played(self, split: str) -> tuple[np.ndarray, Tensor, np.ndarray]:
        """Return the lengths of greedy episodes, and of their n steps outputs, (n, 3), and A."""
        (played,) = greedy_episodes(self.config, split, self._policy, device=self.device)
        outputs = self.learner(torch.from_numpy(played.observations).to(self.device)).cpu()
        values, step = outputs[..., ACTIONS].numpy(), np.arange(played.actions.shape[1])
        ended, inside = (f(step, played.lengths[:, None] - 1) for f in (np.equal, np.less_equal))
        rewards, fell = played.rewards(self.config), ended & played.failed[:, None]
        found = advantages(rewards, values[:, :-1], values[:, 1:], fell, ended, self.config)
        return played.lengths, outputs[:, :-1][torch.from_numpy(inside)], found[inside]

    # --- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rollout": self.rollout._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rollout = Rollout(**state["rollout"]).to(self.device)


class ActorCritic(nn.Module):
    """Two networks of tanh layers, from an observation to logits and to a value.

    Its output, (..., 3), is the logits of the two actions, and the value.
    """

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.actor = _layers(hidden, ACTIONS, gain=0.01)
        self.critic = _layers(hidden, 1, gain=1.0)

    def forward(self, observations: Tensor) -> Tensor:
        """Return both networks' outputs side by side."""
        return torch.cat([self.actor(observations), self.critic(observations)], dim=-1)


def _layers(hidden: tuple[int, ...], outputs: int, *, gain: float) -> nn.Sequential:
    widths, layers = (OBSERVED, *hidden, outputs), []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, 2**0.5)
        nn.init.zeros_(layers[-2].bias)
    nn.init.orthogonal_(layers[-2].weight, gain)
    return nn.Sequential(*layers[:-1])


def log_probability(outputs: Tensor, actions: Tensor) -> Tensor:
    """Return ln pi(a | s) of actions, (n,), for a network's outputs, (n, 3)."""
    return outputs[:, :ACTIONS].log_softmax(1).gather(1, actions.unsqueeze(1)).squeeze(1)


def entropy(outputs: Tensor) -> Tensor:
    """Return the entropy of the policy, (n,), in nats, for a network's outputs, (n, 3)."""
    policy = outputs[:, :ACTIONS].log_softmax(1)
    return -(policy.exp() * policy).sum(1)


def advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    ended: np.ndarray,
    config: PPOConfig,
) -> np.ndarray:
    """Return A_t = sum_k (gamma lambda)^k delta_{t+k} up to the episode's end, or the last step.

    With delta = r + gamma V(s') - V(s), without V(s') beyond a terminal state. All arrays, and what
    is returned, are (..., steps).

    Args:
        rewards: What the steps brought.
        values: V(s).
        next_values: V(s'), of where a step led, before a new episode begins.
        terminated: Whether the step led to a terminal state, 0 or 1.
        ended: Whether an episode ended with it, terminated or cut off, 0 or 1.
        config: Has gamma, and lambda: 0 is the TD error, 1 the return less V(s).
    """
    found = rewards + config.gamma * next_values * (1 - terminated) - values
    fades = config.gamma * config.gae_lambda * (1 - ended)
    for step in reversed(range(found.shape[-1] - 1)):
        found[..., step] += fades[..., step] * found[..., step + 1]
    return found
