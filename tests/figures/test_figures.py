"""Figures: what is drawn, and what is written beside it."""

from __future__ import annotations

import json
from base64 import b64decode
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from repeatlab.analysis.comparison import comparison_table
from repeatlab.analysis.frames import Records, final_points, peak_memory
from repeatlab.analysis.mechanism import by_run, visited_batches
from repeatlab.analysis.paired_differences import PAIR_COLUMNS
from repeatlab.analysis.target_times import kaplan_meier
from repeatlab.analysis.viewpoints import load_views, stack
from repeatlab.cli import ROOT
from repeatlab.core.schema import read_yaml
from repeatlab.figures import (
    adaptability,
    efficiency,
    picture_grid,
    read_manifest,
    repeats_over_time,
    save_figure,
)
from repeatlab.figures.convergence import (
    curves_against_standard,
    curves_over_tasks,
    target_curves,
    time_to_target,
)
from repeatlab.figures.intervals import interval_rows
from repeatlab.figures.look import (
    COLOURS,
    FAMILIES,
    STYLE,
    caption,
    colour,
    in_order,
    line,
    marker,
    said_n,
    tiles,
)
from repeatlab.store.records import Store

RECORDS = Records(
    pd.DataFrame({"id": ["b", "a", "c"], "status": ["complete", "diverged", "missing"]})
)


def _curves(*methods: str) -> pd.DataFrame:
    update = np.arange(5)
    columns = {"update": update, "mean": 2.0**-update, "low": 0.0, "high": 2.0**-update + 0.1}
    columns |= {"n": 5, "diverged": 0}
    pieces = [pd.DataFrame({"task": "t", "method": m, **columns}) for m in methods]
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


def test_a_panel_says_where_a_run_diverged():
    frame = _curves("standard", "linear")
    frame.loc[frame["method"] == "linear", "diverged"] = 1
    figure = curves_against_standard(frame, x="update", ylabel="loss")
    (cross,) = [line for line in _visible(figure)[0].lines if line.get_marker() == "x"]
    assert cross.get_xdata().tolist() == [4]
    assert figure.get_suptitle().endswith("x: a run diverged")
    plt.close(figure)


@pytest.mark.parametrize("columns", [1, 2])
def test_a_caption_of_any_length_is_within_the_figure(columns):
    figure, _ = tiles(columns, columns=columns, height=1.5)
    said = "quantile minus control at equal updates, paired by seed; right of 0: it is better. "
    caption(figure, 3 * said)
    figure.canvas.draw()
    (title,) = (text for text in figure.texts if "quantile" in text.get_text())
    assert title.get_window_extent().x1 <= figure.bbox.width
    assert " ".join(title.get_text().split()) == (3 * said).strip()


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
        {"fresh_batch": [0, 0, 1], "repeat": [0, 1, 0], "repeats": [4, 4, 1], "loss": [2, 1.5, 1]}
    )
    figure = repeats_over_time(updates)
    top, bottom = figure.axes
    assert top.lines[0].get_ydata().tolist() == [2, 1]
    assert [segment[1][1] for segment in bottom.collections[0].get_segments()] == [4, 1]
    assert all(float(tick).is_integer() for tick in bottom.get_yticks())  # N is a count
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
    saved = save_figure(figure, "second", tmp_path, **about)
    save_figure(figure, "first", tmp_path, **about)
    shown, size = DisplayFormatter().format(saved)
    assert b64decode(shown["image/png"]) == (tmp_path / "second.png").read_bytes()
    with Image.open(tmp_path / "second.png") as image:
        inches = np.array(image.size) / STYLE["savefig.dpi"]
    wanted = inches * STYLE["figure.dpi"]
    assert list(size["image/png"].values()) == pytest.approx(wanted, abs=0.5)
    assert (tmp_path / "first.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest) == ["first", "second"]
    entry = manifest["first"]
    assert entry["runs"] == ["a", "b"]
    assert entry["missing_runs"] == 1
    assert entry["parameters"] == {"studies": ["s"]}


def _save_ten(name: str, directory: Path) -> None:
    about = {"notebook": "20_x", "records": RECORDS, "parameters": {}}
    for number in range(10):
        save_figure(plt.figure(figsize=(1, 1)), f"{name}-{number}", directory, **about)


def test_two_notebooks_that_save_at_once_lose_no_entry(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(_save_ten, ("left", "right"), [tmp_path] * 2))
    names = {f"{name}-{number}" for name in ("left", "right") for number in range(10)}
    assert set(read_manifest(tmp_path)) == names


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


@pytest.mark.parametrize("name", ["/etc/x", "a/../../x", "..", "x/"])
def test_no_path_is_a_figure_s_name(tmp_path, name):
    with pytest.raises(ValueError, match=r"the figure name .* must consist of"):
        save_figure(plt.figure(), name, tmp_path, notebook="n", records=RECORDS, parameters={})


def test_a_link_in_a_figure_s_place_is_replaced_not_followed(tmp_path):
    directory = tmp_path / "figures"
    directory.mkdir()
    outside = [tmp_path / f"outside.{kind}" for kind in ("png", "pdf")]
    for file in outside:
        file.write_text("somebody else's")
        (directory / f"x{file.suffix}").symlink_to(file)
    save_figure(plt.figure(), "x", directory, notebook="n", records=RECORDS, parameters={})
    assert [file.read_text() for file in outside] == ["somebody else's"] * 2
    assert not any((directory / f"x{file.suffix}").is_symlink() for file in outside)


# --- one look per method ----------------------------------------------------------------------


PROFILES = sorted((ROOT / "params").glob("*/convergence.yaml"))


def _linear(shade: str) -> np.ndarray:
    rgb = np.array([int(shade[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _lightness(shade: str) -> float:
    """Return L* of CIELAB, which is what a grey print keeps."""
    return float(116 * np.cbrt(_linear(shade) @ TO_XYZ[1]) - 16)


def test_every_method_of_the_profiles_has_a_look_of_its_own():
    shared = [read_yaml(ROOT / "params" / f"{name}.yaml") for name in ("methods", "schedules")]
    used = {method for file in shared for method in file}
    for path in sorted((ROOT / "params").glob("*/*.yaml")):
        study = read_yaml(path).get("parameters", {}).get("study", {})
        methods = study.get("methods", {}) if isinstance(study, dict) else {}
        if "include" in methods:
            used |= methods.keys() - {"include", "without", "defaults"}
    assert {"standard", "inverse_time", "rho_loss"} <= used
    assert used - COLOURS.keys() == set()
    assert len(set(COLOURS.values())) == len(COLOURS)
    for family in FAMILIES.values():
        assert len({(str(line(m)["linestyle"]), marker(m)) for m in family}) == len(family)
    assert colour("something new") == colour("something new")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_shades_of_a_family_get_darker_and_stay_apart_in_grey(family):
    lightness = [_lightness(shade) for shade in family.values()]
    assert all(light - dark > 5 for light, dark in pairwise(lightness))
    assert max(lightness) < 86  # still seen on white


# Linear RGB as seen without the long or the middle cones (Machado, Oliveira, Fernandes 2009).
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


@pytest.mark.parametrize("seen", [np.eye(3), *BLIND.values()], ids=["trichromat", *BLIND])
def test_the_methods_drawn_together_differ_for_colour_blind_readers_too(seen):
    drawn = {m for path in PROFILES for m in read_yaml(path)["parameters"]["methods"]}
    lab = {}
    for method in drawn:
        light = np.clip(np.array(seen) @ _linear(colour(method)), 0, 1)
        f = np.cbrt(np.array(TO_XYZ) @ light / (0.9505, 1, 1.089))
        lab[method] = np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
    close = {(a, b): np.linalg.norm(lab[a] - lab[b]) for a in drawn for b in drawn if a < b}
    assert min(close.values()) > 10, min(close, key=close.get)


def test_methods_stand_family_by_family_and_unknown_ones_last():
    assert in_order(["new", "linear", "fixed2", "standard", "new"]) == [
        "standard",
        "fixed2",
        "linear",
        "new",
    ]


def test_n_is_said_as_a_range():
    assert [said_n([3, 3]), said_n([5, 2, 3]), said_n([])] == ["n = 3", "n = 2 to 5", "no run"]


# --- intervals --------------------------------------------------------------------------------


def test_a_far_estimate_is_a_number_and_a_long_interval_an_arrow():
    found = pd.DataFrame(
        {
            "method": ["a", "b", "c", "far", "wide"],
            "estimate": [0.0, 0.1, -0.1, -50.0, 0.05],
            "low": [-0.1, 0.0, -0.2, -51.0, -90.0],
            "high": [0.1, 0.2, 0.0, -49.0, 90.0],
        }
    )
    figure, axes = plt.subplots()
    interval_rows(axes, found, ["a", "b", "c", "far", "wide", "none"], missing="no pair")
    left, right = axes.get_xlim()
    assert -2 < left < -0.2 < 0.2 < right < 2
    assert [text.get_text() for text in axes.texts] == ["-50", "no pair"]
    markers = [(drawn.get_marker(), drawn.get_ydata()[0]) for drawn in axes.lines]
    arrows = [(shape, row) for shape, row in markers if shape in "<>"]
    assert arrows == [("<", 3), ("<", 4), (">", 4)]
    plt.close(figure)


@pytest.mark.parametrize("estimate", [np.inf, -np.inf, np.nan, 2.0])
def test_a_single_estimate_of_any_kind_can_be_drawn(estimate):
    found = pd.DataFrame({"method": ["a"], "estimate": estimate, "low": np.nan, "high": np.nan})
    figure, axes = plt.subplots()
    interval_rows(axes, found, ["a"])
    figure.draw_without_rendering()
    assert np.isfinite(axes.get_xlim()).all()
    plt.close(figure)


# --- several tasks ----------------------------------------------------------------------------


def test_a_panel_for_each_task_and_a_cross_where_runs_diverged():
    frame = _curves("standard", "linear", "random")
    frame.loc[frame["method"] == "linear", "diverged"] = 1
    figure = curves_over_tasks(
        frame,
        x="update",
        methods=["standard", "linear"],
        ylabels={"t": "loss", "u": "loss"},
        log=["t"],
    )
    full, empty = _visible(figure)
    assert full.get_title(loc="left") == "t, n = 5"
    assert [text.get_text() for text in empty.texts] == ["no run"]
    drawn = [line for line in full.lines if line.get_marker() == "None"]
    means = [line.get_color() for line in drawn if line.get_linewidth() == STYLE["lines.linewidth"]]
    assert means == [COLOURS["standard"], COLOURS["linear"]]
    assert len(drawn) == 3 * len(means)  # each between its limits
    (cross,) = [line for line in full.lines if line.get_marker() == "x"]
    assert cross.get_color() == COLOURS["linear"]
    assert list(cross.get_xdata()) == [4]
    plt.close(figure)


def test_the_axis_follows_the_means_whatever_the_bands():
    frame = _curves("standard", "linear").assign(low=-1e6, high=1e6)
    figure = curves_over_tasks(
        frame, x="update", methods=["standard", "linear"], ylabels={"t": "loss"}
    )
    low, high = _visible(figure)[0].get_ylim()
    # The first evaluation, before any update, is cut: it would flatten the rest.
    assert -0.2 < low < 2.0**-4 < 0.5 < high < 0.6
    plt.close(figure)


def _times(**rows) -> pd.DataFrame:
    times = {"update": [10, 20, 50, 10, 50, 50], "seconds": [1.0, 2, 5, 1, 5, 5]}
    reached = [True, True, False, True, False, False]
    methods = ["standard"] * 3 + ["linear"] * 3
    return pd.DataFrame({"task": "t", "method": methods, "reached": reached, **times, **rows})


def test_target_curves_rise_to_the_share_that_kaplan_and_meier_give():
    times = _times()
    survival = {
        key: kaplan_meier(group["update"], group["reached"])
        for key, group in times.groupby(["task", "method"])
    }
    figure = target_curves(
        times,
        survival,
        x="update",
        methods=["standard", "linear", "random"],
        targets={"t": "accuracy 0.9", "u": "return 1"},
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["linear\n1/3 (2/3)", "random\nno run (2/3)", "no run", "no run"]
    steps = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert [line.get_ydata()[-1] for line in steps] == pytest.approx([2 / 3, 1 / 3])
    censored = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in censored] == [[50], [50, 50]]
    plt.close(figure)


def test_targets_without_any_run_are_drawn_as_such():
    times = pd.DataFrame(columns=["task", "method", "seed", "reached"])
    figure = target_curves(
        times, {}, x="update", methods=["standard", "linear"], targets={"t": "accuracy 0.9"}
    )
    assert "no run" in figure.axes[0].get_title()
    plt.close(figure)


def test_times_on_two_axes_stand_side_by_side():
    figure = time_to_target(_times(), x=["update", "seconds"], target="accuracy 0.9")
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == [
        "gradient updates until accuracy 0.9",
        "training time (s) until accuracy 0.9",
    ]
    plt.close(figure)


# --- stores -----------------------------------------------------------------------------------


def _store(root, losses: dict[tuple[str, int], list[float] | None], *, repeats: int = 1) -> None:
    """Write a store with one study of one task, whose runs have these first losses."""
    store, planned = Store(root), []
    for number, ((method, seed), values) in enumerate(losses.items()):
        planned.append(
            {"task": "t", "method": method, "seed": seed, "run": ["x", f"{number:016x}"]}
        )
        if values is None:
            continue
        n = len(values) * repeats
        columns = {
            "update": np.arange(n),
            "fresh_batch": np.arange(n) // repeats,
            "repeat": np.arange(n) % repeats,
            "repeats": np.full(n, repeats),
            # A repeat's loss is none of the first ones.
            "loss": np.where(np.arange(n) % repeats, 99.0, np.repeat(values, repeats)),
            "lr": np.full(n, 0.1),
            "seconds": np.arange(n),
        }
        writer = store.begin(store.run(*planned[-1]["run"]), {}, {})
        writer.updates(columns)
        memory = {"peak_memory_bytes": 2**21 if method == "linear" else None}
        writer.finish("complete", {"ledger": {}, "final": {}, **memory})
    store.write_study("s", {"name": "s", "max_updates": 8, "runs": planned})


VIEWS = [
    {"study": "s", "name": "task", "target": 1},
    {"study": "gone", "name": "u", "target": None},
]


def test_what_a_store_lacks_is_said(tmp_path):
    _store(tmp_path, {("standard", 0): [1.0, 2.0], ("linear", 0): None})
    seen = load_views(tmp_path, VIEWS)
    assert seen.absent == ["gone"]
    assert list(seen.tasks) == ["task", "u"]
    assert list(seen.with_target) == ["task"]
    assert seen.counts.to_dict("index") == {
        "task": {"complete": 1, "missing": 1},
        "u": {"complete": 0, "missing": 0},
    }
    assert Store(tmp_path).read_study("s")["max_updates"] == 8


def test_an_empty_store_can_be_looked_at(tmp_path):
    seen = load_views(tmp_path, VIEWS)
    assert (len(seen.records.runs), list(seen.tasks)) == (0, ["task", "u"])
    assert seen.counts.shape == (2, 0)


def test_peak_memory_is_that_of_runs_which_recorded_it(tmp_path):
    _store(tmp_path, {("standard", 0): [1.0], ("linear", 0): [1.0], ("linear", 1): None})
    memory = peak_memory(load_views(tmp_path, VIEWS).records).set_index("method")
    assert memory["recorded"].to_dict() == {"standard": 0, "linear": 1}
    assert memory.loc["linear", "MiB"] == 2


def test_empty_frames_do_not_spoil_the_types_of_those_they_join():
    joined = stack([_times(), pd.DataFrame(columns=["task", "reached"])])
    assert joined["reached"].dtype == bool
    assert stack([pd.DataFrame(columns=["a"])]).columns.tolist() == ["a"]


def test_visits_are_fresh_batches_of_the_methods_asked_for(tmp_path):
    _store(tmp_path, {("standard", 0): [1.0, 2.0], ("linear", 0): [3.0]}, repeats=3)
    found = by_run(
        load_views(tmp_path, VIEWS).records, {"batches": visited_batches}, methods=["standard"]
    )["batches"]
    assert found["loss"].tolist() == [1.0, 2.0]
    assert found["repeats"].tolist() == [3, 3]
    figure = adaptability.distributions(found, tasks=["task", "u"], methods=["standard"])
    figure.draw_without_rendering()
    (stairs,) = figure.axes[0].patches
    assert np.sum(stairs.get_data()[0]) == pytest.approx(1)
    plt.close(figure)


# --- efficiency and adaptability --------------------------------------------------------------


def _pairs(differences: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """Return pairs whose standard arm has the values 0, 1, 2, ..."""
    rows = []
    for (task, method), values in differences.items():
        for seed, value in enumerate(values):
            status = "missing" if np.isnan(value) else "diverged" if np.isinf(value) else "paired"
            base = np.nan if np.isnan(value) else float(seed)
            rows.append([task, method, seed, "standard", status, 1.0, base + value, base, value])
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


CLEAR = np.linspace(1, 1.2, 12)
PAIRS = _pairs(
    {
        ("t", "linear"): CLEAR,
        ("t", "random"): [*CLEAR[:6], *-CLEAR[:6]],
        ("u", "linear"): [np.nan, np.nan],
        ("u", "random"): [-np.inf, *CLEAR[1:]],
        ("t", "fixed2"): [0.5],
    }
)


def test_what_is_decided_is_filled():
    table = comparison_table(PAIRS)
    decided = table.loc[table["decision"] != "undecided", ["task", "method"]].to_numpy().tolist()
    assert decided == [["t", "linear"]]
    figure = efficiency.differences({"cost": table[table["task"] == "t"]}, metric="accuracy")
    faces = {
        line.get_markeredgecolor(): line.get_markerfacecolor()
        for line in figure.axes[0].lines
        if line.get_marker() == "o"
    }
    assert faces == {
        COLOURS["linear"]: COLOURS["linear"],
        COLOURS["random"]: "white",
        COLOURS["fixed2"]: "white",
    }
    plt.close(figure)


def _arms(**shares: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return arms and over_tasks of `linear` on a task each, and of `random` on the first."""
    rows = [("linear", task, share, "better") for task, share in shares.items()]
    rows.append(("random", next(iter(shares)), -np.inf, "undecided"))
    arms = pd.DataFrame(rows, columns=["arm", "task", "saved", "state"])
    arms = arms.assign(low=arms["saved"] - 0.1, high=arms["saved"] + 0.1, seeds=8)
    pooled = arms.drop_duplicates("arm").drop(columns=["task", "seeds"])
    pooled = pooled.assign(tasks=len(shares), mean=0.25, new_low=-0.5, new_high=np.nan)
    return arms, pooled


def test_the_updates_saved_are_whole_per_cent_and_what_is_decided_is_framed():
    figure = adaptability.heat_map(*_arms(t=0.304, u=0.002))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    framed = [p for p in axes.patches if p.get_edgecolor() == (0, 0, 0, 1)]
    assert len(framed) == 3  # linear on two tasks, and together
    told = [text.get_text() for text in axes.texts]
    assert told[:4] == ["+30", "[+20, +40]", "0", "[\u221210, +10]"]
    assert told[4] == "\u2212\u221e"
    assert [t.get_text() for t in axes.get_xticklabels()][:2] == ["t\nn = 8", "u\nn = 8"]
    plt.close(figure)


def test_a_cell_that_says_nothing_is_grey():
    """Its limits are those of everything, or its arm was not tested."""
    arms, pooled = _arms(t=0.3)
    arms.loc[arms["arm"] == "random", ["low", "high"]] = -np.inf, 1.0
    untested = arms.assign(task="u", state="not tested")
    figure = adaptability.heat_map(pd.concat([arms, untested]), pooled)
    grey = [len(set(patch.get_facecolor()[:3])) == 1 for patch in figure.axes[0].patches]
    assert grey[:4] == [False, True, True, True]
    plt.close(figure)


def test_these_tasks_stand_beside_what_a_new_one_would_show():
    figure = adaptability.over_all_tasks(_arms(t=0.3, u=0.2)[1])
    figure.draw_without_rendering()
    left, right = figure.axes
    dots = [
        [d.get_xdata()[0] for d in axes.lines if d.get_marker() == "o"] for axes in (left, right)
    ]
    assert dots == [[pytest.approx(30)], [25, 25]]
    plt.close(figure)


def test_too_few_seeds_for_a_decision_are_said():
    table = comparison_table(_pairs({("t", "linear"): [1.0, 2.0, 3.0]}))
    figure = efficiency.differences({"update": table}, metric="accuracy")
    assert "too few seeds" in figure.get_supxlabel()
    plt.close(figure)


def test_the_efficient_methods_are_those_that_none_dominates():
    rng = np.random.default_rng(0)
    spent, gained = rng.integers(0, 6, (2, 40))
    expected = [
        not any(
            (s <= spent[i] and g >= gained[i]) and (s < spent[i] or g > gained[i])
            for s, g in zip(spent, gained, strict=True)
        )
        for i in range(40)
    ]
    assert efficiency.efficient(spent, gained).tolist() == expected


def test_a_pareto_picture_names_the_front_and_the_diverged():
    points = pd.DataFrame(
        {
            "task": "t",
            "method": ["standard", "linear", "random", "fixed2"],
            "cost": [10.0, 12, 12, 10],
            "mean": [0.5, 0.9, 0.7, np.nan],
            "low": np.nan,
            "high": np.nan,
            "n": 3,
        }
    )
    figure = efficiency.pareto(points, x="cost", metrics={"t": "accuracy", "u": "loss"}, k={})
    told = [text.get_text() for text in figure.axes[0].texts]
    assert told == ["standard", "linear", "diverged: fixed2"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["no run"]
    plt.close(figure)


def test_a_final_point_is_the_last_evaluation_of_every_run():
    evals = pd.DataFrame(
        {
            "task": "t",
            "method": "linear",
            "seed": [0, 0, 1, 1],
            "update": [0, 5, 0, 5],
            "split": "validation",
            "metric": "loss",
            "value": [9.0, 1.0, 9.0, 3.0],
            "cost": [0.0, 10.0, 0.0, 20.0],
        }
    )
    (point,) = final_points(evals, "loss", x="cost").to_dict("records")
    assert (point["cost"], point["mean"], point["n"]) == (15.0, 2.0, 2)
    # A run that diverged, and one whose last value is none, have no end: not the last that was.
    for lost in (
        evals.assign(status=["complete"] * 2 + ["diverged"] * 2),
        evals.assign(value=[9.0, 1.0, 9.0, np.nan]),
    ):
        (point,) = final_points(lost, "loss", x="cost").to_dict("records")
        assert np.isnan(point["mean"])
        assert point["n"] == 2
