"""Where the files of a dataset come from, and that they are the right ones.

Every byte is checked against a known MD5 before anything parses it: CIFAR-10 comes as pickles,
and unpickling a wrong file runs whatever it says. The layout on disk is torchvision's, so one
directory serves both.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import md5
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

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


MNIST = Source(
    name="mnist",
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    files={
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    downloads={
        "MNIST/raw/train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "MNIST/raw/train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "MNIST/raw/t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "MNIST/raw/t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)

CIFAR10 = Source(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/",
    files={
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
    },
    downloads={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
)


def data_directory(root: str | Path | None = None) -> Path:
    """Return `root`, else `$REPEATLAB_DATA`, else `~/.cache/repeatlab`."""
    if root is None:
        root = os.environ.get(DIRECTORY_VARIABLE) or Path.home() / ".cache" / "repeatlab"
    return Path(root).expanduser()


def read(source: Source, root: str | Path | None = None) -> dict[str, bytes]:
    """Return the verified content of each of `source.files`, by its relative path.

    Files that are not there are unpacked from a download lying beside them, or fetched. A file
    that is there is never replaced: when it is damaged, its owner decides.

    Raises:
        DataError: A file is damaged, or missing and cannot be fetched; the message names every
            file with its path and MD5.
    """
    directory = data_directory(root)
    contents = {
        file: _verified(directory / file, checksum)
        for file, checksum in source.files.items()
        if (directory / file).exists()
    }
    missing = [file for file in source.files if file not in contents]
    for download, checksum in source.downloads.items() if missing else ():
        is_archive = download.endswith(".tar.gz")
        if not is_archive and download.removesuffix(".gz") not in missing:
            continue
        if not (directory / download).exists():
            try:
                _fetch(source.url + Path(download).name, directory / download, checksum)
            except (OSError, HTTPException, DataError) as error:
                raise DataError(advice(source, directory, missing, error)) from None
        packed = _verified(directory / download, checksum)
        unpacked = _untar(packed, missing) if is_archive else _gunzip(packed, download)
        for file, content in unpacked.items():
            contents[file] = content
            with suppress(OSError):  # a read-only directory: unpack again next time
                _write(directory / file, content)
    return contents


def _verified(path: Path, expected: str) -> bytes:
    """Return the content of `path` after holding it to its MD5."""
    content = path.read_bytes()
    found = md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is damaged or not the expected file: its MD5 is {found}, expected {expected}"
            f" ({len(content)} bytes). Remove it, or replace it with a good copy."
        )
    return content


def _fetch(url: str, path: Path, checksum: str) -> None:
    """Download `url` to `path`, which appears only once it is complete and verified."""
    with urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            partial = Path(folder) / path.name
            with partial.open("wb") as file:
                shutil.copyfileobj(response, file)
            _verified(partial, checksum)
            partial.replace(path)


def _write(path: Path, content: bytes) -> None:
    """Write `path` in one step, so that another process never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".write-") as folder:
        partial = Path(folder) / path.name
        partial.write_bytes(content)
        partial.replace(path)


def _gunzip(packed: bytes, download: str) -> dict[str, bytes]:
    return {download.removesuffix(".gz"): gzip.decompress(packed)}


def _untar(packed: bytes, members: list[str]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        return {member: archive.extractfile(member).read() for member in members}


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
