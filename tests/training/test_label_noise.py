"""Label noise: exactly what is corrupted, and where a run's updates went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from device_without_float64 import device
from hypothesis import given
from hypothesis import strategies as st

from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive
from repeatlab.data import load_splits
from repeatlab.store.records import Run
from repeatlab.tasks.supervised import Supervised
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.recorder import NoiseLog

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = 32
T = 90


def run_config(method: dict[str, Any] | None = None, noise: float = 0.4, **fields: Any):
    data = {
        "task": {
            "name": "supervised",
            "lr": 0.1,
            "batch_size": BATCH,
            "width": 4,
            "label_noise": noise,
        },
        "method": method or {},
        "max_updates": T,
        "evaluation": {"splits": [], "test": False},
        "device": "cpu",
    }
    return parse(RunConfig, data | fields)


def build(noise: float, seed: int = 0) -> Supervised:
    return Supervised(run_config(noise=noise).task, seed=seed, device="cpu")


# --- what is corrupted ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.4, 0.999])
@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_the_share_of_labels_is_another_class(share, seed):
    task, clean = build(share, seed), load_splits("digits").train
    wrong = task.stream.data.labels != clean.labels
    assert int(wrong.sum()) == round(share * len(clean))
    assert torch.equal(wrong, task.corrupted)
    assert torch.equal(task.stream.data.images, clean.images)
    assert set(task.stream.data.labels.tolist()) <= set(range(10))


def test_every_other_class_is_as_likely():
    shifts = torch.zeros(10)
    clean = load_splits("digits").train.labels
    for seed in range(8):
        task = build(0.5, seed)
        shift = (task.stream.data.labels - clean)[task.corrupted] % 10
        shifts += torch.bincount(shift, minlength=10)
    assert shifts[0] == 0
    counts = shifts[1:].numpy()
    expected = counts.sum() / 9
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees, p = 0.001


def test_noise_is_a_function_of_the_seed():
    first, again, other = build(0.4), build(0.4), build(0.4, seed=1)
    assert torch.equal(first.stream.data.labels, again.stream.data.labels)
    assert not torch.equal(first.corrupted, other.corrupted)
    # About the share of both, were they drawn apart: neither the same nor kept apart.
    both = float((first.corrupted & other.corrupted).double().mean())
    error = 4 * (0.16 * 0.84 / len(first.corrupted)) ** 0.5
    assert both == pytest.approx(0.16, abs=error)


def test_more_noise_does_not_move_the_batches_and_weights():
    clean, noisy = build(0.0), build(0.4)
    for index in (0, 7, 60):
        mine, theirs = clean.fresh_batch(index), noisy.fresh_batch(index)
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.indices, theirs.indices)
    for mine, theirs in zip(clean.model.parameters(), noisy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert clean.corrupted is None


def test_what_is_evaluated_keeps_its_true_labels():
    splits, task = load_splits("digits"), build(0.4)
    for split in ("train", "validation", "test"):
        assert torch.equal(task.data.evaluated(split).labels, splits.evaluated(split).labels)
    assert torch.equal(load_splits("digits").train.labels, splits.train.labels)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_named(share):
    with pytest.raises(ConfigError, match=r"task.label_noise: must be"):
        run_config(noise=share)


# --- where the updates went -----------------------------------------------------------------------


def by_hand(run: Run, noise: float) -> dict[str, float | int | None]:
    """Count visits to corrupted samples, one update and one sample after another."""
    task = build(noise, derive(0, "task supervised"))
    seen = {"all": [0, 0], "extra": [0, 0]}
    for row in run.updates.itertuples():
        for number in task.stream.indices(row.fresh_batch).tolist():
            wrong = bool(task.corrupted[number])
            seen["all"][wrong] += 1
            if row.repeat:
                seen["extra"][wrong] += 1
    extra = sum(seen["extra"])
    return {
        "corrupted": round(noise * len(task.corrupted)) / len(task.corrupted),
        "corrupted_visits": seen["all"][True] / sum(seen["all"]),
        "corrupted_extra_visits": seen["extra"][True] / extra if extra else None,
        "extra_visits": extra // BATCH,
    }


METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "fixed 3": {"mapping": {"name": "constant", "repeats": 3}},
    "linear": {"mapping": {"name": "linear", "t": 0.6}},
    "until": {"mapping": {"name": "until", "t": 1.6, "max_repeats": 4}},
    "spaced": {
        "mapping": {
            "name": "trace",
            "of": {"mapping": {"name": "linear", "t": 0.6}},
            "control": "spaced",
        }
    },
    "step size": {"mapping": {"name": "linear", "t": 0.6}, "apply": "step_size"},
}


@pytest.mark.parametrize("noise", [0.2, 0.4])
@pytest.mark.parametrize("name", METHODS)
def test_the_shares_are_those_counted_by_hand(tmp_path, monkeypatch, name, noise):
    monkeypatch.setattr("repeatlab.training.one_run.FLUSH_UPDATES", 7)  # pieces must add up
    run = train(run_config(METHODS[name], noise), tmp_path)
    found, expected = run.summary["label_noise"], by_hand(run, noise)
    assert found.keys() == expected.keys()
    assert found == {
        key: value if value is None else pytest.approx(value, rel=1e-6)
        for key, value in expected.items()
    }
    repeats = name not in ("standard", "step size")
    assert (found["corrupted_extra_visits"] is None) == (not repeats)
    assert (found["extra_visits"] > 0) == repeats


def test_a_sampler_s_choices_are_what_counts(tmp_path):
    """Hard mining goes where the noise is; the shares must be those of the batches it chose."""
    method = {"sampler": {"name": "hard_mining", "alpha": 2.0}}
    run = train(run_config(method, max_updates=300), tmp_path)
    found = run.summary["label_noise"]
    assert found["corrupted"] == pytest.approx(0.4, abs=1e-3)
    assert found["corrupted_visits"] > 0.45
    assert found["corrupted_extra_visits"] is None


@pytest.mark.parametrize("name", ["standard", "linear"])
def test_without_noise_there_is_nothing_to_tell(tmp_path, name):
    assert train(run_config(METHODS[name], 0.0), tmp_path).summary["label_noise"] is None


# --- the log itself -------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 2**31)
)
def test_any_pieces_give_the_same_shares(repeats, piece, seed):
    draws = torch.Generator().manual_seed(seed)
    corrupted = torch.rand(50, generator=draws) < 0.4
    batches = [torch.randperm(50, generator=draws)[:8] for _ in repeats]
    whole, pieces = NoiseLog(corrupted), NoiseLog(corrupted)
    visits = np.repeat(np.arange(len(repeats)), repeats)
    for log in (whole, pieces):
        for batch in batches:
            log.fresh_batch(batch)
    whole.visits(visits)
    for start in range(0, len(visits), piece):
        pieces.visits(visits[start : start + piece])
        restored = NoiseLog(corrupted)
        restored.load_state_dict(pieces.state_dict())
        pieces = restored
    shares = [corrupted[batch].double().mean().item() for batch in batches]
    extra = np.array(repeats) - 1
    assert whole.summary() == pieces.summary()
    assert whole.summary() == {
        "corrupted": pytest.approx(corrupted.double().mean().item()),
        "corrupted_visits": pytest.approx(np.average(shares, weights=repeats)),
        "corrupted_extra_visits": pytest.approx(np.average(shares, weights=extra))
        if extra.any()
        else None,
        "extra_visits": int(extra.sum()),
    }


def test_it_is_counted_where_the_device_has_no_float64():
    corrupted = torch.tensor([True, False, False])
    with device() as where:
        log = NoiseLog(corrupted.to(where))
        log.fresh_batch(torch.tensor([0, 1]).to(where))
        log.visits(np.array([0, 0]))
        found = log.summary()
    assert found["corrupted"] == pytest.approx(1 / 3)
    assert found["corrupted_visits"] == found["corrupted_extra_visits"] == 0.5


def test_a_batch_that_no_update_was_made_on_does_not_count():
    log = NoiseLog(torch.tensor([True, False]))
    log.fresh_batch(torch.tensor([0]))
    log.fresh_batch(torch.tensor([1]))  # handed out, and then the run ended
    log.visits(np.array([0, 0]))
    assert log.summary()["corrupted_visits"] == 1
