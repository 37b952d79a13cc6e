"""How files are named, written and read, so that no reader ever sees half of one.

A *sealed* file ends in the SHA-256 of all that stands before: no bit of it changes unnoticed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# How a sealed object ends.
_END = b'"\n}\n'


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
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def remove_temporaries(directory: Path) -> None:
    """Delete what killed processes were writing in a run's directory; its lock is to be held."""
    for path in directory.glob(".*.part"):
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
        with writing(path):
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):  # it is there no more where it took that place
            temporary.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while `path` is written into a `StoreError` that names it."""
    try:
        yield
    except OSError as error:
        # Libraries put words of their own around what the system says.
        reason = os.strerror(error.errno) if error.errno else error
        raise StoreError(f"{path} cannot be written: {reason}") from error


def make_directory(path: Path) -> None:
    """Make a directory if it is not there, and see that it can be written to.

    Raises:
        StoreError: it cannot.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def write_json(path: Path, data: Any, *, sealed: bool = False) -> None:
    """Write `data` to `path` in one step: readers see the old file or the new one, never half.

    Args:
        path: The file.
        data: What JSON can hold; an object where it is `sealed`.
        sealed: Whether the object's last field, `sha256`, is the digest of the text before it.

    Raises:
        StoreError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(_sealed(data) if sealed else _text(data))


def _text(data: Any) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()


def _sealed(data: dict[str, Any]) -> bytes:
    before = _text({**data, "sha256": ""})[: -len(_END)]
    return before + sha256(before).hexdigest().encode() + _END


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Return the object that `write_json` wrote, without its digest.

    Raises:
        StoreError: it is no such object, or does not fit the digest that it must have if `sealed`.
    """
    text = read_bytes(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise StoreError(f"{path} is damaged: it must hold an object; not {str(data)[:40]!r}")
    if sealed:
        if not data.pop("sha256", None):
            raise StoreError(f"{path} has no digest: it is damaged, or of an earlier version")
        if _sealed(data) != text:
            raise not_whole(path)
    return data


def write_sealed(path: Path, content: bytes | memoryview) -> None:
    """Write `content` and its digest, and make the file durable.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        file.write(content)
        file.write(sha256(content).digest())
        file.flush()
        os.fsync(file.fileno())


def read_sealed(path: Path) -> memoryview:
    """Return what `write_sealed` wrote.

    Raises:
        StoreError: it is not there, or does not fit its digest.
    """
    whole = memoryview(read_bytes(path))
    content, digest = whole[:-32], whole[-32:]
    if sha256(content).digest() != digest:
        raise not_whole(path)
    return content


def read_bytes(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from None


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex digits.

    Raises:
        StoreError: it cannot be read.
    """
    return sha256(read_bytes(path)).hexdigest()


def digest_of_content(content: Any) -> str:
    """Return sixteen hex digits that identify what JSON can hold; the rest counts by its `str`."""
    text = json.dumps(content, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def not_whole(path: Path) -> StoreError:
    return StoreError(f"{path} is damaged: its content does not fit its digest")
