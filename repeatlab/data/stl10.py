"""STL-10 (Coates et al. 2011): 5,000 + 8,000 labelled images of 96 x 96 pixels, 100,000 without.

The unlabelled images are 2.8 GB. They stay in their file, which is mapped into memory: a batch
copies what it takes, pages that nobody asks for are never read, and the system may drop those
that were. The files are those of torchvision's layout, `stl10_binary/*.bin`.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor

from repeatlab.data import sources
from repeatlab.data.sources import DataError, Source

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE

STL10 = Source(
    name="stl10",
    url="http://ai.stanford.edu/~acoates/stl10/",
    files={
        "stl10_binary/train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
        "stl10_binary/train_y.bin": "5a34089d4802c674881badbb80307741",
        "stl10_binary/test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
        "stl10_binary/test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
        "stl10_binary/unlabeled_X.bin": "5242ba1fed5e4be9e1e742405eb56ca4",
    },
    downloads={"stl10_binary.tar.gz": "91f7769df0f17e558f3565bffb0c7dfb"},
)


class MappedImages:
    """Images that stay in their file until a batch takes them.

    Args:
        path: One image after the other: three colour planes, each column by column.

    Raises:
        DataError: the file does not hold whole images.
    """

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        if size == 0 or size % IMAGE_BYTES:
            raise DataError(f"{path} must hold images of {IMAGE_BYTES} bytes; it has {size}.")
        self._planes = np.memmap(path, np.uint8, mode="r").reshape(-1, 3, SIDE, SIDE)

    def __len__(self) -> int:
        return len(self._planes)

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at `indices` (int64, (b,), on the CPU): uint8, (b, 3, 96, 96)."""
        return torch.from_numpy(self._planes[indices.numpy()]).transpose(2, 3).contiguous()


def labelled(part: str, root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Return images, uint8, (n, 3, 96, 96), and classes, int64, (n,), of "train" or "test".

    Raises:
        DataError: a file is damaged, or missing and cannot be fetched.
    """
    directory = prepare(root)
    images = MappedImages(directory / f"stl10_binary/{part}_X.bin")
    classes = np.fromfile(directory / f"stl10_binary/{part}_y.bin", np.uint8)
    # In the file classes count from 1.
    return images.take(torch.arange(len(images))), torch.from_numpy(classes.astype(np.int64) - 1)


def unlabelled(root: str | Path | None = None) -> MappedImages:
    """Return the images without labels.

    Raises:
        DataError: a file is damaged, or missing and cannot be fetched.
    """
    return MappedImages(prepare(root) / "stl10_binary/unlabeled_X.bin")


def prepare(root: str | Path | None = None) -> Path:
    """Return the data directory, in which every file of STL-10 lies, complete and verified.

    Missing files are unpacked from the archive beside them, or fetched. Everything goes from disk
    to disk in pieces: no file is ever in memory as a whole. A process verifies each file once.

    Raises:
        DataError: a file is damaged, or missing and cannot be fetched.
    """
    directory = sources.data_directory(root)
    missing = [file for file in STL10.files if not (directory / file).exists()]
    for download, checksum in STL10.downloads.items() if missing else ():
        archive = directory / download
        if not archive.exists():
            try:
                _fetch(STL10.url + download, archive)
            except (OSError, HTTPException) as error:
                raise DataError(sources.advice(STL10, directory, missing, error)) from None
        _verify(archive, checksum)
        _unpack(archive, missing, directory)
    for file, checksum in STL10.files.items():
        status = (directory / file).stat()
        _verified(directory / file, checksum, status.st_size, status.st_mtime_ns)
    return directory


@lru_cache
def _verified(path: Path, checksum: str, size: int, modified: int) -> None:
    _verify(path, checksum)


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is damaged or not the expected file: its MD5 is {found}, expected {expected}"
            f" ({path.stat().st_size} bytes). Remove it, or replace it with a good copy."
        )


def _fetch(url: str, path: Path) -> None:
    """Download `url` to `path`, which appears only once it is complete."""
    with urlopen(url, timeout=sources.TIMEOUT_SECONDS) as response:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            partial = Path(folder) / path.name
            with partial.open("wb") as file:
                shutil.copyfileobj(response, file)
            partial.replace(path)


def _unpack(archive: Path, members: list[str], directory: Path) -> None:
    """Write `members` of the archive into `directory`, each in one step."""
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix=".unpack-") as folder,
        tarfile.open(archive, "r:gz") as packed,
    ):
        for member in packed:  # in the archive's order: it cannot be read backwards cheaply
            if member.name in members:
                partial = Path(folder) / Path(member.name).name
                with packed.extractfile(member) as source, partial.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                target = directory / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(target)
