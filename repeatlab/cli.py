"""`repeatlab`: the command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Any

import click

from repeatlab.core.files import StoreError
from repeatlab.core.schema import ConfigError, counted, parse
from repeatlab.core.signals import Interrupted
from repeatlab.store.records import Store
from repeatlab.studies.settings import with_settings

if TYPE_CHECKING:
    from repeatlab.studies.study import Study

# Where params/ and notebooks/ are: the clone that the package is in, or the one it is called in.
PLACES = (Path(__file__).resolve().parents[1], Path.cwd())
ROOT = next((place for place in PLACES if (place / "params").is_dir()), PLACES[1])
PATH = click.Path(path_type=Path)
Several = tuple[str, ...]  # of an argument or option that may be repeated
FOLDER = click.Path(path_type=Path, file_okay=False)
RUNS = click.option("--runs", type=FOLDER, default="runs", show_default=True, help="Run store.")
FIGURES = click.option(
    "--figures", type=PATH, default="figures", show_default=True, help="Where figures are, or go."
)
FORMS = click.Choice(["parquet", "csv", "tensorboard", "wandb", "trackio"])
SET = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="As if it stood in the file."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="repeatlab")
def cli() -> None:
    """Loss-driven dynamic batch repetition, compared fairly."""


@cli.command()
@click.argument("notebooks", nargs=-1)
@click.option("--profile", default="quick", show_default=True, help="A directory in params/.")
@click.option("--force", is_flag=True, help="Execute also notebooks of which nothing has changed.")
@RUNS
@FIGURES
def figures(notebooks: Several, profile: str, force: bool, runs: Path, figures: Path) -> None:
    """Train a profile's studies and execute its notebooks: all of them, or those named.

    Runs that the store has are not trained again, and a notebook is executed again only where its
    source, its parameters, its runs, its figures or the code changed.
    """
    from repeatlab.report.notebooks import NotebookError, execute_profile

    places = {"root": ROOT, "runs": runs, "figures": figures}
    try:
        names = execute_profile(profile, **places, only=notebooks, force=force, echo=click.echo)
    except NotebookError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{counted(len(names), 'figure')} in {figures}/ (PDF and PNG, manifest.json):")
    for name in names:
        click.echo(f"  {figures / name}.pdf")


@cli.command()
@click.option("--profile", default="quick", show_default=True, help="A directory in params/.")
@RUNS
@FIGURES
@click.option(
    "--out", type=PATH, default="paper", show_default=True, help="Where paper and its data go."
)
@click.option("--pages", is_flag=True, help="Write each page as PNG, too.")
def paper(profile: str, runs: Path, figures: Path, out: Path, pages: bool) -> None:
    """Build the paper as a PDF from what store and figures hold; what is missing shows as such."""
    from repeatlab.report.paper import gather, typeset
    from repeatlab.studies.parameter_files import read_profile

    jobs = [job for job in read_profile(profile, ROOT) if job.source.stem == "paper"]
    if not jobs:
        raise ConfigError(f"the profile '{profile}' has no paper.yaml: it makes no paper")
    (job,) = jobs
    found = gather(runs, figures, out, **job.parameters)
    click.echo(found.verdict_lines)
    if found.missing_figures:
        click.echo(f"missing figures: {', '.join(found.missing_figures)}")
    click.echo(typeset(out, pages=pages))


@cli.command()
@click.argument("parameters", nargs=-1, required=True, type=PATH)
@RUNS
@click.option("--workers", type=click.IntRange(min=0), help="Processes; 0 trains in this one.")
@click.option("--scheduler", help="Train on the workers of the Dask scheduler at this address.")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), help="Seconds a run.")
@click.option("--runs-per-gpu", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--lockstep/--no-lockstep",
    default=True,
    help="Whether small networks train as groups where that is faster; by default they do.",
)
@click.option("--amend", metavar="REASON", help="Why a registered plan has changed.")
@click.option("--task", "only", multiple=True, help="Of a plan only this task; may be repeated.")
@SET
def run(
    parameters: tuple[Path, ...],
    runs: Path,
    amend: str | None,
    only: Several,
    settings: Several,
    **places: Any,
) -> None:
    """Train the studies of parameter files, without their notebooks; a plan with all its stages."""
    from repeatlab.studies.cluster import Places
    from repeatlab.studies.plan import is_plan, read_plan, run_plan
    from repeatlab.studies.study import run_studies

    plans, others = [], []
    for path in parameters:
        (plans if is_plan(path) else others).append(path)
    for plan in [read_plan(path, settings) for path in plans]:
        for line in plan.cautions():
            click.echo(f"Note: {line}", err=True)
        click.echo(str(run_plan(plan, runs, places=Places(**places), amend=amend, only=only)))
    if others:
        click.echo(str(run_studies(_read_studies(others, settings), runs, places=Places(**places))))


@cli.command()
@click.argument("name")
@RUNS
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="The effect to find, a share of updates saved; by default the plan's margin.",
)
def power(name: str, runs: Path, share: float | None) -> None:
    """Say from the runs of plan NAME, a pilot, how many seeds it needs, and their hours."""
    from repeatlab.analysis.plans import load_plan, pilots
    from repeatlab.analysis.power import power_table

    plan = load_plan(runs, name)
    declared = plan.declared
    options = {"margin": declared.margin, "share": share, "family": declared.family}
    table = power_table(pilots(plan), once=plan.tuning_hours, **options)
    click.echo(table.to_string(index=False))


@cli.command()
@click.argument("studies", nargs=-1)
@RUNS
@click.option("--plan", "plans", multiple=True, help="Every study of this plan.")
@click.option("--visits", multiple=True, help="Every update of this study alone; else of all.")
@click.option("--to", type=PATH, required=True, help="A directory.")
@click.option("--as", "form", type=FORMS, default="parquet", show_default=True)
def export(
    studies: Several, plans: Several, visits: Several, runs: Path, to: Path, form: str
) -> None:
    """Write the runs of studies, by default all, as a few Parquet files that `import` reads.

    Or as CSV files, or as runs of TensorBoard, W&B (offline) or Trackio.
    """
    from repeatlab.store.exchange import export
    from repeatlab.studies.viewers import export_as

    store = Store(runs)
    chosen = list(studies)
    for plan in plans:
        of_plan = [name for name in store.studies() if name.startswith(f"{plan}-")]
        if not of_plan:
            raise StoreError(f"{runs} holds no study of a plan {plan!r}")
        chosen += of_plan
    write = export if form == "parquet" else partial(export_as, form)
    count = write(store, _chosen(store, chosen), to, visits=visits or None)
    click.echo(f"{counted(count, 'run')} written into {to}")


def _chosen(store: Store, studies: Iterable[str]) -> list[str]:
    """Return the studies that are named, by default all."""
    names = list(studies) or store.studies()
    if not names:
        raise StoreError(f"{store.root} holds no study; `repeatlab run` makes one")
    return names


@cli.command("import")
@click.argument("source", type=PATH)
@RUNS
def import_(source: Path, runs: Path) -> None:
    """Put the runs that `export` has written into the store, done: nothing is trained again."""
    from repeatlab.store.exchange import import_runs

    count = import_runs(Store(runs), source)
    click.echo(f"{source}: {counted(count, 'run')} new in {runs}")


@cli.command()
@click.argument("studies", nargs=-1)
@RUNS
@click.option("--all", "everything", is_flag=True, help="List every run, with its time as well.")
def status(studies: Several, runs: Path, everything: bool) -> None:
    """Show how far the studies of a store are: all of them, or those named."""
    import pandas as pd

    from repeatlab.studies.verification import study_states, summary_table, timed_states

    store = Store(runs)
    names = _chosen(store, studies)
    click.echo(summary_table(store, names).to_string())
    states = timed_states if everything else study_states
    rows = pd.concat([states(store, name) for name in names])
    if not everything:
        rows = rows[rows["state"].isin(["running", "diverged", "interrupted", "failed"])]
    for row in rows.itertuples():
        text = f"{row.state} {row.task} {row.method} seed {row.seed} ({row.run})"
        text += f": {row.reason}" if row.reason else ""
        if everything and pd.notna(row.seconds):
            text += f": trained {row.seconds:.3g} s"
            text += f", its share of {row.lockstep} in lock-step" if row.lockstep else ""
        if everything and pd.notna(row.predicted_seconds):
            text += f", predicted {row.predicted_seconds:.3g} s"
        click.echo(text)


@cli.command()
@RUNS
@click.option("--remove", is_flag=True, help="Delete what is damaged, so that it is made again.")
def verify(runs: Path, remove: bool) -> None:
    """Hold a store's studies, and every file of a run that is done, to their digests."""
    from repeatlab.studies import verification

    if not runs.is_dir():
        raise StoreError(f"{runs} is not there: name the run store with --runs")
    store = Store(runs)
    count = len(list(runs.glob("*/*/summary.json")))
    found = list(verification.damaged(store))
    for damage in found:
        click.echo(f"damaged: {damage.reason}")
        if remove:
            verification.remove(store, damage.path)
    click.echo(f"{counted(count, 'run')} read, {len(found)} damaged{' and removed' * remove}")
    sys.exit(1 if found and not remove else 0)


def _read_studies(paths: Iterable[Path], settings: Iterable[str]) -> list[Study]:
    """Return the studies of parameter files, with what is set in them."""
    from repeatlab.studies.parameter_files import read_job
    from repeatlab.studies.study import Study

    studies = []
    for path in paths:
        job = read_job(path, ROOT)
        if "study" not in job.parameters:
            raise ConfigError(f"{path}: parameters.study is missing: this file trains nothing")
        source = f"{path}: parameters.study"
        content = with_settings(job.parameters["study"], settings, source)
        studies.append(parse(Study, content, source=source))
    return studies


@cli.command()
@click.argument("parameters", nargs=-1, type=PATH)
@RUNS
@SET
def measure(parameters: tuple[Path, ...], runs: Path, settings: Several) -> None:
    """Time the parts of an update for every task of the studies; by default of params/quick.

    Afterwards tables can show predicted beside measured training time.
    """
    from repeatlab.studies.diagnostics.measure import measured
    from repeatlab.studies.diagnostics.prediction import measurement_table
    from repeatlab.studies.parameter_files import read_profile

    if not parameters:
        jobs = read_profile("quick", ROOT)
        parameters = tuple(job.source for job in jobs if "study" in job.parameters)
    found = {}
    for study in _read_studies(parameters, settings):
        click.echo(f"measuring {study.name}")
        of_tasks = measured(study, runs, anew=True)
        found |= {f"{study.name}: {task}": one for task, one in of_tasks.items()}
    click.echo(measurement_table(found).to_string())


@cli.command()
@click.argument("task")
@click.option("--dataset", help="By default the embedded one.")
@SET
def check(task: str, dataset: str | None, settings: Several) -> None:
    """Check a task at its defaults, or the tasks of a parameter file, before they are trained.

    Exit status 1 if a check fails.
    """
    from repeatlab.studies.checks import check

    config = {"name": task} | ({"dataset": dataset} if dataset else {})
    chosen: dict[str, Any] = {"": with_settings(config, settings, task)}
    if Path(task).suffix == ".yaml":
        if dataset:
            raise click.UsageError("a parameter file says what its dataset is: leave --dataset out")
        (study,) = _read_studies([Path(task)], settings)
        chosen = {f"{label}: ": config for label, config in study.tasks.items()}
    failed = False
    for label, config in chosen.items():
        report = check(config)
        click.echo(f"{label}{report}")
        failed |= bool(report.failed)
    sys.exit(1 if failed else 0)


@cli.command()
@click.argument("kind", type=click.Choice(("mapping", "task", "notebook")))
@click.argument("name")
def new(kind: str, name: str) -> None:
    """Write into this clone all that a mapping, task or notebook NAME needs, to be filled in."""
    root = PLACES[0]
    script = root / "docs" / "scaffolding.py"  # no part of what is installed, which it adds to
    if not script.is_file():
        said = "must be a clone of the repository: nothing can be added to an installed package"
        raise ConfigError(f"{root} {said}")
    for line in run_path(str(script))["scaffold"](kind, name):
        click.echo(line)


def main() -> None:
    """Run the command line.

    Exit status 2 for a wrong input, 1 for runs that failed, 128 + its number after a signal.
    """
    from repeatlab.studies.study import StudyError

    try:
        sys.exit(cli(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as error:  # click's own word for Ctrl-C
        click.echo(str(error.__cause__) or "Stopped.", err=True)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:
        if isinstance(error.__cause__, Interrupted):  # by another signal
            click.echo(error.__cause__, err=True)
        raise
    except (ConfigError, StoreError, OSError) as error:  # DataError is an OSError
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except StudyError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
