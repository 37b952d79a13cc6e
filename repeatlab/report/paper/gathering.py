"""What the paper is made of, gathered from run store and figures into one directory.

tables/<name>.csv, .tex   what `tables.every_table` returns
verdicts.json             hypotheses with criterion, verdict, sentence and numbers
banner.json               profile, data, scale, seeds, hardware, commits
rules.json                what was decided beforehand: arms, controls, windows, level
figures.json, figures/    figures by section; `file` is null where there is none
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from repeatlab.analysis import planned_comparisons
from repeatlab.analysis.frames import Records
from repeatlab.analysis.hypotheses import Verdict, judge, verdict_table
from repeatlab.analysis.planned_comparisons import Plan
from repeatlab.analysis.statistics import ALPHA
from repeatlab.analysis.viewpoints import Views, load_views
from repeatlab.core.environment import commit
from repeatlab.core.files import write_json
from repeatlab.core.schema import ConfigError
from repeatlab.figures import read_manifest
from repeatlab.report.paper.tables import every_table
from repeatlab.store.records import Run

SECTIONS = ("convergence", "efficiency", "mechanism", "adaptability", "sensitivity", "robustness")


@dataclass(frozen=True)
class Gathered:
    """What `gather` has written.

    Attributes:
        directory: Where.
        tables: Name to table.
        verdicts: One for each hypothesis.
        banner: Where the numbers come from, as banner.json holds it.
        missing_figures: Names of the figures that the paper shows as missing.
    """

    directory: Path
    tables: dict[str, pd.DataFrame]
    verdicts: list[Verdict]
    banner: dict[str, Any]
    missing_figures: list[str]

    @property
    def verdict_table(self) -> pd.DataFrame:
        return verdict_table(self.verdicts)


def gather(
    runs: str | Path,
    figures: str | Path,
    directory: str | Path,
    *,
    profile: str,
    views: Sequence[Mapping[str, Any]],
    shown: Mapping[str, str],
    k: float = 2.0,
    plan: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Gathered:
    """Write tables, verdicts and figures of the views' studies into `directory`.

    Args:
        runs: The run store.
        figures: The directory of the figures and their manifest.
        directory: Where everything goes; made if need be.
        profile: What scale the runs are of, for the banner.
        views: One for each study: `study` (its name in the store), `name` (of the task), `metric`
            and `target` (a number, or None).
        k: A backward's time in forwards, for the cost; a view may have a `k` of its own.
        shown: Figure name to caption. A name's first word is its section, one of `SECTIONS`.
        plan: The fields of `planned_comparisons.Plan` that differ from its defaults.
        seed: Of resampling.

    Raises:
        ConfigError: a figure belongs to no section, or the plan has a field that there is not.
    """
    chosen = _plan(plan or {})
    for name in shown:
        if _section(name) not in SECTIONS:
            said = f"figure {name!r}: its first word must be one of {', '.join(SECTIONS)}"
            raise ConfigError(said)
    viewed = load_views(runs, views)
    endpoints = viewed.endpoints(k)
    found = planned_comparisons.gather(viewed.records, endpoints, chosen)
    verdicts = judge(found, chosen, seed=seed)
    tables = every_table(viewed, endpoints, found, chosen, runs=Path(runs), seed=seed)

    directory = Path(directory)
    (directory / "tables").mkdir(parents=True, exist_ok=True)
    (directory / "figures").mkdir(exist_ok=True)
    for name, table in tables.items():
        table.to_csv(directory / "tables" / f"{name}.csv", index=False, lineterminator="\n")
        latex = table.to_latex(index=False, escape=True, float_format="{:.4g}".format)
        (directory / "tables" / f"{name}.tex").write_text(latex, encoding="utf-8")
    entries = [_figure(name, shown[name], Path(figures), directory) for name in shown]
    rules = asdict(chosen) | {"alpha": ALPHA, "level": round(100 * (1 - ALPHA))}
    written = {
        "verdicts": [_plain(asdict(verdict)) for verdict in verdicts],
        "banner": _banner(profile, viewed, tables["studies"]),
        "rules": _plain(rules),
        "figures": entries,
    }
    for name, content in written.items():
        write_json(directory / f"{name}.json", content)
    missing = [entry["name"] for entry in entries if entry["file"] is None]
    return Gathered(directory, tables, verdicts, written["banner"], missing)


def _plan(given: Mapping[str, Any]) -> Plan:
    known = {field.name for field in fields(Plan)}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"plan: unknown {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


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


def _banner(profile: str, viewed: Views, studies: pd.DataFrame) -> dict[str, Any]:
    """Return where the paper's numbers come from."""
    environments = _environments(viewed.records)
    versions = {e["versions"]["torch"] for e in environments if "versions" in e}
    return {
        "profile": profile,
        "data": sorted({row["data"] for row in studies.to_dict("records") if row["data"]}),
        "updates": _range(studies["updates"]),
        "seeds": _range(studies["seeds"]),
        "tasks": len(studies),
        **{count: int(studies[count].sum()) for count in ("planned", "complete", "diverged")},
        "missing": int(studies["missing"].sum()),
        "absent": viewed.absent,
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


def _range(values: pd.Series) -> str:
    """Return "5", or "3 to 8" where they differ, "none" without any."""
    known = sorted({int(v) for v in values.dropna() if v})
    if not known:
        return "none"
    return f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


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
