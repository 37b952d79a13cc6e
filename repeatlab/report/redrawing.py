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
from collections.abc import Iterator
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
            "parameters": digest_of_content(job.parameters),
            "runs": digest_of_content(_records(job, Store(self.runs))),
            "figures": digest_of_content([(f.name, f.is_file() and digest_of(f)) for f in files]),
            "code": _code(),
        }


def _records(job: Job, store: Store) -> list[Any]:
    """Return what the store has of all that the parameters name, and every measurement.

    A name stands also for the studies whose names begin with it and "-", as a plan's do.
    """
    named = set(re.findall('"(.*?)"', json.dumps(job.parameters, default=str)))
    found = [plan for name, plan in store.plans().items() if name in named]
    found += [digest_of(file) for file in sorted(store.root.glob("measurements/*.json"))]
    for name in store.studies():
        if name in named or any(name.startswith(f"{start}-") for start in named):
            study = store.read_study(name) | {"commit": None}  # `_code` says more of it
            runs = [store.run(*planned["run"]) for planned in study["runs"]]
            # A summary has the digests of all that its run has left.
            ends = [digest_of(r.path / "summary.json") if r.done else r.status for r in runs]
            found.append([study, ends])
    return found


@cache
def _code() -> str:
    """Return the digest of the package, and of which versions of others it finds."""
    versions = sorted(f"{found.name} {found.version}" for found in distributions())
    return digest_of_content([code_digest(), sys.version, versions])
