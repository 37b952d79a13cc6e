"""Frames to axes, and axes to files. Never imports torch.

One colour per method throughout. What all figures share is in `look`; each viewpoint has a module
of its own, which draws what `repeatlab.analysis` has computed.
"""

from repeatlab import require_lab

require_lab()

from repeatlab.figures.look import label, style
from repeatlab.figures.one_run import picture_grid, repeats_over_time, tau_over_time
from repeatlab.figures.saving import read_manifest, save_figure

__all__ = [
    "label",
    "picture_grid",
    "read_manifest",
    "repeats_over_time",
    "save_figure",
    "style",
    "tau_over_time",
]
