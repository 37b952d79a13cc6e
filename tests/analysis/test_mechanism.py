"""Mechanism: statistics of one row per update, against closed forms and planted effects."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repeatlab.analysis import mechanism
from repeatlab.analysis.frames import Records
from repeatlab.analysis.paired_differences import Endpoint
from repeatlab.figures import mechanism as draw
from repeatlab.store.records import Store


def _updates(losses: list[list[float]]) -> pd.DataFrame:
    """Return the rows of a run whose fresh batch i had `losses[i]` at its visits."""
    counts = np.array([len(visits) for visits in losses])
    visit = np.concatenate([np.arange(count) for count in counts])
    return pd.DataFrame(
        {
            "update": np.arange(counts.sum()),
            "fresh_batch": np.repeat(np.arange(len(counts)), counts),
            "repeat": visit,
            "repeats": np.repeat(counts, counts),
            "loss": np.concatenate(losses).astype(float),
            "lr": 0.1,
            "seconds": 0.0,
        }
    )


# --- fresh batches ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_left_out_with_its_batch_or_its_visit():
    found = mechanism.visited_batches(_updates([[1.0], [2.0, np.nan]]))
    assert found["repeats"].tolist() == [1, 1]
    assert len(mechanism.visited_batches(_updates([[1.0], [np.inf]]))) == 1


STATISTICS = ["visited_batches", "repeat_shares", "repeats_over_updates"]
STATISTICS += ["loss_after_repeats", "time_shares", "transfer"]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_run_that_diverged_at_once_has_nothing_to_say_and_does_not_crash(statistic):
    found = getattr(mechanism, statistic)(_updates([[np.nan]]))
    assert not found.notna().to_numpy().any()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=60))
def test_shares_of_n_add_up_and_give_the_mean_n(counts):
    shares = mechanism.repeat_shares(_updates([[1.0] * count for count in counts]))
    assert shares["share"].sum() == pytest.approx(1)
    assert shares["of_updates"].sum() == pytest.approx(1)
    assert (shares["share"] * shares["repeats"]).sum() == pytest.approx(np.mean(counts))
    # 1 / E over updates of 1/N is the mean N over batches.
    assert (shares["of_updates"] / shares["repeats"]).sum() == pytest.approx(
        len(counts) / sum(counts)
    )


def test_n_over_updates_is_the_mean_of_the_batches_that_begin_in_a_stretch():
    updates = _updates([[1.0] * 4, [1.0] * 2, [1.0] * 2])
    found = mechanism.repeats_over_updates(updates, bins=2)
    assert found.to_dict("list") == {"update": [2.0, 6.0], "repeats": [4.0, 2.0]}
    # Stretches in which no batch begins are no zeros.
    assert len(mechanism.repeats_over_updates(updates, bins=8)) == 3


def test_ratios_are_of_means_and_keep_the_batches_of_each_n_apart():
    updates = _updates([[4.0, 2.0], [2.0, 1.6], [9.0], [8.0, 4.0, 2.0]])
    found = mechanism.loss_after_repeats(updates).set_index(["repeats", "repeat"])
    assert found["ratio"].to_dict() == pytest.approx(
        {(2, 0): 1.0, (2, 1): 3.6 / 6, (3, 0): 1.0, (3, 1): 0.5, (3, 2): 0.25}
    )
    assert found["batches"].to_dict() == {(2, 0): 2, (2, 1): 2, (3, 0): 1, (3, 1): 1, (3, 2): 1}


def test_there_is_no_ratio_to_a_loss_that_is_not_positive():
    assert mechanism.loss_after_repeats(_updates([[-1.0, -2.0]]))["ratio"].isna().all()


# --- what training time explains --------------------------------------------------------------


def test_a_trend_of_lines_is_explained_completely_whatever_the_window():
    values = np.concatenate([np.linspace(3, 1, 50), np.linspace(1, 0.5, 50), [0.4, 0.3]])
    trend, parameters = mechanism.local_lines(values, window=50)
    np.testing.assert_allclose(trend, values, atol=1e-12)
    assert parameters == 6
    assert mechanism.time_share(values, window=50) == pytest.approx(1)


def test_the_trend_is_numpys_line_within_each_window():
    values = np.random.default_rng(0).normal(size=23)
    expected = []
    for start in range(0, 23, 10):
        part = values[start : start + 10]
        x = np.arange(len(part))
        expected.append(np.polyval(np.polyfit(x, part, 1), x))
    found, _ = mechanism.local_lines(values, window=10)
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-9)


def test_the_time_share_is_that_of_planted_variances():
    # A step per window of variance 4 beside noise of variance 1: 4 / 5 on average.
    random = np.random.default_rng(1)
    shares = []
    for _ in range(200):
        steps = np.repeat(random.permutation([-2.0, 2.0] * 10), 50)
        shares.append(mechanism.time_share(steps + random.normal(size=1000), window=50))
    assert np.mean(shares) == pytest.approx(0.8, abs=0.01)


def test_noise_without_a_trend_has_a_time_share_of_zero_on_average():
    random = np.random.default_rng(2)
    shares = [mechanism.time_share(random.normal(size=400), window=20) for _ in range(400)]
    # Unadjusted it were (p - 1) / (n - 1) = 39 / 399, about 0.1.
    assert np.mean(shares) == pytest.approx(0, abs=4 * np.std(shares) / 20)
    assert np.mean(shares) < 0.02


def test_there_is_no_time_share_of_what_does_not_vary():
    assert np.isnan(mechanism.time_share(np.full(100, 0.1)))
    assert np.isnan(mechanism.time_share(np.array([1.0, 2.0])))


def test_a_clock_is_told_from_hardness():
    random = np.random.default_rng(3)
    decay = 2.5 * np.exp(-np.arange(600) / 150)
    first = decay + random.normal(0, 0.02, 600)
    clock = np.clip(np.floor(first / 0.3), 1, 5).astype(int)
    hard = np.where(first > decay, 3, 1)
    shares = {
        name: mechanism.time_shares(
            _updates([[loss] * n for loss, n in zip(first, counts, strict=True)])
        )
        for name, counts in (("clock", clock), ("hard", hard))
    }
    assert shares["clock"]["repeats"][0] > 0.9
    assert abs(shares["hard"]["repeats"][0]) < 0.1
    assert shares["hard"]["loss"][0] > 0.9


# --- memorised or learnt ----------------------------------------------------------------------


def _planted(own: float, other: float, *, seed: int, batches: int = 4000) -> pd.DataFrame:
    """Return a run with N at random: a repeat lowers its batch by `own`, the next by `other`.

    The level of other batches falls by `other` for each extra update and comes back before the
    second next batch, above a slow trend.
    """
    random = np.random.default_rng(seed)
    counts = random.integers(1, 6, batches)
    effect = np.concatenate([[0.0], (counts - 1)[:-1] * other])
    level = 5 - np.arange(batches) / batches + random.normal(0, 0.05, batches) - effect
    return _updates([list(a - own * np.arange(n)) for a, n in zip(level, counts, strict=True)])


@pytest.mark.parametrize(("own", "other"), [(0.1, 0.0), (0.1, 0.04), (0.05, -0.02)])
def test_the_effect_on_the_next_batch_is_found_where_n_is_random(own, other):
    found = mechanism.transfer(_planted(own, other, seed=4)).iloc[0]
    assert found["own"] == pytest.approx(own)
    # The slope's standard error is 0.05 / sqrt(4000 * 2), about 0.0006.
    assert found["other"] == pytest.approx(other, abs=0.0025)
    assert found["ratio"] == pytest.approx(found["other"] / own)


def test_without_repeats_or_their_variation_there_is_no_transfer():
    once = mechanism.transfer(_updates([[1.0]] * 20)).iloc[0]
    assert np.isnan(once["own"])
    assert np.isnan(once["other"])
    twice = mechanism.transfer(_updates([[1.0, 0.75]] * 20)).iloc[0]
    assert twice["own"] == pytest.approx(0.25)
    assert np.isnan(twice["other"])


# --- records ----------------------------------------------------------------------------------


def _stored(tmp_path, finals: dict[str, list[float | None]], noise=None) -> Records:
    """Return records of method -> each seed's last validation loss; None is missing."""
    store, rows = Store(tmp_path), []
    for method, values in finals.items():
        for seed, value in enumerate(values):
            run = store.run("t", f"{method}-{seed}")
            status = "missing"
            if value is not None:
                status = "complete" if np.isfinite(value) else "diverged"
                writer = store.begin(run, {}, {})
                updates = _updates([[2.0, 1.0], [1.0]])
                writer.updates({name: updates[name].to_numpy() for name in updates})
                ledger = {"fresh_batches": 2, "seconds": 1.0, "calibration_seconds": 0.0,
                          "forward_samples": 3, "backward_samples": 3}  # fmt: skip
                for update, loss in ((0, 3.0), (3, value)):
                    writer.evals(update, {"validation": {"loss": loss}}, ledger)
                writer.finish(status, {"label_noise": noise})
            keys = {"task": "t", "method": method, "seed": seed, "id": run.path.name}
            rows.append(keys | {"path": str(run.path), "status": status, "max_updates": 6})
    return Records(pd.DataFrame(rows))


def test_statistics_are_made_run_by_run_and_only_of_those_that_are_done(tmp_path):
    records = _stored(tmp_path, {"linear": [1.0, None], "standard": [1.0, np.nan]})
    statistics = {"shares": mechanism.repeat_shares, "time": partial(mechanism.time_shares)}
    found = mechanism.by_run(records, statistics)
    runs = found["time"][["task", "method", "seed"]].to_numpy().tolist()
    assert runs == [["t", "linear", 0], ["t", "standard", 0], ["t", "standard", 1]]
    alone = mechanism.by_run(records, statistics, methods=["linear"])
    assert alone["shares"]["method"].tolist() == ["linear", "linear"]
    nothing = mechanism.by_run(records, statistics, methods=["absent"])
    assert mechanism.mean_shares(nothing["shares"], "t").empty
    for name, frame in nothing.items():
        assert frame.empty
        assert list(frame.columns) == list(found[name].columns)


def test_the_stretches_of_a_run_that_ended_early_are_those_of_the_plan(tmp_path):
    records = _stored(tmp_path, {"linear": [1.0]})
    timeline = partial(mechanism.repeats_over_updates, bins=2)
    found = mechanism.by_run(records, {"timeline": timeline})["timeline"]
    assert found["update"].tolist() == [1.5]  # the run made 3 updates of 6
    assert found["repeats"].tolist() == [1.5]


def test_an_n_that_a_seed_has_not_made_counts_as_none_of_it():
    runs = {0: [1] * 4, 1: [1, 1, 5, 5]}
    frames = [
        mechanism.repeat_shares(_updates([[1.0] * n for n in counts])).assign(
            task="t", method="linear", seed=seed
        )
        for seed, counts in runs.items()
    ]
    found = mechanism.mean_shares(pd.concat(frames), "t")
    assert dict(zip(found["repeats"], found["mean"], strict=True)) == {1: 0.75, 5: 0.25}
    assert found["n"].tolist() == [2, 2]
    assert (found["repeats"] * found["mean"]).sum() == np.mean([1.0, 3.0])


def test_seeds_without_the_statistic_do_not_count():
    frame = pd.DataFrame({"method": "a", "ratio": [1.0, 3.0, np.nan]})
    row = mechanism.over_seeds(frame, ["method"], "ratio").iloc[0]
    assert (row["mean"], row["n"]) == (2.0, 2)
    # Student's limits with one degree of freedom: 12.706 standard errors, here of 1.
    assert row["high"] - row["mean"] == pytest.approx(12.706, abs=1e-3)


def test_the_real_run_is_better_than_a_control_where_its_loss_is_lower(tmp_path):
    finals = {"linear": [1.0, 1.2], "windowed": [1.3, 1.6], "spaced": [1.0, None]}
    records = _stored(tmp_path, finals)
    table = mechanism.against_controls(
        records, {"t": Endpoint(metric="loss")}, real="linear", controls=["windowed", "spaced", "x"]
    ).set_index("against")
    assert table.loc["windowed", "difference"] == pytest.approx(0.35)
    assert table.loc["windowed", "n"] == 2
    assert table.loc["spaced", ["n", "n_missing"]].tolist() == [1, 1]
    assert "missing" in table.loc["x", "note"]
    figure = draw.control_rows(table.reset_index(), real="linear", units={"t": "loss"})
    (axes,) = (a for a in figure.axes if a.get_visible())
    assert [text.get_text() for text in axes.texts[-3:]] == ["2", "1", "0"]
    assert [t.get_text().split("\n")[0] for t in axes.get_yticklabels()] == [
        "windowed", "spaced", "x",
    ]  # fmt: skip


def test_the_larger_step_is_compared_at_equal_data_too(tmp_path):
    finals = {"linear": [1.0, 1.2], "step_size": [0.5, 0.6]}
    controls, endpoints = ["step_size"], {"t": Endpoint(metric="loss")}
    records = _stored(tmp_path, finals)
    # The loss falls from 3 over 4 fresh batches; the real run has had 2 of them.
    evals = records.evals
    mine = evals["method"] == "linear"
    evals["fresh_batches"] = np.where(evals["update"] == 0, 0, np.where(mine, 2, 4))
    table = mechanism.against_controls(records, endpoints, real="linear", controls=controls)
    by_name = table.set_index("against")["difference"]
    assert by_name["step_size"] == pytest.approx(-0.55)
    halfway = np.mean([(3 + 0.5) / 2 - 1.0, (3 + 0.6) / 2 - 1.2])
    assert by_name[mechanism.SAME_DATA] == pytest.approx(halfway)


def test_noise_shares_are_those_of_the_summaries(tmp_path):
    noise = {"corrupted": 0.4, "corrupted_visits": 0.41, "corrupted_extra_visits": None,
             "extra_visits": 0}  # fmt: skip
    shares = mechanism.noise_shares(_stored(tmp_path, {"standard": [1.0, None]}, noise))
    assert json.loads(shares.to_json(orient="records")) == [
        {"task": "t", "method": "standard", "seed": 0} | noise
    ]
    assert mechanism.noise_shares(_stored(tmp_path / "b", {"standard": [1.0]})).empty


# --- figures ----------------------------------------------------------------------------------


def test_every_batch_is_a_dot_however_many_they_are():
    rows = mechanism.visited_batches(_planted(0.1, 0.0, seed=5))
    figure = draw.loss_against_repeats(rows.assign(method="random", seed=0), ["random", "linear"])
    first, second, _ = figure.axes
    (dots,) = first.collections
    assert dots.get_offsets()[:, 0].tolist() == rows["loss"].tolist()
    assert np.abs(dots.get_offsets()[:, 1] - rows["repeats"]).max() <= 0.25
    passed = rows["update"] / rows["update"].max()
    assert dots.get_array().tolist() == pytest.approx(passed.tolist())
    assert [text.get_text() for text in second.texts] == ["no run"]


def test_every_n_is_a_piece_of_its_methods_bar():
    shares = pd.DataFrame({"method": "random", "repeats": [1, 3], "mean": [0.25, 0.75], "n": 2})
    timeline = pd.DataFrame(
        {"method": "random", "update": [1, 2], "mean": 2.5, "low": 2.0, "high": 3.0}
    )
    figure = draw.repeats_distribution(shares, timeline, ["linear", "random"])
    bars = [(b.get_x(), b.get_width()) for b in figure.axes[0].patches]
    assert bars == [(0, 0.25), (0.25, 0.75)]
    said = [text.get_text() for text in figure.axes[0].texts]
    assert "2.50" in said
    assert "no run" in said


def test_the_sharpness_of_a_quadratic_is_its_curvature_times_the_rate():
    """L = h w^2 / 2 under gradient descent; above 2 a repeat raises its batch's loss."""
    rows = []
    for batch, (curvature, visits) in enumerate([(4.0, 3), (30.0, 2), (4.0, 1)]):
        w = 1.0 + batch
        for visit in range(visits):
            loss, gradient = curvature * w**2 / 2, curvature * w
            rows.append((len(rows), batch, visit, visits, loss, 0.1, 0.0, gradient**2))
            w -= 0.1 * gradient
    columns = [*_updates([[1.0]]).columns, "squared_gradient"]
    found = mechanism.batch_sharpness(pd.DataFrame(rows, columns=columns), bins=2)
    assert found["update"].tolist() == [1.5, 4.5]
    assert found["sharpness"].tolist() == pytest.approx([0.4, 3.0])
    assert found["lowered"].tolist() == [1.0, 0.0]


def test_visits_with_others_in_between_and_runs_without_norms_have_no_sharpness():
    rows = _updates([[1.0, 0.5], [2.0, 1.0]])
    assert not len(mechanism.batch_sharpness(rows))
    spaced = rows.assign(squared_gradient=1.0).iloc[[0, 2, 1, 3]].assign(update=range(4))
    assert not len(mechanism.batch_sharpness(spaced))


def test_sharpness_is_a_line_for_each_method_beside_two():
    frame = pd.DataFrame(
        {
            "method": ["fixed2", "fixed2", "linear"],
            "update": [1.0, 3.0, 1.0],
            "mean": [0.5, 1.5, 2.5],
            "low": [0.4, 1.2, 2.0],
            "high": [0.6, 1.8, 3.0],
            "n": 3,
        }
    )
    (axes,) = draw.sharpness_over_updates(frame, ["fixed2", "linear", "random"]).axes
    limit, *curves = axes.lines
    assert list(limit.get_ydata()) == [2, 2]
    found = {tuple(curve.get_ydata()) for curve in curves}
    assert found == {(0.5, 1.5), (2.5,)}
    (axes,) = draw.sharpness_over_updates(frame[:0], ["fixed2"]).axes
    assert "gradient_norms" in " ".join(text.get_text() for text in axes.texts)


def test_figures_of_nothing_say_so():
    nothing = mechanism.over_seeds(pd.DataFrame(), ["method"], "own")
    figure = draw.transfer_rows({"t": {"own": nothing, "other": nothing}}, ["linear"])
    assert "no run, or no repeat" in [text.get_text() for text in figure.axes[0].texts]
    assert "no run" in figure.get_suptitle()
    ratios = mechanism.over_seeds(pd.DataFrame(), ["method", "repeats", "repeat"], "ratio")
    figure = draw.loss_ratios(ratios, ["linear"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["no run, or no repeat"]


def test_noise_visits_are_relative_to_the_share_in_the_data():
    shares = pd.DataFrame(
        {"method": ["linear", "linear", "standard"], "corrupted": [0.2, 0.4, 0.2],
         "corrupted_extra_visits": [0.3, 0.4, np.nan]}
    )  # fmt: skip
    figure = draw.noise_visits(shares, ["standard", "linear"])
    dots = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", None)]
    heights = [height for line in dots for height in line.get_ydata()]
    assert heights == pytest.approx([1.5, 1.0])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["standard: no extra visits", "linear"]
