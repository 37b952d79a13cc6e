"""Forms with sliders for a notebook: what a mapping, or other hardware, would change.

`MappingForm` asks two mappings for their N over the losses that a run has recorded, in the browser
(`mappings.js`), with a kernel or without; `CostForm` asks a cost model for its curves. Never
imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import pandas as pd
import traitlets

from repeatlab.cost import CostModel
from repeatlab.figures.cost import cost_curves
from repeatlab.figures.front_end import CSS, module
from repeatlab.figures.look import png
from repeatlab.repetition.mappings import MAPPINGS

# Those of `mappings.js`: not those that look at every visit's loss, which a trace has not, nor
# recorded counts, nor draws.
OFFERED = tuple(
    name
    for name, kind in MAPPINGS.items()
    if not kind.asks_again and name not in ("trace", "uniform")
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


def _named(widget: Any, name: str) -> Any:
    widget.description = name
    widget.style.description_width = "7em"
    return widget


class CostForm(widgets.VBox):
    """Sliders for hardware that is not at hand; the cost model's curves follow.

    Args:
        model: The cost model to begin with, such as a measured one.
        presample: p to begin with.

    Attributes:
        model: The cost model as the sliders have it.
    """

    def __init__(self, model: CostModel, *, presample: float = 3.0) -> None:
        self._measured = self.model = model
        speed = widgets.FloatLogSlider(1, min=-1, max=3, step=0.05, readout_format=".3g")
        milliseconds = 1000 * max(model.data, 1e-7)
        data = widgets.FloatLogSlider(milliseconds, min=-4, max=4, step=0.02, readout_format=".3g")
        k = widgets.FloatSlider(model.backward_ratio, min=0.1, max=6, step=0.01)
        p = widgets.FloatSlider(presample, min=1, max=10, step=0.1)
        self._sliders = {"times as fast": speed, "data (ms)": data, "k": k, "presample": p}
        for name, slider in self._sliders.items():
            _named(slider, name)
            slider.observe(self._redraw, "value")
        # Else a box stretches what is in it to its own width.
        self._picture = widgets.Image(format="png", layout={"align_self": "flex-start"})
        super().__init__([*self._sliders.values(), self._picture])
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        speed, data, k, p = (slider.value for slider in self._sliders.values())
        measured = self._measured
        self.model = replace(
            measured,
            forward=measured.forward / speed,
            backward_ratio=k,
            optimizer=measured.optimizer / speed,
            recording=measured.recording / speed,
            scoring=None if measured.scoring is None else measured.scoring / speed,
            data=data / 1000,
        )
        self._picture.value = png(cost_curves(self.model, presample=p))
