"""Runs in the tools that people look at results in.

    DIR/STUDY/runs.csv, evaluations.csv, updates.csv    the frames of `repeatlab.load`
    DIR/STUDY/TASK/METHOD/seed-0/events...              TensorBoard
    DIR/wandb/offline-run-.../                          W&B, which `wandb sync` sends
    DIR/STUDY.db                                        Trackio

A run's scalars stand at the updates made before them: `train/loss`, `N` and `lr` of every update,
`eval/METRIC` on the validation split and `eval/SPLIT.METRIC` on others.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from repeatlab.analysis.frames import load
from repeatlab.core.files import make_directory
from repeatlab.core.schema import ConfigError
from repeatlab.store.records import Run, Store

# Called with a run that is done, its study's name, and what that calls task, method and seed.
Viewer = Callable[[Run, str, str, str, int], None]


def scalars(run: Run) -> list[tuple[int, dict[str, float]]]:
    """Return updates made, in order, each with what is known there by name."""
    points: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for row in run.updates.itertuples():
        points[row.update] = {"train/loss": row.loss, "N": row.repeats, "lr": row.lr}
    for row in run.evals.itertuples():
        split = "" if row.split == "validation" else f"{row.split}."
        points[row.update][f"eval/{split}{row.metric}"] = row.value
    return sorted(points.items())


class Tracker(NamedTuple):
    """Writes runs by the calls that W&B and Trackio have in common.

    Attributes:
        module: Either library.
        options: What its `init` takes besides.
    """

    module: Any
    options: dict[str, Any]

    def __call__(self, run: Run, study: str, task: str, method: str, seed: int) -> None:
        """Write a run: its project is the study, its group the method."""
        named = {"project": study, "name": f"{task} {method} seed {seed}", "group": method}
        written = self.module.init(config=run.config, **named, **self.options)
        for update, values in scalars(run):
            written.log(values, step=update)
        written.finish()


def viewer(name: str, to: str | Path) -> Viewer:
    """Return what writes runs into a directory, also while a study runs: `Places.into`.

    Args:
        name: "tensorboard", "wandb" or "trackio", installed by that name.
        to: The directory. Trackio has one for each process.

    Raises:
        ConfigError: there is no such viewer, or its library is not installed.
        StoreError: the directory cannot be written.
    """
    if name not in ("tensorboard", "wandb", "trackio"):
        raise ConfigError(f"a viewer must be tensorboard, wandb or trackio; not {name!r}")
    if find_spec(name) is None:
        raise ConfigError(f"{name} must be installed: pip install {name}")
    to = Path(to).resolve()
    make_directory(to)
    if name == "tensorboard":
        return partial(_write_events, to)
    # What is seen of this machine now says nothing of the runs.
    if name == "trackio":
        os.environ.setdefault("TRACKIO_DIR", str(to))  # read nowhere else, when it is imported
        import trackio

        if trackio.TRACKIO_DIR.resolve() != to:
            raise ConfigError(f"trackio must write into {trackio.TRACKIO_DIR} here; not {to}")
        return Tracker(trackio, {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False})
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_machine_info=True)
    options = {"mode": "offline", "dir": str(to), "reinit": "create_new", "settings": settings}
    return Tracker(wandb, options)


def _write_events(to: Path, run: Run, study: str, task: str, method: str, seed: int) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    config, points = run.config, scalars(run)
    lr = config["task"]["lr"] * config["method"]["rate"]
    chosen = {"task": task, "method": method, "seed": seed, "lr": lr}
    with SummaryWriter(str(to / study / task / method / f"seed-{seed}")) as writer:
        for summary in hparams(chosen, points[-1][1]):
            writer.file_writer.add_summary(summary)
        for update, values in points:
            for name, value in values.items():
                writer.add_scalar(name, value, update)


def export_as(
    form: str, store: Store, studies: Sequence[str], to: Path, *, visits: Sequence[str] | None
) -> int:
    """Write the runs of studies that are done as "csv" or for a viewer; return how many.

    Args:
        form: "csv", or what `viewer` takes.
        store: The store.
        studies: Names of studies.
        to: The directory, of a viewer an empty one: it would show runs twice.
        visits: None, since only Parquet can leave out visits.

    Raises:
        StoreError: a study is not in the store, a run is damaged, or the directory cannot be
            written.
        ConfigError: the directory is not empty, a viewer's library is not installed, or `visits`.
    """
    if visits:
        raise ConfigError(f"--as {form}: --visits must be left out: it writes every update")
    if form != "csv" and to.is_dir() and any(to.iterdir()):
        raise ConfigError(f"--as {form}: --to must be an empty directory; {to} is not")
    write = None if form == "csv" else viewer(form, to)
    count = 0
    for study in studies:
        records = load(store.root, study)
        count += len(records.done)
        for row in records.done.itertuples() if write else ():
            write(Run(Path(row.path)), study, row.task, row.method, row.seed)
        if write is None:
            make_directory(to / study)
            records.runs.drop(columns="path").to_csv(to / study / "runs.csv", index=False)
            records.evals.to_csv(to / study / "evaluations.csv", index=False)
            records.updates.to_csv(to / study / "updates.csv", index=False)
    return count
