"""One run's configuration: its identity, its way through JSON, its ranges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from itertools import product
from types import SimpleNamespace

import pytest

from repeatlab.core.schema import ConfigError, parse
from repeatlab.methods.schedules import SCHEDULES
from repeatlab.repetition.mappings import MAPPINGS
from repeatlab.tasks import TASKS, VERSIONS
from repeatlab.tasks.optimization import OPTIMIZERS
from repeatlab.training.config import MethodConfig, RunConfig

BASE = {"task": {"name": "supervised"}, "max_updates": 100}
REQUIRED = {
    name: {field.name: 1.5 for field in fields(kind) if field.default is MISSING}
    for name, kind in MAPPINGS.items()
} | {"trace": {"counts": [3, 1, 2] * 17}}


def run_config(**fields) -> RunConfig:
    return parse(RunConfig, BASE | fields)


def mapping(name: str, **fields) -> dict:
    return {"mapping": {"name": name} | REQUIRED[name] | fields}


def refusal(**fields) -> str:
    with pytest.raises(ConfigError) as error:
        run_config(**fields)
    return str(error.value)


# --- identity -----------------------------------------------------------------------------------


def test_the_identity_ignores_the_order_of_keys_and_what_is_left_to_its_default():
    first = run_config(
        task={"name": "supervised", "lr": 0.1, "width": 8},
        method={"mapping": {"name": "linear", "t": 1.2, "max_repeats": 5}},
    )
    second = parse(
        RunConfig,
        {
            "seed": 0,
            "method": {"mapping": {"t": 1.2, "name": "linear"}},
            "max_updates": 100,
            "task": {"width": 8, "lr": 0.1, "name": "supervised"},
        },
    )
    assert first.run_id == second.run_id
    assert len(first.run_id) == 16
    assert int(first.run_id, 16) >= 0


def test_the_identity_is_the_same_in_another_process():
    config = run_config(method=mapping("linear"))
    code = (
        "import json, sys; from repeatlab.training.config import RunConfig;"
        "print(RunConfig.from_json(json.loads(sys.argv[1])).run_id)"
    )
    command = [sys.executable, "-c", code, json.dumps(config.to_json())]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == config.run_id


def test_the_identity_changes_with_every_field():
    task = {"name": "supervised"}
    different = [
        {},
        *({"task": task | change} for change in [
            {"dataset": "mnist"},
            {"model": "resnet18"},
            {"width": 17},
            {"lr": 1.1e-3},
            *({"optimizer": {"name": name}} for name in OPTIMIZERS if name != "momentum"),
            {"optimizer": {"name": "momentum", "momentum": 0.8}},
            {"optimizer": {"name": "momentum", "weight_decay": 1e-4}},
            {"clip_norm": 1.0},
            {"ema_decay": 0.9},
            {"label_smoothing": 0.1},
            {"precision": "bfloat16"},
            {"channels_last": True},
            {"compile": True},
            {"batch_size": 63},
            {"augment": False},
        ]),
        *({"method": mapping(name)} for name in MAPPINGS),
        *({"method": {"schedule": {"name": name}}} for name in SCHEDULES),
        {"method": mapping("linear", t=1.6)},
        {"method": mapping("linear", t="auto")},
        {"method": mapping("linear", max_repeats=4)},
        {"method": mapping("linear") | {"schedule": {"name": "cosine"}}},
        {"method": {"fresh_views": True}},
        {"max_updates": 101},
        {"seed": 1},
        {"evaluation": {"every": 999}},
        {"evaluation": {"splits": ["train"]}},
        {"evaluation": {"test": False}},
        {"calibration": {}},
        {"calibration": {"updates": 499}},
        {"calibration": {"target_repeats": 2.5}},
        {"device": "cpu"},
        {"threads": 2},
    ]  # fmt: skip
    identities = [run_config(**fields).run_id for fields in different]
    assert len(set(identities)) == len(different)


def test_the_identity_changes_with_the_version_of_the_records(monkeypatch):
    before = run_config().run_id
    monkeypatch.setattr("repeatlab.training.config.RECORD_VERSION", -1)
    assert run_config().run_id != before


def test_the_identity_changes_with_the_declared_version_of_the_task(monkeypatch):
    names = ("supervised", "unsupervised")
    before = {name: run_config(task={"name": name}).run_id for name in names}
    monkeypatch.setitem(VERSIONS, "supervised", VERSIONS["supervised"] + 1)
    after = {name: run_config(task={"name": name}).run_id for name in names}
    assert after["supervised"] != before["supervised"]
    assert after["unsupervised"] == before["unsupervised"]


def test_versions_are_declared_for_tasks_that_there_are():
    assert VERSIONS.keys() <= TASKS.keys()  # any other is known by its source
    assert all(type(number) is int and number >= 1 for number in VERSIONS.values())


OWN = """
from typing import Literal
from repeatlab.tasks.supervised import Supervised, SupervisedConfig

class OwnConfig(SupervisedConfig):
    name: Literal["own"] = "own"

class Own(Supervised):
    Config = OwnConfig
    # SAYS
"""
IDENTITY = """
import sys
from repeatlab.core.schema import parse
from repeatlab.tasks import TASKS
from repeatlab.training.config import RunConfig

TASKS["own"] = "own:Own"
data = {"task": {"name": "own"}, "max_updates": 3}
print(parse(RunConfig, data).run_id)
# As an editor leaves it behind a session's back, which goes on with what it has loaded.
open(sys.argv[1], "a").write("# later")
print(parse(RunConfig, data).run_id)
"""


def test_other_code_of_a_task_of_one_s_own_is_another_run(tmp_path):
    def identities(says: str) -> list[str]:
        source = tmp_path / "own.py"
        source.write_text(OWN.replace("SAYS", says))
        command = [sys.executable, "-B", "-c", IDENTITY, str(source)]
        paths = os.pathsep.join([str(tmp_path), *sys.path])
        environment = os.environ | {"PYTHONPATH": paths}
        printed = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        )
        return printed.stdout.split()

    first, other, again = identities("one"), identities("two"), identities("one")
    assert first[0] == first[1] == again[0] != other[0]


def test_a_task_whose_source_nobody_can_read_is_refused(monkeypatch):
    space: dict = {"__name__": "typed"}
    exec(OWN, space)
    monkeypatch.setitem(sys.modules, "typed", SimpleNamespace(**space))
    monkeypatch.setitem(TASKS, "own", "typed:Own")
    with pytest.raises(ValueError, match="task: the source of Own must be readable"):
        _ = parse(RunConfig, {"task": {"name": "own"}, "max_updates": 3}).run_id


@pytest.mark.parametrize(("name", "schedule"), [*product([None, *MAPPINGS], [None, *SCHEDULES])])
def test_json_gives_back_every_combination_of_mapping_and_schedule(name, schedule):
    method = (mapping(name) if name else {}) | (
        {"schedule": {"name": schedule}} if schedule else {}
    )
    config = run_config(method=method)
    data = json.loads(json.dumps(config.to_json()))
    again = parse(RunConfig, data)
    assert again == config
    assert again.run_id == config.run_id
    if name:
        assert data["method"]["mapping"]["name"] == name
        assert type(again.method.mapping.build()) is MAPPINGS[name]
    if schedule:
        assert again.method.schedule.build() == SCHEDULES[schedule]()


def test_configurations_that_differ_in_the_mapping_alone_are_not_equal():
    assert run_config(method=mapping("linear")) != run_config(method=mapping("threshold"))


# --- t: auto ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (name, field)
        for name, target in MAPPINGS.items()
        for field in target.__dataclass_fields__
        if field != "seed"
    ],
)
def test_auto_is_understood_for_calibrated_fields_alone(name, field):
    method = mapping(name, **{field: "auto"})
    if (name, field) in {("threshold", "t"), ("linear", "t"), ("until", "t")}:
        assert run_config(method=method).method.calibrated
    else:
        assert f"method.mapping.{field}: " in refusal(method=method)


def test_only_auto_needs_a_calibration():
    assert not MethodConfig().calibrated
    assert not run_config(method=mapping("linear", t=2)).method.calibrated
    assert "or 'auto'; not 'automatic'" in refusal(method=mapping("linear", t="automatic"))


def test_the_ranges_of_the_other_fields_are_checked_beside_auto():
    message = refusal(method=mapping("linear", t="auto", max_repeats=0))
    assert message.startswith("method.mapping: max_repeats must be")


# --- ranges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_updates": 0}, "max_updates: "),
        ({"max_updates": -1}, "max_updates: "),
        ({"seed": -1}, "seed: "),
        ({"threads": 0}, "threads: "),
        ({"device": "gpu"}, "device: "),
        ({"evaluation": {"every": 0}}, "evaluation.every: "),
        ({"evaluation": {"splits": ["train", "test"]}}, "evaluation.splits.1: "),
        ({"calibration": {"updates": 0}}, "calibration.updates: "),
        ({"calibration": {"target_repeats": 1.0}}, "calibration.target_repeats: "),
        ({"task": {"name": "supervised", "lr": 0.0}}, "task.lr: "),
        (
            {"task": {"name": "supervised", "optimizer": {"name": "momentum", "momentum": 1.0}}},
            "task.optimizer: momentum must be",
        ),
        (
            {"task": {"name": "supervised", "optimizer": {"name": "sgd", "weight_decay": -0.1}}},
            "task.optimizer: weight_decay must be",
        ),
        ({"task": {"name": "supervised", "batch_size": 0}}, "task.batch_size: "),
        ({"task": {"name": "supervised", "width": 0}}, "task.width: "),
        ({"task": "supervised"}, "task: must be a mapping with the key 'name'"),
        ({"task": {}}, "task: must be a mapping with the key 'name'"),
        ({"method": mapping("linear", t=0)}, "method.mapping: t must be"),
        ({"method": mapping("linear", t=-1.5)}, "method.mapping: t must be"),
        ({"method": mapping("threshold", t=0.0)}, "method.mapping: t must be"),
        ({"method": mapping("threshold", t=float("nan"))}, "method.mapping.t: "),
        ({"method": mapping("threshold", t=10**400)}, "method.mapping.t: "),
        ({"method": mapping("threshold", repeats=0)}, "method.mapping: repeats must be"),
        ({"method": mapping("constant", repeats=0)}, "method.mapping: repeats must be"),
        ({"method": mapping("uniform", low=3, high=2)}, "method.mapping: low must not exceed high"),
        ({"method": mapping("control_limit", k=-1.0)}, "method.mapping: k must be"),
        ({"method": mapping("quantile", levels=[])}, "method.mapping: levels must be"),
        ({"method": mapping("zscore", window=0)}, "method.mapping: window must be"),
        ({"method": mapping("trace", counts=[1, 0])}, "method.mapping: counts[1] must be"),
        ({"method": mapping("uniform", seed=3)}, "method.mapping.seed: unknown key"),
        ({"method": {"schedule": {"name": "cosine", "final": 2.0}}}, "method.schedule: final must"),
        ({"method": {"schedule": {"name": "exponential", "k": 0}}}, "method.schedule: k must be"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(fields, named):
    lines = refusal(**fields).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(named)


LINEAR = {"name": "linear", "t": 1.0}
OF = {"mapping": {"name": "trace", "of": {"mapping": LINEAR}}}


@pytest.mark.parametrize("size", [10**9 + 1, 10**30], ids=["1e9", "1e30"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (lambda n: {"seed": n * 2**63}, "seed: must be at most 9223372036854775807; not "),
        (lambda n: {"max_updates": n}, "max_updates: must be at most 1000000000; not "),
        (lambda n: {"threads": n}, "threads: "),
        (lambda n: {"task": {"name": "supervised", "width": n}}, "task.width: must be at most "),
        (lambda n: {"task": {"name": "unsupervised", "latent": n}}, "task.latent: must be at "),
        (lambda n: {"task": {"name": "reinforcement", "hidden": [64, n]}}, "task.hidden: must "),
        (lambda n: {"task": {"name": "reinforcement", "capacity": n}}, "task.capacity: must be "),
        (lambda n: {"method": mapping("zscore", window=n)}, "method.mapping.window: must be at "),
        (lambda n: {"method": mapping("quantile", window=n)}, "method.mapping.window: must be "),
        (lambda n: {"method": mapping("constant", repeats=n)}, "method.mapping.repeats: must be "),
        (
            lambda n: {"method": {"mapping": OF["mapping"] | {"control": "spaced", "gap": n}}},
            "method.mapping.gap: must be at most 1000000; not ",
        ),
        (
            lambda n: {"method": {"mapping": OF["mapping"] | {"control": "windowed", "window": n}}},
            "method.mapping.window: must be at most 1000000; not ",
        ),
        (
            lambda n: {"method": {"sampler": {"name": "importance", "presample": n}}},
            "method.sampler.presample: must be at most ",
        ),
        (lambda n: {"loader": {"delay_ms": float(n) if n < 10**300 else 1e300}}, "loader.delay_ms"),
        (lambda n: {"evaluation": {"keep": n}}, "evaluation.keep: must be at most "),
    ],
)  # fmt: skip
def test_a_size_without_bounds_is_named(fields, named, size):
    (line,) = refusal(**fields(size)).splitlines()
    assert line.startswith(named)
    assert len(line) < 250


@pytest.mark.parametrize(
    ("method", "target", "most"),
    [
        (mapping("linear", t="auto", max_repeats=5), 5.0, 5),
        (mapping("linear", t="auto", max_repeats=5), 1e300, 5),
        (mapping("linear", t="auto", max_repeats=2), None, 2),
        ({"mapping": {"name": "trace", "of": mapping("linear", t="auto", max_repeats=3)}}, 3.5, 3),
    ],
)
def test_a_target_that_the_mapping_cannot_meet_is_refused_before_the_calibration(
    method, target, most
):
    calibration = {} if target is None else {"calibration": {"target_repeats": target}}
    message = (
        f"calibration.target_repeats: must be less than the mapping's max_repeats, {most}; not"
    )
    assert refusal(method=method, **calibration).startswith(message)


@pytest.mark.parametrize("name", ["linear", "threshold", "until"])
def test_a_target_concerns_the_calibrated_linear_mapping_alone(name):
    t = {"t": 1.0} if name == "linear" else {"t": "auto"}
    assert run_config(method=mapping(name, **t), calibration={"target_repeats": 100.0})
    assert run_config(
        method=mapping("linear", t="auto", max_repeats=5), calibration={"target_repeats": 4.999}
    )


@pytest.mark.parametrize("apply", ["repeat", "fresh_samples"])
def test_a_trace_that_ends_before_the_run_is_refused_with_both_numbers(apply):
    fields = {"task": {"name": "reinforcement"}, "max_updates": 7}
    method = mapping("trace", counts=[3, 1, 2]) | {"apply": apply}
    assert refusal(**fields, method=method) == (
        "method.mapping.counts: they end after 6 updates, before max_updates: 7"
    )
    enough = mapping("trace", counts=[3, 1, 9]) | {"apply": apply}  # the last one is cut to T
    assert run_config(**fields, method=enough).max_updates == 7


def test_a_configuration_cannot_be_changed():
    config = run_config()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
