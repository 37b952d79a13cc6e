"""From the run store to tidy frames and statistics. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

from repeatlab.core.html_view import rows_table
from repeatlab.cost import cost_units
from repeatlab.store.records import Run, Store

# Ends of the names of metrics that are shares.
SHARES = ("accuracy", "f1", "auc", "recall_at_1", "recall_at_5", "map", "mask_rate", "memorized")
GRID = 60  # points of a mean curve whose runs have none in common
RUN_KEYS = ["task", "method", "seed"]
# x axis of learning curves -> label; but for updates they hold what came before the first one.
AXES = {
    "update": "gradient updates",
    "fresh_batches": "fresh batches drawn",
    "environment_steps": "environment steps",
    "cost": "cost (samples forward)",
    "seconds": "training time (s)",
}
# x axis -> counts of the ledger that are charged on it, besides its own.
CHARGED = {
    "fresh_batches": ("passed_batches", "calibration_fresh_batches", "holdout_fresh_batches"),
    "environment_steps": ("calibration_environment_steps",),
}
# Metrics of which less is better; of all others more is.
LOWER_IS_BETTER = {
    "loss",
    "error",
    "bits_per_character",
    "negative_elbo",
    "reconstruction",
    "fid_classifier",
    "fid_inception",
    "forgetting",
    "forgetting_known",
    "memorized",
}


@dataclass(frozen=True)
class Records:
    """The runs of one or several studies.

    Attributes:
        runs: One row per planned run, whatever became of it: task, method, seed, id, path, status
            ("missing" where there is nothing), max_updates and, for runs that are done, the ledger
            and the final metrics ("validation.accuracy", ...).
    """

    runs: pd.DataFrame

    def __repr__(self) -> str:
        return f"Records({', '.join(f'{name}={value!r}' for name, value in self._shown().items())})"

    def _repr_html_(self) -> str:
        return rows_table(self._shown())

    def _shown(self) -> dict[str, int | str]:
        """Return what a reader wants to know first: how many runs of what, and how they ended."""
        runs = self.runs
        named = {f"{key}s": ", ".join(runs[key].unique()) for key in ("task", "method")}
        seeds = {"seeds": runs["seed"].nunique()}
        return {"runs": len(runs)} | runs["status"].value_counts().to_dict() | named | seeds

    @property
    def run_ids(self) -> list[str]:
        """Ids of the runs that are done, without repetition."""
        return sorted(self.done["id"].unique())

    @property
    def done(self) -> pd.DataFrame:
        """The rows of `runs` that are complete or diverged."""
        return self.runs[self.runs["status"].isin(["complete", "diverged"])]

    @property
    def missing(self) -> pd.DataFrame:
        """The rows of `runs` that are not done."""
        return self.runs[~self.runs["status"].isin(["complete", "diverged"])]

    @cached_property
    def evals(self) -> pd.DataFrame:
        """Rows (task, method, seed, status, update, split, metric, value, ledger) of done runs."""
        frame = self._stack("evals", [*RUN_KEYS, "status"])
        if len(frame):
            # What an arm spent before its first update is part of it from the start, and data that
            # it looked at to choose from is data.
            frame["seconds"] += _prepared_seconds(frame)
            for axis, more in CHARGED.items():
                for name in set(more) & set(frame):
                    frame[axis] += frame[name].fillna(0)
        return frame

    @cached_property
    def updates(self) -> pd.DataFrame:
        """Rows (task, method, seed, update, fresh_batch, repeat, repeats, loss, lr, seconds)."""
        return self._stack("updates", RUN_KEYS)

    def measured(self, metric: str, split: str) -> pd.DataFrame:
        """Return the rows of `evals` with this metric on this split, each run's in order."""
        if (metric, split) not in self._measured:
            evals = self.evals
            rows = evals[(evals["metric"] == metric) & (evals["split"] == split)]
            self._measured[metric, split] = rows.sort_values("update", kind="stable")
        return self._measured[metric, split]

    @cached_property
    def _measured(self) -> dict[tuple[str, str], pd.DataFrame]:
        return {}

    def _stack(self, table: str, keys: Sequence[str]) -> pd.DataFrame:
        done = self.done
        tables = [Run(Path(path)).table(table) for path in done["path"]]
        if not tables:
            return pd.DataFrame(columns=[*keys, "update", "split", "metric", "value"])
        # Joined as Arrow tables: a thousand data frames take several times as long.
        stacked = pa.concat_tables(tables, promote_options="permissive").to_pandas()
        rows = [len(each) for each in tables]
        for place, key in enumerate(keys):
            stacked.insert(place, key, np.repeat(done[key].to_numpy(), rows))
        return stacked


def load(runs: str | Path, studies: str | Sequence[str]) -> Records:
    """Return the records of `studies` in the run store at `runs`.

    Raises:
        StoreError: the store holds no such study; the message tells how to make it.
    """
    store = Store(runs)
    rows: list[dict] = []
    for name in [studies] if isinstance(studies, str) else studies:
        study = store.read_study(name)
        for planned in study["runs"]:
            run = store.run(*planned["run"])
            summary = run.summary
            rows.append(
                {
                    "task": planned["task"],
                    "method": planned["method"],
                    "seed": planned["seed"],
                    "id": run.path.name,
                    "path": str(run.path),
                    "status": run.status["status"],
                    "max_updates": study["max_updates"],
                    **summary.get("ledger", {}),
                    **summary.get("final", {}),
                }
            )
    return Records(pd.DataFrame(rows))


def together(records: Mapping[str, Records]) -> Records:
    """Return the runs of several studies as one, each task under its study's name here.

    Studies call their tasks what they like, "digits" most of them. A study of several tasks keeps
    their names behind its own: "name: task".
    """
    frames = []
    for name, study in records.items():
        tasks = study.runs["task"].unique()
        names = {task: name if len(tasks) == 1 else f"{name}: {task}" for task in tasks}
        frames.append(study.runs.assign(task=study.runs["task"].map(names)))
    empty = pd.DataFrame(columns=[*RUN_KEYS, "id", "path", "status"])
    return Records(pd.concat(frames, ignore_index=True) if frames else empty)


# --- learning curves --------------------------------------------------------------------------


def curves(evals: pd.DataFrame, metric: str, *, x: str = "update") -> pd.DataFrame:
    """Return mean validation curves with 95 % intervals over seeds.

    Runs of one method reach different x at the same update, so each run is interpolated linearly
    onto a grid that all runs of the method cover; nothing is extrapolated.

    Returns:
        Rows (task, method, x, mean, low, high, n, diverged) with the interval of `mean_interval`,
        cut off at what is `possible`; `diverged` of the n runs did, and the curve ends with the
        first of them.
    """
    chosen = evals[(evals["metric"] == metric) & (evals["split"] == "validation")]
    pieces = []
    for (task, method), group in chosen.groupby(["task", "method"], sort=False):
        runs = [r.sort_values("update") for _, r in group.groupby("seed")]
        low, high = max(r[x].iloc[0] for r in runs), min(r[x].iloc[-1] for r in runs)
        same = all(np.array_equal(r[x], runs[0][x]) for r in runs)
        grid = runs[0][x].to_numpy(float) if same else np.linspace(low, high, GRID)
        values = np.stack([np.interp(grid, r[x], r["value"]) for r in runs])
        mean, *limits = mean_interval(values)
        below, above = np.clip(limits, *possible(metric))
        columns = {x: grid, "mean": mean, "low": below, "high": above, "n": len(runs)}
        columns["diverged"] = sum(has_diverged(run) for run in runs)
        pieces.append(pd.DataFrame({"task": task, "method": method, **columns}))
    columns = ["task", "method", x, "mean", "low", "high", "n", "diverged"]
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=columns)


def has_diverged(run: pd.DataFrame) -> bool:
    """Return whether the run with these rows of `Records.evals` diverged, as far as they say."""
    return "status" in run and run["status"].iloc[0] == "diverged"


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return mean and Student-t confidence limits of the mean along axis 0, shape (n, ...).

    With one value the limits are NaN: one run says nothing of the spread.
    """
    values = np.asarray(values, dtype=float)
    n, mean = len(values), values.mean(axis=0)
    if n < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def mean_and_limits(values: np.ndarray) -> dict[str, float]:
    """Return `mean_interval` of numbers (n,) by name: mean, low and high; NaN without any."""
    found = mean_interval(values) if len(values) else [np.nan] * 3
    return dict(zip(["mean", "low", "high"], map(float, found), strict=True))


def possible(metric: str) -> tuple[float, float]:
    """Return the least and the greatest value that a metric can have, as far as it is known.

    >>> possible("knn_accuracy"), possible("return"), possible("forgetting")
    ((0.0, 1.0), (0.0, 500.0), (-inf, inf))
    """
    if metric == "return":  # of CartPole-v1, which ends an episode after so many steps
        return 0.0, 500.0
    return (0.0, 1.0) if metric.endswith(SHARES) else (-np.inf, np.inf)


def with_cost(evals: pd.DataFrame, k: float | Mapping[str, float]) -> pd.DataFrame:
    """Return `evals` with the column `cost`: what was spent so far, in one sample's forward.

    All of `repeatlab.cost.cost_units`: what chose the batches or t is charged like what trained on
    them. A task's pretraining moves all its arms alike and no difference between them; it is
    charged because tasks that are set beside each other may differ in it.

    Args:
        evals: The rows of `Records.evals`.
        k: A backward's time in forwards; one for all tasks, or by task.
    """
    of_task = k if isinstance(k, (int, float)) else evals["task"].map(dict(k))
    counts = evals.filter(like="_samples").fillna(0)
    return evals.assign(cost=cost_units(counts, of_task))


def _prepared_seconds(frame: pd.DataFrame) -> pd.Series:
    """Return the time of what came before the first update; older records lack columns.

    A task's pretraining is one for all arms of a seed, however long it took in each of their
    processes: they are charged the median.
    """
    calibration, holdout, pretraining = (
        frame[f"{part}_seconds"].fillna(0.0)
        if f"{part}_seconds" in frame
        else pd.Series(0.0, index=frame.index)
        for part in ("calibration", "holdout", "pretraining")
    )
    shared = pretraining.groupby([frame["task"], frame["seed"]]).transform("median")
    return calibration + holdout + shared


def counted_axes(frame: pd.DataFrame) -> list[str]:
    """Return the `AXES` on which anything was counted: no environment steps without a simulator."""
    return [axis for axis in AXES if axis in frame and (frame[axis] > 0).any()]


# --- time to target ---------------------------------------------------------------------------


def to_target(evals: pd.DataFrame, metric: str, target: float) -> pd.DataFrame:
    """Return when each run first reached `target`, by the evaluations.

    A run that missed it is censored, never imputed: `reached` is False and the axes hold its last
    evaluation. One that diverged without reaching it never will: it stays a miss up to the largest
    x of the task's runs. One that diverged later has reached it.

    Returns:
        Rows (task, method, seed, reached) and one column for each of `AXES` that was counted.
    """
    chosen = evals[(evals["metric"] == metric) & (evals["split"] == "validation")]
    axes = counted_axes(evals)
    rows = []
    ends = chosen.groupby("task")[axes].max()
    for keys, run in chosen.groupby(RUN_KEYS, sort=False):
        run = run.sort_values("update")
        hits = run["value"] <= target if metric in LOWER_IS_BETTER else run["value"] >= target
        if hits.any():
            at = run[hits].iloc[0]
        else:
            at = ends.loc[keys[0]] if has_diverged(run) else run.iloc[-1]
        rows.append(
            {
                **dict(zip(RUN_KEYS, keys, strict=True)),
                "reached": bool(hits.any()),
                **{axis: at[axis] for axis in axes},
            }
        )
    return pd.DataFrame(rows, columns=[*RUN_KEYS, "reached", *axes])


# --- tables -----------------------------------------------------------------------------------


def final_table(records: Records, metric: str, *, split: str = "validation") -> pd.DataFrame:
    """Return one row per task and method: how its runs ended and what they cost.

    Columns: runs, missing, diverged, mean of the metric at T with 95 % limits (complete runs only,
    cut off at what is possible), mean E[N] = updates / fresh batches, fresh batches, training
    seconds with what came before them.
    """
    rows, prepared = [], _prepared_seconds(records.done)
    for (task, method), group in records.runs.groupby(["task", "method"], sort=False):
        complete = group[group["status"] == "complete"]
        row = {
            "task": task,
            "method": method,
            "runs": len(group),
            "missing": len(group) - int(group["status"].isin(["complete", "diverged"]).sum()),
            "diverged": int((group["status"] == "diverged").sum()),
        }
        if len(complete):
            limits = mean_and_limits(complete[f"{split}.{metric}"].to_numpy())
            # Of few seeds Student's interval may hold what no run can give.
            limits |= {name: np.clip(limits[name], *possible(metric)) for name in ("low", "high")}
            seconds = complete["seconds"] + prepared[complete.index]
            row |= {
                metric: limits.pop("mean"),
                **limits,
                "mean N": (complete["updates"] / complete["fresh_batches"]).mean(),
                "fresh batches": complete["fresh_batches"].mean(),
                "seconds": seconds.mean(),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def target_summary(times: pd.DataFrame) -> pd.DataFrame:
    """Return hits, runs and the median time of each method on each axis.

    The median is over all runs with a miss as infinity, hence infinite where half of them missed.

    Args:
        times: What `to_target` returns.
    """
    rows = []
    for (task, method), group in times.groupby(["task", "method"], sort=False):
        row = {"task": task, "method": method, "reached": int(group["reached"].sum())}
        medians = {
            x: float(np.median(group[x].where(group["reached"], np.inf)))
            for x in AXES
            if x in group and group[x].notna().all()  # of other tasks' axes there is nothing
        }
        rows.append(row | {"runs": len(group)} | medians)
    return pd.DataFrame(rows)


# --- the end ----------------------------------------------------------------------------------


def final_points(evals: pd.DataFrame, metric: str, *, x: str) -> pd.DataFrame:
    """Return what each method reached in the end and what it had spent by then.

    Returns:
        Rows (task, method, x, mean, low, high, n) over the last evaluations on the validation
        split, with the interval of `mean_interval`; not finite where a run diverged.
    """
    chosen = evals[(evals["metric"] == metric) & (evals["split"] == "validation")]
    last = chosen.sort_values("update").groupby(RUN_KEYS, sort=False).tail(1)
    if "status" in last:
        last = last.assign(value=last["value"].where(last["status"] != "diverged"))
    rows = []
    for (task, method), runs in last.groupby(["task", "method"], sort=False):
        point = mean_and_limits(runs["value"].to_numpy(float)) | {"n": len(runs)}
        rows.append({"task": task, "method": method, x: runs[x].mean(), **point})
    return pd.DataFrame(rows, columns=["task", "method", x, "mean", "low", "high", "n"])


def peak_memory(records: Records) -> pd.DataFrame:
    """Return the peak device memory by task and method, of runs that recorded it (those on CUDA).

    Returns:
        Columns task, method, runs, recorded, MiB (mean of those recorded, NaN if none).
    """
    done = records.done
    found = [Run(Path(path)).summary.get("peak_memory_bytes") for path in done["path"]]
    frame = done[["task", "method"]].assign(MiB=np.array(found, dtype=float) / 2**20)
    groups = frame.groupby(["task", "method"], sort=False)["MiB"]
    columns = {"runs": "size", "recorded": "count", "MiB": "mean"}
    return groups.agg(**columns).reset_index()
