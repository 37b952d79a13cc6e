"""DQN on CartPole-v1: does it learn, and how fast is it beside loops written out.

Everything on one CPU thread. The table `results/reinforcement.csv` keeps what was measured last:
low and high are 95 % t-limits of the mean. A ratio is that of the medians over n rounds, in which
both sides take turns of 25 updates and processor time is taken; low and high are its least and
largest round.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from time import process_time

import gymnasium
import numpy as np
import torch
from benchmarks.interleaving import Turns, in_turns, train_in_turns
from benchmarks.tables import counted, record, row
from torch import nn
from torch.nn import functional

from repeatlab.analysis.frames import to_target
from repeatlab.core.environment import processor
from repeatlab.core.schema import parse
from repeatlab.core.stopwatch import Stopwatch
from repeatlab.store.records import Store
from repeatlab.training.config import RunConfig
from repeatlab.training.making import build_task, open_run, train
from repeatlab.training.one_run import Training

RESULTS = Path(__file__).with_name("results") / "reinforcement.csv"
HEAD = {"task": "reinforcement", "data": "CartPole-v1", "scale": "paper"}


def run_config(updates: int, seed: int, evaluation: dict) -> RunConfig:
    data = {
        "task": {"name": "reinforcement"},
        "method": {"schedule": {"name": "linear"}},
        "max_updates": updates,
        "seed": seed,
        "evaluation": evaluation,
        "device": "cpu",
    }
    return parse(RunConfig, data)


# --- learning -------------------------------------------------------------------------------------

UPDATES = 14_500  # the plan's; 15,000 environment steps
SEEDS = range(1000, 1005)  # seeds on which nothing else was ever run
SOLVED = 475


def test_solves_cartpole_in_four_of_five_seeds(tmp_path, benchmark, capsys):
    def runs() -> list:
        return [train(run_config(UPDATES, s, {"every": 500}), tmp_path) for s in SEEDS]

    done = benchmark.pedantic(runs, rounds=1, iterations=1)
    returns = np.array([run.summary["final"]["test.return"] for run in done])
    steps = {run.summary["ledger"]["environment_steps"] for run in done}
    seconds = mean(run.summary["ledger"]["seconds"] for run in done)
    solved = int((returns >= SOLVED).sum())
    labels = HEAD | {"arm": "standard", "metric": "test.return"}
    ends = row(returns, updates=UPDATES, seconds=seconds, digits=1, **labels)
    table = [ends, counted(ends, f"runs with test.return >= {SOLVED}", solved)]
    lines = [
        f"CartPole-v1, DQN, {UPDATES} updates, {steps} environment steps: greedy test return"
        f" {ends['mean']:.1f} (n = {len(done)} seeds: {sorted(returns.tolist())}), {solved} of"
        f" {len(done)} at {SOLVED} or more, {seconds:.1f} s of training a run ({processor()})"
    ]
    for target in (200, SOLVED):
        axes = ("update", "environment_steps", "seconds")
        hits = [
            to_target(run.evals.assign(task="", method="", seed=0), "return", target).iloc[0]
            for run in done
        ]
        # A run that missed counts as infinite, so the median of all is one of the hits, or none.
        medians = {x: float(median(h[x] if h["reached"] else np.inf for h in hits)) for x in axes}
        reached = sum(bool(h["reached"]) for h in hits)
        for axis, value in medians.items():
            table.append(counted(ends, f"median {axis} to return {target}", round(value, 1)))
        lines.append(f"  {reached} of {len(done)} evaluated to {target}; medians {medians}")
    record(RESULTS, table)
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert steps == {UPDATES + 500}
    assert solved >= 4


# --- speed ----------------------------------------------------------------------------------------

TIMED_UPDATES = 2000
ROUNDS = 7
TURN = 25  # updates of one side, before those of the other


class QNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2)
        )

    def forward(self, x):
        return self.network(x)


class NumpyReplay:
    """One-step transitions of several environments in numpy, copied to torch when sampled."""

    def __init__(self, size: int, environments: int = 1) -> None:
        self.size, self.environments, self.place, self.full = size, environments, 0, False
        self.observations = np.zeros((size, environments, 4), dtype=np.float32)
        self.next_observations = np.zeros((size, environments, 4), dtype=np.float32)
        self.actions = np.zeros((size, environments, 1), dtype=np.int64)
        self.rewards = np.zeros((size, environments), dtype=np.float32)
        self.terminations = np.zeros((size, environments), dtype=np.float32)

    def add(self, observation, next_observation, action, reward, termination) -> None:
        self.observations[self.place] = np.array(observation)
        self.next_observations[self.place] = np.array(next_observation)
        self.actions[self.place] = np.array(action).reshape(self.environments, 1)
        self.rewards[self.place] = np.array(reward)
        self.terminations[self.place] = np.array(termination)
        self.place += 1
        if self.place == self.size:
            self.place, self.full = 0, True

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        rows = np.random.randint(0, self.size if self.full else self.place, batch_size)  # noqa: NPY002
        columns = np.random.randint(0, self.environments, batch_size)  # noqa: NPY002
        data = (
            self.observations[rows, columns],
            self.actions[rows, columns],
            self.next_observations[rows, columns],
            self.terminations[rows, columns].reshape(-1, 1),
            self.rewards[rows, columns].reshape(-1, 1),
        )
        return tuple(torch.tensor(array) for array in data)


def plain_loop() -> Turns[float]:
    """Return the seconds of `TIMED_UPDATES` updates of DQN as single-file libraries write it.

    One environment behind the vector interface with episode statistics, numpy replay, unfused Adam;
    the same network, double Q-learning and Huber loss. It does less than ours: one-step returns,
    and nothing is recorded.
    """
    environments = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("CartPole-v1"))]
    )
    network, target = QNetwork(), QNetwork()
    target.load_state_dict(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    replay = NumpyReplay(100_000)
    observations, _ = environments.reset(seed=1)
    watch = Stopwatch(process_time)
    with ExitStack() as timed:
        for step in range(500 + TIMED_UPDATES):
            if step == 500:
                timed.enter_context(watch.running())
            epsilon = max(0.02, 1 - 0.98 * step / 6000)
            if random.random() < epsilon:
                actions = np.array([environments.single_action_space.sample()])
            else:
                actions = torch.argmax(network(torch.Tensor(observations)), dim=1).cpu().numpy()
            following, rewards, terminations, _, _ = environments.step(actions)
            replay.add(observations, following.copy(), actions, rewards, terminations)
            observations = following
            if step < 500:
                continue
            here, acted, there, ended, reward = replay.sample(32)
            with torch.no_grad():
                best = network(there).argmax(dim=1, keepdim=True)
                following_value = target(there).gather(1, best).squeeze()
                goal = reward.flatten() + 0.99 * following_value * (1 - ended.flatten())
            value = network(here).gather(1, acted).squeeze()
            loss = functional.smooth_l1_loss(value, goal)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                for copy, weight in zip(target.parameters(), network.parameters(), strict=True):
                    copy.data.copy_(1.0 * weight.data + 0.0 * copy.data)
            if step % TURN == 0:
                with watch.standing():
                    yield
    environments.close()
    return watch()


def our_run(config: RunConfig, store: Store) -> Turns[float]:
    """Return the seconds of a whole run: set-up, first 500 steps and records included."""
    start = process_time()
    opened = open_run(config, store, store.run("reinforcement", config.run_id), device="cpu")
    watch = Stopwatch(process_time)
    task, how = build_task(config, "cpu"), {"calibration": {}, "clock": watch}
    training = Training(config, task, opened.writer, **how)
    set_up = process_time() - start
    yield from train_in_turns(training, watch, turn=TURN)
    return set_up + watch()


def test_updates_a_second_against_a_plain_loop(tmp_path, benchmark, capsys):
    def rounds() -> tuple[list[float], list[float]]:
        done = []
        for number in range(ROUNDS + 1):  # the first warms up
            config = run_config(TIMED_UPDATES, number, {"splits": [], "test": False})
            sides = {"ours": our_run(config, Store(tmp_path)), "plain": plain_loop()}
            done.append(in_turns(sides))
        return tuple([d[side] for d in done[1:]] for side in ("ours", "plain"))

    fast, slow = benchmark.pedantic(rounds, rounds=1, iterations=1)
    ratio = median(slow) / median(fast)
    rounds_apart = [theirs / ours for theirs, ours in zip(slow, fast, strict=True)]
    labels = HEAD | {"arm": "plain loop", "metric": "its seconds / ours"}
    measured = {
        "n": len(rounds_apart),
        "mean": round(ratio, 3),
        "low": round(min(rounds_apart), 3),
        "high": round(max(rounds_apart), 3),
        "updates": TIMED_UPDATES,
        "seconds per run": round(median(slow), 2),
        "processor": processor(),
    }
    record(RESULTS, [labels | measured])
    with capsys.disabled():
        print(
            f"\nDQN, {TIMED_UPDATES} updates with their environment steps, {ROUNDS} rounds: ours"
            f" {TIMED_UPDATES / median(fast):.0f} updates/s, plain loop"
            f" {TIMED_UPDATES / median(slow):.0f}, ratio {ratio:.2f} ({processor()})"
        )
    assert ratio >= 1.2
