"""Strict reading: YAML as people write it, and every bad field named at once."""

from __future__ import annotations

import math
import os
import tracemalloc
from copy import deepcopy
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repeatlab.core.schema import ConfigError, counted, did_you_mean, parse, read_yaml
from repeatlab.training.config import RunConfig

VALID = {
    "task": {
        "name": "supervised",
        "dataset": "digits",
        "model": "cnn",
        "width": 8,
        "lr": 0.1,
        "optimizer": {"name": "momentum", "momentum": 0.9, "weight_decay": 0.0},
        "batch_size": 32,
        "augment": True,
    },
    "method": {
        "mapping": {"name": "linear", "t": 1.2, "max_repeats": 5},
        "schedule": {"name": "step", "gamma": 0.1, "milestones": [0.5, 0.75]},
        "fresh_views": False,
    },
    "max_updates": 100,
    "seed": 0,
    "evaluation": {"every": 10, "splits": ["train"], "test": True},
    "calibration": {"updates": 50, "target_repeats": 2.0},
    "device": "cpu",
    "threads": 1,
}


def get(data: Any, path: tuple) -> Any:
    for part in path:
        data = data[part]
    return data


def changed(path: tuple, value: Any) -> dict[str, Any]:
    """Return `VALID` with `value` at `path`."""
    data = deepcopy(VALID)
    get(data, path[:-1])[path[-1]] = value
    return data


def renamed(path: tuple, name: str) -> dict[str, Any]:
    """Return `VALID` with the key at the end of `path` called `name`."""
    data = deepcopy(VALID)
    parent = get(data, path[:-1])
    parent[name] = parent.pop(path[-1])
    return data


def paths(data: Any, prefix: tuple = ()) -> list[tuple]:
    """Return the path of every key and list item at every depth."""
    if isinstance(data, dict):
        items = list(data.items())
    else:
        items = list(enumerate(data)) if isinstance(data, list) else []
    found = []
    for key, value in items:
        found += [(*prefix, key), *paths(value, (*prefix, key))]
    return found


def refusal(data: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse(RunConfig, data)
    return str(error.value)


# --- YAML ---------------------------------------------------------------------------------------


def read(tmp_path: Path, content: str | bytes) -> dict[str, Any]:
    path = tmp_path / "some params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E+5", 1e5),
        ("-2e3", -2000.0),
        ("+2e3", 2000.0),
        ("1.5e3", 1500.0),
        ("1.e3", 1000.0),
        (".5e1", 5.0),
        ("0.25", 0.25),
        ("-.5", -0.5),
        ("3.", 3.0),
    ],
)
def test_numbers_with_an_exponent_are_floats(tmp_path, text, value):
    found = read(tmp_path, f"a: {text}\nb: [{text}]")
    assert found == {"a": value, "b": [value]}
    assert type(found["a"]) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-7", -7),
        ("+12", 12),
        ("010", 10),  # YAML 1.1: 8
        ("0o10", 8),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1:30", "1:30"),  # YAML 1.1: 90
        ("1_000", 1000),  # no part of that schema, and nothing else
        ("1_000e2", 1e5),
        ("1__0", "1__0"),
        ("_1", "_1"),
        ("True", True),
        ("FALSE", False),
        *((word, word) for word in ("yes", "no", "on", "off", "Y", "n", "No", "tRue")),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-02", "2024-01-02"),
        ("'1e-3'", "1e-3"),
        ("e3", "e3"),
        ("1e", "1e"),
        ("1e-3x", "1e-3x"),
        ("resnet18", "resnet18"),
        ("-e-", "-e-"),
        ("...e5", "...e5"),
    ],
)
def test_plain_words_mean_what_the_core_schema_of_yaml_1_2_says(tmp_path, text, value):
    found = read(tmp_path, f"a: {text}\nb: [{text or '~'}]")
    assert found == {"a": value, "b": [value]}
    assert type(found["a"]) is type(value)


def test_a_method_may_be_called_no_and_a_switch_is_not_turned_by_it(tmp_path):
    assert read(tmp_path, "no: {}\n1e3x: {}\non: {}") == {"no": {}, "1e3x": {}, "on": {}}
    data = VALID | {"task": {"name": "supervised"} | read(tmp_path, "augment: no")}
    assert refusal(data).endswith("not 'no'; write true or false")


def test_nan_and_infinity_arrive_as_floats_for_the_models_to_refuse(tmp_path):
    found = read(tmp_path, "a: .nan\nb: -.inf\nc: 1e999")
    assert math.isnan(found["a"])
    assert found["b"] == -math.inf
    assert found["c"] == math.inf


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' appears twice"),
        ("x:\n  deep:\n    a: 1\n    a: 1", "the key 'a' appears twice"),
        ("- a\n- b", "must hold a mapping"),
        ("just text", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("1: one", "must hold a mapping of names"),
        ("a: [1, 2", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("a: !!timestamp 2024-99-99", "not valid YAML"),
        ("a: !!int 0b11", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp soon", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: " + 5000 * "[", "not valid YAML"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe\x00", "not valid YAML"),
        (b"a: \x00", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, content, reason):
    with pytest.raises(ConfigError, match=r"some params\.yaml: ") as error:
        read(tmp_path, content)
    assert reason in str(error.value)
    assert "<unicode string>" not in str(error.value)


def test_where_yaml_is_not_valid_is_said_with_the_file_s_name(tmp_path):
    with pytest.raises(ConfigError, match=r'in ".*some params\.yaml", line 2, column 4'):
        read(tmp_path, "a: 1\n  b: 2")


@pytest.mark.parametrize(
    ("count", "what", "text"),
    [(1, "run", "1 run"), (0, "run", "0 runs"), (2, "study", "2 studies")],
)
def test_one_is_singular(count, what, text):
    assert counted(count, what) == text


BOMB = "x0: &x0 {k: v}\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
LONG = f"a: &a {100_000 * 'x'}\nb: [{1100 * '*a,'}]"


@pytest.mark.parametrize("text", [BOMB, LONG])
def test_what_aliases_blow_up_is_refused_before_it_is_built(tmp_path, text):
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"must hold at most 100000 values"):
            read(tmp_path, text)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2000 * max(len(text), 1e4)


@pytest.mark.parametrize(
    "text", ["methods: {standard: &x {mapping: {of: *x}}}", "a: &a [1, *a]", "&a {b: {c: *a}}"]
)
def test_what_holds_itself_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="and not itself"):
        read(tmp_path, text)


def test_data_that_hold_themselves_are_refused_as_well():
    mapping: dict[str, Any] = {"name": "trace"}
    mapping["of"] = {"mapping": mapping}
    assert "must not hold itself" in refusal(VALID | {"method": {"mapping": mapping}})


def test_a_key_given_twice_is_found_in_linear_time(tmp_path):
    def seconds(count: int) -> float:
        text = "a: {" + "".join(f"k{i}: 1, " for i in range(count)) + "k0: 2}"
        start = perf_counter()
        with pytest.raises(ConfigError, match="'k0' appears twice"):
            read(tmp_path, text)
        return perf_counter() - start

    seconds(10)
    # Eight times as many: 64 times as long, were each compared with all before it.
    assert seconds(16_000) < 30 * seconds(2_000)


def test_a_merge_key_is_refused_and_an_alias_is_read(tmp_path):
    with pytest.raises(ConfigError, match="the key '<<' is not read"):
        read(tmp_path, "a: &a {x: 1}\nb: {<<: *a, y: 2}")
    assert read(tmp_path, "a: &a {x: 1}\nb: *a") == {"a": {"x": 1}, "b": {"x": 1}}


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: it must be a regular file"):
            read_yaml(path)


def test_a_message_is_short_whatever_it_is_about():
    long = {f"name{i}": ["x" * 10_000] * 50 for i in range(3000)}
    for data in (
        VALID | {"method": {"mapping": long}},
        VALID | {"task": "x" * 10**6},
        VALID | {"task": {"name": "x" * 10**6}},
        VALID | {"seed": long},
        VALID | {"seed": 10**4000},
        VALID | long,
        VALID | {"x" * 10**6: 1},
    ):
        message = refusal(data)
        assert len(message) < 10_000
        assert len(message.splitlines()) < 30
    assert "and 2980 more" in refusal(VALID | long)


def test_the_line_of_a_key_given_twice_is_named(tmp_path):
    with pytest.raises(ConfigError, match="line 3"):
        read(tmp_path, "a: 1\nb: 2\na: 3")


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError) as error:
            read_yaml(path)
        assert str(error.value).startswith(f"{path}: cannot be read: ")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("yaml") / "fuzzed.yaml"


SNIPPETS = ("a", "b: ", "c", ": ", "\n", "  ", "- ", "&x ", "*x", "<<: ", "!!int ", "!!float ")
SNIPPETS += ("!!binary ", "{", "}", "[", "]", ", ", "'", '"', "1", "e", "-", ".", "_", "0b", "?")


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.binary(), st.lists(st.sampled_from(SNIPPETS)).map(lambda s: "".join(s).encode()))
)
def test_any_bytes_are_read_or_refused_with_the_file_s_name(scratch, content):
    scratch.write_bytes(content)
    try:
        data = read_yaml(scratch)
    except ConfigError as error:
        assert str(error).startswith(f"{scratch}: ")  # noqa: PT017
    else:
        assert all(isinstance(key, str) for key in data)


# --- models -------------------------------------------------------------------------------------


def test_the_valid_configuration_is_valid():
    config = parse(RunConfig, VALID)
    assert config.method.mapping.t == 1.2
    assert config.method.schedule.milestones == (0.5, 0.75)


@pytest.mark.parametrize(
    ("path", "typo"),
    [
        (("max_updates",), "max_update"),
        (("task", "width"), "widht"),
        (("task", "batch_size"), "batchsize"),
        (("method", "schedule"), "shedule"),
        (("method", "mapping", "max_repeats"), "max_repeat"),
        (("method", "schedule", "milestones"), "milestone"),
        (("evaluation", "every"), "evry"),
        (("calibration", "target_repeats"), "target_repeat"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(path, typo):
    line = f"{'.'.join((*path[:-1], typo))}: unknown key; did you mean '{path[-1]}'? (known: "
    assert any(found.startswith(line) for found in refusal(renamed(path, typo)).splitlines())


@pytest.mark.parametrize(
    ("path", "name", "answer"),
    [
        (("task", "name"), "supervized", "task: unknown task 'supervized'; did you mean 'superv"),
        (
            ("task", "dataset"),
            "cifar",
            "task.dataset: unknown dataset 'cifar'; did you mean 'cifar",
        ),
        (
            ("method", "mapping", "name"),
            "liner",
            "method.mapping: unknown mapping 'liner'; did you",
        ),
        (
            ("method", "schedule", "name"),
            "zzz",
            "method.schedule: unknown schedule 'zzz'; (known: ",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(path, name, answer):
    assert refusal(changed(path, name)).startswith(answer)


def test_a_name_near_none_is_answered_with_all():
    assert did_you_mean("zzz", ["b", "a"]) == "(known: a, b)"
    assert did_you_mean("linaer", ["linear", "cosine"]).startswith("did you mean 'linear'? ")


def test_all_bad_fields_are_reported_at_once_behind_the_source():
    data = changed(("task", "lr"), -1.0)
    data["task"]["widht"] = 4
    data["method"]["mapping"] |= {"t": "much", "max_repeats": 2.5}
    data["max_updates"] = 0
    data["evaluation"]["splits"] = ["test"]
    data["seed"] = "one"
    with pytest.raises(ConfigError) as error:
        parse(RunConfig, data, source="some.yaml")
    lines = str(error.value).splitlines()
    assert {line.split(": ")[1] for line in lines} == {
        "task.lr",
        "task.widht",
        "method.mapping.t",
        "method.mapping.max_repeats",
        "max_updates",
        "evaluation.splits.0",
        "seed",
    }
    assert all(line.startswith("some.yaml: ") for line in lines)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_nan_or_infinite(number):
    floats = [path for path in paths(VALID) if type(get(VALID, path)) is float]
    assert len(floats) == 8
    for path in floats:
        message = refusal(changed(path, number))
        assert all(part in message for part in path if isinstance(part, str))
        assert repr(number) in message


def test_nothing_is_converted():
    for path, value in [
        (("seed",), 1.0),
        (("seed",), True),
        (("max_updates",), "100"),
        (("task", "lr"), "0.1"),
        (("task", "lr"), True),
        (("task", "augment"), 1),
        (("method", "mapping", "t"), True),
        (("method", "mapping", "t"), b"1.5"),
    ]:
        assert refusal(changed(path, value)).startswith(".".join(path) + ": ")


def test_messages_with_braces_survive():
    assert "'{lr}'" in refusal(changed(("seed",), "{lr}"))
    assert "{oops}: unknown key" in refusal(VALID | {"{oops}": 1})


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(-(10**30), 10**30),
    st.sampled_from([10**400, -(10**400), 1e308, 5e-324, -0.0]),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.dates(),
    st.lists(st.one_of(st.floats(), st.integers(), st.text(max_size=2)), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([object(), 1j, "auto", "{x}", {1: 2}, ("a",), {"name": None}, {"name": []}]),
)
# Mutations are drawn over the whole tree, so that every field meets every kind.
ALL = paths(VALID)
KEYS = [path for path in ALL if isinstance(path[-1], str)]


def names(path: tuple) -> list[str]:
    """Return what a message about `path` must hold; a registered name stands for its mapping."""
    return [part for part in path if isinstance(part, str) and part != "name"]


def outcome(data: Any) -> str | None:
    """Return the refusal, or None for what was accepted and reads back as itself."""
    try:
        config = parse(RunConfig, data)
    except ConfigError as error:
        return str(error)
    assert parse(RunConfig, config.to_json()) == config
    return None


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(ALL), JUNK)
def test_a_field_of_any_value_is_accepted_or_named(path, value):
    message = outcome(changed(path, value))
    if message is None:
        assert not isinstance(value, (bytes, date, complex))
        assert not isinstance(value, float) or math.isfinite(value)
    else:
        assert all(name in message for name in names(path))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KEYS), st.text(max_size=6))
def test_a_renamed_key_is_named_with_its_place(path, name):
    if name in get(VALID, path[:-1]):
        return
    message = refusal(renamed(path, name))
    assert all(part in message for part in names(path[:-1]))
    assert name in message or path[-1] == "name"


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_dropped_key_has_its_default_or_is_named(path):
    data = deepcopy(VALID)
    del get(data, path[:-1])[path[-1]]
    required = {("task",), ("max_updates",), ("method", "mapping", "t")}
    message = outcome(data)
    if path in required:
        assert message == f"{'.'.join(path)}: Field required"
    elif path[-1] == "name":
        assert message.startswith(f"{'.'.join(path[:-1])}: must be a mapping with the key 'name'")
    else:
        assert message is None
