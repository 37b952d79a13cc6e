"""Forms with sliders for a notebook: what a mapping, or other hardware, would change.

`MappingForm` asks a mapping for its N over the losses that a run has recorded, `CostForm` a cost
model for its curves. Pictures are images, not outputs of a cell, which a form that is moved faster
than it draws could mix up. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from html import escape
from math import log10
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from repeatlab.cost import CostModel
from repeatlab.figures.cost import cost_curves
from repeatlab.figures.look import png
from repeatlab.figures.trace import repeats_on_trace
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import MAPPINGS, Mapping

Slider = widgets.IntSlider | widgets.FloatSlider | widgets.FloatLogSlider
# A mapping's field -> the slider that asks for it, as functions of its default. `t` is a loss, so
# that its range follows from the trace.
_SLIDERS: dict[str, Callable[[Any], Slider]] = {
    "repeats": lambda value: widgets.IntSlider(value, 1, 10),
    "max_repeats": lambda value: widgets.IntSlider(value, 1, 10),
    "low": lambda value: widgets.IntSlider(value, 1, 10),
    "high": lambda value: widgets.IntSlider(value, 1, 10),
    "window": lambda value: widgets.IntSlider(value, 2, 500),
    "k": lambda value: widgets.FloatSlider(value, min=0.1, max=6, step=0.1),
    "step": lambda value: widgets.FloatSlider(value, min=0.1, max=4, step=0.1),
    "levels": lambda value: widgets.FloatSlider(value[0], min=0.05, max=0.99, step=0.01),
}
_NOT_ASKED = {"seed"}


def offered() -> list[str]:
    """Return the mappings that a trace of first losses can be given to, by name.

    Not those that look at every visit's loss, which a trace has not, and not recorded counts.
    """
    known = _SLIDERS.keys() | _NOT_ASKED | {"t"}
    return [
        name
        for name, kind in MAPPINGS.items()
        if not kind.asks_again and {field.name for field in fields(kind)} <= known
    ]


def counts_on_trace(mapping: Mapping, losses: Iterable[float], *, max_updates: int) -> np.ndarray:
    """Return the N that `mapping` gives to fresh batches with these losses, in their order.

    Up to the batch on which the budget is spent, whose N is cut; fewer where the losses end before.
    A real run would have had other losses: repetition changes what the next batch's loss is.

    Args:
        mapping: The mapping.
        losses: First losses of fresh batches, finite.
        max_updates: T.
    """
    stats, counts, left = LossStats(mapping.window), [], max_updates
    for index, loss in enumerate(losses):
        if not left:
            break
        stats.index, stats.progress = index, (max_updates - left) / max_updates
        counts.append(min(mapping(loss, stats), left))
        left -= counts[-1]
        stats.observe(loss)
    return np.array(counts, dtype=int)


class MappingForm(widgets.VBox):
    """Sliders for a mapping and its fields; N over a recorded trace is drawn anew at every move.

    Args:
        updates: Rows of one run with `repeat` and `loss`, in their order; as many as its T.
        mapping: The name of the mapping to begin with.
        fields: Values of its fields to begin with.

    Attributes:
        mapping: The mapping as the sliders have it.
        counts: N of the fresh batches of the trace, up to T; see `counts_on_trace`.

    Raises:
        ValueError: `mapping` is not one of `offered()`, or there is no finite loss.
    """

    def __init__(
        self, updates: pd.DataFrame, mapping: str = "linear", **fields: float | int
    ) -> None:
        if mapping not in offered():
            raise ValueError(f"the mapping must be one of {', '.join(offered())}; not {mapping!r}")
        losses = updates.loc[updates["repeat"] == 0, "loss"].to_numpy(dtype=float)
        self._losses, self._max_updates = losses[np.isfinite(losses)], len(updates)
        if not len(self._losses):
            raise ValueError("the trace holds no finite loss")
        self.mapping: Mapping | None = None
        self.counts = np.array([], dtype=int)
        self._name = _named(widgets.Dropdown(options=offered(), value=mapping), "mapping")
        self._fields = widgets.VBox()
        self._said = widgets.HTML()
        self._picture = _image()
        self._name.observe(lambda change: self._ask(change["new"]), "value")
        super().__init__([self._name, self._fields, self._said, self._picture])
        self._ask(mapping, **fields)

    def _ask(self, name: str, **values: float | int) -> None:
        """Show the sliders of another mapping."""
        sliders = []
        for field in fields(MAPPINGS[name]):
            if field.name in _NOT_ASKED:
                continue
            if field.name == "t":
                slider = _loss_slider(self._losses)
            else:
                slider = _SLIDERS[field.name](field.default)
            _named(slider, field.name)
            slider.value = values.get(field.name, slider.value)
            slider.observe(self._redraw, "value")
            sliders.append(slider)
        self._fields.children = sliders
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        kind = MAPPINGS[self._name.value]
        values = {slider.description: slider.value for slider in self._fields.children}
        if "levels" in values:
            values["levels"] = (values["levels"],)
        try:
            self.mapping = kind(**values)
        except ValueError as error:  # two sliders that contradict each other
            self._said.value = escape(str(error))
            return
        self.counts = counts_on_trace(self.mapping, self._losses, max_updates=self._max_updates)
        self._said.value = escape(_in_words(self.counts, len(self._losses), self._max_updates))
        t = getattr(self.mapping, "t", None)
        self._picture.value = png(repeats_on_trace(self._losses, self.counts, t=t))


def _named(widget: Any, name: str) -> Any:
    widget.description = name
    widget.style.description_width = "7em"
    return widget


def _image() -> widgets.Image:
    # Else a box stretches what is in it to its own width.
    return widgets.Image(format="png", layout={"align_self": "flex-start"})


def _loss_slider(losses: np.ndarray) -> widgets.FloatLogSlider:
    positive = losses[losses > 0]
    low, middle, high = (
        np.quantile(positive, [0, 0.25, 1]) if len(positive) else np.array([0.01, 1.0, 10.0])
    )
    return widgets.FloatLogSlider(
        value=middle, min=log10(low / 10), max=log10(high * 2), step=0.01, readout_format=".3g"
    )


def _in_words(counts: np.ndarray, batches: int, max_updates: int) -> str:
    made = int(counts.sum())
    spent = "the budget is spent" if made == max_updates else "the trace ends"
    return (
        f"mean N {counts.mean():.3f}, N > 1 on {np.mean(counts > 1):.1%} of fresh batches; "
        f"after {len(counts)} of {batches} {spent}: {made} of {max_updates} updates"
    )


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
        self._picture = _image()
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
