"""One card per arm of params/methods.yaml and params/opponents.yaml: what it is, costs and gave.

Written from the classes that an arm names, from the cost model, from the benchmarks' tables and, if
there is one, from the run store.
"""

from __future__ import annotations

import ast
import csv
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import readme
import yaml

from repeatlab.analysis.frames import LOWER_IS_BETTER, load, mean_interval
from repeatlab.analysis.plan_tables import arms_table
from repeatlab.analysis.plans import load_plan
from repeatlab.core.files import StoreError
from repeatlab.core.schema import ConfigError, parse
from repeatlab.cost import CostModel, cost_units
from repeatlab.methods import controls
from repeatlab.tasks import TASKS
from repeatlab.training.config import MethodConfig, RunConfig

PARAMS = readme.PROJECT / "params"
FILES = ("methods.yaml", "opponents.yaml")
K = (1.0, 2.0, 3.0)
MEASURED_K = 2.0  # of the cost that is shown beside runs
# Batches of samples that a sampler scores for one that is trained on.
SCORED: dict[str, Callable[[Any], float]] = {
    "importance": lambda sampler: sampler.presample,
    "selective": lambda sampler: sampler.beta + 1,
    "rho_loss": lambda sampler: sampler.presample,
}
# Batches of data that it draws for one update, while it is on.
DRAWN = SCORED | {"multiplicity": lambda sampler: 1 / sampler.views}
# Mean N of mappings that a formula gives, whatever the losses are.
DOSES: dict[str, Callable[[Any], float]] = {
    "constant": lambda mapping: mapping.repeats,
    "uniform": lambda mapping: (mapping.low + mapping.high) / 2,
    "cosine": lambda mapping: (mapping.low + mapping.high) / 2,
    "ramp": lambda mapping: (mapping.low + mapping.high) / 2,
    "quantile": lambda mapping: 1 + sum(1 - level for level in mapping.levels),
}


@dataclass(frozen=True)
class Arm:
    """An arm of a parameter file, as it is written there and as it is read."""

    name: str
    file: str
    written: str
    fields: Mapping[str, Any]
    method: MethodConfig


def arms() -> list[Arm]:
    """Return the arms of all files that there are, in their order; controls with their source."""
    known: dict[str, Any] = {}
    found = []
    for file in filter(lambda name: (PARAMS / name).exists(), FILES):
        text = (PARAMS / file).read_text(encoding="utf-8")
        known |= yaml.safe_load(text)
        for name, written in yaml.safe_load(text).items():
            line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
            fields = dict(written)
            if "of" in fields.get("mapping", {}):
                fields["mapping"] = fields["mapping"] | {"of": known[fields["mapping"]["of"]]}
            found.append(Arm(name, file, line, fields, parse(MethodConfig, fields)))
    return found


# --- what it is -----------------------------------------------------------------------------------


def described(arm: Arm) -> list[tuple[str, str, str]]:
    """Return what an arm chooses: field, where its source is, and what that says."""
    parts = []
    for field in arm.fields:
        value = getattr(arm.method, field)
        control = getattr(value, "control", None)
        target = getattr(type(value), "target", None)
        if control is not None:
            target = getattr(controls, control.split("_")[0], None) or getattr(controls, control)
        if target is not None:
            role = "class" if inspect.isclass(target) else "func"
            path = f"{target.__module__}.{target.__qualname__}"
            parts.append((field, f"{{py:{role}}}`{path}`", as_markdown(inspect.getdoc(target))))
        else:
            path = f"{MethodConfig.__module__}.{MethodConfig.__name__}"
            said = _field_docstrings(MethodConfig).get(field, "")
            parts.append((field, f"{{py:class}}`{path}`", as_markdown(said)))
    return parts


def _field_docstrings(kind: type) -> dict[str, str]:
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body)
    found = {}
    for node, after in pairwise(body):
        said = getattr(getattr(after, "value", None), "value", None)
        if isinstance(node, ast.AnnAssign) and isinstance(said, str):
            found[node.target.id] = inspect.cleandoc(said)
    return found


def as_markdown(docstring: str) -> str:
    """Return a docstring of the project's style as Markdown, papers as links."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        heading = re.match(r"(Args|Attributes|Returns|Raises):\n", paragraph)
        if ">>>" in paragraph:
            parts.append(f"```pycon\n{paragraph}\n```")
        elif heading:
            items = re.split(r"\n    (?=\S)", "\n" + paragraph[heading.end() :])
            said = [" ".join(item.split()) for item in items if item.strip()]
            parts.append("\n".join([f"{heading[1]}:", "", *(f"- {_named(one)}" for one in said)]))
        else:
            parts.append(_linked(" ".join(paragraph.split())))
    return "\n\n".join(parts)


def _named(item: str) -> str:
    name, colon, said = item.partition(":")
    return f"`{name}`: {_linked(said.strip())}" if colon and " " not in name else _linked(item)


def _linked(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*<])", r"\\\1", part) for part in parts[::2]]
    text = "".join(parts)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


# --- what it costs --------------------------------------------------------------------------------


def predicted(arm: Arm) -> str:
    """Return what the cost model says before anything is trained."""
    sampler, mapping = arm.method.sampler, arm.method.mapping
    scored = SCORED[sampler.name](sampler) if getattr(sampler, "name", None) in SCORED else 0
    rows = [["k", *(f"{k:g}" for k in K)], ["time of an update, in standard updates"]]
    for k in K:
        model = CostModel(forward=1.0, backward_ratio=k, batch_size=1)
        rows[1].append(f"{model.importance_update(scored) / model.update:.2f}")
    said = [readme.table(rows)]
    if scored:
        said.append(f"{scored:g} batches are scored for one that is trained on, while it is on.")
    if getattr(sampler, "holdout_updates", None):
        said.append(f"Two models of {sampler.holdout_updates} updates each are charged beside.")
    if arm.method.depends_on_calibration:
        said.append("The short run that finds t is charged beside.")
    name = getattr(mapping, "name", None)
    if mapping is None:
        drawn = DRAWN.get(getattr(sampler, "name", None), lambda sampler: 1)(sampler)
        said.append(f"Every batch is visited once: data of {drawn:g} T batches.")
    elif arm.method.apply == "step_size":
        said.append("Every batch is visited once, with a step of N times the rate.")
    elif name in DOSES:
        dose = DOSES[name](mapping)
        said.append(f"Expected dose {dose:.2f}: {1 / dose:.2f} T fresh batches.")
    else:
        said.append("The dose depends on the losses: T / dose fresh batches.")
    return "\n\n".join(said)


def benchmarked(arm: Arm) -> str:
    """Return the rows of the committed benchmarks that measured an arm."""
    parts = []
    for file, key, columns in (
        ("cost_model.csv", "arm", "task; scale; predicted; measured; error; n; k; hardware"),
        (
            "batch_selection.csv",
            "method",
            "data; mode; n; updates; test accuracy; low; high; cost units; of which scoring; k",
        ),
    ):
        path = readme.PROJECT / "tests/benchmarks/results" / file
        with path.open(encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if row[key] == arm.name]
        names = columns.split("; ")
        if rows:
            body = [[row[name] for name in names] for row in rows]
            parts += [f"`tests/benchmarks/results/{file}`:", readme.table([names, *body])]
    return "\n\n".join(parts) or "No committed benchmark measures this arm."


# --- where, and with what result ------------------------------------------------------------------


def applies(arm: Arm) -> dict[str, str]:
    """Return for every task why the arm means nothing there, or nothing where it does."""
    reasons = {}
    for task in TASKS:
        run = {"task": {"name": task}, "method": arm.method, "max_updates": 10_000}
        try:
            parse(RunConfig, run)
            reasons[task] = ""
        except ConfigError as error:
            reasons[task] = str(error).splitlines()[0]
    return reasons


class Measured:
    """What the quick profile's studies in a run store say, as far as they are there.

    Args:
        runs: The store.
        profile: A folder in params/ with a plan.
    """

    def __init__(self, runs: Path, profile: str = "quick") -> None:
        plan = yaml.safe_load((PARAMS / profile / "plan.yaml").read_text(encoding="utf-8"))
        self.name, self.written = plan["name"], plan["methods"]
        self.metrics = {task: fields["metric"] for task, fields in plan["tasks"].items()}
        self.runs, self.saved = {}, pd.DataFrame()
        for task in self.metrics:
            found = _there(partial(load, runs, f"{self.name}-{task}"))
            if found is not None and f"validation.{self.metrics[task]}" in found.runs:
                self.runs[task] = found.runs[found.runs["status"] == "complete"]
        registered = _there(partial(load_plan, runs, self.name))
        if registered is not None:
            self.saved = arms_table(registered)

    def table(self, arm: str) -> str:
        """Return what an arm's runs cost and reached, task by task, beside standard training."""
        rows = []
        for task, runs in self.runs.items():
            own, other = (
                runs[runs["method"] == method].set_index("seed") for method in (arm, "standard")
            )
            seeds = own.index.intersection(other.index)
            if not len(seeds):
                continue
            own, other, metric = own.loc[seeds], other.loc[seeds], self.metrics[task]
            values, base = (part[f"validation.{metric}"].to_numpy() for part in (own, other))
            dose = (own["updates"] / own["fresh_batches"]).mean()
            cost, standard = (cost_units(part.fillna(0), MEASURED_K) for part in (own, other))
            rows.append(
                [
                    task,
                    f"{metric.replace('_', ' ')} ({'less' if metric in LOWER_IS_BETTER else 'more'}"
                    " is better)",
                    f"{len(seeds)}",
                    interval(values, values),
                    interval(values - base, values) if arm != "standard" else "-",
                    f"{dose:.2f}",
                    f"{(cost / standard).mean():.2f}",
                ]
            )
        if not rows:
            return ""
        head = ["task", "metric", "n", "at T [95 %]", "less standard's [95 %]", "dose"]
        return readme.table([[*head, f"cost beside standard's (k = {MEASURED_K:g})"], *rows])

    def plan_table(self, arm: str) -> str:
        """Return the updates that an arm saved at its own rate, if the plan has it."""
        rows = self.saved[self.saved["arm"] == arm] if len(self.saved) else self.saved
        if not len(rows):
            return ""
        body = [
            [
                row["task"],
                f"{row['seeds']}",
                f"{row['rate']:g}",
                f"{row['mean_n']:.2f}",
                saved_share(row),
                row["state"],
            ]
            for _, row in rows.iterrows()
        ]
        head = ["task", "n", "own rate", "dose", "updates saved [95 %]", "state"]
        return readme.table([head, *body])


def _there(read: Callable[[], Any]) -> Any:
    """Return what a store holds, or nothing where it lacks it."""
    try:
        return read()
    except (StoreError, ConfigError, KeyError):
        return None


def interval(values: np.ndarray, scale: np.ndarray) -> str:
    """Return mean and 95 % interval of values as a cell, with the digits that a scale has."""
    digits = 3 if abs(scale.mean()) < 10 else 1
    # 0 is added for -0.0.
    mean, low, high = (round(float(part), digits) + 0 for part in mean_interval(values))
    shown = f"{mean:.{digits}f}"
    return f"{shown} [{low:.{digits}f}, {high:.{digits}f}]" if isfinite(low) else shown


def saved_share(row: pd.Series) -> str:
    """Return updates saved as a cell; few seeds give no limits."""
    limits = [f"{100 * row[name]:.0f} %" for name in ("low", "high") if isfinite(row[name])]
    shown = f"{100 * row['saved']:.0f} %" if isfinite(row["saved"]) else "no bound"
    bounded = len(limits) == 2
    return f"{shown} [{', '.join(limits)}]" if bounded else f"{shown} (no limits)"


# --- the card -------------------------------------------------------------------------------------


def card(arm: Arm, measured: Measured) -> str:
    """Return an arm's card as a page."""
    reasons = applies(arm)
    parts = [f"# {arm.name}", f"```yaml\n{arm.written}\n```", f"From `params/{arm.file}`."]
    for field, source, said in described(arm):
        parts += [f"## {field}", said, f"Source: {source}"]
    if not arm.fields:
        parts.append("One update on each fresh batch: what all other arms are compared with.")
    parts += ["## What it costs", "### Predicted", predicted(arm), "### Measured", benchmarked(arm)]
    parts += ["## Where it means something", ", ".join(t for t in reasons if not reasons[t])]
    refused = [f"- not on `{task}`: {reason}" for task, reason in reasons.items() if reason]
    parts += ["\n".join(refused), "## Results"]
    table, saved = measured.table(arm.name), measured.plan_table(arm.name)
    if table:
        parts += [f"Profile {measured.name}, all arms at the task's rate:", table]
    if saved:
        parts.append(f"The plan `{measured.name}`, every arm at its own rate:")
        if arm.name in measured.written:
            parts.append(f"There it is `{json.dumps(measured.written[arm.name])}`.")
        parts.append(saved)
    if table or saved:
        parts.append("Where n is 3, none of these numbers decides anything.")
    else:
        parts.append("The run store that these pages were made from has no run of it.")
    return "\n\n".join(filter(None, parts)) + "\n"


def write(folder: Path, runs: Path) -> list[str]:
    """Write all cards into a folder, with an index; return the arms' names."""
    folder.mkdir(parents=True, exist_ok=True)
    found, measured = arms(), Measured(runs)
    for arm in found:
        (folder / f"{arm.name}.md").write_text(card(arm, measured), encoding="utf-8")
    rows = [["arm", "what it chooses"], *([f"[{a.name}]({a.name}.md)", _short(a)] for a in found)]
    entries = "\n".join(arm.name for arm in found)
    index = f"# Methods\n\nOne card per arm.\n\n{readme.table(rows)}\n"
    toc = f"\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"
    (folder / "index.md").write_text(index + toc, encoding="utf-8")
    return [arm.name for arm in found]


def _short(arm: Arm) -> str:
    return f"`{arm.written.partition(':')[2].strip()}`"
