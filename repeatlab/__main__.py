"""`repeatlab` and `python -m repeatlab`."""

import sys

from repeatlab import require_lab


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        require_lab()
    except ImportError as error:
        sys.exit(str(error))
    from repeatlab.cli import main as run

    run()


if __name__ == "__main__":
    main()
