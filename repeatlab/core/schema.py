"""Strict models for everything that comes from YAML, a notebook or a command line.

Wrong types and unknown keys are refused, all at once, each with its path and, for a name that is
not known, the nearest one that is.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

M = TypeVar("M", bound=BaseModel)

# Of a field that is an integer: counts beyond it end in memory or time, without the field's name.
MOST_INTEGER = 10**9
# What a parameter file may hold: an alias names a part of any size, and aliases name aliases.
MOST_VALUES = 100_000
# Of an error message: lines, characters of a line, and names that would be right.
MOST_LINES, MOST_TEXT, MOST_KNOWN = 20, 1500, 40
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class ConfigError(ValueError):
    """A configuration is not valid; the message names every bad field."""


def shown(value: Any) -> str:
    """Return a value as an error message shows it: as Python writes it, without most of a lot."""
    return _SHORT.repr(value)


def counted(count: int, what: str) -> str:
    """Return "1 run", "2 runs", "2 studies"."""
    several = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{count} {what if count == 1 else several}"


def _checked_name(name: str) -> str:
    unsafe = {"/", "\\", "$"} & set(name)  # a path's, and what starts a formula in a figure
    if unsafe or not name.isprintable() or not name.strip(". ") or len(name) > 100:
        raise ValueError(
            f"a name must be at most 100 printable characters without '/', '\\' and '$'; "
            f"not {shown(name)}"
        )
    return name


# What a study calls a task or a method, in tables, figures and files.
Name = Annotated[str, AfterValidator(_checked_name)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint such as "did you mean 'linear'? (known: constant, linear)"."""
    known = sorted(known)
    close = get_close_matches(str(name), known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    more = ", ..." if len(known) > MOST_KNOWN else ""
    return f"{hint}(known: {', '.join(known[:MOST_KNOWN])}{more})"


def check_known(field: str, what: str, name: str, known: Collection[str]) -> None:
    """Raise a `ConfigError` that names the field unless `name` is among the known ones."""
    if name not in known:
        raise ConfigError(f"{field}: unknown {what} {name!r}; {did_you_mean(name, known)}")


class Model(BaseModel):
    """Base of all configuration models: immutable, no conversion, no unknown keys, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    most: ClassVar[Mapping[str, int]] = {}
    """The largest integers of fields that cannot take `MOST_INTEGER`, or may take more."""

    @model_validator(mode="wrap")
    @classmethod
    def _with_hints_and_bounds(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            model = handler(data)
        except ValidationError as error:
            details = [cls._with_hint(item) for item in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, details) from None
        details = [cls._too_large(name, value) for name, value in model]
        if any(details):
            raise ValidationError.from_exception_data(cls.__name__, [*filter(None, details)])
        return model

    @classmethod
    def _too_large(cls, name: str, value: Any) -> InitErrorDetails | None:
        most = cls.most.get(name, MOST_INTEGER)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) > most:
                error = PydanticCustomError(
                    "repeatlab", f"must be at most {most}; not {shown(number)}"
                )
                return InitErrorDetails(type=error, loc=(name,), input=number)
        return None

    @classmethod
    def _with_hint(cls, item: Any) -> InitErrorDetails:
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            message = f"unknown key; {did_you_mean(item['loc'][0], cls.model_fields)}"
        elif item["type"] == "model_type":
            keys = ", ".join(sorted(cls.model_fields))
            message = f"must be a mapping with keys among {keys}; not {shown(item['input'])}"
        elif item["type"] == "too_short":
            least = item["ctx"]["min_length"]
            message = f"must have at least {'one' if least == 1 else least}; not {item['input']!r}"
        elif item["type"] not in ("missing", "value_error", "repeatlab"):
            # YAML and notebooks write tuples as lists.
            message = message.replace("tuple", "list").replace("Input should be", "must be")
            message = f"{message}; not {shown(item['input'])}"
            if isinstance(item["input"], str) and item["type"] == "bool_type":
                message = f"{message}; write true or false"
        return InitErrorDetails(
            type=PydanticCustomError("repeatlab", message), loc=item["loc"], input=item["input"]
        )


# --- one of several, by name ------------------------------------------------------------------


def named(what: str, models: Mapping[str, Any], load: Callable = lambda model: model) -> Any:
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
            raise ValueError(f"must be a mapping with the key 'name'; not {shown(value)}")
        name = value["name"]
        if not isinstance(name, str) or name not in models:
            raise ValueError(f"unknown {what} {shown(name)}; {did_you_mean(name, models)}")
        return load(models[name]).model_validate(value)

    return Annotated[SerializeAsAny[Model], PlainValidator(pick)]


class Choice(Model):
    """One member of a registry of dataclasses, by `name`, with that member's own fields."""

    most: ClassVar[Mapping[str, int]] = {"history": 10**6, "presample": 10**4, "window": 10**6}
    name: str

    def build(self, **overrides: Any) -> Any:
        """Return the dataclass with these fields; `overrides` are added to them."""
        fields = {key: value for key, value in self if key != "name"}
        return type(self).target(**(fields | overrides))


def choice(what: str, registry: Mapping[str, type]) -> Any:
    """Return the annotation of a field that holds one member of `registry`.

    The dataclasses stay the only place where fields, defaults and ranges are written. A field that
    a class names in `calibrated` also takes "auto".

    Args:
        what: What to call it in messages.
        registry: Name to frozen dataclass.
    """
    return named(what, choices(registry))


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
            kind = Annotated[SerializeAsAny[float], WrapValidator(_or_auto)]
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


def _or_auto(value: Any, number: Callable[[Any], float]) -> float | str:
    if isinstance(value, str) and value != "auto":
        raise ValueError(f"must be a number or 'auto'; not {shown(value)}")
    return value if value == "auto" else number(value)


# --- reading ----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads plain words by the core schema of YAML 1.2, in which `no` and 1:30 are text.

    A mapping must not give a key twice, nor take another one in by "<<".
    """

    yaml_implicit_resolvers: ClassVar = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping."""
        seen = set()
        for key, _ in node.value:
            if key.value == "<<" or str(key.value) in seen:
                what = "is not read" if key.value == "<<" else "appears twice"
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shown(key.value)} {what}", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_DIGITS = "[0-9]+(_[0-9]+)*"
# The core schema (YAML 1.2.2, section 10.3.2); beside it digits in groups, 10_000.
for _tag, _plain in (
    ("null", "~|null|Null|NULL|"),
    ("bool", "true|True|TRUE|false|False|FALSE"),
    ("int", rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+"),
    (
        "float",
        rf"[-+]?(\.{_DIGITS}|{_DIGITS}(\.({_DIGITS})?)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_plain})\Z"), None)
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    # PyYAML's own takes 010 for 8.
    lambda loader, node: int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10)),
)


def _check_size(data: Any) -> None:
    """Refuse what aliases make endless or too large: each names a part of any size."""
    count, parts = 0, [data]
    while parts:
        part = parts.pop()
        count += 1 + (len(part) // 1000 if isinstance(part, str) else 0)
        if count > MOST_VALUES:
            raise ValueError(
                f"it must hold at most {MOST_VALUES} values, aliases written out, and not itself"
            )
        if isinstance(part, (dict, list)):
            parts += [*part, *part.values()] if isinstance(part, dict) else part


def yaml_value(text: str | bytes, source: str) -> Any:
    """Return the value that YAML from `source` holds, in UTF-8 where it is bytes.

    Raises:
        ConfigError: it is not YAML, or too large.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        data = yaml.load(text, Loader=_Loader)
        _check_size(data)
    except Exception as error:  # a date such as 2024-99-99 is a ValueError, `!!bool x` a KeyError
        said = str(error).replace('"<unicode string>"', f'"{source}"')  # PyYAML's own name for it
        raise ConfigError(_cut(f"{source}: not valid YAML: {said}")) from None
    return data


def with_value(content: dict[str, Any], path: str, value: Any, source: str = "") -> dict[str, Any]:
    """Return a mapping with another value at a dotted path; what is not there is made.

    Raises:
        ConfigError: something on the path is no mapping; with `source` (a file, say) in front.

    >>> with_value({"a": {"b": 1}}, "a.c.d", 2)
    {'a': {'b': 1, 'c': {'d': 2}}}
    """
    name, _, rest = path.partition(".")
    inner = content.get(name, {})
    if rest and not isinstance(inner, dict):
        message = f"{name} must be a mapping; not {shown(inner)}"
        raise ConfigError(": ".join(filter(None, (source, path, message))))
    return content | {name: with_value(inner, rest, value, source) if rest else value}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping of names.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: cannot be read: it must be a regular file")
    try:
        data = yaml_value(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
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
    except RecursionError:
        message = "must not hold itself, nor be nested as deeply"
        raise ConfigError(": ".join(filter(None, (source, message)))) from None
    except ValidationError as error:
        items = error.errors(include_url=False)
    lines = []
    for item in items[:MOST_LINES]:
        path = ".".join(_cut(str(part)) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(_cut(": ".join(filter(None, (source, path, message)))))
    if len(items) > MOST_LINES:
        lines.append(f"and {len(items) - MOST_LINES} more")
    raise ConfigError("\n".join(lines))


def _cut(text: str) -> str:
    """Return the text without its middle where it is long."""
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT // 2]} ... {text[-200:]}"
