"""Notebooks in batch: parameter files -> papermill -> executed notebooks and figures.

All studies of a profile are trained first, by the same processes, one per core: no core waits for
the last run of a study, or for a notebook. Then notebooks that are `alone` train by themselves,
with nothing beside them, and all others only draw, side by side; those of a later group of names
(20 on, 30 on) after those of an earlier one, whose runs they read.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Timer
from time import perf_counter
from typing import Any

from repeatlab.core.schema import counted, parse
from repeatlab.report.redrawing import Drawn
from repeatlab.studies.parameter_files import Job, plans_of, read_profile

# How long Ctrl-C waits for a kernel, whose runs leave their checkpoints.
LEAVE_SECONDS = 10


class NotebookError(RuntimeError):
    """A notebook could not be executed to its end."""


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
    with tempfile.TemporaryDirectory(prefix="rl", dir=_short()) as sockets:
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


def _short() -> str | None:
    """Return a directory for sockets, whose paths have 107 bytes at most; None for the usual."""
    return "/tmp" if len(os.fsencode(tempfile.gettempdir())) > 80 else None


def execute_profile(
    profile: str,
    *,
    root: Path,
    runs: Path,
    figures: Path,
    only: Collection[str] = (),
    force: bool = False,
    echo: Callable[[str], None] = print,
) -> list[str]:
    """Train a profile's studies, execute its notebooks, and return the figures that they wrote.

    All parameter files are checked before anything is trained, a plan's stages last. A profile
    whose exports lie in results/<profile> takes its plan's runs from them, and trains none of it.
    Where notebooks are named in `only`, just their studies are trained and just they are executed.
    What nothing has changed of since it was last done is left as it is, unless by `force`.

    Raises:
        ConfigError: a parameter file is not valid.
        StudyError: runs have failed; all others are in the store.
        NotebookError: a notebook could not be executed.
        KeyboardInterrupt: Ctrl-C; no kernel is left.
    """
    from repeatlab.figures import read_manifest
    from repeatlab.store.exchange import import_runs
    from repeatlab.store.records import Store
    from repeatlab.studies.plan import read_plan, run_plan
    from repeatlab.studies.study import Study, run_studies

    published = [file.parent for file in (root / "results" / profile).glob("*/plans.json")]
    for export in sorted(published):
        count = import_runs(Store(runs), export)
        echo(f"{export.relative_to(root)}: {counted(count, 'run')} imported")
    files = [] if only or published else plans_of(profile, root)
    plans = [(path, read_plan(path)) for path in files]
    jobs = read_profile(profile, root, only=only)
    output = runs / "notebooks" / profile
    drawn = Drawn(output, runs, figures)
    studies = [
        parse(Study, study, source=f"{job.source}: parameters.{name}")
        for job in jobs
        if not job.alone and job.studies and (force or drawn.changes(job))
        for name, study in job.studies.items()
    ]
    if studies:
        start = perf_counter()
        report = run_studies(studies, runs)
        echo(f"{counted(len(studies), 'study')}: {report}, {perf_counter() - start:.0f} s")
    kernels = Kernels()

    def run(job: Job, name: str, do: Callable[[], Any]) -> None:
        changed = drawn.changes(job)
        if not changed and not force:
            echo(f"{name}: nothing has changed")
            return
        what = ", ".join(changed) or "nothing, but it is forced"
        echo(f"{name}: {what if changed == ['new'] else f'changed: {what}'}")
        start = perf_counter()
        with drawn.noting(job):
            done = do()
        echo(f"{name}: {done or 'drawn'}, {perf_counter() - start:.0f} s")

    for path, plan in plans:
        job = Job(path, path, {"plan": plan.name, "digest": plan.digest}, alone=True)
        run(job, f"plan {plan.name}", partial(run_plan, plan, runs))

    def draw(job: Job) -> None:
        places = {"output": output, "runs": runs, "figures": figures}
        run(job, job.notebook.stem, partial(execute, job, **places, kernels=kernels))

    for (together, _), group in groupby(jobs, key=lambda job: job.stage):
        _side_by_side(draw, group, kernels, most=os.cpu_count() if together else 1)
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
