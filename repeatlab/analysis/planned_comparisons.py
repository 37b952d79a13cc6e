"""The comparisons that the hypotheses are judged by, gathered from records. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from repeatlab.analysis.frames import Records
from repeatlab.analysis.paired_differences import MISSING, PAIR_COLUMNS, PAIRED, Endpoint, pairs
from repeatlab.store.records import Run

# The control of one larger step, which at equal updates goes further and sees more fresh data.
LARGER_STEP = "step_size"
DEFAULT_CONTROLS = ("windowed", "time_only", "anti_hard", "spaced", LARGER_STEP)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which arms the hypotheses are about; to be fixed before the runs are made.

    Attributes:
        against: The arm that everything is compared with.
        arms: What "loss-driven batch repetition" means in H1, H2 and H4.
        real: The arm whose mechanism H3 is about.
        controls: The arms that H3 compares it with.
        variants: The mappings and values of t that H5 compares.
        window: Fresh batches within which H3 asks who gets the extra updates.
    """

    against: str = "standard"
    arms: tuple[str, ...] = ("threshold", "linear")
    real: str = "linear"
    controls: tuple[str, ...] = DEFAULT_CONTROLS
    variants: tuple[str, ...] = ("threshold", "linear", "control_limit")
    window: int = 50


@dataclass(frozen=True)
class Evidence:
    """The comparisons that decide, in the columns of `pairs.pairs`.

    Attributes:
        speed: Arms against the standard one: how soon, on the axis of cost.
        cost: Arms and variants against the standard one at equal cost.
        controls: The real arm against its controls at equal updates: a control that replays counts
            needs no calibration, which must not decide between them.
        variants: Each variant against each later one at equal cost.
        hardness: What `hardness` returns, as differences from 0.
    """

    speed: pd.DataFrame
    cost: pd.DataFrame
    controls: pd.DataFrame
    variants: pd.DataFrame
    hardness: pd.DataFrame


def gather(records: Records, endpoints: Mapping[str, Endpoint], plan: Plan) -> Evidence:
    """Return what the records say about `plan`; what they lack is in it as missing."""
    planned = set(records.runs[["task", "method"]].itertuples(index=False, name=None))
    with_runs = {task for task, _ in planned}
    arms = list(dict.fromkeys([*plan.arms, *plan.variants]))

    def against(other: str, methods: list[str], **how: str) -> pd.DataFrame:
        # Only the standard arm belongs to every task: where another is not planned, none is missed.
        asked = {
            task: endpoint
            for task, endpoint in endpoints.items()
            if other == plan.against or (task, other) in planned or task not in with_runs
        }
        return pairs(records, asked, against=other, methods=methods, **{"axis": "cost"} | how)

    return Evidence(
        speed=against(plan.against, list(plan.arms), measure="speed"),
        cost=against(plan.against, arms),
        controls=_stack(against(control, [plan.real], axis="update") for control in plan.controls),
        variants=_stack(against(b, [a]) for a, b in combinations(plan.variants, 2)),
        hardness=_hardness_rows(records, endpoints, plan),
    )


def _stack(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=PAIR_COLUMNS)


def hardness(batches: pd.DataFrame, *, window: int = 50) -> float:
    """Return the rank correlation of first loss and N within windows of fresh batches of one run.

    Within a window training time has hardly passed, so that what is left is which batches got the
    extra updates: 1 is the hardest, 0 is no matter which, also where N never varies.

    Args:
        batches: `Run.fresh_batches`.
        window: Fresh batches in a window.
    """
    first = batches[np.isfinite(batches["loss"])]
    ranks = first.groupby(first["fresh_batch"] // window)[["loss", "repeats"]]
    centred = ranks.rank() - ranks.transform("size").to_numpy()[:, None] / 2 - 0.5
    loss, repeats = centred["loss"].to_numpy(), centred["repeats"].to_numpy()
    scale = np.sqrt((loss @ loss) * (repeats @ repeats))
    return float(loss @ repeats / scale) if scale > 0 else 0.0


def _hardness_rows(records: Records, endpoints: Mapping[str, Endpoint], plan: Plan) -> pd.DataFrame:
    runs = records.runs[records.runs["method"] == plan.real]
    rows = []
    for run in runs[runs["task"].isin(list(endpoints))].itertuples():
        value, status = np.nan, MISSING
        if run.status in ("complete", "diverged"):
            value, status = hardness(Run(Path(run.path)).fresh_batches, window=plan.window), PAIRED
        keys = {"task": run.task, "method": plan.real, "seed": run.seed, "against": "chance"}
        measured = {"status": status, "sign": 1, "value": value, "other": 0.0, "difference": value}
        rows.append(keys | measured)
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)
