"""What a viewpoint looks at: studies and what is asked of each. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.analysis.frames import Records, load, together
from repeatlab.analysis.paired_differences import Endpoint


@dataclass(frozen=True)
class Views:
    """The runs of several studies as one.

    Attributes:
        records: The runs, each task under its view's name.
        tasks: Task -> its view, also where the store has nothing of it.
        absent: Studies that the store lacks.
    """

    records: Records
    tasks: dict[str, Mapping[str, Any]]
    absent: list[str]

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

    def endpoints(self, k: float | None = None) -> dict[str, Endpoint]:
        """Return what is compared on each task.

        Args:
            k: A backward's time in forwards; a view may have a `k` of its own.
        """
        return {
            task: Endpoint(metric=view["metric"], target=view["target"], k=view.get("k", k))
            for task, view in self.tasks.items()
        }


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
    return Views(together(found), tasks, absent)


def stack(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return the frames as one; the empty ones, whose columns have no type, do not spoil it."""
    frames = list(frames)
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else frames[0]
