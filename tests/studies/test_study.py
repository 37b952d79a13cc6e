"""Studies: what is run, where, and what becomes of it."""

from __future__ import annotations

import json

import pytest
import torch

from repeatlab import tasks
from repeatlab.core.schema import ConfigError, parse
from repeatlab.core.seeding import derive
from repeatlab.store.records import Store
from repeatlab.studies.study import Report, Study, StudyError, run_studies, run_study
from repeatlab.training.config import RunConfig

NOT_TIMES = ["seconds", "calibration_seconds"]


def _records(study, runs):
    store = Store(runs)
    return {
        (p.method, p.seed): store.run(p.config.task.name, p.config.run_id) for p in study.planned()
    }


def _assert_same(first, second):
    """Two executions agree on everything but the time they took."""
    assert first.keys() == second.keys()
    for key, run in first.items():
        other = second[key]
        for table in ("updates", "evals"):
            mine, theirs = getattr(run, table), getattr(other, table)
            columns = mine.columns.difference(NOT_TIMES)
            assert mine[columns].equals(theirs[columns]), (key, table)
        assert run.summary["state_sha256"] == other.summary["state_sha256"]


def test_the_same_seeds_give_the_same_records_in_any_number_of_processes(small_study, tmp_path):
    study = small_study()
    for workers in (0, 1, 2):
        study.run(tmp_path / str(workers), workers=workers)
    here, one, two = (_records(study, tmp_path / str(workers)) for workers in (0, 1, 2))
    assert all(run.status == {"status": "complete"} for run in here.values())
    _assert_same(here, one)
    _assert_same(here, two)


def test_a_second_execution_trains_nothing(small_study, tmp_path):
    study = small_study()
    assert study.run(tmp_path, workers=0).trained == 6
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    report = study.run(tmp_path, workers=2)
    assert report.trained == 0
    assert set(report.status.values()) == {"complete"}
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}


def test_a_run_s_identity_is_found_out_once(small_study, tmp_path, monkeypatch):
    small_study().run(tmp_path, workers=0)
    write, written = RunConfig.to_json, []

    def counted(config):
        written.append(config)
        return write(config)

    monkeypatch.setattr(RunConfig, "to_json", counted)
    assert small_study().run(tmp_path, workers=0).trained == 0
    assert len(written) == 6


def test_a_changed_copy_of_a_configuration_has_an_identity_of_its_own(small_study):
    config = small_study().planned()[0].config
    before = config.run_id
    copy = config.model_copy(update={"seed": 7})
    assert copy.run_id == RunConfig.from_json(config.to_json() | {"seed": 7}).run_id != before
    assert config.run_id == before


def test_only_what_is_missing_is_trained(small_study, tmp_path):
    small_study(seeds=1).run(tmp_path, workers=0)
    assert small_study(seeds=2).run(tmp_path, workers=0).trained == 3


def test_a_run_that_two_studies_need_is_made_once(small_study, tmp_path):
    studies = [small_study(), small_study(name="other", methods={"plain": {}})]
    report = run_studies(studies, tmp_path, workers=0)
    assert len(report.status) == 6
    assert Store(tmp_path).read_study("other")["runs"][0]["run"] in [
        run["run"] for run in Store(tmp_path).read_study("small")["runs"]
    ]


def test_changing_the_calibration_concerns_calibrated_arms_only(small_study):
    def ids(study):
        return {(p.method, p.seed): p.config.run_id for p in study.planned()}

    before, after = ids(small_study()), ids(small_study(calibration={"updates": 9}))
    assert {method for (method, seed), i in before.items() if after[method, seed] != i} == {
        "linear"
    }


def test_the_manifest_lists_every_planned_run(small_study, tmp_path):
    study = small_study(seeds=(3, 7))
    study.run(tmp_path, workers=0)
    manifest = json.loads((tmp_path / "studies" / "small.json").read_text())
    assert {(run["method"], run["seed"]) for run in manifest["runs"]} == {
        (method, seed) for method in study.methods for seed in (3, 7)
    }
    for run in manifest["runs"]:
        assert Store(tmp_path).run(*run["run"]).done


class _Fails(tasks.load_task(tasks.TASKS["supervised"])):
    """The supervised task, but the run of seed 1 breaks at its fifth update."""

    def __init__(self, config, *, seed, device):
        super().__init__(config, seed=seed, device=device)
        self.seed = seed

    def step(self, batch, report, weights=None):
        if self.seed == derive(1, "task supervised") and batch.index == 4:
            raise RuntimeError("planted")
        super().step(batch, report, weights)


def test_a_run_that_fails_takes_no_other_down(small_study, tmp_path, monkeypatch):
    monkeypatch.setattr("repeatlab.training.making.load_task", lambda target: _Fails)
    study = small_study(methods={"standard": {}}, seeds=3)
    with pytest.raises(StudyError, match=r"1 of 3 runs failed:\n.*RuntimeError: planted"):
        study.run(tmp_path, workers=0)
    status = {seed: run.status for (_, seed), run in _records(study, tmp_path).items()}
    assert status[0] == status[2] == {"status": "complete"}
    assert status[1] == {"status": "failed", "error": "RuntimeError: planted"}


def test_divergence_is_a_result(small_study, tmp_path):
    study = small_study(
        tasks={"digits": {"name": "supervised", "lr": 1e12}}, methods={"standard": {}}, seeds=1
    )
    report = study.run(tmp_path, workers=0)
    assert list(report.status.values()) == ["diverged"]
    (run,) = _records(study, tmp_path).values()
    assert not torch.isfinite(torch.tensor(run.updates["loss"].iloc[-1]))
    assert run.summary["update"] == run.updates["update"].iloc[-1]


def test_missing_data_is_one_message_and_leaves_nothing(small_study, tmp_path, monkeypatch):
    monkeypatch.setenv("REPEATLAB_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr("repeatlab.data.sources.urlopen", _no_network)
    study = small_study(tasks={"mnist": {"name": "supervised", "dataset": "mnist"}})
    with pytest.raises(OSError, match=r"(?s)nowhere.*REPEATLAB_DATA"):
        study.run(tmp_path / "runs", workers=2)
    assert not list((tmp_path / "runs").glob("supervised/*"))


def _no_network(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, "name: the study name '../x' must consist of"),
        ({"methods": {}}, "methods: "),
        ({"methods": {"a": {"maping": {}}}}, "methods.a.maping: unknown key; did you mean 'map"),
        ({"tasks": {"x": {"name": "superwised"}}}, "tasks.x: unknown task 'superwised'; did you"),
        (
            {"seeds": 0},
            "seeds: must be a count of at least 1 and at most 10000, or a list",
        ),
        (
            {"seeds": [1, 1]},
            "seeds: must be a count of at least 1 and at most 10000, or a list",
        ),
        ({"seeds": []}, "seeds: must be a count"),
        ({"seeds": True}, "seeds: must be a count"),
        ({"seeds": [-1]}, "seeds: must be a count"),
        ({"max_updates": 0}, "max_updates: must be greater than or equal to 1; not 0"),
        ({"seed": 3}, "seed: unknown key; did you mean 'seeds'?"),
    ],
)
def test_bad_fields_are_named(small_study, changes, message):
    with pytest.raises(ConfigError) as error:
        small_study(**changes)
    assert str(error.value).startswith(message)


FIELDS = {
    "name": "again",
    "tasks": {"digits": {"name": "supervised", "lr": 0.05}},
    "methods": {"linear": {"mapping": {"name": "linear", "t": 1}}},
    "seeds": [4],
    "max_updates": 5,
    "evaluation": {"every": 5},
}


@pytest.mark.parametrize(
    "commits", [("abc", "abc"), ("abc", "abd"), ("a+changes.1a2b3c4d",) * 2, (None,) * 2]
)
def test_a_stored_study_is_recognised_only_by_the_code_that_made_it(tmp_path, monkeypatch, commits):
    made, asked = commits
    monkeypatch.setattr("repeatlab.studies.study.commit", lambda: made)
    assert run_study(FIELDS, tmp_path, workers=0).trained == 1
    parsed = []
    monkeypatch.setattr("repeatlab.studies.study.commit", lambda: asked)
    monkeypatch.setattr("repeatlab.studies.study.parse", lambda *a: parsed.append(a) or parse(*a))
    assert run_study(FIELDS, tmp_path, workers=0).trained == 0
    assert bool(parsed) == (commits != ("abc", "abc"))
    # What differs, or is not all there, is looked at in full.
    assert run_study(FIELDS | {"seeds": [4, 5]}, tmp_path, workers=0).trained == 1
    first, _ = Store(tmp_path).read_study("again")["runs"]
    (Store(tmp_path).run(*first["run"]).path / "summary.json").unlink()
    assert run_study(FIELDS | {"seeds": [4, 5]}, tmp_path, workers=0).trained == 1


def test_the_report_says_how_the_runs_ended():
    report = Report({"a": "complete", "b": "complete", "c": "diverged"}, trained=2)
    assert str(report) == "3 runs: 2 complete, 1 diverged (2 trained now, 1 in the store)"


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_trained(tmp_path):
    task = {"name": "supervised", "dataset": "digits", "batch_size": 5000}
    study = Study.of(name="big", tasks={"digits": task}, methods={"standard": {}}, max_updates=3)
    with pytest.raises(ConfigError, match=r"task\.batch_size: 5000 exceeds the \d+ samples"):
        run_studies([study], tmp_path)
    assert not list(tmp_path.glob("supervised/*"))


def test_more_threads_than_any_machine_has_are_refused():
    with pytest.raises(ConfigError, match="threads: must be less than or equal to 1024"):
        Study.of(
            name="many",
            tasks={"digits": {"name": "supervised"}},
            methods={"standard": {}},
            max_updates=3,
            threads=10**6,
        )
