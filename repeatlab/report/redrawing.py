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
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from repeatlab.core.environment import code_digest
from repeatlab.core.files import StoreError, digest_of, read_json, write_json
from repeatlab.figures import read_manifest
from repeatlab.store.measurements import measured_k
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
        """Return, in words, what is not as it was when the job was last done; all if it was not."""
        try:
            before = read_json(self._record(job), sealed=True)
        except StoreError:
            before = {}
        return [what for what, digest in self._state(job).items() if digest != before.get(what)]

    @contextmanager
    def noting(self, job: Job) -> Iterator[None]:
        """Take what happens inside for the job, and note from what it was done once it has ended.

        What changes meanwhile counts as changed since; not the runs of a job that trains by itself.
        """
        before, made = self._state(job), ["figures", "runs"] if job.alone else ["figures"]
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
        return {
            "source": digest_of(job.notebook),
            "parameters": _digest(job.parameters),
            "runs": _digest(_records(job, Store(self.runs))),
            "figures": _digest([(f.name, f.is_file() and digest_of(f)) for f in files]),
            "code": _code(),
        }


def _records(job: Job, store: Store) -> list[Any]:
    """Return what the store has of the plans and studies that the parameters name.

    A study's name stands also for those that are made from it, whose names go on with "-".
    """
    text, plans = json.dumps(job.parameters, default=str), store.plans()
    named = set(re.findall('"(.*?)"', text))
    planned = {f"{p}-{task}-" for p in named & plans.keys() for task in plans[p]["plan"]["tasks"]}
    found = [plans[name] for name in sorted(named & plans.keys())]
    for name in store.studies():
        of_plan = any(name.startswith(start) for start in planned)
        derived = any(name.startswith(f"{study}-") for study in named)
        if name in named or of_plan or derived:
            study = store.read_study(name) | {"commit": None}  # `_code` says more of it
            if name in named or of_plan or not study.get("plan"):
                found.append([study, *_ends(study, store)])
    return found


def _ends(study: Mapping[str, Any], store: Store) -> tuple[list[Any], list[float | None]]:
    """Return how a study's runs ended, and the k of each of its tasks."""
    runs = {store.run(*planned["run"]): planned["task"] for planned in study["runs"]}
    # A summary has the digests of all that its run has left.
    ends = [digest_of(run.path / "summary.json") if run.done else run.status for run in runs]
    done = {task: run for run, task in reversed(runs.items()) if run.done}
    return ends, [measured_k(store.root, run) for run in done.values()]


@cache
def _code() -> str:
    """Return the digest of the package, and of which versions of others it finds."""
    versions = sorted(f"{found.name} {found.version}" for found in distributions())
    return _digest([code_digest(), sys.version, versions])


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
