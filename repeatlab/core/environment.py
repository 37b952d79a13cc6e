"""On what a run was made: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from repeatlab import __version__

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "gymnasium")


def describe(device: str) -> dict[str, Any]:
    """Return versions, processor, device and commit of this process."""
    import torch

    return {
        "python": platform.python_version(),
        # Its own from its source: on a path it runs without being installed.
        "versions": {"repeatlab": __version__} | {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "commit": commit(),
    }


def pick_device(name: str) -> str:
    """Return "cuda", "mps" or "cpu"; "auto" is the first of these that is there.

    Raises:
        ValueError: the device asked for is not there.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"device: '{name}' is not available here; use 'auto' or 'cpu'")
    return name


@cache
def processor() -> str:
    """Return the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """Return the commit of the source tree, or "COMMIT+changes.DIGEST"; None outside git.

    There are changes where package, notebooks or parameters differ from the commit. The digest is
    `code_digest`'s: it is equal where the code is.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        parts = ("repeatlab", "notebooks", "params")
        if not _git(root, "status", "--porcelain", "--untracked-files=all", "--", *parts):
            return head
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes.{code_digest()[:8]}"


def code_digest() -> str:
    """Return the digest of the package's files, but for what is compiled or hidden."""
    root = Path(__file__).resolve().parents[2]
    digest = sha256()
    for path in sorted((root / "repeatlab").rglob("*")):
        hidden = path.name.startswith(".") or "__pycache__" in path.parts
        if path.is_file() and not hidden:
            digest.update(os.fsencode(path.relative_to(root)) + b"\0")
            digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _git(root: Path, *arguments: str) -> str:
    command = ("git", "-C", str(root), *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
