"""Any configuration is refused with its field's name, or it works.

Valid configurations of every task and method are changed at random: values, keys, whole parts taken
from another one, and the text that they are written as. What is accepted must come back from JSON,
build all of its parts and, where it is small enough, train.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from every_method import METHODS, config
from hypothesis import given, settings
from hypothesis import strategies as st

from repeatlab.core.schema import ConfigError, parse, read_yaml
from repeatlab.repetition.mappings import Mapping
from repeatlab.repetition.repeater import BatchRepeater
from repeatlab.studies.study import Study
from repeatlab.tasks import TASKS
from repeatlab.training.config import RunConfig, TraceConfig
from repeatlab.training.making import train
from repeatlab.training.visits import build_mapping

TASK_NAMES = ("supervised", "semisupervised", "selfsupervised", "reinforcement", "unsupervised")
TASK_NAMES += ("generative",)
JUNK = (None, True, False, 0, 1, -1, 2, 3, 7, 10**30, 0.0, -0.0, 0.5, 1.0, 1.5, 1e-3, 1e308)
JUNK += (5e-324, float("nan"), float("inf"), "", "auto", "1", "linear", "name", "{x}", [], [1])
JUNK += ([0.5], ["train"], ["x", 1], {}, {"name": "linear"}, {"name": None}, {"a": 1}, b"x", 1j)
# What a run on this machine, in this test's time, may ask for at most.
LARGEST = 64
SLOW_OR_ABSENT = ("cuda", "mps", "mnist", "cifar10", "stl10", "resnet18", "float16", "bfloat16")
SEEDS = st.integers(0, 2**64 - 1)


@cache
def valid_runs_by_name() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the configuration of every task and method that the task does not refuse."""
    found = {}
    for name, method in product(TASK_NAMES, METHODS):
        try:
            run = config(name, method).to_json()
        except ConfigError:
            continue
        run["task"] = {"name": name, "batch_size": 16}
        if method == "trace":  # just enough for T: a change may leave too few
            run["method"]["mapping"]["counts"] = [2, 1]
        found[name, method] = run | {"max_updates": 3, "device": "cpu"}
    return found


def valid_runs() -> list[dict[str, Any]]:
    """Return the configurations of `valid_runs_by_name`."""
    return list(valid_runs_by_name().values())


def valid_study(chance: random.Random) -> dict[str, Any]:
    """Return the fields of a small study."""
    runs = chance.sample(valid_runs(), 3)
    return {
        "name": "fuzzed",
        "tasks": {run["task"]["name"]: run["task"] for run in runs},
        "methods": {f"arm{number}": run["method"] for number, run in enumerate(runs)},
        "seeds": chance.choice([1, [0, 3]]),
        "max_updates": 3,
        "evaluation": {"every": 2, "splits": ["train"], "test": False},
        "calibration": {"updates": 3},
    }


def places(data: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of the tree."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for key, value in items:
        found.append((data, key))
        if isinstance(value, (dict, list)):
            found += places(value)
    return found


def mutated(data: dict[str, Any], chance: random.Random, *, other: dict[str, Any]) -> dict:
    """Return `data` with one to three changes, some of them parts of `other`."""
    data = deepcopy(data)
    for _ in range(chance.choice([1, 1, 2, 3])):
        container, key = chance.choice(places(data))
        donor, donor_key = chance.choice(places(other))
        same = [c[k] for c, k in places(other) if k == key]
        kind = chance.randrange(6)
        if kind == 0:
            container[key] = deepcopy(chance.choice(JUNK))
        elif kind == 1 and isinstance(container[key], (int, float)):
            factor = chance.choice([-1, 0, 0.1, 1.0000001, 2, 10])
            container[key] = type(container[key])(container[key] * factor)
        elif kind == 2 and same:
            container[key] = deepcopy(chance.choice(same))
        elif kind == 3 and isinstance(container, dict):
            container[chance.choice([f"{key}x", str(donor_key), "x"])] = container.pop(key)
        elif kind == 4:
            container.pop(key)
        elif isinstance(container, dict):
            container[donor_key] = deepcopy(donor[donor_key])
        if not data:
            break
    return data


def refusal_names_a_field(error: ConfigError, model: type, data: dict[str, Any]) -> None:
    """Hold every line of a refusal to naming a field of the model, or a key that is none."""
    known = {*model.model_fields, *map(str, data)}
    for line in str(error).splitlines():
        path, found, message = line.partition(": ")
        assert found, line
        assert message, line
        assert any(path == name or path.startswith((f"{name}.", f"{name} ")) for name in known), (
            line
        )


def parsed(model: type, data: dict[str, Any]) -> Any | None:
    """Return the model, or None where it is refused, as it should be."""
    try:
        return parse(model, data)
    except ConfigError as error:
        refusal_names_a_field(error, model, data)
        return None


def hold_to_its_word(run: RunConfig) -> None:
    """Build whatever of an accepted run does not need its data."""
    text = json.dumps(run.to_json(), allow_nan=False)
    again = RunConfig.from_json(json.loads(text))
    assert again == run
    assert again.run_id == run.run_id
    mapping = run.method.mapping
    if mapping is not None and not (isinstance(mapping, TraceConfig) and mapping.of is not None):
        counts = build_mapping(run, t=1.0)
        assert counts.most >= 1
        if run.max_updates <= LARGEST:
            all_visits(counts, run.max_updates)
    if run.method.schedule is not None:
        schedule = run.method.schedule.build()
        assert all(0 <= schedule(u, run.max_updates) <= 1 for u in (0, run.max_updates - 1))
    if run.method.sampler is not None:
        run.method.sampler.build()


def all_visits(mapping: Mapping, max_updates: int) -> None:
    """Ask a mapping for every N that a run of this length may need."""
    repeater = BatchRepeater([None], mapping, max_updates=max_updates)
    for _ in repeater:
        repeater.report(1.0)
    assert len(repeater.drain()["update"]) == max_updates


def affordable(run: RunConfig) -> bool:
    """Whether the run needs nothing large, slow or absent."""
    data = run.to_json()
    leaves = [container[key] for container, key in places(data)]
    sizes = [c[k] for c, k in places(data) if k != "seed" and type(c[k]) in (int, float)]
    return (
        not any(leaf in SLOW_OR_ABSENT for leaf in leaves if isinstance(leaf, str))
        and run.task.batch_size <= LARGEST
        and run.max_updates <= LARGEST
        and run.threads == 1
        and run.loader.delay_ms <= LARGEST
        and (run.calibration is None or run.calibration.updates <= LARGEST)
        and getattr(run.method.sampler, "holdout_updates", 0) <= LARGEST
        and all(abs(size) <= 1e5 for size in sizes)
    )


def trained(run: RunConfig, runs: Path) -> None:
    """Train an accepted run: it completes, or its losses are not finite."""
    try:
        assert train(run, runs).status["status"] in ("complete", "diverged")
    except RuntimeError as error:
        # What a run needs may diverge, and says so.
        assert "diverged" in str(error)  # noqa: PT017


def one_run(seed: int) -> RunConfig | None:
    """Return the run that a random change of a valid one gives, if it is accepted."""
    chance = random.Random(seed)
    base, other = chance.sample(valid_runs(), 2)
    data = mutated(base, chance, other=other)
    run = parsed(RunConfig, data)
    if run is not None:
        hold_to_its_word(run)
    return run


def one_study(seed: int) -> Study | None:
    """Return the study that a random change of a valid one gives, if it is accepted."""
    chance = random.Random(seed)
    study = parsed(Study, mutated(valid_study(chance), chance, other=valid_study(chance)))
    if study is not None and (not isinstance(study.seeds, int) or study.seeds < 100):
        for planned in study.planned():
            hold_to_its_word(planned.config)
        json.dumps(study.model_dump(mode="json", exclude_unset=True), allow_nan=False)
    return study


def one_text(seed: int, scratch: Path) -> None:
    """Change a study's YAML, character by character, and read it."""
    chance = random.Random(seed)
    text = list(yaml.safe_dump(json.loads(json.dumps(valid_study(chance)))))
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(text))
        snippet = chance.choice([*":-[]{}&*!|>'\"#%@,\n\t 0e.", "\n  ", "name: ", "1e400", "\0"])
        text[place : place + chance.randrange(3)] = chance.choice([snippet, "", text[place] * 2])
    scratch.write_text("".join(text), encoding="utf-8")
    try:
        data = read_yaml(scratch)
    except ConfigError as error:
        assert str(error).startswith(f"{scratch}: ")  # noqa: PT017
        return
    parsed(Study, data)


@pytest.mark.parametrize("kind", ["tasks", "methods"])
@pytest.mark.parametrize(
    "name",
    ["a$x^{$", "\ud800", "a/b", "..", ".", " ", "", "a\nb", "a\\b", "\x00", "\u200b", "x" * 101],
    ids=ascii,
)
def test_a_name_that_breaks_figures_or_files_is_refused(kind, name):
    data = valid_study(random.Random(0))
    data[kind] = {name: next(iter(data[kind].values()))}
    with pytest.raises(ConfigError) as error:
        parse(Study, data)
    message = str(error.value)
    assert message.startswith(f"{kind}.")
    assert "a name must be at most 100 printable characters without '/', '\\' and '$'" in message


def test_names_may_say_what_they_stand_for():
    data = valid_study(random.Random(0))
    names = ("standard", "linear t=1.2, max 5", "lr=1e-3 (half)", "学习率", "β ≥ 0.5", "1")
    for name in names:
        data["methods"] = {name: {}}
        assert list(parse(Study, data).methods) == [name]


@pytest.mark.parametrize("seeds", [10**9, 10**30, 0, -1, [], [1, 1], [2**63], True, [0, -1]])
def test_seeds_that_eat_the_memory_or_the_record_are_refused(seeds):
    data = valid_study(random.Random(0)) | {"seeds": seeds}
    with pytest.raises(ConfigError, match=r"^seeds: must be a count of at least 1 and at most 1"):
        parse(Study, data)


def test_every_task_and_method_is_a_start():
    for data in valid_runs():
        hold_to_its_word(parse(RunConfig, data))
    assert {data["task"]["name"] for data in valid_runs()} == set(TASK_NAMES) <= set(TASKS)


@pytest.mark.parametrize("method", METHODS)
def test_a_number_changed_alone_names_its_field_or_works(method):
    """One up, one down, twice and half: what random changes seldom meet in a run that is short."""
    runs = valid_runs_by_name()
    base = next(run for (_, made_by), run in runs.items() if made_by == method)
    tried = 0
    for number, (container, key) in enumerate(places(base)):
        value = container[key]
        if type(value) not in (int, float):
            continue
        for changed in (value + 1, value - 1, 2 * value, type(value)(value / 2)):
            data = deepcopy(base)
            there, _ = places(data)[number]
            there[key] = changed
            run = parsed(RunConfig, data)
            tried += 1
            if run is not None:
                hold_to_its_word(run)
    assert tried >= 4 * 6  # batch size, T, seed, evaluation, delay, threads


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS)
def test_a_changed_run_names_its_bad_field_or_works(seed):
    one_run(seed)


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_a_changed_study_names_its_bad_field_or_works(seed):
    one_study(seed)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed") / "study.yaml"


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_a_changed_text_names_its_file_or_its_bad_field(seed, scratch):
    one_text(seed, scratch)


def test_what_is_accepted_trains(tmp_path):
    made = 0
    for seed in range(10_000):
        run = one_run(seed)
        if run is not None and affordable(run):
            trained(run, tmp_path / str(made))
            made += 1
        if made == 8:
            break
    assert made == 8
