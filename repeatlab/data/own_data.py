"""Data of one's own, without code: a folder of images by class, or a NumPy file.

    dataset: ~/birds           # ~/birds/<class>/*.png, or ~/birds/{train,test}/<class>/*.png
    dataset: ./birds.npz       # arrays images and labels, and if there are test_images, test_labels

Classes are numbered in the order of their names. Where nothing says what is for the test, a fifth
of every class is, always the same one. A relative path is looked for in the working directory, then
in the data directory. What is read is part of the data's name, by its digest.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repeatlab.data.sources import DataError, data_directory

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LEAST = 5  # images of a class, so that every split has one

Part = tuple[Tensor, Tensor]  # images, uint8, (n, channels, height, width), and labels, int64, (n,)


def is_path(dataset: str) -> bool:
    """Whether a dataset's name is that of a file or folder."""
    return any(sign in dataset for sign in ("/", "\\")) or dataset.endswith(".npz")


def find(
    dataset: str,
    root: str | Path | None = None,
    *,
    what: str = "a folder of images by class or an .npz file",
) -> Path:
    """Return where the data, which are `what`, lie.

    Raises:
        DataError: nowhere.
    """
    path = Path(dataset).expanduser()
    there = [place for place in (path, data_directory(root) / path) if place.exists()]
    if not there:
        raise DataError(
            f"dataset {dataset!r} must be {what}; there is neither {path.absolute()} nor"
            f" {data_directory(root) / path}."
        )
    return there[0].resolve()


def load(dataset: str, root: str | Path | None = None) -> tuple[str, Part, Part | None]:
    """Return a name that tells the content, what may be trained on, and the test part if given.

    Raises:
        DataError: there is nothing, or it is not as it must be: which file or array, and why.
    """
    path = find(dataset, root)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return _load(path, tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache(maxsize=2)  # a study builds many tasks, and reading a folder takes long
def _load(path: Path, version: tuple) -> tuple[str, Part, Part | None]:
    train, test = (_arrays if path.is_file() else _folder)(path)
    counts, shape = train[1].bincount(), train[0].shape[1:]
    least = LEAST if test is None else LEAST - 1
    if shape[0] not in (1, 3):
        raise DataError(f"{path}: images must have one channel or three; not {shape[0]}.")
    if len(counts) < 2 or counts.min() < least:
        raise DataError(
            f"{path}: there must be two classes or more, of {least} images or more each; class"
            f" {int(counts.argmin())} of {len(counts)} has {int(counts.min())}."
        )
    if test is not None and (test[0].shape[1:] != shape or int(test[1].max()) >= len(counts)):
        raise DataError(f"{path}: test images must be as the others in size and classes.")
    digest = hashlib.sha256()
    for tensor in (*train, *(test or ())):
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return f"{path.stem}-{digest.hexdigest()[:12]}", train, test


# --- a NumPy file ---------------------------------------------------------------------------------


def _arrays(path: Path) -> tuple[Part, Part | None]:
    try:
        with path.open("rb") as opened:
            # Else numpy takes it for a pickle, and advises to allow that.
            if not zipfile.is_zipfile(opened):
                raise ValueError("it is no .npz archive")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} must be an .npz file of plain arrays: {error}") from None
    missing = {"images", "labels"} - arrays.keys()
    if missing or ("test_images" in arrays) != ("test_labels" in arrays):
        raise DataError(
            f"{path} must hold the arrays images and labels, and test_images and test_labels or"
            f" neither; it holds {', '.join(arrays) or 'none'}."
        )
    train = _part(path, arrays, "")
    return train, _part(path, arrays, "test_") if "test_images" in arrays else None


def _part(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> Part:
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{path}: {prefix}images must be uint8, (n, height, width) or (n, height, width,"
            f" channels); not {images.dtype}, {images.shape}."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or (labels < 0).any():
        raise DataError(
            f"{path}: {prefix}labels must be whole numbers from 0, ({len(images)},), one for each"
            f" image; not {labels.dtype}, {labels.shape}."
        )
    return _tensors(images.reshape(*images.shape[:3], -1), labels)


def _tensors(images: np.ndarray, labels: Sequence[int]) -> Part:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(np.asarray(labels, dtype=np.int64))


# --- a folder -------------------------------------------------------------------------------------


def _folder(path: Path) -> tuple[Part, Part | None]:
    split = all((path / part).is_dir() for part in ("train", "test"))
    found = [_by_class(path / part) for part in (("train", "test") if split else (".",))]
    if len({tuple(by_class) for by_class in found}) > 1:
        raise DataError(f"{path}: train and test must have the same classes, a folder each.")
    pixels = [_read([file for files in by_class.values() for file in files]) for by_class in found]
    if all((images == images[..., :1]).all() for images in pixels):
        pixels = [images[..., :1] for images in pixels]  # all grey
    parts = []
    for images, by_class in zip(pixels, found, strict=True):
        counts = [len(files) for files in by_class.values()]
        parts.append(_tensors(images, np.repeat(np.arange(len(counts)), counts)))
    return parts[0], parts[1] if split else None


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, in the order of their names."""
    found = {
        part.name: sorted(f for f in part.iterdir() if f.suffix.lower() in SUFFIXES)
        for part in sorted(folder.iterdir())
        if part.is_dir() and part.name[0] != "."
    }
    empty = ", ".join(name for name, files in found.items() if not files)
    if empty or not found:
        raise DataError(
            f"{folder} must hold a folder of images ({', '.join(sorted(SUFFIXES))}) for each class;"
            f" {f'there is none in {empty}' if empty else 'it holds no folder'}."
        )
    return found


def _read(files: list[Path]) -> np.ndarray:
    """Return the images as uint8, (n, height, width, 3)."""
    from PIL import Image

    pixels: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file) as image:
                pixels.append(np.asarray(image.convert("RGB")))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} must be an image: {error}") from None
        (height, width, _), (first, across, _) = pixels[-1].shape, pixels[0].shape
        if (height, width) != (first, across):
            raise DataError(
                f"{file} is {width} x {height} pixels, {files[0].name} {across} x {first}: all"
                " images must be of one size."
            )
    return np.stack(pixels)
