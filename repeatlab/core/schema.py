"""Strict models for everything that comes from YAML, a notebook or a command line.

Wrong types and unknown keys are refused, all at once, each with its path and, for a name that is
not known, the nearest one that is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from math import isfinite, nan
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_origin, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration is not valid; the message names every bad field."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint such as "did you mean 'linear'? (known: constant, linear)"."""
    known = sorted(known)
    close = get_close_matches(str(name), known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}(known: {', '.join(known)})"


class Model(BaseModel):
    """Base of all configuration models: immutable, no conversion, no unknown keys, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _hint_at_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            details = [cls._with_hint(item) for item in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, details) from None

    @classmethod
    def _with_hint(cls, item: Any) -> InitErrorDetails:
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            message = f"unknown key; {did_you_mean(item['loc'][0], cls.model_fields)}"
        elif item["type"] == "model_type":
            keys = ", ".join(sorted(cls.model_fields))
            message = f"must be a mapping with keys among {keys}; not {item['input']!r}"
        elif item["type"] not in ("missing", "value_error", "repeatlab"):
            # YAML and notebooks write tuples as lists.
            message = f"{message.replace('tuple', 'list')}, not {item['input']!r}"
            if isinstance(item["input"], str) and _is_number(item["input"]):
                message = f"{message}, which is text: write it without quotes"
        return InitErrorDetails(
            type=PydanticCustomError("repeatlab", message), loc=item["loc"], input=item["input"]
        )


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        return isfinite(float(text))
    return False


# --- one of several, by name ------------------------------------------------------------------


def named(what: str, models: Mapping[str, Any], load: Callable[[Any], type[Model]]) -> Any:
    """Return the annotation of a field `{name: ..., ...}` that holds one of several models.

    Args:
        what: What to call it in messages.
        models: The known names, each with whatever `load` turns into its model.
        load: Called for the chosen name only.
    """

    def pick(value: Any) -> Model:
        if isinstance(value, Model):
            return value
        if not isinstance(value, dict) or "name" not in value:
            raise ValueError(f"must be a mapping with the key 'name', not {value!r}")
        name = value["name"]
        if not isinstance(name, str) or name not in models:
            raise ValueError(f"unknown {what} {name!r}; {did_you_mean(name, models)}")
        return load(models[name]).model_validate(value)

    return Annotated[SerializeAsAny[Model], PlainValidator(pick)]


class Choice(Model):
    """One member of a registry of dataclasses, by `name`, with that member's own fields."""

    name: str

    def build(self, **overrides: Any) -> Any:
        """Return the dataclass with these fields; `overrides` are added to them."""
        fields = {key: value for key, value in self if key != "name"}
        return type(self).target(**(fields | overrides))


def choice(what: str, registry: Mapping[str, type], *, without: tuple[str, ...] = ()) -> Any:
    """Return the annotation of a field that holds one member of `registry`.

    The dataclasses stay the only place where fields, defaults and ranges are written. A field that
    a class names in `calibrated` also takes "auto".

    Args:
        what: What to call it in messages.
        registry: Name to frozen dataclass.
        without: Fields that are not configured, because the run provides them.
    """
    return named(what, choices(registry, without=without), lambda model: model)


def choices(
    registry: Mapping[str, type], *, without: tuple[str, ...] = ()
) -> dict[str, type[Choice]]:
    """Return the model of every member of `registry`, by name; see `choice`."""
    return {name: _choice_model(name, target, without) for name, target in registry.items()}


def _choice_model(name: str, target: type, without: tuple[str, ...]) -> type[Choice]:
    hints = get_type_hints(target)
    fields: dict[str, Any] = {"name": (Literal[name], ...)}
    for field in dataclasses.fields(target):
        kind = hints[field.name]
        if get_origin(kind) is tuple:  # YAML and JSON know lists only
            kind = Annotated[kind, Field(strict=False)]
        if field.name == getattr(target, "calibrated", None):
            kind = Annotated[float | str, PlainValidator(_number_or_auto)]
        if field.name not in without:
            default = ... if field.default is dataclasses.MISSING else field.default
            fields[field.name] = (kind, default)

    def check_ranges(self: Choice) -> Self:
        self.build(**{key: 1.0 for key, value in self if value == "auto"})
        return self

    model = create_model(
        f"{target.__name__}Choice",
        __base__=Choice,
        __validators__={"check_ranges": model_validator(mode="after")(check_ranges)},
        **fields,
    )
    model.target = target
    return model


def _number_or_auto(value: Any) -> float | str:
    if value == "auto":
        return value
    number = nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):  # an int may exceed every float
            number = float(value)
    if not isfinite(number):
        raise ValueError(f"must be a finite number or 'auto', not {value!r}")
    return number


# --- reading ----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as the number it is (YAML 1.1 makes it text) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # "<<" takes another mapping in, whose keys may be given anew.
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' appears twice", nodes[position].start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping of names.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # a date such as 2024-99-99 is a ValueError, `!!bool x` a KeyError
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: must hold a mapping of names to values")
    return data


def parse(model: type[M], data: Any, *, source: str = "") -> M:
    """Return `data` as a `model`.

    Raises:
        ConfigError: one line per bad field, with `source` (a file, say) in front.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            path = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            lines.append(": ".join(part for part in (source, path, message) if part))
        raise ConfigError("\n".join(lines)) from None
