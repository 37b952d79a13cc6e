"""What a notebook was last drawn from, so that nothing is done twice.

runs/notebooks/<profile>/<parameter file>.json, beside the executed copy, holds digests of it,
written once the notebook has come to its end; likewise of a plan. It lies in the store, not in the
figures' manifest: that one is committed, and a clone of it has none of the runs yet. Where in
doubt, a notebook is drawn.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from repeatlab.core.environment import code_digest
from repeatlab.core.files import StoreError, digest_of, digest_of_content, read_json, write_json
from repeatlab.figures import read_manifest
from repeatlab.store.records import Store
from repeatlab.studies.parameter_files import Job


@dataclass(frozen=True)
class Drawn:
    """What the notebooks of a profile were drawn from.

    Attributes:
        output: Where executed copies go, and the digests.
        runs: The run store.
        figures: Where the figures go.
    """

    output: Path
    runs: Path
    figures: Path

    def changes(self, job: Job) -> list[str]:
        """Return, in words, what is not as it was when the job was last done, or "new"."""
        try:
            before = read_json(self._record(job), sealed=True)
        except StoreError:
            return ["new"]
        return [what for what, digest in self._state(job).items() if digest != before.get(what)]

    @contextmanager
    def noting(self, job: Job) -> Iterator[None]:
        """Take what happens inside for the job, and note from what it was done once it has ended.

        What changes meanwhile counts as changed since; not the runs of a job that trains by itself.
        """
        before, made = self._state(job), ["figures", "runs of its own", *["runs"] * job.alone]
        self.output.mkdir(parents=True, exist_ok=True)
        self._record(job).unlink(missing_ok=True)
        yield
        after = self._state(job)
        write_json(self._record(job), before | {what: after[what] for what in made}, sealed=True)

    def _record(self, job: Job) -> Path:
        return self.output / f"{job.source.stem}.json"

    def _state(self, job: Job) -> dict[str, str]:
        entries, stem = read_manifest(self.figures).values(), job.notebook.stem
        names = [n for e in entries if e["notebook"] == stem for n in e.get("files", [])]
        if shown := job.parameters.get("shown"):
            # Who shows other notebooks' figures is the paper, whose results lie beside them.
            names += [f"{name}.pdf" for name in shown] + ["results.md"]
        files = [self.figures / name for name in names]
        files.append(self.output / f"{job.source.stem}.ipynb")
        given, own = _records(job, Store(self.runs))
        return {
            "source": digest_of(job.notebook),
            "parameters": digest_of_content(job.parameters),
            "runs": digest_of_content(given),
            "runs of its own": digest_of_content(own),
            "figures": digest_of_content([(f.name, f.is_file() and digest_of(f)) for f in files]),
            "code": _code(),
        }


def _records(job: Job, store: Store) -> tuple[list[Any], list[Any]]:
    """Return what the store has of all that the parameters name, with every measurement.

    A plan's name stands for its studies. Apart from these what the notebook makes by itself: the
    studies whose names begin with one of its own and "-", and the plan that it declares.
    """
    named = set(re.findall('"(.*?)"', json.dumps(job.parameters, default=str)))
    plan = job.parameters.get("plan")
    own_plan = plan["name"] if isinstance(plan, Mapping) else None
    beginnings = tuple(f"{study['name']}-" for study in job.studies.values())
    plans = {name: plan for name, plan in store.plans().items() if name in named}
    found = [plan for name, plan in plans.items() if name != own_plan]
    found += [digest_of(file) for file in sorted(store.root.glob("measurements/*.json"))]
    own = [plan for name, plan in plans.items() if name == own_plan]
    of_plan = {plan["digest"]: name for name, plan in plans.items()}
    for name in store.studies():
        study = store.read_study(name) | {"commit": None}  # `_code` says more of it
        its_plan = of_plan.get(study.get("plan"))
        itself = its_plan == own_plan if its_plan else name.startswith(beginnings)
        if name in named or its_plan or itself:
            runs = [store.run(*planned["run"]) for planned in study["runs"]]
            # A summary has the digests of all that its run has left.
            ends = [digest_of(r.path / "summary.json") if r.done else r.status for r in runs]
            (own if itself and name not in named else found).append([study, ends])
    return found, own


@cache
def _code() -> str:
    """Return the digest of the package, and of which versions of others it finds."""
    versions = sorted(f"{found.name} {found.version}" for found in distributions())
    return digest_of_content([code_digest(), sys.version, versions])
