"""Where the files of a dataset come from, and that they are the right ones.

Every byte is checked against a known MD5 before anything parses it: CIFAR-10 comes as pickles,
and unpickling a wrong file runs whatever it says. The layout on disk is torchvision's, so one
directory serves both. Files go from disk to disk in pieces: none is ever in memory as a whole.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

from repeatlab.core.files import temporary_beside
from repeatlab.core.schema import read_yaml

DIRECTORY_VARIABLE = "REPEATLAB_DATA"
TIMEOUT_SECONDS = 5.0  # of one socket operation: without a network a run should say so at once


class DataError(OSError):
    """A dataset's files are missing, damaged or not what they claim to be."""


@dataclass(frozen=True)
class Source:
    """The files of one dataset; all paths are relative to the data directory.

    Attributes:
        name: The dataset, as error messages call it.
        url: Where the downloads lie, with a slash at the end.
        files: MD5 of each file that is read.
        downloads: MD5 of each file that `url` offers: `<file>.gz`, or a `.tar.gz` whose members
            are named like `files`.
    """

    name: str
    url: str
    files: Mapping[str, str]
    downloads: Mapping[str, str]


# By name, those of `sources.yaml`.
SOURCES = {
    name: Source(name, **fields)
    for name, fields in read_yaml(Path(__file__).with_name("sources.yaml")).items()
}
MNIST, CIFAR10 = SOURCES["mnist"], SOURCES["cifar10"]


def data_directory(root: str | Path | None = None) -> Path:
    """Return `root`, else `$REPEATLAB_DATA`, else `~/.cache/repeatlab`."""
    if root is None:
        root = os.environ.get(DIRECTORY_VARIABLE) or Path.home() / ".cache" / "repeatlab"
    return Path(root).expanduser()


def prepare(source: Source, root: str | Path | None = None) -> Path:
    """Return the data directory, in which every one of `source.files` lies, complete and verified.

    Files that are not there are unpacked from a download lying beside them, or fetched. A file
    that is there is never replaced: when it is damaged, its owner decides. A process verifies each
    file once.

    Raises:
        DataError: A file is damaged, or missing and cannot be fetched or written; the message
            names every file with its path and MD5.
    """
    directory = data_directory(root)
    missing = [file for file in source.files if not _verified(directory / file, source.files[file])]
    for download, checksum in source.downloads.items() if missing else ():
        is_archive = download.endswith(".tar.gz")
        if not is_archive and download.removesuffix(".gz") not in missing:
            continue
        packed = directory / download
        try:
            if not packed.exists():
                url = source.url + Path(download).name
                with urlopen(url, timeout=TIMEOUT_SECONDS) as response:
                    _write(response, packed, checksum)
            _verify(packed, checksum)
            _untar(packed, missing, directory) if is_archive else _gunzip(packed)
        except (OSError, HTTPException) as error:
            if isinstance(error, DataError) and packed.exists():
                raise
            raise DataError(advice(source, directory, missing, error)) from None
    for file in missing:
        _verified(directory / file, source.files[file])
    return directory


def _verified(path: Path, expected: str) -> bool:
    """Hold a file to its MD5 if it is there; return whether it is."""
    if not path.exists():
        return False
    status = path.stat()
    _verify_once(path, expected, status.st_size, status.st_mtime_ns)
    return True


@lru_cache
def _verify_once(path: Path, expected: str, size: int, modified: int) -> None:
    _verify(path, expected)


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is damaged or not the expected file: its MD5 is {found}, expected {expected}"
            f" ({path.stat().st_size} bytes). Remove it, or replace it with a good copy."
        )


def _gunzip(packed: Path) -> None:
    with gzip.open(packed) as content:
        _write(content, packed.with_suffix(""))


def _untar(packed: Path, members: list[str], directory: Path) -> None:
    with tarfile.open(packed, "r:gz") as archive:
        for member in archive:  # in its own order: it cannot be read backwards cheaply
            if member.name in members:
                _write(archive.extractfile(member), directory / member.name)


def _write(content: BinaryIO, path: Path, checksum: str | None = None) -> None:
    """Write a file that appears at `path` only once it is whole and, by its checksum, verified."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_beside(path)
    try:
        with partial.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        if checksum is not None:
            _verify(partial, checksum)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def advice(source: Source, directory: Path, missing: list[str], error: Exception) -> str:
    """Say what is missing, why it could not be fetched, and where to put which file."""

    def listing(files: Mapping[str, str]) -> str:
        return "\n".join(f"  {directory / file}  (MD5 {files[file]})" for file in files)

    wanted = {file: source.files[file] for file in missing}
    return (
        f"{source.name}: {len(missing)} of {len(source.files)} files are missing and could not be"
        f" fetched from {source.url} ({type(error).__name__}: {error}). Put there either\n"
        f"{listing(wanted)}\nor, as downloaded,\n{listing(source.downloads)}\n"
        f"or set {DIRECTORY_VARIABLE} to the directory that holds them (now {directory})."
    )
