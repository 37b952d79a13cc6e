"""DQN on CartPole: against an agent written out by hand, and against single environments.

The hand-written agent shares with the package the random streams, and nothing else: it keeps its
steps in a list and sums n-step returns when it samples.
"""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from repeatlab.analysis.frames import load, to_target
from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive, generator
from repeatlab.studies.study import Study
from repeatlab.tasks.reinforcement import (
    Reinforcement,
    ReinforcementConfig,
    greedy,
    play_greedily,
    q_network,
)
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = np.array([2.0, 1.0, 10.0, 1.0], dtype=np.float32)
SMALL = {"hidden": (16, 8), "learning_starts": 60, "epsilon_steps": 300, "evaluation_episodes": 4}


def make(seed: int = 0, **fields: Any) -> Reinforcement:
    return Reinforcement(ReinforcementConfig(**SMALL | fields), seed=seed, device="cpu")


def ignore(loss: torch.Tensor) -> None:
    pass


def learn(task: Reinforcement, counts: list[int], start: int = 0) -> list[float]:
    """Make `counts[k]` updates on the fresh batch `start + k`; return the driver losses."""
    losses: list[float] = []
    for place, count in enumerate(counts):
        batch = task.fresh_batch(start + place)
        for _ in range(count):
            task.step(batch, lambda loss: losses.append(loss.item()))
    return losses


# --- the field's method, by hand ------------------------------------------------------------------


def network_by_hand(hidden: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, hidden[0]),
        nn.ReLU(),
        nn.Linear(hidden[0], hidden[1]),
        nn.ReLU(),
        nn.Linear(hidden[1], 2),
    )


class Agent:
    """Double DQN with 3-step returns, as one would write it for CartPole alone."""

    def __init__(self, seed: int, *, starts: int, decay: int, hidden: tuple[int, int], every: int):
        self.seed, self.starts, self.decay, self.every = seed, starts, decay, every
        torch.manual_seed(derive(seed, "weights"))
        self.online, self.frozen = network_by_hand(hidden), network_by_hand(hidden)
        self.frozen.load_state_dict(self.online.state_dict())
        self.adam = torch.optim.Adam(self.online.parameters(), lr=3e-4, fused=True)
        self.environment = gymnasium.make("CartPole-v1")
        self.history: list[tuple] = []  # (observation, action, reward, next, terminated, ended)
        self.episodes = self.updates = 0
        self.reset()

    def reset(self) -> None:
        start, _ = self.environment.reset(seed=derive(self.seed, "episode", self.episodes))
        self.here = start * SCALE

    def live(self) -> None:
        number = len(self.history)
        epsilon = max(0.02, 1 - 0.98 * number / self.decay)
        block, row = divmod(number, 1024)
        draws = torch.rand(1024, 2, generator=generator(self.seed, "explore", block))[row]
        if draws[0] < epsilon:
            action = 1 if draws[1] >= 0.5 else 0
        else:
            with torch.no_grad():
                values = self.online(torch.tensor(self.here))
            action = 1 if values[1] > values[0] else 0
        raw, _, terminated, truncated, _ = self.environment.step(action)
        there = raw * SCALE
        reward = -1.0 if terminated else 0.0
        self.history.append((self.here, action, reward, there, terminated, terminated or truncated))
        self.here = there
        if terminated or truncated:
            self.episodes += 1
            self.reset()

    def transition(self, t: int) -> tuple:
        observation, action = self.history[t][:2]
        total = 0.0
        for ahead in range(3):
            _, _, reward, there, terminated, ended = self.history[t + ahead]
            total += 0.99**ahead * reward
            if ended or ahead == 2:
                return observation, action, total, there, 0.99 ** (ahead + 1) * (not terminated)

    def sample(self, index: int) -> tuple[torch.Tensor, ...]:
        while len(self.history) < self.starts + index + 1:
            self.live()
        block, row = divmod(index, 1024)
        source = generator(self.seed, "replay", block)
        uniform = torch.rand(1024, 32, generator=source, dtype=torch.float64)[row]
        rows = [self.transition(int(u * (self.starts + index + 1 - 2))) for u in uniform]
        s, a, r, s2, d = zip(*rows, strict=True)
        floats = [torch.tensor(np.array(column), dtype=torch.float32) for column in (s, r, s2, d)]
        return floats[0], torch.tensor(a), *floats[1:]

    def update(self, s, a, r, s2, d) -> float:
        with torch.no_grad():
            best = self.online(s2).argmax(1)
            target = r + d * self.frozen(s2)[torch.arange(len(a)), best]
        guess = self.online(s).gather(1, a[:, None])[:, 0]
        loss = functional.huber_loss(guess, target)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.updates += 1
        if self.updates % self.every == 0:
            self.frozen.load_state_dict(self.online.state_dict())
        return loss.item()


def test_learns_bit_for_bit_as_the_agent_written_out_by_hand():
    counts = [1, 3, 1, 2, 5] * 15  # 180 updates on 75 fresh batches
    task = make(seed=3, target_every=70)
    with torch.random.fork_rng():
        agent = Agent(3, starts=60, decay=300, hidden=(16, 8), every=70)
    expected = []
    for index, count in enumerate(counts):
        batch = agent.sample(index)
        expected += [agent.update(*batch) for _ in range(count)]
    assert learn(task, counts) == expected
    for ours, theirs in zip(task.model.parameters(), agent.online.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(task.target.parameters(), agent.frozen.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert task.environment_steps == len(agent.history) == 60 + len(counts)
    # More than the start was lived through: a failure lies in the buffer, and the greedy policy.
    assert agent.episodes >= 3


@pytest.mark.parametrize("values", [[0.5, 1.0], [1.0, 0.5], [2.0, 2.0], [-1.0, -1.0, 3.0]])
def test_greedy_is_torch_s_argmax(values):
    assert greedy(torch.tensor(values)) == torch.tensor(values).argmax()


@pytest.mark.parametrize("action", [2, -1, 0.5])
def test_the_environment_refuses_other_actions_than_two(action):
    environment = make().environment._simulator
    environment.step(np.int64(1))
    with pytest.raises(AssertionError, match="invalid"):
        environment.step(action)


def test_has_the_size_of_the_plan():
    task = Reinforcement(ReinforcementConfig(learning_starts=3), seed=0, device="cpu")
    layers = [4, 120, 84, 2]
    parameters = sum((a + 1) * b for a, b in pairwise(layers))
    assert parameters == 10_934
    assert sum(p.numel() for p in task.model.parameters()) == parameters
    assert (task.forward_samples, task.backward_samples) == (3 * 32, 32)


def test_the_defaults_are_the_plans():
    config = ReinforcementConfig()
    assert (config.lr, config.batch_size, config.hidden) == (3e-4, 32, (120, 84))
    assert (config.n_steps, config.gamma, config.target_every) == (3, 0.99, 100)
    # 14,500 updates of one step each end at 15,000 steps, and the buffer has kept all of them.
    task = Reinforcement(config, seed=0, device="cpu")
    assert task._steps_at(14_499) == 15_000 <= config.capacity


@pytest.mark.parametrize(("driver", "power"), [("huber", 2), ("td_error", 1)])
def test_the_first_loss_of_an_agent_without_opinion_is_that_of_its_returns(driver, power):
    task = make(driver=driver)
    for network in (task.model, task.target):
        nn.init.zeros_(network[-1].weight)
        nn.init.zeros_(network[-1].bias)
    batch = task.fresh_batch(0)
    # All Q-values are 0, so delta is the return; within 1 the Huber loss is half its square.
    assert batch.returns.min() < 0
    delta = batch.returns.double().abs()
    expected = (delta.square() / 2 if power == 2 else delta).mean().item()
    assert learn(task, [1])[0] == pytest.approx(expected, rel=1e-6)


# --- fresh batches --------------------------------------------------------------------------------


def test_a_fresh_batch_comes_after_its_steps_and_is_the_same_when_asked_again():
    task = make(train_frequency=4)
    assert task.environment_steps == 60
    first = task.fresh_batch(0)
    assert task.environment_steps == 64
    second = task.fresh_batch(1)
    assert task.environment_steps == 68
    for batch in (first, second):
        again = task.fresh_batch(batch.index)
        assert all(torch.equal(a, b) for a, b in zip(batch[:-1], again[:-1], strict=True))
    assert task.environment_steps == 68
    # The two latest transitions wait for the rewards of their third step.
    assert 0 <= int(first.indices.min()) <= int(first.indices.max()) <= 64 - 3
    assert not torch.equal(first.indices, second.indices)


def test_samples_are_uniform_over_the_buffer():
    task = make(batch_size=256)
    indices = torch.cat([task.fresh_batch(k).indices for k in range(200)])
    # Among the first 59 transitions, which every one of these batches could have drawn.
    counts = torch.bincount(indices[indices < 59], minlength=59).double()
    expected = counts.mean()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert counts.min() > 0
    assert chi_square < 58 + 5 * (2 * 58) ** 0.5  # mean and standard deviation of chi^2 with 58


def test_arms_of_a_seed_share_weights_starts_and_replay_indices():
    standard, repeating = make(seed=5), make(seed=5)
    assert digest(standard.state_dict()) == digest(repeating.state_dict())
    same_content = []
    for k in range(80):
        first, second = standard.fresh_batch(k), repeating.fresh_batch(k)
        assert torch.equal(first.indices, second.indices)
        same_content.append(torch.equal(first.observations, second.observations))
        for task, batch, count in ((standard, first, 1), (repeating, second, 4)):
            for _ in range(count):
                task.step(batch, ignore)
    # What lies at those indices is each policy's own experience.
    assert same_content[0]
    assert not all(same_content)
    other = make(seed=6)
    assert not torch.equal(other.fresh_batch(0).indices, standard.replay(0).indices)
    assert not torch.equal(other.model[0].weight, make(seed=5).model[0].weight)


def test_a_redraw_takes_other_transitions_of_the_same_buffer_and_refresh_changes_nothing():
    task = make()
    batch = task.fresh_batch(9)
    redrawn = task.replay(9, visit=1)
    assert redrawn.index == 9
    assert not torch.equal(redrawn.indices, batch.indices)
    assert int(redrawn.indices.max()) <= 60 + 10 - 3
    assert torch.equal(task.replay(9, visit=1).indices, redrawn.indices)
    assert task.refresh(batch, 1) is batch


def test_a_small_buffer_forgets_the_oldest_transitions():
    task = make(capacity=50)
    for k in range(100):
        batch = task.fresh_batch(k)
        assert 60 + k + 1 - 50 <= int(batch.indices.min())
    # Transition i is what happened at step i, wherever it lies: the next ones begin where it led.
    numbers = torch.tensor(task.buffer.samples_at(160))
    held = task.buffer.batch(numbers, 0)
    one_later = {tuple(row) for row in held.observations[3:].tolist()}
    led_to = [tuple(row) for row in held.next_observations[:-3].tolist()]
    discounted = held.discounts[:-3].tolist()
    inside = [p for p, d in zip(led_to, discounted, strict=True) if d]
    assert inside
    assert set(inside) <= one_later


# --- what repeats do to the clocks ----------------------------------------------------------------


def test_epsilon_falls_with_environment_steps():
    task = Reinforcement(ReinforcementConfig(), seed=0, device="cpu")
    for steps, expected in ((0, 1.0), (1500, 0.755), (3000, 0.51), (6000, 0.02), (15_000, 0.02)):
        task.buffer.steps = steps
        assert task.epsilon() == pytest.approx(expected)
        task.updates += 1000  # without effect


def test_epsilon_can_fall_with_updates():
    by_steps, by_updates = make(), make(epsilon_clock="updates")
    learn(by_steps, [1] * 50)
    learn(by_updates, [1] * 50)
    assert by_steps.epsilon() == by_updates.epsilon() != 1.0
    assert digest(by_steps.state_dict()) == digest(by_updates.state_dict())
    learn(by_updates, [3] * 50, start=50)
    assert by_updates.epsilon() == pytest.approx(1 - 0.98 * (60 + 50 + 150) / 300)


def copies(task: Reinforcement, counts: list[int]) -> list[int]:
    """Return after how many updates the target network was found changed."""
    changed, before = [], digest(task.target.state_dict())
    for index, count in enumerate(counts):
        batch = task.fresh_batch(index)
        if digest(task.target.state_dict()) != before:
            changed.append(task.updates)
            before = digest(task.target.state_dict())
        for _ in range(count):
            task.step(batch, ignore)
            if digest(task.target.state_dict()) != before:
                changed.append(task.updates)
                before = digest(task.target.state_dict())
    return changed


def test_the_target_network_is_copied_by_updates_or_by_fresh_batches():
    assert copies(make(target_every=4), [1] * 10) == [4, 8]
    assert copies(make(target_every=4), [3] * 5) == [4, 8, 12]
    by_batches = {"target_every": 4, "target_clock": "fresh_batches"}
    assert copies(make(**by_batches), [1] * 10) == [4, 8]
    assert copies(make(**by_batches), [3] * 10) == [12, 24]


def test_a_replay_ratio_makes_more_batches_of_the_same_steps():
    once, often = make(train_frequency=2), make(train_frequency=2, replay_ratio=4)
    batches = [often.fresh_batch(k) for k in range(12)]
    assert often.environment_steps == 60 + 3 * 2
    assert len({tuple(batch.indices.tolist()) for batch in batches}) == 12
    assert all(int(b.indices.max()) < 60 + 2 * (k // 4 + 1) - 2 for k, b in enumerate(batches))
    learn(once, [1] * 3)
    assert once.environment_steps == often.environment_steps
    again = [often.fresh_batch(k).indices.tolist() for k in range(12)]
    assert again == [batch.indices.tolist() for batch in batches]
    assert often.environment_steps == 60 + 3 * 2
    # The clock of the target network that counts steps goes by them still.
    by_steps = {"target_every": 3, "target_clock": "fresh_batches"}
    assert copies(make(**by_steps, replay_ratio=2), [1] * 20) == [6, 12, 18]


@pytest.mark.parametrize(("layers", "kept"), [(1, 4), (2, 2), (9, 0)])
def test_a_reset_draws_the_last_layers_anew_and_forgets_their_moments(layers, kept):
    plain, reset = make(target_every=5), make(target_every=5, reset_every=7, reset_layers=layers)
    assert learn(plain, [1] * 7) == learn(reset, [1] * 7)
    first, number = list(make().model.parameters()), len(list(plain.model.parameters()))
    rows = zip(*(t.parameters() for t in (plain.model, reset.model, reset.target)), strict=True)
    for place, (before, after, target) in enumerate(rows):
        assert torch.equal(before, after) == (place < kept)
        assert torch.equal(after, target) == (place >= kept)
        assert not torch.equal(after, first[place])
        assert (after in reset.optimizer.state) == (place < kept)
        if place >= kept:  # drawn as torch's linear layers are
            fan_in = list(reset.model.parameters())[place // 2 * 2].shape[1]
            assert 0 < after.abs().max().item() <= fan_in**-0.5
    assert number == 6
    assert reset.buffer.steps == plain.buffer.steps
    # The next reset draws others.
    was = [weight.clone() for weight in list(reset.model.parameters())[-2:]]
    learn(reset, [1] * 7, start=7)
    assert reset.updates == 14
    assert not any(map(torch.equal, was, list(reset.model.parameters())[-2:]))


def run_config(method: dict[str, Any], updates: int = 40, **task: Any) -> RunConfig:
    data = {
        "task": {"name": "reinforcement"} | SMALL | task,
        "method": method,
        "max_updates": updates,
        "evaluation": {"every": 20},
        "device": "cpu",
    }
    return parse(RunConfig, data)


@pytest.mark.parametrize(
    ("method", "fresh"),
    [
        ({}, 40),
        ({"mapping": {"name": "constant", "repeats": 3}}, 14),
        ({"mapping": {"name": "constant", "repeats": 40}}, 1),
    ],
)
def test_repetition_starves_the_environment(tmp_path, method, fresh):
    record = train(run_config(method, train_frequency=2), tmp_path)
    ledger = record.summary["ledger"]
    assert (ledger["updates"], ledger["fresh_batches"]) == (40, fresh)
    assert ledger["environment_steps"] == 60 + 2 * fresh
    assert ledger["forward_samples"] == 40 * 96
    assert 32 * 0.5 < ledger["distinct_samples"] <= 60 + 2 * fresh
    last = record.evals[record.evals["update"] == 40]
    assert set(last["environment_steps"]) == {60 + 2 * fresh}
    assert np.isfinite(record.evals["value"]).all()


def test_once_is_standard_and_a_schedule_is_the_methods(tmp_path):
    standard = train(run_config({}), tmp_path)
    once = train(run_config({"mapping": {"name": "constant", "repeats": 1}}), tmp_path)
    decayed = train(run_config({"schedule": {"name": "linear"}}), tmp_path)
    assert standard.path != once.path
    assert standard.summary["state_sha256"] == once.summary["state_sha256"]
    assert standard.summary["final"] == once.summary["final"]
    assert decayed.summary["state_sha256"] != standard.summary["state_sha256"]
    assert decayed.updates["lr"].tolist() == pytest.approx([3e-4 * (1 - u / 40) for u in range(40)])


def test_targets_can_be_asked_for_on_the_axis_of_environment_steps(tmp_path):
    study = Study.of(
        name="reinforcement-target",
        tasks={"CartPole": {"name": "reinforcement"} | SMALL},
        methods={"standard": {}, "fixed2": {"mapping": {"name": "constant", "repeats": 2}}},
        seeds=1,
        max_updates=40,
        evaluation={"every": 20},
        device="cpu",
    )
    study.run(tmp_path, workers=0)
    records = load(tmp_path, study.name)
    missed = to_target(records.evals, "return", 1e9)
    steps = dict(zip(missed["method"], missed["environment_steps"], strict=True))
    assert steps == {"standard": 60 + 40, "fixed2": 60 + 20}
    assert not missed["reached"].any()
    assert to_target(records.evals, "return", 1.0)["reached"].all()


# --- losses per sample ----------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["huber", "td_error"])
def test_sample_losses_average_to_the_driver_and_leave_no_trace(driver):
    task = make(driver=driver)
    learn(task, [2] * 30)
    batch = task.fresh_batch(30)
    before = digest(task.state_dict())
    losses = task.sample_losses(batch)
    assert losses.shape == (32,)
    assert not losses.requires_grad
    assert digest(task.state_dict()) == before
    reported: list[torch.Tensor] = []
    task.step(batch, reported.append)
    assert reported[0].ndim == 0
    assert losses.mean().item() == pytest.approx(reported[0].item(), rel=1e-6)
    assert len(set(losses.tolist())) > 1


def test_the_driver_does_not_change_the_gradient():
    by_huber, by_error = make(), make(driver="td_error")
    first, second = learn(by_huber, [1] * 20), learn(by_error, [1] * 20)
    assert first != second
    assert digest(by_huber.state_dict()) == digest(by_error.state_dict())


@pytest.mark.parametrize("driver", ["huber", "td_error"])
def test_weights_act_on_the_gradient_and_not_on_the_driver(driver):
    plain, ones, some, part = (make(driver=driver) for _ in range(4))
    batch = plain.fresh_batch(0)
    reports: dict[str, list[float]] = {"plain": [], "ones": [], "some": []}
    plain.step(batch, lambda loss: reports["plain"].append(loss.item()))
    ones.step(batch, lambda loss, *_: reports["ones"].append(loss.item()), torch.ones(32))
    # Twice the weight on one half and none on the other is training on that half.
    halves = torch.cat([torch.full((16,), 2.0), torch.zeros(16)])
    some.step(batch, lambda loss, *_: reports["some"].append(loss.item()), halves)
    part.step(type(batch)(*(column[:16] for column in batch[:-1]), 0), ignore)
    assert reports["ones"] == pytest.approx(reports["plain"])
    assert reports["some"] == pytest.approx(reports["plain"])

    def gradients(task: Reinforcement) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in task.model.parameters()])

    torch.testing.assert_close(gradients(ones), gradients(plain))
    torch.testing.assert_close(gradients(some), gradients(part))
    assert not torch.allclose(gradients(some), gradients(plain))


# --- evaluation -----------------------------------------------------------------------------------


def balance(task: Reinforcement, weights: tuple[float, ...]) -> None:
    """Make the agent push right where the weighted (scaled) observation is positive."""
    (layer,) = task.model
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-w for w in weights], weights]))
        layer.bias.zero_()


# The angle alone is soon lost; with its velocity the pole stays up; "drifts" depends on the start:
# the first to fall begin and end again before the last have ended once.
POLICIES = {
    "falls": (0.0, 0.0, 1.0, 0.0),
    "stays": (0.1, 0.3, 0.5, 1.0),
    "drifts": (-0.2, -0.4, 0.2, 1.0),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("reward", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_evaluation_agrees_with_single_environments(policy, reward, copied):
    weights = POLICIES[policy]
    task = make(hidden=(), sutton_barto_reward=reward, evaluation_episodes=12)
    balance(task, weights)
    other = {"0.weight": torch.ones(2, 4) / 9, "0.bias": torch.zeros(2)}
    task.target.load_state_dict(task.model.state_dict() if copied else other)

    def value(observation: np.ndarray) -> float:
        return abs(float(observation @ np.float32(weights)))

    vector = gymnasium.make_vec("CartPole-v1", num_envs=12, vectorization_mode="vector_entry_point")
    vector.reset(seed=derive(0, "evaluation/test"))
    lengths, losses, values = [], [], []
    for start in vector.state.T:
        environment = gymnasium.make("CartPole-v1")
        environment.reset(seed=0)
        environment.unwrapped.state = start
        seen, rewards, over = [np.float32(start) * SCALE], [], False
        while not over:
            action = int(seen[-1] @ np.float32(weights) > 0)
            raw, _, terminated, truncated, _ = environment.step(action)
            seen.append(raw * SCALE)
            rewards.append((-1.0 if terminated else 0.0) if reward else 1.0)
            over = terminated or truncated
        lengths.append(len(rewards))
        for t in range(len(rewards)):
            # Q(s, a) of the greedy action is |w s|; another target network's is the mean it has.
            steps = min(3, len(rewards) - t)
            total = sum(0.99**i * rewards[t + i] for i in range(steps))
            ends = terminated and t + steps == len(rewards)
            later = value(seen[t + steps]) if copied else seen[t + steps].sum() / 9
            following = 0.0 if ends else 0.99**steps * later
            error = abs(total + following - value(seen[t]))
            losses.append(error**2 / 2 if error < 1 else error - 0.5)
            values.append(value(seen[t]))
    metrics = task.evaluate("test")
    assert metrics["return"] == np.mean(lengths)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["q_value"] == pytest.approx(np.mean(values), rel=1e-4)
    assert (np.mean(lengths) == 500) == (policy == "stays")


def test_training_metrics_are_those_of_the_episodes_lived():
    task = make()
    learn(task, [1] * 300)
    # Only the step of a failure has a return of exactly -1: the two before it are discounted.
    failed = task.buffer.batch(torch.arange(360), 0).returns == -1.0
    ends = [-1, *torch.where(failed)[0].tolist()]
    lengths = np.diff(ends)[-20:]
    metrics = task.evaluate("train")
    assert len(lengths) > 5
    assert metrics["return"] == np.mean(lengths)
    sampled = task.buffer.batch(torch.tensor(task.buffer.samples_at(360)), 0)
    everything = task.sample_losses(sampled).mean().item()
    assert metrics["loss"] == pytest.approx(everything, rel=1e-4)


def test_before_its_first_episode_has_ended_the_agent_has_lasted_so_long():
    task = make(learning_starts=4)
    assert task.evaluate("train")["return"] == 4


def test_evaluation_is_repeatable_and_has_no_influence():
    watched, alone = make(seed=2), make(seed=2)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for index in range(12):
        batch = watched.fresh_batch(index)
        before = digest(watched.state_dict())
        for split in ("train", "validation", "test"):
            assert watched.evaluate(split) == watched.evaluate(split)
        assert digest(watched.state_dict()) == before
        watched.step(batch, ignore)
    learn(alone, [1] * 12)
    assert digest(watched.state_dict()) == digest(alone.state_dict())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_episodes_of_several_agents_side_by_side_are_those_of_each_alone():
    agents = [make(seed=seed) for seed in range(3)]

    def values(seen: torch.Tensor) -> torch.Tensor:
        rows = seen.view(3, -1, 4)
        return torch.cat([agent.model(row) for agent, row in zip(agents, rows, strict=True)])

    together = play_greedily(agents[0].config, "test", values, device="cpu", agents=3)
    for agent, played in zip(agents, together, strict=True):
        alone = agent.play("test")
        assert (played.lengths == alone.lengths).all()
        for one, other in zip(played.transitions[:-1], alone.transitions[:-1], strict=True):
            assert torch.equal(one, other)


def test_values_of_played_episodes_are_the_network_s():
    agent = make(seed=1)
    with torch.no_grad():
        for weight in agent.model.parameters():
            weight.mul_(5)
    played = agent.play("validation")
    seen = played.transitions
    assert len(seen.actions) == played.lengths.sum()
    for found, at in (
        (played.values, seen.observations),
        (played.next_values, seen.next_observations),
    ):
        torch.testing.assert_close(found, agent.model(at).detach())
    assert torch.equal(played.values.argmax(1), seen.actions)


def test_evaluation_starts_are_fixed_over_runs_and_differ_between_splits():
    def starts(seed: int, split: str) -> torch.Tensor:
        played = make(seed=seed).play(split)
        return played.transitions.observations[np.cumsum(played.lengths) - played.lengths]

    assert torch.equal(starts(0, "test"), starts(1, "test"))
    assert not torch.equal(starts(0, "test"), starts(0, "validation"))
    assert len(starts(0, "test").unique(dim=0)) == 4


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 10, 23])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"capacity": 50},
        {"target_clock": "fresh_batches"},
        {"replay_ratio": 2, "reset_every": 8},
    ],
)
def test_goes_on_after_a_reload_in_the_middle_of_a_repeat(stop, fields):
    """As the loop does: the batch under way is asked for again."""
    counts, fields = [3] * 40, {"target_every": 10} | fields
    whole, first = (make(seed=4, **fields) for _ in range(2))
    losses = learn(whole, counts)
    learn(first, [*counts[:stop], 1])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(seed=4, **fields)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert digest(second.state_dict()) == digest(first.state_dict())
    rest = learn(second, [2, *counts[stop + 1 :]], start=stop)
    assert rest == losses[3 * stop + 1 :]
    assert digest(second.state_dict()) == digest(whole.state_dict())
    assert second.evaluate("train") == whole.evaluate("train")


@pytest.mark.parametrize("fields", [{}, {"learning_starts": 90, "capacity": 50}])
def test_an_agent_can_begin_where_its_like_has_begun(fields):
    lived = make(seed=3, **fields)
    beginning = lived.lived()
    learn(lived, [2] * 9)
    other = make(seed=3, **fields)
    begun = Reinforcement(other.config, seed=3, device="cpu", beginning=beginning)
    assert digest(begun.state_dict()) == digest(other.state_dict())
    assert begun.evaluate("train") == other.evaluate("train")
    learn(begun, [2] * 9)
    assert digest(begun.state_dict()) == digest(lived.state_dict())


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_starts": 2}, "must not be less than n_steps"),
        ({"capacity": 2}, "must not be less than n_steps"),
        ({"driver": "mse"}, "driver.*'huber' or 'td_error'; not 'mse'"),
        ({"target_clock": "steps"}, "target_clock.*not 'steps'"),
        ({"observation_scale": [1.0, 2.0]}, "observation_scale.2"),
        ({"hidden": [120, 0]}, "hidden.1.*not 0"),
        ({"gamma": 1.5}, "gamma.*not 1.5"),
        ({"epsilon": 0.5}, "epsilon: unknown key; did you mean"),
    ],
)
def test_refuses_what_makes_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse(RunConfig, {"task": {"name": "reinforcement"} | fields, "max_updates": 1})


def test_a_configuration_survives_json():
    config = run_config({}, hidden=(7,), observation_scale=[1.0, 1.0, 1.0, 1.0])
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert again.run_id == config.run_id


def test_the_network_takes_any_number_of_layers():
    assert [tuple(p.shape) for p in q_network((5,)).parameters()] == [(5, 4), (5,), (2, 5), (2,)]
