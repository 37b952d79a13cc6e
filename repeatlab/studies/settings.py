"""What a command line sets in a parameter file: `--set methods.linear.mapping.t=2`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from repeatlab.core.schema import ConfigError, did_you_mean, with_value, yaml_value


def with_settings(content: Any, settings: Iterable[str], source: str) -> Any:
    """Return a study, a plan or a task with what is set in it, in methods that it includes too.

    Args:
        content: As its file has it, with the methods that it includes. What is no mapping stays as
            it is.
        settings: "max_updates=50", "methods.linear.mapping.t=2": a dotted key and a YAML value.
        source: Where it stands, for error messages.

    Raises:
        ConfigError: one is no key with a value, or a field of a task or method that is not there,
            which would make a new one. What else is not known is found where the content is parsed,
            as if it stood in the file.
    """
    for setting in settings if isinstance(content, dict) else ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set: must be KEY=VALUE; not {setting!r}")
        part, name, *fields = *key.split("."), "", ""
        known = content.get(part) if part in ("tasks", "methods") else None
        if fields[2:] and isinstance(known, dict) and name not in known:
            raise ConfigError(f"{source}: {part}.{name}: unknown key; {did_you_mean(name, known)}")
        content = with_value(content, key, yaml_value(value, f"--set {key}"), source)
    return content
