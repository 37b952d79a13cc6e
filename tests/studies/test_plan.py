"""A plan: declared, tuned, compared, judged; nothing of it changes unseen."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from pandas.testing import assert_frame_equal

from repeatlab.analysis.frames import Records
from repeatlab.analysis.plan_tables import arms_table, plan_tables, verdicts_side_by_side
from repeatlab.analysis.plans import load_plan, pilots
from repeatlab.cli import cli
from repeatlab.core.files import StoreError
from repeatlab.core.schema import ConfigError
from repeatlab.store.exchange import export, import_runs
from repeatlab.store.records import Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.plan import choose, read_plan, register, run_plan, tuning_study, wider

HERE = Places(workers=0)
CONTENT = {
    "name": "tiny",
    "seeds": 3,
    "budgets": [0.5, 1.0, 2.0],
    "tuning": {"rates": [0.5, 1.0, 2.0], "seeds": 1, "widen": 1},
    "methods": {
        "standard": {},
        "fixed2": {"mapping": {"name": "constant", "repeats": 2}},
        "quantile": {"mapping": {"name": "quantile", "levels": [0.5], "window": 4}},
        "windowed": {"mapping": {"name": "trace", "of": "quantile", "control": "windowed"}},
    },
    "tasks": {
        "digits": {
            "task": {"name": "supervised", "dataset": "digits", "model": "mlp", "batch_size": 16},
            "max_updates": 20,
            "metric": "accuracy",
            "target": 0.3,
            "evaluation": {"every": 5},
            "grids": {"quantile": {"mapping.levels": [[0.5], [0.3]]}},
        }
    },
    "judged": {
        "arms": ["quantile", "fixed2"],
        "real": "quantile",
        "controls": ["windowed"],
        "variants": ["quantile", "fixed2"],
    },
}


def written(folder: Path, **changes) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(CONTENT | changes))
    return path


def with_task(**changes) -> dict:
    """Return the plan's tasks with other fields of the one there is."""
    return {"tasks": {"digits": CONTENT["tasks"]["digits"] | changes}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return a store in which the plan has been run."""
    folder = tmp_path_factory.mktemp("plan")
    run_plan(read_plan(written(folder)), folder / "runs", places=HERE)
    return folder / "runs"


def test_all_arms_are_tuned_with_the_same_rates_and_seeds_that_are_used_nowhere_else(done):
    plan = Store(done).read_study("tiny-digits-tuning")
    by_arm: dict[str, set] = {}
    for run in plan["runs"]:
        by_arm.setdefault(run["method"].split(" ")[0], set()).add(run["seed"])
        assert run["seed"] >= 1000
    assert by_arm == {arm: {1000} for arm in ("standard", "fixed2", "quantile")}
    rates = Store(done).read_plan("tiny")["rates"]["digits"]
    assert rates["quantile"]["trials"] in (6, 8)
    assert {rates[arm]["trials"] for arm in ("standard", "fixed2")} <= {3, 4}
    assert all(choice["updates"] == choice["trials"] * 20 for choice in rates.values())


def test_a_rate_is_the_best_of_its_grid_on_validation_and_a_control_takes_its_source_s(done):
    store = Store(done)
    plan, tuning = store.read_plan("tiny"), store.read_study("tiny-digits-tuning")
    found = {
        run["method"]: store.run(*run["run"]).summary["final"]["validation.accuracy"]
        for run in tuning["runs"]
    }
    for arm, choice in plan["rates"]["digits"].items():
        if arm == "windowed":
            continue
        tried = {k: v for k, v in found.items() if k.startswith(f"{arm} ")}
        best = max(tried, key=tried.get)
        assert tried[best] == max(tried.values())
        assert f"{arm} rate={choice['rate']:g}" in {
            k[: len(f"{arm} rate={choice['rate']:g}")] for k, v in tried.items() if v == tried[best]
        }
    own = store.read_study("tiny-digits-own")["study"]["methods"]
    assert own["windowed"].get("rate", 1.0) == own["quantile"].get("rate", 1.0)
    shared = store.read_study("tiny-digits-shared")["study"]["methods"]
    assert {method.get("rate", 1.0) for method in shared.values()} == {1.0}


def test_the_standard_arm_is_trained_at_every_budget_with_its_own_rate(done):
    store = Store(done)
    rate = store.read_plan("tiny")["rates"]["digits"]["standard"]["rate"]
    for ratio, updates in ((0.5, 10), (2, 40)):
        study = store.read_study(f"tiny-digits-budget-{ratio:g}")
        assert study["max_updates"] == updates
        configs = [store.run(*run["run"]).config for run in study["runs"]]
        assert {config["method"]["rate"] for config in configs} == {rate}


def test_a_second_run_of_a_plan_trains_nothing(done, tmp_path):
    report = run_plan(read_plan(written(tmp_path)), done, places=HERE)
    assert report.trained == 0


def test_a_plan_that_changed_is_refused_and_amended_with_a_reason_that_verdicts_show(
    done, tmp_path
):
    changed = read_plan(written(tmp_path, margin=0.2))
    with pytest.raises(
        ConfigError, match=r"tiny: it was registered as \w+ and has changed.*margin"
    ):
        register(changed, Store(done))
    other = Store(tmp_path / "other")
    register(read_plan(written(tmp_path)), other)
    register(changed, other, amend="the pilot was too small")
    (change,) = other.read_plan("tiny")["changes"]
    assert (change["fields"], change["reason"]) == ("margin", "the pilot was too small")
    assert load_plan(tmp_path / "other", "tiny").changes == [change]


def test_every_run_of_the_comparison_knows_its_plan(done):
    store = Store(done)
    digest = store.read_plan("tiny")["digest"]
    assert {store.read_study(name)["plan"] for name in store.studies()} == {digest}


def test_the_tables_say_dose_rate_and_what_is_saved(done):
    plan = load_plan(done, "tiny")
    table = arms_table(plan).set_index("arm")
    assert table.loc["fixed2", "mean_n"] == pytest.approx(2.0)
    assert table.loc["fixed2", "repeated"] == 1.0
    assert set(table["rate"]) <= {0.25, 0.5, 1.0, 2.0, 4.0}
    assert table.loc["fixed2", "reuse"] == pytest.approx(2 / (1 - table.loc["fixed2", "saved"]))
    sides = verdicts_side_by_side(plan).set_index("hypothesis")
    assert set(sides.index) == {"H1", "H2", "H3", "H4", "H5"}
    # Three seeds decide nothing.
    assert not {"supported", "refuted"} & set(sides.iloc[:, 1:].to_numpy().ravel())


def test_a_store_with_fewer_seeds_than_planned_is_interim(done, tmp_path):
    more = read_plan(written(tmp_path, seeds=4, name="more"))
    store = Store(done)
    register(more, store)
    for stage in ("own", "shared", "budget-0.5", "budget-2"):
        study = store.read_study(f"tiny-digits-{stage}")
        store.write_study(f"more-digits-{stage}", study)
    sides = verdicts_side_by_side(load_plan(done, "more"))
    assert set(sides.iloc[:, 2:].to_numpy().ravel()) == {"interim"}


def test_a_pilot_says_what_more_seeds_would_find(done):
    told = CliRunner().invoke(cli, ["power", "tiny", "--runs", str(done)])
    assert told.exit_code == 0, told.output
    assert told.output.splitlines()[0].split() == [
        "seeds",
        "equivalence",
        "power",
        "hours",
        "enough",
    ]
    plan, store = load_plan(done, "tiny"), Store(done)
    spent: dict[tuple[str, ...], tuple[float, str]] = {}
    for name in store.studies():
        for run in store.read_study(name)["runs"]:
            seconds = store.run(*run["run"]).summary["ledger"]["seconds"]
            spent[tuple(run["run"])] = seconds, "tuning" if "-tuning" in name else "rest"
    hours = {
        stage: sum(seconds for seconds, of in spent.values() if of == stage) / 3600
        for stage in ("tuning", "rest")
    }
    # A run that is in two stages, at own and shared rates, is made once.
    assert 3 * pilots(plan)["digits"].hours == pytest.approx(hours["rest"])
    assert plan.tuning_hours == pytest.approx(hours["tuning"])
    column = told.output.splitlines()[1].split()
    assert float(column[3]) == pytest.approx(hours["tuning"] + hours["rest"], rel=1e-3, abs=1e-6)
    far = CliRunner().invoke(cli, ["power", "tiny", "--runs", str(done), "--share", "0.6"])
    assert "share must be at most 0.5, which the largest budget, 2 T, shows; not 0.6" in str(
        far.exception
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgets": [0.5, 2.0]}, "budgets must hold 1.0"),
        ({"judged": CONTENT["judged"] | {"real": "quantil"}}, "did you mean 'quantile'"),
        (
            {"tuning": {"first_seed": 2}},
            "tuning.first_seed must be above the seeds of tasks.digits, 3; not 2",
        ),
        ({"judged": CONTENT["judged"] | {"arms": ["fixed"]}}, "judged.arms: unknown .*'fixed2'"),
        (
            {"judged": CONTENT["judged"] | {"real": "fixed2"}},
            "tasks.digits: judged.controls: 'windowed' must replay judged.real, 'fixed2'",
        ),
        (
            {"judged": CONTENT["judged"] | {"controls": ["fixed2"]}},
            "judged.controls: 'fixed2' must replay judged.real, 'quantile', or have its mapping",
        ),
        (with_task(methods={"fixed": None}), r"tasks.digits.methods: unknown .*'fixed2'"),
        (with_task(methods={"standard": None}), "tasks.digits.methods: 'standard' cannot be left"),
        (with_task(target=30), "tasks.digits.target must be a share, as accuracy is; not 30"),
        ({"margin": 1.5}, "margin: must be less than 1"),
    ],
)
def test_a_wrong_plan_is_refused_by_its_field(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        read_plan(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "acuracy"}, "tasks.digits.metric: unknown metric 'acuracy'; .*'accuracy'"),
        (
            {"target": 0.01},
            "tasks.digits.target must take training, without .* accuracy is .* not 0.01",
        ),
    ],
)
def test_a_goal_that_means_nothing_is_refused_before_anything_is_trained(tmp_path, changes, said):
    plan = read_plan(written(tmp_path, **with_task(**changes)))
    with pytest.raises(ConfigError, match=said):
        run_plan(plan, tmp_path / "runs", places=HERE)
    assert Store(tmp_path / "runs").studies() == []


def test_a_plan_says_what_it_cannot_decide(tmp_path):
    """Three seeds, five comparisons: 5 * 2 / 2^3 is above 1. Evaluated every 5 of 20 updates."""
    plan = read_plan(written(tmp_path))
    seeds, tuning, times = plan.cautions()
    assert "with 3, p among the 5 comparisons of H1 to H3 is never below 1" in seeds
    assert tuning.startswith("tuning.seeds")
    assert "tasks.digits.evaluation.every: 5 of 20 is not below the margin, 0.1" in times
    # With two arms 5 * 2 / 2^8 is below 0.05, with three 7 * 2 / 2^8 is not.
    for arms, said in ((2, False), (3, True)):
        judged = CONTENT["judged"] | {"arms": ["quantile", "fixed2", "windowed"][:arms]}
        more = read_plan(written(tmp_path, seeds=8, judged=judged))
        assert any(line.startswith("seeds") for line in more.cautions()) is said
    fine = {"evaluation": {"every": 1}, "target": 0.3}
    quiet = written(tmp_path, seeds=8, tuning={"seeds": 3}, **with_task(**fine))
    assert read_plan(quiet).cautions() == []


# --- tuning -----------------------------------------------------------------------------------


def tuned(values: dict[tuple[str, float], list[float]]) -> Records:
    """Return runs of a tuning stage: (arm, rate) -> the metric of each seed, NaN where diverged."""
    rows = [
        {
            "task": "digits",
            "method": f"{arm} rate={rate:g}",
            "seed": 1000 + seed,
            "status": "diverged" if np.isnan(value) else "complete",
            "validation.accuracy": value,
        }
        for (arm, rate), found in values.items()
        for seed, value in enumerate(found)
    ]
    return Records(pd.DataFrame(rows))


def chosen(tmp_path: Path, values: dict, **tuning) -> dict[str, float]:
    task = {"tasks": {"digits": CONTENT["tasks"]["digits"] | {"grids": {}}}}
    plan = read_plan(written(tmp_path, tuning={"seeds": 2} | tuning, **task))
    grids: dict[str, tuple] = {}
    for arm, rate in values:
        grids[arm] = (*grids.get(arm, ()), rate)
    return {a: c.rate for a, c in choose(plan, "digits", grids, tuned(values)).items()}


def test_settings_within_noise_tie_and_ties_go_to_the_rate_that_is_best_for_all_arms(tmp_path):
    """The spread at the best settings is 0.02 sqrt(2), and so is a difference's standard error."""
    rates = {"rates": [0.5, 1.0, 2.0]}
    arms = ("standard", "random", "fixed2", "quantile")
    middle = {(arm, 1.0): [0.88, 0.92] for arm in arms}
    low = {(arm, 0.5): [0.5, 0.5] for arm in arms}
    high = {
        ("standard", 2.0): [0.80, 0.84],
        ("random", 2.0): [0.80, 0.84],
        ("fixed2", 2.0): [0.90, 0.94],  # 0.02 above its own at 1: within 0.028
        ("quantile", 2.0): [0.94, 0.98],  # 0.06 above
    }
    found = chosen(tmp_path, low | middle | high, **rates)
    assert found == dict.fromkeys(arms, 1.0) | {"quantile": 2.0}
    found = chosen(tmp_path, low | middle | high, tie=0, **rates)
    assert found == dict.fromkeys(arms, 1.0) | {"fixed2": 2.0, "quantile": 2.0}
    found = chosen(tmp_path, low | middle | high, tie=3, **rates)
    assert found == dict.fromkeys(found, 1.0)


def test_a_setting_of_which_a_run_diverged_is_never_preferred(tmp_path):
    rates = {"rates": [0.5, 1.0]}
    lost = {("standard", 1.0): [0.9, np.nan], ("standard", 0.5): [0.2, 0.3]}
    assert chosen(tmp_path, lost, **rates) == {"standard": 0.5}
    nothing = {key: [np.nan, np.nan] for key in lost}
    assert chosen(tmp_path, nothing, **rates)["standard"] in (0.5, 1.0)


@pytest.mark.parametrize("seeds", [1, 3])
def test_tuning_has_as_many_seeds_as_declared_none_of_the_comparison_s(tmp_path, seeds):
    plan = read_plan(written(tmp_path, tuning={"seeds": seeds, "first_seed": 3}))
    study = tuning_study(plan, "digits", {"fixed2": (0.5, 1.0)})
    assert study.seeds == tuple(range(3, 3 + seeds))
    assert set(study.seeds).isdisjoint(range(plan.seeds))


def test_a_grid_is_widened_by_its_last_step():
    assert wider((0.5, 1.0, 2.0), 2.0) == (0.5, 1.0, 2.0, 4.0)
    assert wider((0.5, 1.0, 2.0), 0.5) == (0.25, 0.5, 1.0, 2.0)


# --- task by task -----------------------------------------------------------------------------


def test_a_plan_is_run_task_by_task_under_one_digest_and_arms_are_left_out_by_task(tmp_path):
    """On the second task quantile and its control are not run, and an arm of its own is."""
    first = CONTENT["tasks"]["digits"] | {"max_updates": 8, "evaluation": {"every": 4}}
    more = {
        "quantile": None,
        "windowed": None,
        "fixed3": {"mapping": {"name": "constant", "repeats": 3}},
    }
    tasks = {"one": first, "two": first | {"methods": more, "grids": {}}}
    path, runs = written(tmp_path, tasks=tasks, seeds=2), tmp_path / "runs"
    told = CliRunner().invoke(
        cli, ["run", str(path), "--runs", str(runs), "--workers", "0", "--task", "two"]
    )
    assert told.exit_code == 0, told.output
    assert "Note: seeds: with 2" in told.output
    store, plan = Store(runs), read_plan(path)
    assert not [name for name in store.studies() if "-one-" in name]
    half = load_plan(runs, "tiny")
    assert half.digest == plan.digest
    sides = verdicts_side_by_side(half)
    assert set(sides.iloc[:, 2:].to_numpy().ravel()) == {"interim"}
    assert "1 of 2 tasks" in half.views["own rates, validation"][1][0].sentence
    assert run_plan(plan, runs, places=HERE, only=["one"]).trained > 0
    assert run_plan(plan, runs, places=HERE).trained == 0
    whole = load_plan(runs, "tiny")
    assert set(whole.rates) == {"one", "two"}
    tables = plan_tables(whole)
    arms = tables["arms"]
    assert set(arms.loc[arms["task"] == "two", "arm"]) == {"fixed2", "fixed3"}
    counts = tables["over_tasks"].set_index("arm")["tasks"].to_dict()
    assert counts == {"fixed2": 2, "quantile": 1, "windowed": 1, "fixed3": 1}
    assert not whole.evidence("own", "validation").lacking
    with pytest.raises(ConfigError, match=r"unknown task 'tow'.*'two'"):
        run_plan(plan, runs, places=HERE, only=["tow"])


def test_damage_of_a_stage_is_not_taken_for_a_stage_that_has_not_begun(done, tmp_path):
    shutil.copytree(done, tmp_path / "runs")
    path = tmp_path / "runs" / "studies" / "tiny-digits-shared.json"
    path.write_text(path.read_text().replace("digits", "digit5", 1))
    with pytest.raises(StoreError, match=r"tiny-digits-shared\.json"):
        load_plan(tmp_path / "runs", "tiny")
    path.unlink()
    assert not len(load_plan(tmp_path / "runs", "tiny").stages["shared"].runs)


# --- export and import ------------------------------------------------------------------------


def test_an_export_brings_everything_back_without_one_update_trained(done, tmp_path):
    store, other = Store(done), Store(tmp_path / "other")
    count = export(store, store.studies(), tmp_path / "out")
    assert import_runs(other, tmp_path / "out") == count
    assert other.studies() == store.studies()
    before, after = load_plan(done, "tiny"), load_plan(tmp_path / "other", "tiny")
    assert arms_table(before).equals(arms_table(after))
    assert verdicts_side_by_side(before).equals(verdicts_side_by_side(after))
    for name in store.studies():
        for planned in store.read_study(name)["runs"]:
            ours, theirs = store.run(*planned["run"]), other.run(*planned["run"])
            assert_frame_equal(ours.updates, theirs.updates, atol=0.5e-6, rtol=0)
            assert ours.updates.drop(columns="seconds").equals(
                theirs.updates.drop(columns="seconds")
            )
            assert ours.evals.equals(theirs.evals)
            assert (ours.config, ours.environment) == (theirs.config, theirs.environment)
    assert import_runs(other, tmp_path / "out") == 0
    report = run_plan(read_plan(written(tmp_path)), tmp_path / "other", places=HERE)
    assert report.trained == 0
    verified = CliRunner().invoke(cli, ["verify", "--runs", str(tmp_path / "other")])
    assert verified.exit_code == 0, verified.output


def test_an_export_may_leave_out_the_visits_of_some_studies(done, tmp_path):
    store, other = Store(done), Store(tmp_path / "other")
    whole, light = tmp_path / "whole", tmp_path / "light"
    count = export(store, store.studies(), whole)
    assert export(store, store.studies(), light, visits=["tiny-digits-own"]) == count
    assert (light / "updates.parquet").stat().st_size < (whole / "updates.parquet").stat().st_size
    assert import_runs(other, light) == count
    before, after = load_plan(done, "tiny"), load_plan(tmp_path / "other", "tiny")
    assert arms_table(before).equals(arms_table(after))
    assert verdicts_side_by_side(before).equals(verdicts_side_by_side(after))
    own = {tuple(run["run"]) for run in store.read_study("tiny-digits-own")["runs"]}
    for planned in store.read_study("tiny-digits-tuning")["runs"]:
        run = other.run(*planned["run"])
        assert bool(len(run.updates)) == (tuple(planned["run"]) in own)
        assert run.evals.equals(store.run(*planned["run"]).evals)
    verified = CliRunner().invoke(cli, ["verify", "--runs", str(tmp_path / "other")])
    assert verified.exit_code == 0, verified.output


def test_exports_of_a_plan_task_by_task_come_together_whatever_their_order(done, tmp_path):
    store, other = Store(done), Store(tmp_path / "other")
    plan = store.read_plan("tiny")
    export(store, store.studies(), tmp_path / "out")
    elsewhere = {"another": {"standard": {"rate": 2.0}}}
    other.write_plan("tiny", plan | {"rates": elsewhere})
    import_runs(other, tmp_path / "out")
    assert other.read_plan("tiny")["rates"] == plan["rates"] | elsewhere


def test_an_import_does_not_replace_a_plan_that_is_registered_otherwise(done, tmp_path):
    export(Store(done), ["tiny-digits-own"], tmp_path / "out")
    other = Store(tmp_path / "other")
    mine = register(read_plan(written(tmp_path, margin=0.2)), other)
    with pytest.raises(StoreError, match=f"plan tiny: must be {mine['digest']}, as it is regis"):
        import_runs(other, tmp_path / "out")
    assert other.studies() == []
    assert other.read_plan("tiny")["digest"] == mine["digest"]


@pytest.mark.parametrize("name", ["runs.parquet", "updates.parquet", "studies.json"])
def test_a_damaged_export_is_refused_with_the_file_s_name(done, tmp_path, name):
    store = Store(done)
    export(store, ["tiny-digits-own"], tmp_path / "out")
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=name):
        import_runs(Store(tmp_path / "other"), tmp_path / "out")
    assert not (tmp_path / "other").exists()


def test_what_is_no_export_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is no export"):
        import_runs(Store(tmp_path / "runs"), tmp_path)
