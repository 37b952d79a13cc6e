"""Tensors in sealed files, from which no code is run."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from repeatlab.core.files import StoreError, read_sealed, write_sealed


def write_tensors(path: Path, content: Any) -> None:
    """Write tensors, numbers, strings, lists and dicts, as `torch.save` does, and their digest.

    Raises:
        OSError: the file cannot be written.
    """
    import torch

    # By way of memory: torch's own writer has no word for a full disk.
    buffer = BytesIO()
    torch.save(content, buffer)
    write_sealed(path, buffer.getbuffer())


def read_tensors(path: Path) -> Any:
    """Return what `write_tensors` wrote, on the CPU.

    Raises:
        StoreError: it cannot be read, or does not fit its digest.
    """
    import torch

    content = BytesIO(read_sealed(path))
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # sealed, but by something else
        raise StoreError(f"{path} cannot be read: {type(error).__name__}") from error
