"""`python -m repeatlab`."""

from repeatlab.cli import main

if __name__ == "__main__":
    main()
