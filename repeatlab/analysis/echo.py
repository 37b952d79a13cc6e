"""What repetition saves where data is slow, and where choosing samples pays: runs and tables.

With a loader that makes the next batch while updates run, up to R = d / update updates a batch are
free (data echoing, Choi et al. 2019, arXiv 1907.05550). Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.analysis.frames import load
from repeatlab.cost import (
    CostModel,
    break_even_keep,
    break_even_presample,
    cost_ratio,
    tau_threshold,
)

LOADERS = {"in turn": False, "prefetched": True}


def echo_studies(
    fields: Mapping[str, Any], *, delay_ms: float, repeats: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return for each of `LOADERS` the fields of a study with a slow one and constant N.

    Args:
        fields: Those of a study, of which the first task is taken, and all but the methods.
        delay_ms: What a batch takes on top of its making.
        repeats: N of the methods.
    """
    first = next(iter(fields["tasks"]))
    methods = {f"N={n}": {"mapping": {"name": "constant", "repeats": n}} for n in repeats}
    return {
        loader: {
            **fields,
            "name": f"{fields['name']}-{loader.replace(' ', '-')}",
            "tasks": {first: fields["tasks"][first]},
            "methods": methods,
            "loader": {"delay_ms": delay_ms, "prefetch": prefetch},
        }
        for loader, prefetch in LOADERS.items()
    }


def echo_runs(runs: str | Path, studies: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row for each run of `echo_studies` that is done.

    With `loader`, `method`, `seed`, `updates`, `fresh_batches`, `repeats` (the mean N) and
    `seconds`, of one update.

    Args:
        runs: The run store.
        studies: What `echo_studies` returned.
    """
    frames = {loader: load(runs, fields["name"]).done for loader, fields in studies.items()}
    rows = pd.concat(frames, names=["loader"]).reset_index(level="loader")
    rows = rows[["loader", "method", "seed", "updates", "fresh_batches", "seconds"]].copy()
    rows["repeats"] = rows["updates"] / rows["fresh_batches"]
    rows["seconds"] /= rows["updates"]
    return rows


def echo_table(models: Mapping[str, CostModel]) -> pd.DataFrame:
    """Return what each model says of repetition: a row a name.

    `update (ms)` and `data (ms)`; `R`, up to how many updates a batch are free under prefetch;
    `most saved`, the share of standard training's time that repetition without prefetch can save at
    equal updates, d / (d + update).
    """
    rows = {
        name: {
            "update (ms)": 1000 * model.update,
            "data (ms)": 1000 * model.data,
            "R": model.free_repeats(),
            "most saved": model.data / (model.data + model.update),
        }
        for name, model in models.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def break_even_table(ratios: Mapping[str, float], *, presample: float) -> pd.DataFrame:
    """Return where methods that score samples break even: a row a name.

    Args:
        ratios: Name to k, one sample's backward over its forward.
        presample: p.

    Returns:
        `k`; `tau_th`, an update of importance sampling over a uniform one; `u`, its cost against
        training on all that it scores; `p from`, above which u is below 1; `keep below`, the share
        below which selective backprop is cheaper than training on all.
    """
    rows = {
        name: {
            "k": k,
            "tau_th": tau_threshold(presample, k),
            "u": cost_ratio(presample, k),
            "p from": break_even_presample(k),
            "keep below": break_even_keep(k),
        }
        for name, k in ratios.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")
