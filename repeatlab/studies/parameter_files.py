"""Parameter files: params/<profile>/*.yaml, each a notebook with its parameters, or a plan.

    # params/quick/supervised.yaml
    notebook: 10_supervised
    parameters: {...}          # every name must stand in the notebook's `parameters` cell
    alone: false               # true where it times what it trains

Methods that many studies share are written once; see `repeatlab.studies.method_files`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from repeatlab.core.schema import ConfigError, Model, check_known, did_you_mean, parse, read_yaml
from repeatlab.studies.method_files import with_included
from repeatlab.studies.plan import is_plan

# Where notebooks find store and figures; the batch decides that, not a parameter file.
PLACES = ("runs", "figures")


class BatchEntry(Model):
    """What a parameter file says."""

    notebook: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    alone: bool = False
    """Whether nothing may run beside the notebook, since it times what it trains."""


@dataclass(frozen=True)
class Job:
    """One notebook with its parameters."""

    source: Path
    notebook: Path
    parameters: dict[str, Any]
    alone: bool = False

    @property
    def stage(self) -> tuple[bool, str]:
        """Stages follow each other; notebooks of one need nothing of each other.

        What times its own runs comes first: all axes of cost are drawn by the k that it measures.
        """
        return not self.alone, "" if self.alone else self.notebook.name[0]

    @property
    def studies(self) -> dict[str, dict[str, Any]]:
        """The parameters that are studies: neither the name of one in the store nor a plan."""
        return {
            name: value
            for name, value in self.parameters.items()
            if isinstance(value, dict) and "methods" in value and "judged" not in value
        }


def read_profile(profile: str, root: Path, *, only: Collection[str] = ()) -> list[Job]:
    """Return the jobs of params/<profile>, checked, in the order in which they are done.

    Args:
        profile: A folder in params/.
        root: Where params/ and notebooks/ are.
        only: Names of notebooks; if there are any, the jobs of the others are left out.

    Raises:
        ConfigError: no such profile, a file that is not valid, a notebook that does not exist or a
            parameter that it does not have; a name in `only` that is no notebook of the profile.
    """
    if not (root / "params").is_dir():
        raise ConfigError(
            f"{root / 'params'} must be there: notebooks/ and params/ come with a clone of the "
            "repository, not with the installed package: call this in the folder of one "
            "(git clone ADDRESS; cd repeatlab)"
        )
    directory = root / "params" / profile
    files = sorted(set(directory.glob("*.yaml")) - set(plans_of(profile, root)))
    if not files:
        known = [d.name for d in sorted((root / "params").glob("*")) if any(d.glob("*.yaml"))]
        raise ConfigError(
            f"no profile {profile!r} in {root / 'params'}; {did_you_mean(profile, known)}"
        )
    jobs = [read_job(path, root) for path in files]
    notebooks = {job.notebook.stem for job in jobs}
    for name in only:
        if name not in notebooks:
            hint = did_you_mean(name, sorted(notebooks))
            raise ConfigError(f"no notebook {name!r} in the profile {profile!r}; {hint}")
    jobs = [job for job in jobs if not only or job.notebook.stem in only]
    return sorted(jobs, key=lambda job: (job.stage, job.notebook.name, job.source.name))


def plans_of(profile: str, root: Path) -> list[Path]:
    """Return the files of a profile that are plans; see `repeatlab.studies.plan`."""
    files = sorted((root / "params" / profile).glob("*.yaml"))
    return [path for path in files if is_plan(path)]


def read_job(path: Path, root: Path) -> Job:
    """Return the job that one parameter file describes, checked against its notebook.

    Where there are no notebooks, as beside an installed package, it is not: training needs none.

    Raises:
        ConfigError: the file is not valid; see `read_profile`.
    """
    content = read_yaml(path)
    if "tasks" in content:
        raise ConfigError(f"{path}: tasks: a study must stand under `parameters: study:`")
    entry = parse(BatchEntry, content, source=str(path))
    folder, parameters = root / "notebooks", _with_methods(entry.parameters, path)
    if not folder.is_dir():
        return Job(path, folder / f"{entry.notebook}.ipynb", parameters, alone=entry.alone)
    notebooks = {p.stem: p for p in folder.glob("*.ipynb")}
    check_known(f"{path}: notebook", "notebook", entry.notebook, notebooks)
    notebook = notebooks[entry.notebook]
    known = parameter_names(notebook)
    for name in entry.parameters:
        if name in PLACES:
            raise ConfigError(f"{path}: parameters.{name}: given on the command line (--{name})")
        if name not in known:
            raise ConfigError(
                f"{path}: parameters.{name}: {notebook.name} has no such parameter; "
                f"{did_you_mean(name, known)}"
            )
    return Job(path, notebook, parameters, alone=entry.alone)


def _with_methods(parameters: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the parameters with the methods that their study includes written out."""
    study = parameters.get("study")
    if not isinstance(study, dict) or not isinstance(study.get("methods"), dict):
        return parameters
    methods = with_included(study["methods"], path, "parameters.study.methods")
    return parameters | {"study": study | {"methods": methods}}


def parameter_names(notebook: Path) -> set[str]:
    """Return the names assigned in the cell that is tagged `parameters`.

    Read from the syntax tree: papermill's own inspector misses lines whose comment holds "=".

    Raises:
        ConfigError: it is no notebook, has no such cell, or one that is not Python.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        sources = [
            "".join(cell["source"])
            for cell in cells
            if "parameters" in cell["metadata"].get("tags", [])
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{notebook}: must be a notebook") from None
    if not sources:
        raise ConfigError(f"{notebook}: no cell is tagged 'parameters'")
    try:
        tree = _syntax_tree(sources[0])
    except SyntaxError as error:
        where = f"{notebook}: the cell tagged 'parameters' must be Python: line {error.lineno}"
        raise ConfigError(f"{where}: {error.msg}") from None
    assigned = [node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return {
        part.id
        for node in assigned
        for target in getattr(node, "targets", None) or [node.target]
        for part in ast.walk(target)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }


def _syntax_tree(source: str) -> ast.Module:
    """Return the tree of a cell, which may hold magics such as `%matplotlib inline`."""
    from IPython.core.inputtransformer2 import TransformerManager

    first, _, rest = source.lstrip().partition("\n")  # `%%time` is the whole cell's
    return ast.parse(TransformerManager().transform_cell(rest if first[:2] == "%%" else source))
