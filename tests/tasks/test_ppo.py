"""PPO on CartPole: against an agent written out by hand, and what is known of its numbers.

The hand-written agent shares with the package the random streams and the first weights, and nothing
else: its environments are gymnasium's own, and it sums advantages by their definition.
"""

from __future__ import annotations

import io
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive, generator
from repeatlab.tasks.cartpole import greedy_episodes
from repeatlab.tasks.ppo import PPO, ActorCritic, PPOConfig, advantages
from repeatlab.training.checkpoint import digest
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

SCALE = np.array([2.0, 1.0, 10.0, 1.0], dtype=np.float32)
SMALL = {"hidden": (16,), "batch_size": 24, "environments": 3, "evaluation_episodes": 4}


def make(seed: int = 0, **fields: Any) -> PPO:
    return PPO(PPOConfig(**SMALL | fields), seed=seed, device="cpu")


def learn(task: PPO, counts: list[int], start: int = 0) -> list[float]:
    """Make `counts[k]` updates on the fresh batch `start + k`; return the driver losses."""
    losses: list[float] = []
    for place, count in enumerate(counts):
        batch = task.fresh_batch(start + place)
        for _ in range(count):
            task.step(batch, lambda loss, *_: losses.append(loss.item()))
    return losses


def run_config(method: dict[str, Any], updates: int = 40, **task: Any) -> RunConfig:
    data = {
        "task": {"name": "ppo"} | SMALL | task,
        "method": method,
        "max_updates": updates,
        "evaluation": {"every": 20},
        "seed": 3,
        "device": "cpu",
    }
    return parse(RunConfig, data)


# --- the field's method, by hand ------------------------------------------------------------------


def by_definition(rewards, values, later, fell, ended, gamma: float, lam: float) -> np.ndarray:
    """Return the advantages of the steps of one environment, each as the sum that it is."""
    found = []
    for t in range(len(rewards)):
        total, weight = 0.0, 1.0
        for k in range(t, len(rewards)):
            beyond = 0.0 if fell[k] else later[k]
            total += weight * (rewards[k] + gamma * beyond - values[k])
            if ended[k]:
                break
            weight *= gamma * lam
        found.append(total)
    return np.array(found)


class Agent:
    """PPO on whole rollouts, as one would write it for CartPole alone."""

    def __init__(self, seed: int, first: dict[str, torch.Tensor], *, clip_value: float | None):
        self.seed, self.rollouts, self.steps = seed, 0, 0
        self.actor = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        for name, network in (("actor", self.actor), ("critic", self.critic)):
            begun = {k.removeprefix(f"{name}."): v for k, v in first.items() if name in k}
            network.load_state_dict(begun)
        self.weights = [*self.actor.parameters(), *self.critic.parameters()]
        self.adam = torch.optim.Adam(self.weights, lr=0.003, eps=1e-5)
        self.clip_value = clip_value
        self.worlds = [gymnasium.make("CartPole-v1") for _ in range(3)]
        self.episodes, self.here = [0] * 3, [self.begin(e, 0) for e in range(3)]

    def begin(self, e: int, episode: int) -> np.ndarray:
        seed = derive(derive(self.seed, "environment", e), "episode", episode)
        return self.worlds[e].reset(seed=seed)[0] * SCALE

    def rollout(self) -> tuple[torch.Tensor, ...]:
        lived: list[list[tuple]] = [[], [], []]
        for step in range(8):
            block, row = divmod(self.rollouts * 8 + step, 1024)
            draws = torch.rand(1024, 3, generator=generator(self.seed, "act", block))[row]
            for e, world in enumerate(self.worlds):
                with torch.no_grad():
                    first = torch.softmax(self.actor(torch.tensor(self.here[e])), 0)[0]
                action = 0 if draws[e] < first else 1
                raw, reward, fell, cut, _ = world.step(action)
                lived[e].append((self.here[e], action, reward, raw * SCALE, fell, fell or cut))
                self.here[e], self.steps = raw * SCALE, self.steps + 1
                if fell or cut:
                    self.episodes[e] += 1
                    self.here[e] = self.begin(e, self.episodes[e])
        self.rollouts += 1
        parts = []
        for steps in lived:
            s, a, r, s2, fell, ended = (np.array(column) for column in zip(*steps, strict=True))
            with torch.no_grad():
                values = self.critic(torch.tensor(s))[:, 0]
                later = self.critic(torch.tensor(s2))[:, 0]
                chosen = torch.tensor(a)
                before = torch.distributions.Categorical(logits=self.actor(torch.tensor(s)))
            raw = by_definition(r, values.numpy(), later.numpy(), fell, ended, 0.98, 0.8)
            parts.append((torch.tensor(s), chosen, before.log_prob(chosen), values, raw))
        s, a, log_prob, values, raw = zip(*parts, strict=True)
        raw = np.concatenate(raw)
        normal = (raw - raw.mean()) / (raw.std() + 1e-8)
        values = torch.cat(values)
        returns = (torch.tensor(raw) + values.double()).float()
        return *map(torch.cat, (s, a, log_prob)), values, torch.tensor(normal).float(), returns

    def update(self, s, a, log_prob, values, normal, returns) -> tuple[float, float]:
        """Make one update; return the loss and the KL before it."""
        policy = torch.distributions.Categorical(logits=self.actor(s))
        ratio = torch.exp(policy.log_prob(a) - log_prob)
        gain = torch.min(normal * ratio, normal * torch.clamp(ratio, 0.8, 1.2))
        value = self.critic(s)[:, 0]
        error = (value - returns) ** 2
        if self.clip_value:
            c = self.clip_value
            near = torch.min(torch.max(value, values - c), values + c)
            error = torch.max(error, (near - returns) ** 2)
        loss = -gain.mean() + 0.5 * (error / 2).mean() - 0.01 * policy.entropy().mean()
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 0.5)
        self.adam.step()
        return loss.item(), (ratio - 1 - torch.log(ratio)).mean().item()


def agent_like(task: PPO, **options: Any) -> Agent:
    first = {name: weight.clone() for name, weight in task.model.state_dict().items()}
    return Agent(task.seed, first, **{"clip_value": None} | options)


@pytest.mark.parametrize("clip_value", [None, 0.02])
def test_learns_as_the_agent_written_out_by_hand(clip_value):
    counts = [1, 3, 1, 2, 5, 4, 1, 8] * 2  # 50 updates on 16 rollouts
    task = make(seed=3, lr=0.003, entropy_weight=0.01, clip_value=clip_value)
    agent, expected = agent_like(task, clip_value=clip_value), []
    for count in counts:
        batch = agent.rollout()
        expected += [agent.update(*batch)[0] for _ in range(count)]
    assert len(expected) == 50
    assert learn(task, counts) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for ours, theirs in zip(task.model.parameters(), agent.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert task.environment_steps == agent.steps == 16 * 24
    # Otherwise neither the end of an episode nor the beginning of the next was met.
    assert min(agent.episodes) >= 3


def test_the_kl_stop_makes_as_many_passes_as_the_loop_written_by_hand(tmp_path):
    stop = {"name": "while", "t": 0.002, "max_repeats": 6}
    config = run_config({"mapping": stop}, 60, lr=0.003, driver="kl", entropy_weight=0.01)
    done = train(config, tmp_path)
    first = PPO(config.task, seed=config.stream_seed, device="cpu")
    agent, passes, made = agent_like(first), [], 0
    while made < 60:
        batch, kl, passes = agent.rollout(), 0.0, [*passes, 0]
        while kl < 0.002 and passes[-1] < 6 and made < 60:
            _, kl = agent.update(*batch)
            passes[-1], made = passes[-1] + 1, made + 1
    assert done.updates.groupby("fresh_batch")["repeat"].size().tolist() == passes
    assert {6} < set(passes)  # stopped by the KL, and by the most
    assert done.summary["ledger"]["environment_steps"] == agent.steps == 24 * len(passes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_advantages_are_the_sums_that_define_them(data):
    steps, gamma, lam = data.draw(st.integers(1, 12)), *data.draw(st.tuples(*[st.floats(0, 1)] * 2))
    numbers = st.lists(st.floats(-10, 10), min_size=steps, max_size=steps)
    ends = st.lists(st.sampled_from(["goes on", "fell", "cut"]), min_size=steps, max_size=steps)
    rows = [[np.array(data.draw(numbers)) for _ in range(3)] for _ in range(2)]
    for row in rows:
        how = data.draw(ends)
        row += [np.array([h == "fell" for h in how]), np.array([h != "goes on" for h in how])]
    config = PPOConfig(gamma=gamma, gae_lambda=lam)
    found = advantages(*(np.stack(column) for column in zip(*rows, strict=True)), config)
    for mine, row in zip(found, rows, strict=True):
        assert mine == pytest.approx(by_definition(*row, gamma, lam), abs=1e-9)


# --- parts ----------------------------------------------------------------------------------------


def test_at_the_first_visit_the_policy_is_the_rollouts_and_advantages_are_normal():
    for index in range(5):
        drivers = {}
        for driver in ("kl", "surrogate", "value", "loss"):
            task = make(seed=1, driver=driver)
            learn(task, [3] * index)
            drivers[driver] = task.sample_losses(task.fresh_batch(index))
        batch = task.rollout
        assert drivers["kl"].tolist() == [0.0] * 24
        assert torch.equal(drivers["surrogate"], -batch.advantages)
        assert batch.advantages.mean().item() == pytest.approx(0, abs=1e-6)
        assert batch.advantages.std(correction=0).item() == pytest.approx(1, rel=1e-4)
        half = (batch.values - batch.returns).square() / 2
        assert drivers["value"].tolist() == pytest.approx(half.tolist(), rel=1e-5)
        whole = drivers["surrogate"] + 0.5 * drivers["value"]
        assert drivers["loss"].tolist() == pytest.approx(whole.tolist(), rel=1e-5, abs=1e-6)


def test_the_driver_does_not_change_the_update():
    tasks = [make(driver=driver) for driver in ("loss", "value", "surrogate", "kl")]
    drivers = [learn(task, [4] * 5) for task in tasks]
    assert len({digest(task.state_dict()) for task in tasks}) == 1
    assert len({tuple(of_one) for of_one in drivers}) == 4
    assert drivers[3][0] == 0 < drivers[3][1]


def test_a_step_whose_ratio_is_far_off_pulls_no_further():
    task = make()
    batch = task.rollout
    outputs = task.outputs(batch).detach()
    for shift in (3.0, -3.0):  # on the logit of what was done
        moved = outputs.clone()
        moved[torch.arange(24), batch.actions] += shift
        moved.requires_grad_()
        drivers, _ = make(driver="surrogate").losses(moved, batch)
        (gradient,) = torch.autograd.grad(drivers.sum(), moved)
        held = batch.advantages > 0 if shift > 0 else batch.advantages < 0
        assert torch.equal(gradient.abs().sum(1) == 0, held)


def test_first_weights_are_orthogonal_with_the_gains_of_their_layers():
    torch.manual_seed(0)
    network = ActorCritic((64, 32))
    gains = {"actor": (2**0.5, 2**0.5, 0.01), "critic": (2**0.5, 2**0.5, 1.0)}
    for name, of_layers in gains.items():
        layers = [layer for layer in getattr(network, name) if isinstance(layer, nn.Linear)]
        for layer, gain in zip(layers, of_layers, strict=True):
            singular = torch.linalg.svdvals(layer.weight.detach())
            assert singular.tolist() == pytest.approx([gain] * len(singular), rel=1e-4)
            assert not layer.bias.any()
    assert isinstance(network.actor[-1], nn.Linear)


@pytest.mark.parametrize("repeats", [1, 3, 40])
def test_repetition_starves_the_environment(tmp_path, repeats):
    record = train(run_config({"mapping": {"name": "constant", "repeats": repeats}}), tmp_path)
    ledger, rollouts = record.summary["ledger"], -(-40 // repeats)
    assert (ledger["updates"], ledger["fresh_batches"]) == (40, rollouts)
    assert ledger["environment_steps"] == ledger["distinct_samples"] == 24 * rollouts
    assert ledger["forward_samples"] == 40 * 24
    last = record.evals[record.evals["update"] == 40]
    assert set(last["environment_steps"]) == {24 * rollouts}
    assert np.isfinite(record.evals["value"]).all()


def test_what_is_evaluated_are_greedy_episodes_and_the_critics_error_on_them():
    task = make(lr=0.01)
    learn(task, [4] * 30)
    (played,) = greedy_episodes(
        task.config, "test", lambda seen: task.model.actor(seen), device="cpu"
    )
    found, errors = task.evaluate("test"), []
    for e, length in enumerate(played.lengths):
        with torch.no_grad():
            values = task.model.critic(torch.tensor(played.observations[e]))[:, 0].numpy()
        rewards, ended = np.ones(length), np.arange(length) == length - 1
        fell = ended & played.failed[e]
        parts = (rewards, values[:length], values[1 : length + 1], fell, ended)
        errors.append(by_definition(*parts, 0.98, 0.8))
    assert found["return"] == played.lengths.mean()
    assert found["loss"] == pytest.approx((np.concatenate(errors) ** 2).mean() / 2, rel=1e-4)
    assert 0 < found["entropy"] < np.log(2)


# --- resuming and configuration -------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_resumed_between_two_passes_is_the_unbroken_one(stop):
    whole, first = make(seed=4), make(seed=4)
    losses = learn(whole, [3] * 12)
    learn(first, [*[3] * stop, 1])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(seed=4)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.evaluate("train") == first.evaluate("train")
    assert learn(second, [2, *[3] * (11 - stop)], start=stop) == losses[3 * stop + 1 :]
    assert digest(second.state_dict()) == digest(whole.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 20}, "batch_size must be a multiple of environments, 3; not 20"),
        ({"driver": "entropy"}, "driver.*'surrogate' or 'kl'; not 'entropy'"),
        ({"clip": 1.0}, "clip.*not 1"),
        ({"gae_lambda": 1.5}, "gae_lambda.*not 1.5"),
        ({"ema_decay": 0.5}, "ema_decay: the agent is judged as it acts"),
    ],
)
def test_refuses_what_makes_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        run_config({}, **fields)


@pytest.mark.parametrize("name", ["hard_mining", "online", "importance", "selective", "rho_loss"])
def test_there_is_nothing_that_a_sampler_could_choose_from(name):
    with pytest.raises(ConfigError, match=f"sampler: {name} is not for the task ppo: a batch is"):
        run_config({"sampler": {"name": name}})
