"""STL-10 (Coates et al. 2011): 5,000 + 8,000 labelled images of 96 x 96 pixels, 100,000 without.

The unlabelled images are 2.8 GB. They stay in their file, which is mapped into memory: a batch
copies what it takes, pages that nobody asks for are never read, and the system may drop those
that were. The files are those of torchvision's layout, `stl10_binary/*.bin`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repeatlab.data import sources
from repeatlab.data.sources import DataError

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE

STL10 = sources.SOURCES["stl10"]


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
    """Return the data directory, in which every file of STL-10 lies; see `sources.prepare`."""
    return sources.prepare(STL10, root)
