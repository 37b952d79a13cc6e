"""A form with sliders for a notebook: what a mapping would have done over recorded losses.

`MappingForm` asks two mappings for their N over the losses that a run has recorded, in the browser
(`mappings.js`), with a kernel or without. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets

from repeatlab.figures.front_end import CSS, module

# Those that `mappings.js` knows: not those that look at every visit's loss, which a trace has not,
# nor recorded counts, nor draws. One that is written there too is named here.
OFFERED = (
    "constant",
    "threshold",
    "linear",
    "cosine",
    "ramp",
    "control_limit",
    "quantile",
    "zscore",
)


class MappingForm(anywidget.AnyWidget):
    """Sliders for two mappings; their N over recorded losses are drawn anew at every move.

    N of the fresh batches in their order, up to the one on which the budget is spent. A real run
    would have had other losses: repetition changes what the next batch's loss is.

    Args:
        updates: Rows of one run with `repeat` and `loss`, in their order; as many as its T.
        mapping: The name of the first mapping to begin with, one of `OFFERED`.
        other: That of the second.
        t: The loss that mappings with a t begin with; by default the losses' lower quartile.
        fields: Values of the first mapping's other fields to begin with.

    Raises:
        ValueError: a name is not one of `OFFERED`, or there is no finite loss.
    """

    _esm, _css = module(Path(__file__).with_name("mappings.js")), CSS
    losses = traitlets.Bytes().tag(sync=True)
    max_updates = traitlets.Int().tag(sync=True)
    t = traitlets.Float().tag(sync=True)
    chosen = traitlets.List().tag(sync=True)

    def __init__(
        self,
        updates: pd.DataFrame,
        mapping: str = "linear",
        other: str = "threshold",
        *,
        t: float | None = None,
        **fields: float | int,
    ) -> None:
        losses = updates.loc[updates["repeat"] == 0, "loss"]
        state = _state(losses, len(updates), [{"name": mapping, **fields}, {"name": other}], t)
        super().__init__(**state)


def _state(
    losses: Iterable[float], max_updates: int, chosen: list[dict[str, Any]], t: float | None
) -> dict[str, Any]:
    """Return what the front end starts from: losses are float32, in which they are compared."""
    for side in chosen:
        if side["name"] not in OFFERED:
            raise ValueError(
                f"the mapping must be one of {', '.join(OFFERED)}; not {side['name']!r}"
            )
    numbers = np.asarray(losses, dtype="<f4")
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        raise ValueError("the trace holds no finite loss")
    positive = numbers[numbers > 0]
    t = t or (float(np.quantile(positive, 0.25)) if len(positive) else 1.0)
    return {"losses": numbers.tobytes(), "max_updates": max_updates, "t": t, "chosen": chosen}
