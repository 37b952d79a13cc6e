"""How files are named, written and read, so that no reader ever sees half of one."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What `temporary_beside` makes of a run's files; earlier versions ended the names in a process id.
_TEMPORARY = re.compile(r"\.(checkpoint|[\w-]+\.(arrow|json|parquet|pt))\.([0-9a-f]{16}|\d+)")


class StoreError(RuntimeError):
    """The run store cannot be read or written; the message names the file."""


def safe_name(what: str, name: str) -> str:
    """Return `name` if it can name a file inside its directory.

    Raises:
        ValueError: it holds anything but letters, digits, '.', '_' and '-'.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise ValueError(
            f"the {what} {name!r} must consist of letters, digits, '.', '_' and '-', and begin "
            "with a letter or digit"
        )
    return name


def temporary_beside(path: Path) -> Path:
    """Return a name beside `path` that nobody else has: process ids are equal in two containers."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def remove_temporaries(directory: Path) -> None:
    """Delete what killed processes were writing in a run's directory; its lock is to be held."""
    for path in directory.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside `path` that takes its place once it is written.

    Raises:
        StoreError: it cannot be written; what is at `path` stays as it is.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise not_written(path, error) from error
        raise


def not_written(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be written: {error.strerror or error}")


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` in one step: readers see the old file or the new one, never half.

    Raises:
        StoreError: it cannot be written.
    """
    text = json.dumps(data, indent=1) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error
