"""One contract for every mapping, and each mapping's own closed form."""

import json
import math
from dataclasses import FrozenInstanceError, asdict, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import (
    MAPPINGS,
    Constant,
    ControlLimit,
    CosineRepeats,
    Linear,
    LinearRepeats,
    Quantile,
    Threshold,
    Trace,
    Uniform,
    Until,
    UntilLimit,
    While,
    ZScore,
)

EXAMPLES = {
    "constant": [Constant(), Constant(4)],
    "uniform": [Uniform(), Uniform(low=2, high=3, seed=7)],
    "threshold": [Threshold(t=1.0), Threshold(t=0.1, repeats=4)],
    "linear": [Linear(t=0.1), Linear(t=0.7, max_repeats=3)],
    "until": [Until(t=1.0), Until(t=0.1, max_repeats=3)],
    "while": [While(t=1.0), While(t=0.02, max_repeats=3)],
    "cosine": [CosineRepeats(), CosineRepeats(high=4, low=2)],
    "ramp": [LinearRepeats(), LinearRepeats(high=3)],
    "control_limit": [ControlLimit(window=8), ControlLimit(k=0.5, repeats=3, window=5)],
    "until_limit": [UntilLimit(k=1.5, window=8), UntilLimit(k=0.5, repeats=3, window=5)],
    "quantile": [Quantile(window=8), Quantile(levels=(0.2, 0.5, 0.9), window=5)],
    "zscore": [ZScore(window=8), ZScore(step=0.3, max_repeats=4, window=5)],
    "trace": [Trace(counts=(3, 1, 2, 5) * 10)],
    # `repeatlab new mapping` writes a line here.
}


def mappings_where(condition):
    members = [m for kind in EXAMPLES.values() for m in kind if condition(m)]
    return pytest.mark.parametrize("mapping", members, ids=lambda m: repr(m)[:40])


every_mapping = mappings_where(lambda m: True)

float32 = st.floats(-1e4, 1e4, width=32)
histories = st.lists(st.floats(0, 100, width=32), min_size=0, max_size=30)


def stats_after(mapping, losses):
    """Return the stats with which `mapping` decides on the batch after `losses`."""
    stats = LossStats(mapping.window)
    for loss in losses:
        stats.observe(loss)
        stats.index += 1
    return stats


def counts_of(mapping, losses, stats):
    """Return N for every one of `losses`, in a run that goes on from `stats`."""
    counts = []
    for loss in losses:
        counts.append(mapping(loss, stats))
        stats.observe(loss)
        stats.index += 1
    return counts


def json_round_trip(value):
    return json.loads(json.dumps(value, allow_nan=False))


def through_json(mapping):
    return type(mapping)(**json_round_trip(asdict(mapping)))


# --- The contract ---------------------------------------------------------------------------------


def test_every_registered_mapping_is_under_contract():
    assert set(EXAMPLES) == set(MAPPINGS)
    for name, members in EXAMPLES.items():
        assert all(type(member) is MAPPINGS[name] for member in members)


@every_mapping
@settings(max_examples=60, deadline=None)
@given(loss=st.floats(allow_nan=False, allow_infinity=False), history=histories)
def test_count_is_an_integer_from_1_to_most(mapping, loss, history):
    count = mapping(loss, stats_after(mapping, history))
    assert type(count) is int
    assert 1 <= count <= mapping.most


@mappings_where(lambda m: type(m) is not While)
@settings(max_examples=60, deadline=None)
@given(losses=st.lists(float32, min_size=2, max_size=6), history=histories)
def test_a_larger_loss_never_gives_fewer_repeats(mapping, losses, history):
    stats = stats_after(mapping, history)
    counts = [mapping(loss, stats) for loss in sorted(losses)]
    assert counts == sorted(counts)


@every_mapping
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_losses_that_are_not_finite_are_refused(mapping, loss):
    with pytest.raises(ValueError, match=f"finite loss, not {loss}"):
        mapping(loss, stats_after(mapping, [1.0] * 10))


@every_mapping
@settings(max_examples=60, deadline=None)
@given(losses=st.lists(st.floats(0, 20), min_size=1, max_size=30))
def test_float32_and_float64_losses_give_the_same_counts(mapping, losses):
    single = [np.float32(loss) for loss in losses]
    in_double = counts_of(mapping, losses, LossStats(mapping.window))
    assert counts_of(mapping, single, LossStats(mapping.window)) == in_double
    assert counts_of(mapping, [float(s) for s in single], LossStats(mapping.window)) == in_double


@every_mapping
def test_json_round_trip(mapping):
    restored = through_json(mapping)
    assert restored == mapping
    assert type(restored) is type(mapping)
    assert hash(restored) == hash(mapping)


@every_mapping
@settings(max_examples=40, deadline=None)
@given(
    losses=st.lists(st.floats(0, 20), min_size=1, max_size=30),
    cut=st.integers(0, 30),
    data=st.data(),
)
def test_resumed_from_json_in_the_middle_it_decides_the_same(mapping, losses, cut, data):
    whole = counts_of(mapping, losses, LossStats(mapping.window))
    stats = LossStats(mapping.window)
    head = counts_of(mapping, losses[:cut], stats)
    state = stats.state_dict()
    resumed = LossStats(mapping.window)
    resumed.load_state_dict(json_round_trip(state) if data.draw(st.booleans()) else state)
    assert head + counts_of(through_json(mapping), losses[cut:], resumed) == whole
    assert resumed.state_dict() == stats_after(mapping, losses).state_dict()


@every_mapping
@settings(max_examples=30, deadline=None)
@given(loss=st.floats(0, 20), history=histories)
def test_a_decision_changes_nothing(mapping, loss, history):
    stats = stats_after(mapping, history)
    before = stats.state_dict()
    first = mapping(loss, stats)
    assert stats.state_dict() == before
    assert mapping(loss, stats) == first
    assert mapping(loss, stats_after(mapping, history)) == first


@every_mapping
def test_frozen(mapping):
    name = fields(mapping)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(mapping, name, getattr(mapping, name))


@mappings_where(lambda m: not m.needs_loss)
@settings(max_examples=30, deadline=None)
@given(losses=st.lists(float32, min_size=2, max_size=2), history=histories)
def test_a_mapping_that_needs_no_loss_ignores_it(mapping, losses, history):
    stats = stats_after(mapping, history)
    assert mapping(losses[0], stats) == mapping(losses[1], stats)


@mappings_where(lambda m: m.calibrated)
def test_calibrated_names_a_field(mapping):
    assert mapping.calibrated in {field.name for field in fields(mapping)}


# --- Threshold and Linear -------------------------------------------------------------------------

positive_t = st.floats(1e-30, 1e6)


@settings(deadline=None)
@given(t=positive_t)
def test_threshold_is_strict(t):
    at = np.float32(t)
    above = np.nextafter(at, np.float32(np.inf))
    below = np.nextafter(at, np.float32(0))
    for loss, count in ((below, 1), (at, 1), (float(at), 1), (t, 1), (above, 2), (float(above), 2)):
        assert Threshold(t=t)(loss, LossStats()) == count


@pytest.mark.parametrize("loss", [0.1, np.float32(0.1), np.float64(0.1), float(np.float32(0.1))])
def test_a_loss_of_one_tenth_equals_a_threshold_of_one_tenth(loss):
    # float32(0.1) is 0.10000000149: above the double 0.1, were it not rounded, too.
    assert Threshold(t=0.1)(loss, LossStats()) == 1
    assert Threshold(t=0.1)(np.nextafter(np.float32(0.1), np.float32(1)), LossStats()) == 2


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_three_tenths_over_one_tenth_is_three(kind):
    assert 0.3 // 0.1 == 2  # why the mapping needs a tolerance
    assert Linear(t=0.1)(kind(0.3), LossStats()) == 3


@settings(deadline=None)
@given(t=positive_t, k=st.integers(1, 20))
def test_linear_gives_k_at_k_times_t(t, k):
    mapping = Linear(t=t, max_repeats=20)
    assert mapping(k * t, LossStats()) == k
    assert mapping(np.float32(k * t), LossStats()) == k
    assert mapping(k * t * (1 - 1e-5), LossStats()) == max(1, k - 1)
    assert mapping((k + 0.5) * t, LossStats()) == k


def test_linear_stays_within_1_and_max_repeats():
    assert Linear(t=1.0)(0.0, LossStats()) == 1
    assert Linear(t=1.0)(-3.0, LossStats()) == 1
    assert Linear(t=1.0)(5.99, LossStats()) == 5
    assert Linear(t=1.0)(1e30, LossStats()) == 5
    assert Linear(t=5e-324)(1e300, LossStats()) == 5  # the quotient overflows
    assert Linear(t=5e-324)(-1e300, LossStats()) == 1


# E[N] of losses distributed as Exp(mu), at t = mu: 1 + q and 1 + q^2 + q^3 + q^4 + q^5, q = 1 / e.
EXPECTED_AT_MU = [(Threshold, 1.367879), (Linear, 1.210176)]


@pytest.mark.parametrize(("kind", "expected"), EXPECTED_AT_MU)
@pytest.mark.parametrize("mu", [0.3, 2.0])
def test_expected_count_of_exponential_losses_by_quadrature(kind, expected, mu):
    integrate = pytest.importorskip("scipy.integrate")
    mapping, stats = kind(t=mu), LossStats()
    steps = [k * mu for k in range(6)]
    mean = sum(
        integrate.quad(lambda loss: mapping(loss, stats) * math.exp(-loss / mu) / mu, low, high)[0]
        for low, high in zip(steps, [*steps[1:], 60 * mu], strict=True)
    )
    assert mean == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("kind", "expected"), EXPECTED_AT_MU)
def test_expected_count_of_exponential_losses_by_simulation(kind, expected):
    mu = 0.7
    mapping, stats = kind(t=mu), LossStats()
    losses = np.random.default_rng(0).exponential(mu, 50_000)
    counts = np.array([mapping(loss, stats) for loss in losses.tolist()])
    standard_error = counts.std() / math.sqrt(len(counts))
    assert abs(counts.mean() - expected) < 3 * standard_error


@pytest.mark.parametrize(("t", "repeats"), [(0.5, 2), (1.0, 4)])
def test_expected_count_of_threshold_with_more_repeats(t, repeats):
    mapping, stats = Threshold(t=t, repeats=repeats), LossStats()
    losses = np.random.default_rng(1).exponential(1.0, 20_000)
    counts = np.array([mapping(loss, stats) for loss in losses.tolist()])
    expected = 1 + (repeats - 1) * math.exp(-t)
    assert abs(counts.mean() - expected) < 3 * counts.std() / math.sqrt(len(counts))


@pytest.mark.parametrize("max_repeats", [1, 2, 5])
def test_until_asks_for_one_more_while_the_loss_is_above_t(max_repeats):
    mapping = Until(t=0.1, max_repeats=max_repeats)
    above = 2 if max_repeats > 1 else 1
    losses = [0.05, 0.1, np.float32(0.1), float(np.float32(0.1)), 0.1001, 9.0]
    assert [mapping(loss, LossStats()) for loss in losses] == [1, 1, 1, 1, above, above]
    assert (mapping.most, mapping.asks_again) == (max_repeats, True)
    asking = {name for name, kind in MAPPINGS.items() if kind.asks_again}
    assert asking == {"until", "until_limit", "while"}


@pytest.mark.parametrize("max_repeats", [1, 2, 5])
def test_while_asks_for_one_more_while_the_loss_is_below_t(max_repeats):
    mapping = While(t=0.1, max_repeats=max_repeats)
    below = 2 if max_repeats > 1 else 1
    losses = [-3.0, 0.0, 0.0999, 0.1, np.float32(0.1), float(np.float32(0.1)), 9.0]
    assert [mapping(loss, LossStats()) for loss in losses] == [below] * 3 + [1] * 4
    assert (mapping.most, mapping.asks_again) == (max_repeats, True)


@pytest.mark.parametrize("kind", [CosineRepeats, LinearRepeats])
@settings(deadline=None)
@given(low=st.integers(1, 4), span=st.integers(0, 6), place=st.integers(0, 200), data=st.data())
def test_counts_that_fall_by_the_clock_round_their_closed_form(kind, low, span, place, data):
    total = data.draw(st.integers(max(1, place + 1), 201))
    stats = LossStats()
    stats.progress = place / total
    left = {
        CosineRepeats: (1 + math.cos(math.pi * place / total)) / 2,
        LinearRepeats: 1 - place / total,
    }[kind]
    ideal = low + span * left
    found = kind(high=low + span, low=low)(data.draw(float32), stats)
    assert isinstance(found, int)
    assert abs(found - ideal) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        # Half up, at u / T = 0, 1/8, 1/4, 1/2, 3/4 and the very end.
        (LinearRepeats(), [5, 5, 4, 3, 2, 1]),
        (CosineRepeats(), [5, 5, 4, 3, 2, 1]),
        (LinearRepeats(high=3, low=2), [3, 3, 3, 3, 2, 2]),
        (CosineRepeats(high=9, low=1), [9, 9, 8, 5, 2, 1]),
        (LinearRepeats(high=2, low=2), [2] * 6),
    ],
)
def test_counts_that_fall_by_the_clock_at_known_places(mapping, expected):
    found = []
    for progress in (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1 - 1e-9):
        stats = LossStats()
        stats.progress = progress
        found.append(mapping(9.9, stats))
    assert found == expected


@pytest.mark.parametrize("kind", [CosineRepeats, LinearRepeats])
@pytest.mark.parametrize(("high", "low"), [(5, 1), (4, 2)])
def test_counts_that_fall_by_the_clock_have_the_mean_of_their_ends(kind, high, low):
    stats, found = LossStats(), []
    for place in range(10_000):
        stats.progress = (place + 0.5) / 10_000
        found.append(kind(high=high, low=low)(0.0, stats))
    assert sorted(found, reverse=True) == found
    assert np.mean(found) == pytest.approx((high + low) / 2, abs=1e-3)


# --- Constant, Uniform, Trace ---------------------------------------------------------------------


def at(index):
    stats = LossStats()
    stats.index = index
    return stats


def test_constant():
    assert [Constant(k)(0.0, at(9)) for k in (1, 2, 5)] == [1, 2, 5]
    assert Constant() == Constant(1)


@pytest.mark.parametrize(("low", "high"), [(1, 5), (2, 3), (1, 7)])
def test_uniform_is_uniform(low, high):
    stats = pytest.importorskip("scipy.stats")
    draws = [Uniform(low=low, high=high, seed=3)(0.0, at(i)) for i in range(20_000)]
    observed = np.bincount(draws, minlength=high + 1)[low:]
    assert observed.sum() == 20_000
    assert len(observed) == high - low + 1
    assert stats.chisquare(observed).pvalue > 1e-3


def test_uniform_draws_of_neighbours_and_of_seeds_are_unrelated():
    stats = pytest.importorskip("scipy.stats")
    draws = np.array([[Uniform(seed=s)(0.0, at(i)) for i in range(5_000)] for s in (0, 1)])
    for a, b in ((draws[0, :-1], draws[0, 1:]), (draws[0], draws[1])):
        pairs = np.bincount((a - 1) * 5 + (b - 1), minlength=25)
        assert stats.chisquare(pairs).pvalue > 1e-3


def test_uniform_depends_on_seed_and_index_alone():
    mapping = Uniform(seed=5)
    forward = {i: mapping(0.0, at(i)) for i in range(200)}
    order = np.random.default_rng(0).permutation(200).tolist()
    assert {i: Uniform(seed=5)(float(i), at(i)) for i in order} == forward


def test_uniform_with_one_value():
    assert {Uniform(low=3, high=3)(0.0, at(i)) for i in range(50)} == {3}


def test_trace_replays_and_names_its_end():
    trace = Trace(counts=(3, 1, 2))
    assert [trace(9.9, at(i)) for i in range(3)] == [3, 1, 2]
    assert trace.most == 3
    with pytest.raises(ValueError, match="holds 3 counts, but fresh batch 3 was asked for"):
        trace(0.0, at(3))


# --- Mappings of the recent losses ----------------------------------------------------------------

WINDOW = 20


@pytest.fixture
def stream():
    """Losses in float32 precision, 150 of them, gamma-distributed with a falling mean."""
    rng = np.random.default_rng(2)
    losses = rng.gamma(4.0, 0.25, 150) * np.linspace(2, 1, 150)
    return losses.astype(np.float32).astype(float)


def control_limit_of(loss, recent):
    return 4 if loss > recent.mean() + 1.5 * recent.std() else 1


def quantile_of(loss, recent):
    return 1 + sum(loss > np.quantile(recent, level) for level in (0.5, 0.9))


def zscore_of(loss, recent):
    return int(np.clip(1 + np.floor((loss - recent.mean()) / recent.std() / 0.5), 1, 5))


@pytest.mark.parametrize(
    ("mapping", "formula"),
    [
        (ControlLimit(k=1.5, repeats=4, window=WINDOW), control_limit_of),
        (Quantile(levels=(0.5, 0.9), window=WINDOW), quantile_of),
        (ZScore(step=0.5, window=WINDOW), zscore_of),
    ],
)
def test_windowed_mappings_against_numpy_on_the_last_losses(mapping, formula, stream):
    counts = counts_of(mapping, stream.tolist(), LossStats(mapping.window))
    expected = [
        1 if i < WINDOW else formula(loss, stream[i - WINDOW : i]) for i, loss in enumerate(stream)
    ]
    assert counts == expected
    assert len(set(counts)) > 1


@pytest.mark.parametrize("kind", [ControlLimit, Quantile, ZScore])
@pytest.mark.parametrize("window", [1, 2, 7])
def test_one_update_until_the_window_is_full(kind, window):
    mapping, stats = kind(window=window), LossStats(window)
    rising = [1.0 + i % 2 for i in range(window)]
    assert [mapping(1e6, stats_after(mapping, rising[:seen])) for seen in range(window)] == (
        [1] * window
    )
    assert counts_of(mapping, rising, stats) == [1] * window
    if not (kind is ZScore and window == 1):  # one loss alone has no spread
        assert mapping(1e6, stats) == mapping.most


@pytest.mark.parametrize("kind", [ControlLimit, Quantile, ZScore])
@pytest.mark.parametrize("loss", [0.1, np.float32(0.1), 1 / 3, 7e-5])
def test_a_constant_loss_is_never_repeated(kind, loss):
    # In any precision: the loss lies exactly on the mean of those before it.
    mapping = kind(window=7)
    assert counts_of(mapping, [loss] * 40, LossStats(mapping.window)) == [1] * 40


def test_quantile_expects_one_plus_the_sum_of_exceedances():
    mapping = Quantile(levels=(0.5, 0.8), window=400)
    losses = np.random.default_rng(3).normal(size=6_000).tolist()
    counts = np.array(counts_of(mapping, losses, LossStats(mapping.window))[400:])
    assert counts.mean() == pytest.approx(1 + 0.5 + 0.2, abs=0.05)


# --- LossStats ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    offset=st.sampled_from([0.0, 1e3, -1e6, 69_559.0]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    window=st.integers(1, 60),
    length=st.integers(1, 1_500),
    seed=st.integers(0, 2**32 - 1),
)
def test_moments_over_long_streams(offset, scale, window, length, seed):
    losses = np.random.default_rng(seed).normal(offset, scale, length).astype(np.float32)
    stats = LossStats(window)
    for i, loss in enumerate(losses.tolist()):
        stats.observe(loss)
        if i % 97 == 0 or i == length - 1:
            recent = losses[max(0, i + 1 - window) : i + 1].astype(float)
            assert stats.mean == pytest.approx(recent.mean(), rel=1e-12, abs=1e-9 * scale)
            assert stats.std == pytest.approx(recent.std(), rel=1e-9)
            assert sorted(stats.recent) == sorted(recent)
            assert stats.quantile(0.3) == pytest.approx(np.quantile(recent, 0.3))
    assert stats.count == length
    assert stats.full == (length >= window)


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1.5, 3.0, 1e4, 1e9, 1e15]), max_size=80),
    window=st.integers(1, 12),
)
def test_moments_recover_once_a_spike_has_left_the_window(losses, window):
    stats = LossStats(window)
    for i, loss in enumerate(losses):
        stats.observe(loss)
        recent = np.float32(losses[max(0, i + 1 - window) : i + 1]).astype(float)
        assert stats.std == pytest.approx(recent.std(), rel=1e-3, abs=1e-3 * np.abs(recent).max())
        assert stats.mean == pytest.approx(recent.mean(), rel=1e-6, abs=1e-6 * recent.max())


def test_stats_before_the_first_loss():
    stats = LossStats(5)
    assert (stats.index, stats.count, stats.mean, stats.std, stats.full) == (0, 0, 0.0, 0.0, False)
    assert math.isnan(stats.quantile(0.5))
    assert stats.recent.shape == (0,)


def test_stats_without_a_window_keep_only_the_count():
    stats = LossStats(0)
    stats.observe(3.0)
    assert (stats.count, stats.recent.shape, stats.std) == (1, (0,), 0.0)


def test_stats_refuse_a_state_of_another_window():
    with pytest.raises(ValueError, match="window of 3 losses, the mapping asks for 4"):
        LossStats(4).load_state_dict(LossStats(3).state_dict())


# --- Bad arguments --------------------------------------------------------------------------------

BAD_NUMBERS = [0, -1, 0.0, -0.5, math.nan, math.inf, True, "1", None]
BAD_COUNTS = [0, -3, 1.5, 2.0, True, math.nan, "2", None]


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (Threshold, "t"),
        (Linear, "t"),
        (Until, "t"),
        (While, "t"),
        (ControlLimit, "k"),
        (ZScore, "step"),
    ],
)
def test_bad_numbers_are_named(kind, field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be a positive, finite number") as error:
        kind(**{field: value})
    assert str(error.value).endswith(f"not {value!r}")


@pytest.mark.parametrize("value", BAD_COUNTS)
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (Constant, "repeats"),
        (Uniform, "low"),
        (Uniform, "high"),
        (Threshold, "repeats"),
        (Linear, "max_repeats"),
        (Until, "max_repeats"),
        (While, "max_repeats"),
        (CosineRepeats, "high"),
        (LinearRepeats, "low"),
        (ControlLimit, "repeats"),
        (ControlLimit, "window"),
        (Quantile, "window"),
        (ZScore, "max_repeats"),
        (ZScore, "window"),
    ],
)
def test_bad_counts_are_named(kind, field, value):
    needed = {"t": 1.0} if kind in (Threshold, Linear, Until, While) else {}
    with pytest.raises(ValueError, match=rf"^{field} must be an integer of at least 1") as error:
        kind(**needed, **{field: value})
    assert str(error.value).endswith(f"not {value!r}")


@pytest.mark.parametrize("levels", [(), (0.0,), (1.0,), (0.5, 1.2), (-0.1,), (math.nan,), (True,)])
def test_bad_levels_are_named(levels):
    with pytest.raises(ValueError, match="levels must be numbers between 0 and 1"):
        Quantile(levels=levels)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="low must not exceed high, but 4 > 2"):
        Uniform(low=4, high=2)
    with pytest.raises(ValueError, match="low must not exceed high, but 6 > 5"):
        CosineRepeats(low=6)
    with pytest.raises(ValueError, match="counts must hold at least one count"):
        Trace(counts=())
    with pytest.raises(ValueError, match=r"counts\[1\] must be an integer of at least 1, not 0"):
        Trace(counts=(2, 0))
