"""Methods that many studies share, written once.

`methods: {include: [FILES], without: [NAMES], defaults: {...}, NAME: {...}}` takes those of YAML
files beside it, but for some, puts `defaults` into each that does not say otherwise, and adds or
replaces others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from repeatlab.core.schema import ConfigError, Model, check_known, parse, read_yaml


class Included(Model):
    """How a study takes its methods from other files."""

    include: list[str] = Field(default_factory=list)
    only: list[str] = Field(default_factory=list)
    without: list[str] = Field(default_factory=list)
    defaults: dict[str, Any] = Field(default_factory=dict)


def with_included(methods: dict[str, Any], path: Path, field: str) -> dict[str, Any]:
    """Return methods with those that they include written out.

    Args:
        methods: As a parameter file has them.
        path: The file.
        field: Where they stand in it, for error messages.

    Raises:
        ConfigError: a file or a name is not there, or what is written is no method.
    """
    if "include" not in methods:
        return methods
    where = f"{path}: {field}"
    own = {name: value for name, value in methods.items() if name not in Included.model_fields}
    rule = {name: value for name, value in methods.items() if name in Included.model_fields}
    settings = parse(Included, rule, source=where)
    shared: dict[str, Any] = {}
    for file in settings.include:
        shared |= read_yaml(path.parent / file)
    for key in ("only", "without"):
        for name in getattr(settings, key):
            check_known(f"{where}.{key}", "method", name, shared)
    kept = {n: v for n, v in shared.items() if n not in settings.without}
    if settings.only:
        kept = {name: kept[name] for name in settings.only}
    for name, value in (kept | own).items():
        if not isinstance(value, dict):
            raise ConfigError(f"{where}.{name}: must be a mapping such as {{}}, not {value!r}")
    return {name: settings.defaults | value for name, value in (kept | own).items()}
