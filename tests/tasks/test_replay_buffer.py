"""The replay buffer against n-step returns summed from the raw steps by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repeatlab.tasks.replay_buffer import ReplayBuffer, whole_episodes

GAMMA = 0.9
SIZE = 3


@st.composite
def lives(draw):
    """Steps of one environment: rewards, and after which steps an episode ended and how."""
    count = draw(st.integers(1, 40))
    rewards = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=count, max_size=count))
    ends = draw(
        st.lists(
            st.sampled_from(["", "", "", "terminated", "truncated"]),
            min_size=count,
            max_size=count,
        )
    )
    return rewards, ends


def fill(buffer: ReplayBuffer, rewards, ends, start: int = 0) -> None:
    """Add the steps; step t goes from (t, t, t) to (t + 0.5, ...), so that places can be told."""
    for t, (reward, end) in enumerate(zip(rewards, ends, strict=True)):
        if t >= start:
            buffer.add(
                np.full(SIZE, t, dtype=np.float32),
                t % 2,
                reward,
                np.full(SIZE, t + 0.5, dtype=np.float32),
                terminated=end == "terminated",
                truncated=end == "truncated",
            )


def by_hand(rewards, ends, t: int, n: int):
    """Return (return, last step, discount) of the n-step transition that begins at step t."""
    total, factor, step = 0.0, 1.0, t
    while True:
        total += factor * rewards[step]
        factor *= GAMMA
        if ends[step] or step == t + n - 1:
            return total, step, 0.0 if ends[step] == "terminated" else factor
        step += 1


@settings(max_examples=80, deadline=None)
@given(life=lives(), n=st.integers(1, 5), capacity=st.integers(5, 60))
def test_every_transition_that_can_be_sampled_is_the_one_summed_by_hand(life, n, capacity):
    rewards, ends = life
    buffer = ReplayBuffer(capacity, SIZE, n_steps=n, gamma=GAMMA)
    fill(buffer, rewards, ends)
    numbers = list(buffer.samples_at(buffer.steps))
    assert numbers == [
        t for t in range(len(rewards)) if t >= len(rewards) - capacity and t + n <= len(rewards)
    ]
    batch = buffer.batch(torch.tensor(numbers, dtype=torch.int64), 7)
    assert batch.index == 7
    assert batch.indices.tolist() == numbers
    for place, t in enumerate(numbers):
        total, last, discount = by_hand(rewards, ends, t, n)
        assert batch.observations[place].tolist() == [t] * SIZE
        assert batch.actions[place].item() == t % 2
        assert batch.next_observations[place].tolist() == [last + 0.5] * SIZE
        assert batch.returns[place].item() == pytest.approx(total, abs=1e-5)
        assert batch.discounts[place].item() == pytest.approx(discount, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.integers(5, 60), min_size=1, max_size=4),
    n=st.integers(1, 5),
    capacity=st.integers(5, 60),
    seed=st.integers(0, 9),
)
def test_what_is_drawn_uniformly_could_be_sampled_after_these_steps(steps, n, capacity, seed):
    buffer = ReplayBuffer(capacity, SIZE, n_steps=n, gamma=GAMMA)
    draws = np.random.default_rng(seed).random((len(steps), 8))
    found = buffer.uniform(draws, steps)
    for row, drawn, after in zip(found, draws, steps, strict=True):
        numbers = buffer.samples_at(after)
        assert row.tolist() == [numbers[int(draw * len(numbers))] for draw in drawn]


@pytest.mark.parametrize("n", [1, 3])
def test_whole_episodes_at_once_are_what_the_buffer_holds(n):
    generator = np.random.default_rng(n)
    lengths, terminated = np.array([1, 2, 10, 3, 10]), np.array([True, False, True, True, False])
    steps = lengths.max()
    observations = generator.normal(size=(5, steps + 1, SIZE)).astype(np.float32)
    actions, rewards = generator.integers(0, 2, (5, steps)), generator.normal(size=(5, steps))
    settings = {"n_steps": n, "gamma": GAMMA}
    buffer = ReplayBuffer(40, SIZE, **settings)
    places = []
    for episode, length in enumerate(lengths):
        for t in range(length):
            last = t == length - 1
            buffer.add(
                observations[episode, t],
                int(actions[episode, t]),
                float(rewards[episode, t]),
                observations[episode, t + 1],
                terminated=last and bool(terminated[episode]),
                truncated=last and not terminated[episode],
            )
            places.append((episode, t, min(t + n, length)))
    found = whole_episodes(observations, actions, rewards, lengths, terminated, **settings)
    held = buffer.batch(torch.arange(lengths.sum()), 0)
    for ours, theirs in zip(found.transitions[:5], held[:5], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    assert list(zip(found.episode, found.first, found.last, strict=True)) == places


def test_goes_on_after_a_reload_as_if_nothing_had_happened():
    rewards, ends = [1.0, -1.0, 0.5] * 9, ["", "", "", "terminated", ""] * 5 + ["", ""]
    whole = ReplayBuffer(10, SIZE, n_steps=3, gamma=GAMMA)
    fill(whole, rewards, ends)
    for stop in (2, 9, 10, 17):
        first = ReplayBuffer(10, SIZE, n_steps=3, gamma=GAMMA)
        fill(first, rewards[:stop], ends[:stop])
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = ReplayBuffer(10, SIZE, n_steps=3, gamma=GAMMA)
        second.load_state_dict(torch.load(file, weights_only=True))
        fill(second, rewards, ends, start=stop)
        numbers = torch.tensor(whole.samples_at(whole.steps))
        assert numbers.tolist() == list(second.samples_at(second.steps))
        pairs = zip(whole.batch(numbers, 0)[:-1], second.batch(numbers, 0)[:-1], strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
