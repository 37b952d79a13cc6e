"""The samplers as functions, in a bare loop, against their closed forms."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, deque
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repeatlab.cost import tau_threshold
from repeatlab.methods.selection import (
    ImportanceSwitch,
    LastScores,
    draws,
    hard_mining,
    importance_sampling,
    online_selection,
    rho_loss,
    selective_backprop,
    tau,
)

SCORES = np.array([0.5, 1.0, 2.0, 4.0, 0.0, 2.5])
scores_of_some = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30)


def test_importing_them_brings_no_framework_and_their_use_torch_alone():
    code = (
        "import sys, repeatlab.methods; assert 'torch' not in sys.modules;"
        "import repeatlab.methods.selection;"
        "assert not {'sklearn', 'pydantic', 'pandas', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- importance sampling --------------------------------------------------------------------------


@given(scores_of_some, st.integers(0, 9))
def test_importance_weights_leave_every_mean_unbiased(scores, index):
    scores = torch.tensor(scores, dtype=torch.float64)
    p, f = scores / scores.sum(), torch.arange(len(scores), dtype=torch.float64).sin()
    indices, weights = importance_sampling(scores, 64, draws(0, index))
    weight_of = dict(zip(indices.tolist(), weights.tolist(), strict=True))
    for place, weight in weight_of.items():
        assert weight == pytest.approx(1 / (len(scores) * float(p[place])), rel=1e-6)
    # Of all places, drawn or not, the closed form sum p_i w_i f_i = mean f.
    expected = sum(p[i] * f[i] * weight_of.get(i, 1 / (len(p) * p[i])) for i in range(len(p)))
    assert float(expected) == pytest.approx(float(f.mean()), abs=1e-6)


def test_places_come_as_often_as_their_score_says():
    counts, drawn = Counter(), 4000
    for index in range(4):
        counts.update(importance_sampling(SCORES, drawn // 4, draws(0, index)).indices.tolist())
    p = SCORES / SCORES.sum()
    for place, share in enumerate(p):
        assert abs(counts[place] / drawn - share) <= 4 * sqrt(share * (1 - share) / drawn)


@given(scores_of_some)
def test_tau_is_that_of_the_coefficient_of_variation(scores):
    scores = np.array(scores)
    assert tau(scores) == pytest.approx(sqrt(1 + (scores.std() / scores.mean()) ** 2), rel=1e-9)


def test_tau_at_its_ends():
    assert tau(np.eye(384)[3]) == pytest.approx(19.5959, abs=5e-5)
    assert tau(torch.full((7,), 0.3)) == pytest.approx(1.0)
    assert tau(torch.zeros(7)) == 1.0


def test_the_switch_follows_the_average_of_tau():
    switch = ImportanceSwitch(tau_threshold(presample=3, k=2.0), ema=0.5)
    assert switch.threshold == 2.0
    seen = []
    for scores in (np.eye(100)[0], np.eye(100)[0], np.ones(100), np.ones(100), np.ones(100)):
        assert switch.update(scores) == pytest.approx(tau(scores))
        seen.append((round(switch.tau, 4), switch.on))
    assert seen == [(5.0, True), (7.5, True), (4.25, True), (2.625, True), (1.8125, False)]


# --- by what was seen last ------------------------------------------------------------------------


def test_hard_samples_come_as_often_as_their_priority_says_with_the_weights_of_replay():
    alpha, floor, beta, counts = 0.7, 0.2, 0.5, Counter()
    priorities = np.maximum(SCORES, floor * SCORES.mean()) ** alpha
    p = priorities / priorities.sum()
    of_all = (len(p) * p) ** -beta
    for index in range(40):
        chosen = hard_mining(SCORES, 100, draws(1, index), alpha=alpha, floor=floor, beta=beta)
        counts.update(chosen.indices.tolist())
        of_batch = of_all[chosen.indices.numpy()]
        assert chosen.weights.numpy() == pytest.approx(of_batch / of_batch.max(), rel=1e-6)
    for place, share in enumerate(p):
        assert abs(counts[place] / 4000 - share) <= 4 * sqrt(share * (1 - share) / 4000)


def test_without_weights_the_samples_of_a_batch_differ():
    for index in range(20):
        indices, weights = hard_mining(SCORES, 4, draws(0, index))
        assert len(set(indices.tolist())) == 4
        assert weights.tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="7 different samples cannot be drawn from 6"):
        hard_mining(SCORES, 7, draws(0, 0))


def test_the_largest_loss_is_pressure_times_as_likely_as_the_smallest():
    n, pressure, counts = 5, 20.0, Counter()
    losses = np.array([3.0, 0.1, 9.0, 0.2, 5.0])
    for index in range(4000):
        counts.update(
            online_selection(losses, 1, draws(0, index), pressure=pressure).indices.tolist()
        )
    by_rank = pressure ** (-np.arange(n) / n)
    shares = dict(zip((2, 4, 0, 3, 1), by_rank / by_rank.sum(), strict=True))
    for place, share in shares.items():
        assert abs(counts[place] / 4000 - share) <= 4 * sqrt(share * (1 - share) / 4000)


def test_what_was_never_seen_counts_as_the_largest_so_far():
    memory = LastScores(4)
    assert memory.known().tolist() == [1.0] * 4
    memory.update([1, 2], np.array([3.0, 0.5]))
    assert memory.known().tolist() == [3.0, 3.0, 0.5, 3.0]
    memory.update([1], torch.tensor([1.0]))
    assert memory.known().tolist() == [3.0, 1.0, 0.5, 3.0]
    assert memory.known(range(2, 6)).tolist() == [0.5, 3.0, 3.0, 3.0]
    again = LastScores()
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again.known(), memory.known())


# --- by what a forward says -----------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_selective_backprop_keeps_one_in_beta_and_one(beta):
    history, kept, seen = deque(maxlen=2000), 0, 40 * 500
    random = np.random.default_rng(0)
    for index in range(40):
        losses = random.exponential(size=500)
        kept += len(selective_backprop(losses, history, draws(0, index), beta=beta).indices)
    assert len(history) == 2000
    share = 1 / (beta + 1)
    assert kept / seen == pytest.approx(share, abs=0.02)


def test_a_loss_is_kept_with_its_percentile_to_the_power_of_beta():
    losses, counts = np.array([1.0, 2.0, 3.0, 4.0]), Counter()
    for index in range(4000):
        chosen = selective_backprop(losses, deque(), draws(0, index), beta=2.0)
        counts.update(chosen.indices.tolist())
    for place in range(4):
        share = ((place + 1) / 4) ** 2
        assert abs(counts[place] / 4000 - share) <= 4 * sqrt(share * (1 - share) / 4000)


def test_rho_takes_what_can_still_be_reduced_most():
    chosen = rho_loss([5.0, 1.0, 4.0, 3.0], [5.0, 0.0, 0.5, 2.5], 2)
    assert chosen.indices.tolist() == [2, 1]
    assert chosen.weights.tolist() == [1.0, 1.0]


# --- a loop of one's own --------------------------------------------------------------------------


def test_a_weighted_loop_finds_the_solution_of_the_unweighted_problem():
    # Least squares with samples of very different size: a biased gradient would end elsewhere.
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=random) * torch.logspace(-1, 1, 200).unsqueeze(1)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + torch.randn(200, generator=random)
    best = torch.linalg.lstsq(x, y.unsqueeze(1)).solution.flatten()
    weight, average = torch.zeros(3), torch.zeros(3)
    for update in range(3000):
        scores = (x @ weight - y).abs() * x.norm(dim=1)  # gradient norms
        indices, weights = importance_sampling(scores, 16, draws(0, update))
        errors = weights * (x[indices] @ weight - y[indices])
        weight = weight - 0.02 * (x[indices] * errors.unsqueeze(1)).mean(0)
        if update >= 1000:
            average += weight / 2000
    assert average.numpy() == pytest.approx(best.numpy(), abs=0.02)


def test_the_same_seed_and_number_choose_the_same_on_arrays_and_tensors():
    for choose in (hard_mining, online_selection, importance_sampling):
        first = choose(SCORES, 3, draws(5, 7))
        again = choose(torch.from_numpy(SCORES), 3, draws(5, 7))
        assert torch.equal(first.indices, again.indices)
        assert torch.equal(first.weights, again.weights)
    others = [importance_sampling(SCORES, 30, draws(5, index)).indices.tolist() for index in (7, 8)]
    assert others[0] != others[1]
