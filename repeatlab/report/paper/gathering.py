"""What the paper is made of, gathered from run store and figures into one directory.

tables/<name>.csv, .tex   what `tables.every_table` returns
verdicts.json             of each hypothesis criterion, verdict in every view, sentence, numbers,
                          and the plan that it follows: digest, n, margin, changes
banner.json               profile, data, scale, seeds, hardware, commits
rules.json                what was decided beforehand: arms, controls, margin, windows, level
figures.json, figures/    figures by section; `file` is null where there is none
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.analysis.declaration import Declaration
from repeatlab.analysis.frames import Records
from repeatlab.analysis.plans import PlanRecords, core_hours, load_plan
from repeatlab.analysis.statistics import ALPHA
from repeatlab.analysis.viewpoints import Views, load_views
from repeatlab.core.environment import commit
from repeatlab.core.files import write_json
from repeatlab.core.schema import ConfigError
from repeatlab.figures import read_manifest
from repeatlab.figures.look import extent
from repeatlab.report.paper.tables import every_table
from repeatlab.report.paper.wording import registered, verdict_entries, what_can_be_decided
from repeatlab.store.records import Run, Store

NO_PLAN = "no plan says what is compared, or the store lacks it"
SECTIONS = ("convergence", "efficiency", "mechanism", "adaptability", "sensitivity", "robustness")


@dataclass(frozen=True)
class Gathered:
    """What `gather` has written.

    Attributes:
        directory: Where.
        tables: Name to table.
        verdicts: One for each hypothesis, as verdicts.json holds them; none without a plan.
        banner: Where the numbers come from, as banner.json holds it.
        rules: What was decided beforehand, as rules.json holds it.
        missing_figures: Names of the figures that the paper shows as missing.
    """

    directory: Path
    tables: dict[str, pd.DataFrame]
    verdicts: list[dict[str, Any]]
    banner: dict[str, Any]
    rules: dict[str, Any]
    missing_figures: list[str]

    @property
    def verdict_lines(self) -> str:
        """Each hypothesis with its verdict, a line each; or that there is none."""
        lines = [f"{one['hypothesis']} {one['verdict']}" for one in self.verdicts]
        return "\n".join(lines) or f"no verdicts: {NO_PLAN}"


def gather(
    runs: str | Path,
    figures: str | Path,
    directory: str | Path,
    *,
    profile: str,
    views: Sequence[Mapping[str, Any]],
    shown: Mapping[str, str],
    k: float = 2.0,
    plan: str | None = None,
) -> Gathered:
    """Write tables, verdicts and figures of the views' studies into `directory`.

    Args:
        runs: The run store.
        figures: The directory of the figures and their manifest.
        directory: Where everything goes; made if need be.
        profile: What scale the runs are of, for the banner.
        views: One for each study: `study` (its name in the store), `name` (of the task), `metric`
            and `target` (a number, or None).
        k: A backward's time in forwards, for the cost, where the store has not measured a task's;
            a view may have a `k` of its own.
        shown: Figure name to caption. A name's first word is its section, one of `SECTIONS`.
        plan: The registered plan that the verdicts follow; without one there are none.

    Raises:
        ConfigError: a figure belongs to no section.
    """
    for name in shown:
        if _section(name) not in SECTIONS:
            said = f"figure {name!r}: its first word must be one of {', '.join(SECTIONS)}"
            raise ConfigError(said)
    viewed = load_views(runs, views)
    known = plan is not None and Store(runs).read_plan(plan) is not None
    planned = load_plan(runs, plan) if known else None
    tables = every_table(viewed, planned, runs=Path(runs), k=k)
    verdicts = verdict_entries(planned, tables["arms"]) if planned else []

    directory = Path(directory)
    (directory / "tables").mkdir(parents=True, exist_ok=True)
    (directory / "figures").mkdir(exist_ok=True)
    for name, table in tables.items():
        table.to_csv(directory / "tables" / f"{name}.csv", index=False, lineterminator="\n")
        latex = table.to_latex(index=False, escape=True, float_format="{:.4g}".format)
        (directory / "tables" / f"{name}.tex").write_text(latex, encoding="utf-8")
    entries = [_figure(name, shown[name], Path(figures), directory) for name in shown]
    parts = [*planned.stages.values(), *planned.budgets.values()] if planned else []
    written = {
        "verdicts": _plain(verdicts),
        "banner": _banner(profile, viewed, tables["studies"], [] if known else [plan])
        | {"core_hours": core_hours([viewed.records, *parts])},
        "rules": _plain(_rules(planned)),
        "figures": entries,
    }
    for name, content in written.items():
        write_json(directory / f"{name}.json", content)
    missing = [entry["name"] for entry in entries if entry["file"] is None]
    found = (written[name] for name in ("verdicts", "banner", "rules"))
    return Gathered(directory, tables, *found, missing)


def _rules(plan: PlanRecords | None) -> dict[str, Any]:
    """Return what was decided before the runs; without a plan that is next to nothing."""
    declared = plan.declared if plan else Declaration(goals={}, seeds=0)
    rules = asdict(declared) | {"alpha": ALPHA, "level": round(100 * (1 - ALPHA))}
    if not plan:
        return rules | {"plan": None, "changes": []}
    return rules | registered(plan) | {"decides": what_can_be_decided(plan)}


def _section(figure: str) -> str:
    return figure.partition("-")[0]


def _figure(name: str, caption: str, figures: Path, directory: Path) -> dict[str, Any]:
    """Copy a figure beside the paper and return its entry."""
    entry = {
        "name": name,
        "section": _section(name),
        "caption": caption,
        "file": None,
        "missing_runs": 0,
    }
    listed, source = read_manifest(figures).get(name), figures / f"{name}.pdf"
    if listed is None or not source.exists():
        return entry
    target = directory / "figures" / source.name
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
    file = target.relative_to(directory).as_posix()
    return entry | {"file": file, "missing_runs": listed["missing_runs"]}


def _banner(
    profile: str, viewed: Views, studies: pd.DataFrame, plans: Sequence[str | None]
) -> dict[str, Any]:
    """Return where the paper's numbers come from; `plans` are those that the store lacks."""
    environments = _environments(viewed.records)
    versions = {e["versions"]["torch"] for e in environments if "versions" in e}
    return {
        "profile": profile,
        "data": sorted({row["data"] for row in studies.to_dict("records") if row["data"]}),
        "updates": extent(studies["updates"].dropna()),
        "seeds": extent(studies["seeds"][studies["seeds"] > 0]),
        "tasks": len(studies),
        **{count: int(studies[count].sum()) for count in ("planned", "complete", "diverged")},
        "missing": int(studies["missing"].sum()),
        "absent": [*viewed.absent, *(f"plan {name}" for name in plans if name)],
        "hardware": sorted({_machine(e) for e in environments}),
        "torch": sorted(versions),
        "run_commits": sorted({str(e.get("commit")) for e in environments}),
        "commit": str(commit()),
    }


def _environments(records: Records) -> list[dict[str, Any]]:
    return [
        environment
        for row in records.done.itertuples()
        if (environment := Run(Path(row.path)).environment)
    ]


def _machine(environment: Mapping[str, Any]) -> str:
    processor = f"{environment.get('processor')}, {environment.get('cores')} cores"
    device = environment.get("device", "cpu")
    return processor if device == "cpu" else f"{device} ({processor})"


def _plain(value: Any) -> Any:
    """Return `value` as strict JSON can hold it: NaN as null, infinity as a word."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
