"""Schedules: one contract for all, and torch's own schedulers as references over a whole run."""

from __future__ import annotations

from dataclasses import is_dataclass
from itertools import pairwise
from math import exp, inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    SequentialLR,
)

from repeatlab.methods.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Exponential,
    InverseTime,
    LinearDecay,
    Step,
)

fractions = st.floats(0, 1)
rates = st.floats(1e-3, 50)
above_zero = st.floats(0, 1, exclude_min=True)
DRAWS = {
    "constant": st.just(Constant()),
    "cosine": st.builds(Cosine, final=fractions),
    "linear": st.builds(LinearDecay, final=fractions),
    "step": st.builds(
        Step, gamma=fractions, milestones=st.lists(above_zero, max_size=4).map(tuple)
    ),
    "exponential": st.builds(Exponential, k=rates),
    "inverse_time": st.builds(InverseTime, k=rates),
}
schedules = st.sampled_from(sorted(SCHEDULES)).flatmap(DRAWS.__getitem__)


def test_every_schedule_is_drawn():
    assert DRAWS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "constant"])
def test_the_default_starts_at_the_whole_rate_and_ends_well_below(name):
    schedule = SCHEDULES[name]()
    assert schedule(0, 1000) == 1
    assert 0 <= schedule(999, 1000) < 0.11


@given(schedules, st.integers(1, 60))
def test_contract(schedule, total):
    factors = [schedule(update, total) for update in range(total)]
    assert factors[0] == pytest.approx(1, abs=1e-15)
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(later <= earlier for earlier, later in pairwise(factors))
    # Pure: neither the order of calls nor an equal object makes a difference.
    twin = type(schedule)(**schedule.__dict__)
    assert [twin(update, total) for update in reversed(range(total))] == factors[::-1]


@given(schedules, st.floats(0, 1), st.integers(1, 60))
def test_a_warm_up_rises_to_the_whole_rate_and_then_the_rest_is_the_schedule(
    schedule, warm_up, total
):
    warmed = type(schedule)(**schedule.__dict__ | {"warm_up": warm_up})
    factors = [warmed(update, total) for update in range(total)]
    rising = round(warm_up * total)
    steps = [1 / (rising + 1)] * rising
    assert [later - earlier for earlier, later in pairwise([0, *factors[:rising]])] == (
        pytest.approx(steps)
    )
    assert factors[rising:] == [schedule(u, total - rising) for u in range(total - rising)]
    assert all(0 < factor <= 1 for factor in factors[:rising])


@pytest.mark.parametrize(("total", "warm_up", "rising"), [(200, 0.1, 20), (7, 0.5, 4), (9, 0.1, 1)])
@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        (Constant, lambda o, n: LinearLR(o, start_factor=1.0, total_iters=1)),
        (Cosine, lambda o, n: CosineAnnealingLR(o, T_max=n)),
        (LinearDecay, lambda o, n: LinearLR(o, start_factor=1.0, end_factor=0, total_iters=n)),
    ],
)
def test_torch_s_schedulers_one_after_another_give_the_same_rates(
    kind, reference, total, warm_up, rising
):
    def scheduler(optimizer):
        rise = LinearLR(optimizer, start_factor=1 / (rising + 1), total_iters=rising)
        fall = reference(optimizer, total - rising)
        return SequentialLR(optimizer, [rise, fall], milestones=[rising])

    found = [0.3 * kind(warm_up=warm_up)(update, total) for update in range(total)]
    assert found == pytest.approx(rates_of(scheduler, total), rel=1e-9, abs=1e-12)


def rates_of(make_scheduler, total: int) -> list[float]:
    """Return the rate at each of `total` updates of a real optimizer, base rate 0.3."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make_scheduler(optimizer)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("total", [1, 7, 200])
@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (Cosine(), lambda o, n: CosineAnnealingLR(o, T_max=n)),
        (Cosine(final=0.2), lambda o, n: CosineAnnealingLR(o, T_max=n, eta_min=0.2 * 0.3)),
        (
            LinearDecay(final=0.1),
            lambda o, n: LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=n),
        ),
        (LinearDecay(), lambda o, n: LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=n)),
        (Exponential(k=2.5), lambda o, n: ExponentialLR(o, gamma=exp(-2.5 / n))),
        (InverseTime(k=9.0), lambda o, n: LambdaLR(o, lambda update: 1 / (1 + 9 / n * update))),
    ],
    ids=lambda part: repr(part) if is_dataclass(part) else "torch",  # stable across workers
)
def test_torch_s_scheduler_gives_the_same_rates(schedule, reference, total):
    expected = rates_of(lambda optimizer: reference(optimizer, total), total)
    found = [0.3 * schedule(update, total) for update in range(total)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_torch_s_multistep_gives_the_same_rates():
    schedule = Step(gamma=0.3, milestones=(0.25, 0.5, 0.9))
    expected = rates_of(lambda o: MultiStepLR(o, milestones=[50, 100, 180], gamma=0.3), 200)
    assert [0.3 * schedule(update, 200) for update in range(200)] == pytest.approx(expected)
    assert len(set(expected)) == 4


def test_a_milestone_between_two_updates_is_reached_at_the_later_one():
    # 0.55 * 100 is a little more than 55, and 0.07 * 100 than 7.
    for milestone, update in ((0.55, 55), (0.07, 7), (0.29, 29)):
        step = Step(milestones=(milestone,))
        assert [step(update - 1, 100), step(update, 100)] == [1.0, 0.1]
    schedule = Step(gamma=0.1, milestones=(0.5,))
    assert [schedule(update, 7) for update in range(7)] == [1, 1, 1, 1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda value: Cosine(final=value), "final must lie between 0 and 1"),
        (lambda value: LinearDecay(final=value), "final must lie between 0 and 1"),
        *(
            (lambda value, k=kind: k(warm_up=value), "warm_up must lie")
            for kind in SCHEDULES.values()
        ),
        (lambda value: Step(gamma=value), "gamma must lie between 0 and 1"),
        (lambda value: Step(milestones=(0.5, value)), "milestones must lie between 0 and 1"),
        (lambda value: Exponential(k=-abs(value)), "k must be a positive, finite number"),
        (lambda value: InverseTime(k=-abs(value)), "k must be a positive, finite number"),
    ],
    ids=lambda part: repr(part) if is_dataclass(part) else "torch",  # stable across workers
)
@pytest.mark.parametrize("value", [-0.1, 1.1, nan, inf, -inf])
def test_a_bad_argument_is_named(make, named, value):
    with pytest.raises(ValueError, match=named):
        make(value)


@pytest.mark.parametrize("kind", [Exponential, InverseTime])
@pytest.mark.parametrize("value", [0, inf, nan])
def test_a_rate_of_decay_is_positive_and_finite(kind, value):
    with pytest.raises(ValueError, match="k must be a positive, finite number"):
        kind(k=value)
