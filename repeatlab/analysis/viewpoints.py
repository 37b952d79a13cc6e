"""What a viewpoint looks at: studies and what is asked of each. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.analysis.frames import Records, load, together
from repeatlab.analysis.paired_differences import Endpoint
from repeatlab.core.schema import read_yaml
from repeatlab.store.measurements import measurement_of
from repeatlab.store.records import Run, Store


@dataclass(frozen=True)
class Views:
    """The runs of several studies as one.

    Attributes:
        records: The runs, each task under its view's name.
        tasks: Task -> its view, also where the store has nothing of it.
        absent: Studies that the store lacks.
        measured: Task -> k, where the store has measured it; see `store.measurements`.
    """

    records: Records
    tasks: dict[str, Mapping[str, Any]]
    absent: list[str]
    measured: dict[str, float]

    @property
    def counts(self) -> pd.DataFrame:
        """Planned runs by task and status; a study that the store lacks has none."""
        runs = self.records.runs
        table = pd.crosstab(runs["task"], runs["status"])
        return table.reindex(list(self.tasks), fill_value=0).rename_axis("task")

    @property
    def with_target(self) -> dict[str, Mapping[str, Any]]:
        """The tasks of which a target is known."""
        return {t: view for t, view in self.tasks.items() if view["target"] is not None}

    def k(self, given: float | None = None) -> dict[str, float | None]:
        """Return each task's k, a backward's time in forwards, for the axis of cost.

        Args:
            given: Where neither the store has measured it nor the view has a `k` of its own.
        """
        return {t: self.measured.get(t, view.get("k", given)) for t, view in self.tasks.items()}

    def k_table(self, given: float | None = None) -> pd.DataFrame:
        """Return each task's k, and whether it was measured or given: columns task, k, origin."""
        rows = [
            {"task": task, "k": k, "origin": "measured" if task in self.measured else "given"}
            for task, k in self.k(given).items()
        ]
        return pd.DataFrame(rows, columns=["task", "k", "origin"])

    def endpoints(self, k: float | None = None) -> dict[str, Endpoint]:
        """Return what is compared on each task; `k` as for the method of this name."""
        return {
            task: Endpoint(metric=self.tasks[task]["metric"], k=k) for task, k in self.k(k).items()
        }


def fullest(
    runs: str | Path,
    views: Sequence[Mapping[str, Any]],
    viewpoint: str,
    *,
    params: str | Path = "../params",
) -> dict[str, Any]:
    """Return what a viewpoint looks at by default: the parameters of the fullest profile.

    That is the one of whose views' studies the store has most runs that are done. Only views of the
    smoke scale give way to it, and not where REPEATLAB_SMOKE is set, as for tests whose outcome is
    not to depend on what else the store has.

    Args:
        runs: The run store.
        views: The notebook's own.
        viewpoint: Name of its parameter file in each profile, "convergence".
        params: Where the profiles are.
    """
    own = {"views": views}
    smoke = all(view["study"].startswith("smoke-") for view in views)
    if not smoke or os.environ.get("REPEATLAB_SMOKE"):
        return own
    store = Store(runs)
    known = store.studies()

    def done(parameters: Mapping[str, Any]) -> int:
        names = [view["study"] for view in parameters["views"] if view["study"] in known]
        return sum(store.run(*p["run"]).done for n in names for p in store.read_study(n)["runs"])

    files = sorted(Path(params).glob(f"*/{viewpoint}.yaml"))
    return max([own, *(read_yaml(file)["parameters"] for file in files)], key=done)


def load_views(runs: str | Path, views: Sequence[Mapping[str, Any]]) -> Views:
    """Return the runs of the views that the store at `runs` has, and what it lacks.

    Args:
        runs: The run store.
        views: Each with `study` (its name in the store), `name`, `target` (a number or None) and
            whatever else is asked of it. A study of several tasks gives "name: task" for each.
    """
    found = {
        view["name"]: load(runs, view["study"])
        for view in views
        if Path(runs, "studies", f"{view['study']}.json").exists()
    }
    tasks: dict[str, Mapping[str, Any]] = {}
    for view in views:
        name = view["name"]
        own = together({name: found[name]}).runs["task"].unique() if name in found else [name]
        tasks |= dict.fromkeys(own, view)
    absent = [view["study"] for view in views if view["name"] not in found]
    records = together(found)
    first = records.done.groupby("task", sort=False)["path"].first()
    of_task = {task: measurement_of(runs, Run(Path(path))) for task, path in first.items()}
    measured = {task: found.sample_ratio for task, found in of_task.items() if found}
    return Views(records, tasks, absent, measured)


def stack(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return the frames as one; the empty ones, whose columns have no type, do not spoil it."""
    frames = list(frames)
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else frames[0]
