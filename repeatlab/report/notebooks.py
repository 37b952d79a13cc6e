"""Notebooks in batch: params/<profile>/*.yaml -> papermill -> executed notebooks and figures.

    # params/quick/supervised.yaml
    notebook: 10_supervised
    parameters: {...}          # every name must stand in the notebook's `parameters` cell
    alone: false               # true where it times what it trains

Methods that many studies share are written once; see `repeatlab.studies.method_files`.

All studies of a profile are trained first, by the same processes, one per core: no core waits for
the last run of a study, or for a notebook. Then notebooks only draw, and run side by side; those of
a later group of names (20 on, 30 on) after those of an earlier one, whose runs they read. One that
is `alone` trains by itself, in its turn, with nothing beside it.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Timer
from time import perf_counter
from typing import Any

from pydantic import Field

from repeatlab.core.schema import ConfigError, Model, did_you_mean, parse, read_yaml
from repeatlab.studies.method_files import with_included

# Where notebooks find store and figures; the batch decides that, not a parameter file.
PLACES = ("runs", "figures")
# The folder of params/ that holds searches, which have no notebook.
SEARCHES = "search"
# How long Ctrl-C waits for a kernel, whose runs leave their checkpoints.
LEAVE_SECONDS = 10


class NotebookError(RuntimeError):
    """A notebook could not be executed to its end."""


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
    def stage(self) -> tuple[str, bool]:
        """Notebooks that follow each other with equal stage need nothing of each other."""
        return self.notebook.name[0], self.alone

    @property
    def studies(self) -> dict[str, dict[str, Any]]:
        """The parameters that are studies: neither the name of one in the store nor a plan."""
        return {
            name: value
            for name, value in self.parameters.items()
            if isinstance(value, dict) and "methods" in value and "judged" not in value
        }


def read_profile(profile: str, root: Path, *, only: Collection[str] = ()) -> list[Job]:
    """Return the jobs of params/<profile>, checked, in the order of their notebooks.

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
        folders = (d for d in sorted((root / "params").glob("*")) if any(d.glob("*.yaml")))
        known = [folder.name for folder in folders if folder.name != SEARCHES]
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
    return sorted(jobs, key=lambda job: (job.notebook.name, job.source.name))


def plans_of(profile: str, root: Path) -> list[Path]:
    """Return the files of a profile that are plans; see `repeatlab.studies.plan`."""
    files = sorted((root / "params" / profile).glob("*.yaml"))
    return [path for path in files if "judged" in read_yaml(path)]


def read_job(path: Path, root: Path) -> Job:
    """Return the job that one parameter file describes, checked against its notebook.

    Where there are no notebooks, as beside an installed package, it is not: training needs none.

    Raises:
        ConfigError: the file is not valid; see `read_profile`.
    """
    content = read_yaml(path)
    if "space" in content:
        raise ConfigError(f"{path}: is a search, which `repeatlab search` makes")
    entry = parse(BatchEntry, content, source=str(path))
    folder, parameters = root / "notebooks", _with_methods(entry.parameters, path)
    if not folder.is_dir():
        return Job(path, folder / f"{entry.notebook}.ipynb", parameters, alone=entry.alone)
    notebooks = {p.stem: p for p in folder.glob("*.ipynb")}
    if entry.notebook not in notebooks:
        hint = did_you_mean(entry.notebook, notebooks)
        raise ConfigError(f"{path}: notebook: unknown notebook {entry.notebook!r}; {hint}")
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
    try:
        return ast.parse(source)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        first, _, rest = source.lstrip().partition("\n")  # `%%time` is the whole cell's
        return ast.parse(TransformerManager().transform_cell(rest if first[:2] == "%%" else source))


class Kernels:
    """The kernels of all notebooks that are executed.

    Each is in a session of its own, where a terminal's Ctrl-C does not reach it.
    """

    def __init__(self) -> None:
        self._managers: list[Any] = []
        self._ending = False

    def options(self) -> dict[str, Any]:
        """Return the options of an execution whose kernel is to be one of these."""
        from jupyter_client import AsyncKernelManager

        managers = self._managers

        class Manager(AsyncKernelManager):
            async def start_kernel(self, **options: Any) -> None:
                await super().start_kernel(**options)
                managers.append(self)

        return {
            "kernel_manager_class": Manager,
            "on_cell_start": self._check,
            # A kernel is interrupted before it is ended, and would report that as an error.
            "extra_arguments": ["--log-level=CRITICAL"],
        }

    def _check(self, **_: Any) -> None:
        # A kernel ignores what interrupts it between two cells.
        if self._ending:
            raise NotebookError("interrupted")

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Interrupt all kernels; kill those that are left after a while, or at the next Ctrl-C."""
        self._ending = True
        watch = Timer(LEAVE_SECONDS, self._signal, [signal.SIGKILL])
        try:
            self._signal(signal.SIGINT)
            watch.start()
            yield
        except KeyboardInterrupt:
            self._signal(signal.SIGKILL)
            raise
        finally:
            watch.cancel()

    def _signal(self, number: int) -> None:
        for manager in self._managers:
            if manager.has_kernel:
                with suppress(ProcessLookupError):
                    # With what it has started: it leads its session, and so its process group.
                    os.killpg(manager.provisioner.pid, number)


def execute(
    job: Job, *, output: Path, runs: Path, figures: Path, kernels: Kernels | None = None
) -> None:
    """Execute one notebook; its executed copy goes to `output`.

    The notebook raises where a run fails, so that an execution without an exception is a success.

    Args:
        job: The notebook with its parameters.
        output: A directory.
        runs: The run store that the notebook is given.
        figures: Where it is told to write figures.
        kernels: Those that its kernel is to be one of.

    Raises:
        NotebookError: a cell raised, or the kernel died, timed out or was interrupted.
    """
    import papermill
    from papermill.exceptions import PapermillException
    from traitlets.config import Config

    # Its own inspector warns of every line with two equals signs; `parameter_names` has read them.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    output.mkdir(parents=True, exist_ok=True)
    copy = output.resolve() / f"{job.source.stem}.ipynb"
    parameters = job.parameters | {"runs": str(runs.resolve()), "figures": str(figures.resolve())}
    # Kernels over TCP can lose the race for a port; a socket in a directory of its own cannot.
    with tempfile.TemporaryDirectory(prefix="rl") as sockets:
        try:
            executed = papermill.execute_notebook(
                job.notebook,
                copy,
                parameters=parameters,
                # Not papermill's `cwd`, which moves this whole process, and so other threads.
                resources={"metadata": {"path": str(job.notebook.parent)}},
                kernel_name="python3",
                language="python",
                progress_bar=False,
                coalesce_streams=True,
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/k"}}),
                **(kernels or Kernels()).options(),
            )
        except (PapermillException, RuntimeError, TimeoutError) as error:
            # What a failed cell raised, without papermill's frame of dashes.
            name = getattr(error, "ename", type(error).__name__)
            reason = f"{name}: {getattr(error, 'evalue', error)}"
            raise NotebookError(f"{job.source}: {reason} (executed copy: {copy})") from error
    # Papermill takes `sys.exit(0)` for a success.
    if any(cell.metadata.get("papermill", {}).get("exception") for cell in executed.cells):
        reason = "sys.exit must not end a notebook before its last cell"
        raise NotebookError(f"{job.source}: {reason} (executed copy: {copy})")


def execute_profile(
    profile: str,
    *,
    root: Path,
    runs: Path,
    figures: Path,
    only: Collection[str] = (),
    echo: Callable[[str], None] = print,
) -> list[str]:
    """Train a profile's studies, execute its notebooks, and return the figures that they wrote.

    All parameter files are checked before anything is trained, a plan's stages last. Where
    notebooks are named in `only`, just their studies are trained and just they are executed.

    Raises:
        ConfigError: a parameter file is not valid.
        StudyError: runs have failed; all others are in the store.
        NotebookError: a notebook could not be executed.
        KeyboardInterrupt: Ctrl-C; no kernel is left.
    """
    from repeatlab.figures import read_manifest
    from repeatlab.studies.plan import read_plan, run_plan
    from repeatlab.studies.study import run_all

    plans = [] if only else [read_plan(path) for path in plans_of(profile, root)]
    jobs = read_profile(profile, root, only=only)
    studies = {
        f"{job.source}: parameters.{name}": study
        for job in jobs
        if not job.alone
        for name, study in job.studies.items()
    }
    if studies:
        start = perf_counter()
        echo(f"{len(studies)} studies: {run_all(studies, runs)}, {perf_counter() - start:.0f} s")
    for plan in plans:
        start = perf_counter()
        echo(f"plan {plan.name}: {run_plan(plan, runs)}, {perf_counter() - start:.0f} s")
    kernels = Kernels()
    places = {"output": runs / "notebooks" / profile, "runs": runs, "figures": figures}

    def run(job: Job) -> None:
        echo(f"{job.notebook.stem} ({job.source.relative_to(root)})")
        start = perf_counter()
        execute(job, **places, kernels=kernels)
        echo(f"{job.notebook.stem}: {perf_counter() - start:.0f} s")

    for (_, alone), group in groupby(jobs, key=lambda job: job.stage):
        _side_by_side(run, group, kernels, most=1 if alone else os.cpu_count())
    notebooks = {job.notebook.stem for job in jobs}
    manifest = read_manifest(figures)
    return [name for name, entry in manifest.items() if entry["notebook"] in notebooks]


def _side_by_side(
    run: Callable[[Job], None], jobs: Iterable[Job], kernels: Kernels, *, most: int | None
) -> None:
    """Call `run` on all jobs, `most` at a time; those left are left out after one that raises.

    So they are after Ctrl-C, which ends those under way, too.
    """
    futures: list[Future[None]] = []
    with ThreadPoolExecutor(most) as pool:
        # It is futures that are waited for: a join that Ctrl-C cuts short, CPython 3.11 takes for
        # the end of the thread.
        try:
            for job in jobs:
                futures.append(pool.submit(run, job))
            wait(futures, return_when=FIRST_EXCEPTION)
            wait(_begun(futures, pool))
        except KeyboardInterrupt:
            begun = _begun(futures, pool)
            with kernels.ending():
                wait(begun)
            raise
    for future in _begun(futures, pool):
        future.result()


def _begun(futures: Iterable[Future[None]], pool: ThreadPoolExecutor) -> list[Future[None]]:
    """Cancel those that have not begun, and return the others."""
    pool.shutdown(wait=False, cancel_futures=True)
    return [future for future in futures if not future.cancelled()]
