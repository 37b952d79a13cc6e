"""`repeatlab` and `python -m repeatlab`."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from repeatlab.cli import main as run
    except ModuleNotFoundError as error:
        from repeatlab import missing_extra

        sys.exit(str(missing_extra("the command line", error)))
    run()


if __name__ == "__main__":
    main()
