"""Figures: what is drawn, and what is written beside it."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from repeatlab.analysis import Records
from repeatlab.figures import (
    COLOURS,
    colour,
    curves_against_standard,
    picture_grid,
    repeats_over_time,
    save_figure,
    time_to_target,
)

RECORDS = Records(
    pd.DataFrame({"id": ["b", "a", "c"], "status": ["complete", "diverged", "missing"]})
)


def _curves(*methods: str) -> pd.DataFrame:
    update = np.arange(5)
    columns = {"update": update, "mean": 2.0**-update, "low": 0.0, "high": 2.0**-update + 0.1}
    pieces = [pd.DataFrame({"task": "t", "method": m, **columns, "n": 5}) for m in methods]
    return pd.concat(pieces, ignore_index=True)


def _visible(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_every_method_has_a_panel_with_the_standard_arm_behind_it(count):
    methods = ["cosine", "fixed2", "linear", "random", "threshold"][:count]
    figure = curves_against_standard(_curves("standard", *methods), x="update", ylabel="loss")
    panels = _visible(figure)
    assert [axes.get_title(loc="left") for axes in panels] == methods
    for axes, method in zip(panels, methods, strict=True):
        assert [line.get_color() for line in axes.lines] == [COLOURS["standard"], colour(method)]
    plt.close(figure)


def test_the_caption_says_statistic_and_n():
    figure = curves_against_standard(_curves("standard", "linear"), x="update", ylabel="loss")
    assert figure.get_suptitle() == ("t: mean and 95 % t-interval over n = 5 seeds; grey: standard")
    plt.close(figure)


def test_a_band_below_zero_stays_on_a_logarithmic_axis():
    figure = curves_against_standard(
        _curves("standard", "linear"), x="update", ylabel="loss", log=True
    )
    (band,) = [c for c in _visible(figure)[0].collections if c.get_facecolor()[0][3] > 0][1:]
    assert band.get_paths()[0].vertices[:, 1].min() > 0
    plt.close(figure)


def test_a_band_keeps_its_place_on_a_linear_axis_also_below_zero():
    frame = _curves("standard", "linear").assign(mean=-1.0, low=-1.5, high=-0.5)
    figure = curves_against_standard(frame, x="update", ylabel="q value")
    for band in _visible(figure)[0].collections:
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (-1.5, -0.5)
    plt.close(figure)


def test_misses_are_open_triangles_and_have_no_median():
    times = pd.DataFrame(
        {
            "task": "t",
            "method": ["a"] * 3 + ["b"] * 3,
            "reached": [True, True, False, True, False, False],
            "update": [10, 20, 50, 10, 50, 50],
        }
    )
    figure = time_to_target(times, x="update", target="accuracy 0.9")
    lines = figure.axes[0].lines
    misses = [line for line in lines if line.get_marker() == ">"]
    assert [list(line.get_xdata()) for line in misses] == [[50], [50, 50]]
    bars = [line for line in lines if line.get_marker() == "None"]
    assert [list(line.get_xdata()) for line in bars] == [[20, 20]]
    assert {text.get_text() for text in figure.axes[0].texts} == {"2/3", "1/3"}
    plt.close(figure)


def test_repeats_over_time_draws_fresh_batches_only():
    updates = pd.DataFrame(
        {"fresh_batch": [0, 0, 1], "repeat": [0, 1, 0], "repeats": [2, 2, 1], "loss": [2, 1.5, 1]}
    )
    figure = repeats_over_time(updates)
    top, bottom = figure.axes
    assert top.lines[0].get_ydata().tolist() == [2, 1]
    assert [segment[1][1] for segment in bottom.collections[0].get_segments()] == [2, 1]
    plt.close(figure)


def test_pictures_are_shown_under_their_names_pixel_by_pixel():
    grey = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    coloured = np.full((2, 4, 4, 3), 7, dtype=np.uint8)
    figure = picture_grid({"originals": grey, "samples": coloured}, columns=2)
    panels = _visible(figure)
    assert [axes.get_title(loc="left") for axes in panels] == ["originals", "samples"]
    sheet = panels[0].images[0].get_array()
    for image in grey:
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(sheet), (4, 4))
        assert (windows == image).all(axis=(2, 3)).sum() == 1
    plt.close(figure)


def test_saving_writes_both_files_and_the_manifest(tmp_path):
    figure = curves_against_standard(_curves("standard", "linear"), x="update", ylabel="loss")
    about = {"notebook": "20_x", "records": RECORDS, "parameters": {"studies": ["s"]}}
    save_figure(figure, "second", tmp_path, **about)
    save_figure(figure, "first", tmp_path, **about)
    assert (tmp_path / "first.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest) == ["first", "second"]
    entry = manifest["first"]
    assert entry["runs"] == ["a", "b"]
    assert entry["missing_runs"] == 1
    assert entry["parameters"] == {"studies": ["s"]}


def test_the_same_figure_is_the_same_file(tmp_path):
    about = {"notebook": "20_x", "records": RECORDS, "parameters": {}}
    for directory in ("one", "two"):
        figure = curves_against_standard(_curves("standard", "linear"), x="update", ylabel="loss")
        save_figure(figure, "same", tmp_path / directory, **about)
    for name in ("same.pdf", "same.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_figure_cannot_leave_its_directory(tmp_path):
    with pytest.raises(ValueError, match=r"the figure name '\.\./x' must consist of"):
        save_figure(plt.figure(), "../x", tmp_path, notebook="n", records=RECORDS, parameters={})


def test_every_method_of_the_profiles_has_a_colour_of_its_own():
    assert len({colour(m) for m in ("standard", "cosine", "fixed2", "fixed3", "random")}) == 5
    assert colour("something new") == colour("something new")
