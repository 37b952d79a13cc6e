"""`--set key=value` changes a parameter file as if the file said so."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from repeatlab.cli import main
from repeatlab.core.schema import ConfigError, parse
from repeatlab.store.records import Store
from repeatlab.studies.plan import read_plan, register
from repeatlab.studies.settings import with_settings
from repeatlab.studies.study import Study

METHODS = "standard: {}\nlinear: {mapping: {name: linear, t: 1.0, max_repeats: 4}}\n"
STUDY = """
name: tiny
tasks: {digits: {name: supervised, lr: 0.05}}
max_updates: 10
seeds: 1
evaluation: {every: 5}
methods: {include: [methods.yaml]}
"""
PLAN = """
name: tiny
seeds: 4
budgets: [0.5, 1, 2]
methods: {include: [methods.yaml]}
tasks:
  digits:
    task: {name: supervised, lr: 0.05}
    max_updates: 10
    metric: accuracy
    target: 0.9
judged: {arms: [linear], real: linear}
"""
KEYS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3)
VALUES = st.one_of(st.integers(), st.booleans(), st.none(), st.text("xyz 1.#:", max_size=5))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files of a study and of a plan, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "methods.yaml").write_text(METHODS)
    study = {"notebook": "10_supervised", "parameters": {"study": yaml.safe_load(STUDY)}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path


@pytest.fixture
def repeatlab(files, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["repeatlab", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, capsys.readouterr()

    return call


def configs(store):
    """Return method -> its run's configuration."""
    runs = store.read_study("tiny")["runs"]
    return {run["method"]: store.run(*run["run"]).config for run in runs}


def test_a_run_is_the_one_that_the_changed_file_asks_for(repeatlab, files):
    asked = ["max_updates=6", "methods.linear.mapping.t=2", "tasks.digits.lr=1e-2"]
    asked += ["methods.more={mapping: {name: constant, repeats: 2}}", "evaluation.every=3"]
    code, said = repeatlab("run", "study.yaml", "--workers=0", *(f"--set={one}" for one in asked))
    assert (code, said.out) == (0, "3 runs: 3 complete (3 trained now, 0 in the store)\n")
    content = yaml.safe_load(STUDY) | {"max_updates": 6, "evaluation": {"every": 3}}
    content["tasks"]["digits"]["lr"] = 0.01
    content["methods"] = yaml.safe_load(METHODS) | {
        "more": {"mapping": {"name": "constant", "repeats": 2}}
    }
    content["methods"]["linear"]["mapping"]["t"] = 2
    expected = {p.method: p.config.to_json() for p in parse(Study, content).planned()}
    found = configs(Store("runs"))
    assert {name: {k: config[k] for k in expected[name]} for name, config in found.items()} == (
        expected
    )


@pytest.mark.parametrize("file", ["study", "plan"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_updatess=3", "max_updatess: unknown key; "),
        ("methods.linear.mapping.tt=3", "tt: unknown key; did you mean 't'"),
        ("methods.liner.rate=3", "methods.liner: unknown key; did you mean 'linear'"),
        ("tasks.digit.lr=3", "tasks.digit: unknown key; did you mean 'digits'"),
        ("seeds=many", "seeds: "),
        ("name.first=x", "name.first: name must be a mapping; not 'tiny'"),
        ("methods={}", "methods: must have at least one; not {}"),
        ("seeds", "--set: must be KEY=VALUE; not 'seeds'"),
        ("seeds=[1", "--set seeds: not valid YAML"),
        ("=1", ": unknown key"),
    ],
)
def test_what_is_not_known_is_refused_by_its_key_and_nothing_is_written(
    repeatlab, files, file, setting, message
):
    before = sorted(files.iterdir())
    code, said = repeatlab("run", f"{file}.yaml", "--set", setting)
    assert code == 2
    assert said.err.startswith((f"Error: {file}.yaml: ", "Error: --set"))
    assert message in said.err
    assert "Traceback" not in said.err
    assert sorted(files.iterdir()) == before


def test_the_error_is_that_of_the_file(repeatlab, files):
    _, by_command = repeatlab("run", "study.yaml", "--set", "max_updatess=3")
    study = yaml.safe_load((files / "study.yaml").read_text())
    study["parameters"]["study"]["max_updatess"] = 3
    (files / "study.yaml").write_text(yaml.safe_dump(study))
    _, by_file = repeatlab("run", "study.yaml")
    assert by_command.err == by_file.err
    assert "max_updatess" in by_file.err


def test_a_registered_plan_that_is_changed_so_has_changed(repeatlab, files):
    store = Store("runs")
    registered = register(read_plan("plan.yaml"), store)
    code, said = repeatlab("run", "plan.yaml", "--set", "margin=0.2", "--set", "seeds=5")
    assert code == 2
    assert f"registered as {registered['digest']} and has changed since (margin, seeds)" in said.err
    assert store.read_plan("tiny")["digest"] == registered["digest"]
    changed = PLAN.replace("seeds: 4", "seeds: 5\nmargin: 0.2")
    amended = register(read_plan("plan.yaml", ["margin=0.2", "seeds=5"]), store, amend="why not")
    (files / "plan.yaml").write_text(changed)
    assert read_plan("plan.yaml").digest == amended["digest"]
    assert [change["reason"] for change in amended["changes"]] == ["why not"]
    # What changes nothing is no change.
    assert read_plan("plan.yaml", ["seeds=5"]).digest == amended["digest"]


def test_a_check_takes_the_task_s_own_fields_and_a_file_s(repeatlab, files):
    code, said = repeatlab("check", "supervised", "--set", "lrr=1")
    assert code == 2
    assert "task.lrr: unknown key; did you mean 'lr'" in said.err
    code, said = repeatlab("check", "study.yaml", "--set", "tasks.digits.lrr=1")
    assert code == 2
    assert "tasks.digits.lrr: unknown key; did you mean 'lr'" in said.err
    code, said = repeatlab("measure", "study.yaml", "--set", "tasks.digits.lrr=1")
    assert code == 2
    assert "tasks.digits.lrr: unknown key; did you mean 'lr'" in said.err


@given(path=KEYS, value=VALUES)
def test_one_value_is_another_and_the_given_mapping_stays_as_it_is(path, value):
    shared = {"b": {"c": 0}}
    content, twin = {"a": shared, "b": shared, "c": {}}, {"a": {"b": {"c": 0}}}
    twin |= {"b": {"b": {"c": 0}}, "c": {}}
    key, text = ".".join(path), yaml.safe_dump(value)
    try:
        found = with_settings(content, [f"{key}={text}"], "here")
    except ConfigError:
        inner = twin
        for name in path[:-1]:
            inner = inner.get(name, {})
            if not isinstance(inner, dict):
                break
        assert not isinstance(inner, dict)
        found = twin
    else:
        inner = twin
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    assert found == twin
    assert shared == {"b": {"c": 0}}
