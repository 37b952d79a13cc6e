"""`repeatlab`: the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from repeatlab.records import StoreError
from repeatlab.schema import ConfigError, parse

ROOT = Path(__file__).resolve().parents[1]
RUNS = click.option(
    "--runs", type=click.Path(path_type=Path), default="runs", show_default=True, help="Run store."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="repeatlab")
def cli() -> None:
    """Loss-driven dynamic batch repetition, compared fairly."""


@cli.command()
@click.option("--profile", default="quick", show_default=True, help="A directory in params/.")
@RUNS
@click.option(
    "--figures",
    type=click.Path(path_type=Path),
    default="figures",
    show_default=True,
    help="Where the figures go.",
)
def figures(profile: str, runs: Path, figures: Path) -> None:
    """Execute a profile's notebooks; runs that the store has are not trained again."""
    from repeatlab.batch import execute_profile

    names = execute_profile(profile, root=ROOT, runs=runs, figures=figures, echo=click.echo)
    click.echo(f"{len(names)} figures in {figures}/ (PDF and PNG, manifest.json):")
    for name in names:
        click.echo(f"  {figures / name}.pdf")


@cli.command()
@click.argument("parameters", nargs=-1, required=True, type=click.Path(path_type=Path))
@RUNS
@click.option("--workers", type=click.IntRange(min=0), help="Processes; 0 trains in this one.")
def run(parameters: tuple[Path, ...], runs: Path, workers: int | None) -> None:
    """Train the studies of parameter files, without their notebooks."""
    from repeatlab.batch import read_job
    from repeatlab.study import Study, run_studies

    studies = []
    for path in parameters:
        job = read_job(path, ROOT)
        if "study" not in job.parameters:
            raise ConfigError(f"{path}: parameters.study is missing: this file trains nothing")
        studies.append(parse(Study, job.parameters["study"], source=f"{path}: parameters.study"))
    click.echo(str(run_studies(studies, runs, workers=workers)))


def main() -> None:
    """Run the command line: exit status 2 for a wrong input, 1 for runs that failed."""
    from repeatlab.batch import NotebookError
    from repeatlab.study import StudyError

    try:
        cli()
    except (ConfigError, StoreError, OSError) as error:  # DataError is an OSError
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except (StudyError, NotebookError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
