"""What repetition did inside the runs, from one row per update. Never imports torch.

Functions of `updates` take the rows of one run, as `records.Run.updates` has them. N is the number
of visits that a fresh batch got. A loss that was not finite made no update and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from repeatlab.analysis.comparison import comparison_table
from repeatlab.analysis.declaration import LARGER_STEP
from repeatlab.analysis.frames import RUN_KEYS, Records, mean_and_limits
from repeatlab.analysis.paired_differences import Endpoint, pairs
from repeatlab.analysis.viewpoints import stack
from repeatlab.store.records import UPDATES, Run, fresh_batches

WINDOW = 50
SAME_DATA = f"{LARGER_STEP}_same_data"
NOISE = ["corrupted", "corrupted_visits", "corrupted_extra_visits", "extra_visits"]
Statistic = Callable[[pd.DataFrame], pd.DataFrame]


def by_run(
    records: Records, statistics: Mapping[str, Statistic], *, methods: Sequence[str] | None = None
) -> dict[str, pd.DataFrame]:
    """Return each statistic of every run that is done, its rows behind task, method and seed.

    One run is in memory at a time. How many updates were planned stands in its `attrs`.

    Args:
        records: The runs.
        statistics: Name -> a function of one run's updates that returns a frame.
        methods: Of which methods; by default all.
    """
    pieces: dict[str, list[pd.DataFrame]] = {name: [] for name in statistics}
    for row in records.done.itertuples():
        if methods is not None and row.method not in methods:
            continue
        updates = Run(Path(row.path)).updates
        updates.attrs["planned"] = row.max_updates
        for name, statistic in statistics.items():
            frame = statistic(updates)
            for place, key in enumerate(RUN_KEYS):
                frame.insert(place, key, getattr(row, key))
            pieces[name].append(frame)
    keys, unmade = pd.DataFrame(columns=RUN_KEYS), UPDATES.empty_table().to_pandas()
    return {
        # Without a run there are the columns all the same: figures then say so.
        name: pd.concat(frames or [keys.join(statistics[name](unmade)[:0])], ignore_index=True)
        for name, frames in pieces.items()
    }


def over_seeds(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Return mean, low, high (95 % t-limits over seeds) and n of `value` for each group of `by`.

    A NaN, where a statistic does not exist for a run, is left out of its group and of n.
    """
    rows = []
    if value in frame:
        for keys, group in frame.dropna(subset=value).groupby(list(by), sort=False):
            limits = mean_and_limits(group[value].to_numpy())
            rows.append(dict(zip(by, keys, strict=True)) | limits | {"n": len(group)})
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])


def of_task(frame: pd.DataFrame, task: str, by: Sequence[str], value: str) -> pd.DataFrame:
    """Return `over_seeds` of one task's rows, by method and whatever else `by` names."""
    rows = frame[frame["task"] == task] if len(frame) else frame
    return over_seeds(rows, ["method", *by], value)


def by_task(
    frame: pd.DataFrame, tasks: Iterable[str], values: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, pd.DataFrame]]:
    """Return task -> value -> `of_task`, each of the `values` for the methods that it names."""
    return {
        task: {
            value: of_task(frame[frame["method"].isin(methods)], task, [], value)
            for value, methods in values.items()
        }
        for task in tasks
    }


# --- fresh batches and their visits -----------------------------------------------------------


def visited_batches(updates: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `records.fresh_batches` on which updates were made; N is their number.

    A batch on which a run ended has fewer than were planned.
    """
    batches = fresh_batches(updates)
    batches = batches[batches["visits"] > 0]
    return batches.assign(repeats=batches["visits"])


def repeat_shares(updates: pd.DataFrame) -> pd.DataFrame:
    """Return the histogram of N: columns repeats, share (of fresh batches) and of_updates."""
    counts = visited_batches(updates)["repeats"].value_counts().sort_index()
    made = counts * counts.index
    shares = {"share": counts / counts.sum(), "of_updates": made / made.sum()}
    return pd.DataFrame(shares).rename_axis("repeats").reset_index()


def mean_shares(shares: pd.DataFrame, task: str) -> pd.DataFrame:
    """Return `of_task` of many runs' `repeat_shares`: an N that a run has not made is 0 of it."""
    whole = []
    for _, rows in shares[shares["task"] == task].groupby("method", sort=False):
        table = rows.pivot_table(index=RUN_KEYS, columns="repeats", values="share", fill_value=0.0)
        whole.append(table.reset_index().melt(RUN_KEYS, value_name="share"))
    return of_task(pd.concat(whole) if whole else shares, task, ["repeats"], "share")


def repeats_over_updates(updates: pd.DataFrame, *, bins: int = 20) -> pd.DataFrame:
    """Return mean N of the fresh batches that begin in each of `bins` equal stretches of T.

    The stretches are those of the planned updates, where `updates.attrs` tells them, so that they
    are the same for a run that ended early.

    Returns:
        Columns update (the middle of the stretch) and repeats; a stretch without any is left out.
    """
    batches = visited_batches(updates)
    stretch = updates.attrs.get("planned", len(updates)) / bins
    means = batches.groupby(batches["update"] // max(stretch, 1e-9))["repeats"].mean()
    return pd.DataFrame({"update": (means.index + 0.5) * stretch, "repeats": means.to_numpy()})


def loss_after_repeats(updates: pd.DataFrame) -> pd.DataFrame:
    """Return the loss at each visit relative to the first, for the batches of each N >= 2.

    A ratio of means, so that batches whose loss is next to nothing do not decide it. Batches of
    different N are kept apart: those that got more visits had another loss to begin with.

    Returns:
        Columns repeats (N), repeat (updates made on the batch so far: 0 to N - 1), ratio (NaN where
        the mean first loss is not positive) and batches.
    """
    rows = updates[np.isfinite(updates["loss"])]
    counts = rows.groupby("fresh_batch")["loss"].transform("size").rename("repeats")
    many = rows[counts > 1].groupby([counts, "repeat"])["loss"].agg(["mean", "size"]).reset_index()
    first = many.groupby("repeats")["mean"].transform("first")
    many["ratio"] = (many["mean"] / first).where(first > 0)
    return many.rename(columns={"size": "batches"})[["repeats", "repeat", "ratio", "batches"]]


def batch_sharpness(updates: pd.DataFrame, *, bins: int = 20) -> pd.DataFrame:
    """Return what batches that were visited again tell of their sharpness, over training.

    On one batch dL = -eta |g|^2 + (eta^2 / 2) g'Hg for a step of plain gradient descent, up to
    terms of third order, so that eta g'Hg / |g|^2 = 2 (dL / (eta |g|^2) + 1): the batch sharpness
    (Andreyev and Beneventano, arXiv 2412.20553) times the rate, with dL from one visit to the next.
    Below 2 the update has lowered its own batch's loss. It means nothing with momentum, another
    optimizer, weight decay, clipping, dropout, or another driver than the loss that is descended.

    Args:
        updates: Of a run with `gradient_norms`; others have no rows.
        bins: Equal stretches of the planned updates, as in `repeats_over_updates`.

    Returns:
        Columns update (the middle of the stretch), sharpness (the mean) and lowered (the share of
        visits whose loss was lower at the next one).
    """
    if "squared_gradient" not in updates:
        return pd.DataFrame(columns=["update", "sharpness", "lowered"])
    rows, following = updates, updates.shift(-1)
    change = following["loss"] - rows["loss"]
    expected = rows["lr"] * rows["squared_gradient"]
    again = following["fresh_batch"] == rows["fresh_batch"]  # and nothing in between
    known = again & np.isfinite(change) & (expected > 0)
    sharpness = 2 * (change / expected + 1)
    found = pd.DataFrame({"sharpness": sharpness, "lowered": (change < 0).astype(float)})[known]
    stretch = max(updates.attrs.get("planned", len(updates)) / bins, 1e-9)
    means = found.groupby(rows.loc[known, "update"] // stretch).mean()
    return means.assign(update=(means.index + 0.5) * stretch).reset_index(drop=True)


# --- what training time explains --------------------------------------------------------------


def local_lines(values: np.ndarray, *, window: int = WINDOW) -> tuple[np.ndarray, int]:
    """Return the smooth trend of `values` (n,), and how many parameters it took.

    A least-squares line within each window of so many fresh batches; a window of one value keeps
    it.
    """
    values = np.asarray(values, dtype=float)
    trend, parameters = np.empty(len(values)), 0
    for start in range(0, len(values), window):
        part = values[start : start + window]
        x = np.arange(len(part)) - (len(part) - 1) / 2
        slope = x @ part / (x @ x) if len(part) > 1 else 0.0
        trend[start : start + window] = part.mean() + slope * x
        parameters += min(2, len(part))
    return trend, parameters


def time_share(values: np.ndarray, *, window: int = WINDOW) -> float:
    """Return the share of the variance of `values` (n,) that training time explains.

    The adjusted R^2 of `local_lines`: 1 - (residual SS / (n - p)) / (total SS / (n - 1)). In noise
    without a trend its mean is 0, so single runs fall below. NaN where nothing varies or no degree
    of freedom is left.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return np.nan
    trend, parameters = local_lines(values, window=window)
    total = float(((values - values.mean()) ** 2).sum())
    freedom = len(values) - parameters
    if total <= 1e-24 * float(values @ values) or freedom < 1:
        return np.nan
    residual = float(((values - trend) ** 2).sum())
    return 1 - (residual / freedom) / (total / (len(values) - 1))


def time_shares(updates: pd.DataFrame, *, window: int = WINDOW) -> pd.DataFrame:
    """Return, in one row, the `time_share` of N (`repeats`) and of the first losses (`loss`)."""
    batches = visited_batches(updates)
    return pd.DataFrame(
        {name: [time_share(batches[name], window=window)] for name in ("repeats", "loss")}
    )


# --- memorised or learnt ----------------------------------------------------------------------


def transfer(updates: pd.DataFrame, *, window: int = WINDOW) -> pd.DataFrame:
    """Return, in one row, what an extra update on a batch did to it and to the next batch.

    `own`: how far a batch's loss fell from one visit to the next, mean over all extra visits.
    `other`: how much lower the first loss of the next fresh batch is for every extra visit of this
    one, by least squares after `local_lines` are taken from both. Where N is drawn at random
    (`uniform`) this is a randomised experiment, and `other` what an extra update does to a batch
    that it is not made on. Where the loss decides N it is an association only: a moment at which
    the model is bad raises N and the next loss together, and so lowers `other`.

    The records hold no loss of one batch before and after an update on another, so it is known on
    average over a run alone; nor do they say whether the next batch's samples were seen in an
    earlier epoch.

    Returns:
        Columns own and other (in the loss's unit per extra update, positive where the loss falls)
        and ratio = other / own; NaN where N never exceeds 1, or does not vary.
    """
    batches = visited_batches(updates)
    counts, first = batches["repeats"].to_numpy(float), batches["loss"].to_numpy()
    extra = float((counts - 1).sum())
    own = float((first - batches["last_loss"].to_numpy()).sum() / extra) if extra else np.nan
    other = np.nan
    if len(counts) > 3:
        n, following = (
            part - local_lines(part, window=window)[0] for part in (counts[:-1], first[1:])
        )
        spread = float(n @ n)
        other = -float(n @ following) / spread if spread > 1e-12 * (counts @ counts) else np.nan
    return pd.DataFrame({"own": [own], "other": [other], "ratio": [other / own if own else np.nan]})


# --- the real run against its controls, and where extra updates go ------------------------------


def against_controls(
    records: Records,
    endpoints: Mapping[str, Endpoint],
    *,
    real: str,
    controls: Sequence[str],
) -> pd.DataFrame:
    """Return `comparison_table` of the real arm against each control, one family for Holm.

    Positive where the real arm is better, at equal updates. A control that is missing keeps its
    row. The larger step has a second one, `SAME_DATA`: at equal fresh batches, up to which both
    have gone the same way to first order; under a schedule its rate has not come down by then.
    """

    def against(control: str, axis: str = "update") -> pd.DataFrame:
        return pairs(records, endpoints, axis=axis, against=control, methods=[real])

    frames = [against(control) for control in controls]
    if LARGER_STEP in controls:
        frames.append(against(LARGER_STEP, "fresh_batches").assign(against=SAME_DATA))
    return comparison_table(stack(frames))


def noise_shares(records: Records) -> pd.DataFrame:
    """Return the share of corrupted samples in the data, in all visits and in extra visits.

    One row per run that is done and had label noise; the extra visits' share is NaN where the run
    made none. See `label_noise.NoiseLog`.
    """
    rows = []
    for row in records.done.itertuples():
        noise = Run(Path(row.path)).summary.get("label_noise")
        if noise:
            rows.append({key: getattr(row, key) for key in RUN_KEYS} | noise)
    return pd.DataFrame(rows, columns=[*RUN_KEYS, *NOISE]).astype(dict.fromkeys(NOISE[:3], float))


def statistics(*, window: int = WINDOW) -> dict[str, Statistic]:
    """Return what the viewpoint asks of every run, for `by_run`."""
    return {
        "batches": visited_batches,
        "shares": repeat_shares,
        "timeline": repeats_over_updates,
        "ratios": loss_after_repeats,
        "time": partial(time_shares, window=window),
        "transfer": partial(transfer, window=window),
        "sharpness": batch_sharpness,
    }
