"""The form of mappings as a part of a page: `MappingForm` of the notebooks, without a kernel."""

from __future__ import annotations

import json
from base64 import b64encode
from tempfile import TemporaryDirectory

import cards
import pandas as pd
import readme
import yaml

from repeatlab.analysis.frames import load
from repeatlab.figures.sliders import MappingForm
from repeatlab.studies.study import run_study

FILE = cards.PARAMS / "quick" / "supervised.yaml"
T = 0.6  # nats: a quarter of the first losses, so that N falls step by step
# A widget's front end asks a model for its traits; here there is no kernel to tell of them. All of
# it stands in the page: a browser that opens a page as a file loads no module from another one.
MOUNT = """
const state = %s;
const bytes = Uint8Array.from(atob(state.losses), (letter) => letter.charCodeAt(0));
state.losses = new DataView(bytes.buffer);
const model = {
  get: (name) => state[name],
  set: (name, value) => (state[name] = value),
  on: () => {},
  save_changes: () => {},
};
render({ model, el: document.getElementById("mapping-form") });
"""


def recorded() -> pd.DataFrame:
    """Train the quick profile's standard arm on the digits, a few seconds; return its updates."""
    study = yaml.safe_load(FILE.read_text(encoding="utf-8"))["parameters"]["study"]
    study |= {"name": "explorer", "methods": {"standard": {}}, "seeds": 1}
    with TemporaryDirectory() as runs:
        run_study(study, runs, workers=0)
        return load(runs, study["name"]).updates


def html(updates: pd.DataFrame) -> str:
    """Return the form over a run's losses as HTML that loads nothing."""
    form = MappingForm(updates, "linear", "quantile", t=T)
    state = form.get_state(("losses", "max_updates", "t", "chosen"))
    told = json.dumps(state | {"losses": b64encode(state["losses"]).decode()})
    return (
        '<div id="mapping-form"><noscript>The form needs JavaScript.</noscript></div>\n'
        f"<style>\n{form._css}</style>\n"
        f'<script type="module">\n{form._esm}{MOUNT % told}</script>\n'
    )


def filled(page: str, updates: pd.DataFrame) -> str:
    """Return the guide with the form over a run's losses between its marks."""
    return readme.filled(page, {"mapping_form": f"````{{raw}} html\n{html(updates)}````\n"})
