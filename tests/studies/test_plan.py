"""A plan: declared, tuned, compared, judged; nothing of it changes unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from repeatlab.analysis.plan_tables import arms_table, verdicts_side_by_side
from repeatlab.analysis.plans import load_plan, pilots
from repeatlab.cli import cli
from repeatlab.core.files import StoreError
from repeatlab.core.schema import ConfigError
from repeatlab.store.exchange import export, import_runs
from repeatlab.store.records import Store
from repeatlab.studies.cluster import Places
from repeatlab.studies.plan import read_plan, register, run_plan, wider

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
    assert pilots(load_plan(done, "tiny"))["digits"].hours > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgets": [0.5, 2.0]}, "budgets must hold 1.0"),
        ({"judged": CONTENT["judged"] | {"real": "quantil"}}, "did you mean 'quantile'"),
        ({"tuning": {"first_seed": 2}}, "tuning.first_seed must be above the seeds"),
        ({"margin": 1.5}, "margin: must be less than 1"),
    ],
)
def test_a_wrong_plan_is_refused_by_its_field(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        read_plan(written(tmp_path, **changes))


def test_a_grid_is_widened_by_its_last_step():
    assert wider((0.5, 1.0, 2.0), 2.0) == (0.5, 1.0, 2.0, 4.0)
    assert wider((0.5, 1.0, 2.0), 0.5) == (0.25, 0.5, 1.0, 2.0)


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
            assert ours.updates.equals(theirs.updates)
            assert ours.evals.equals(theirs.evals)
            assert (ours.config, ours.environment) == (theirs.config, theirs.environment)
    assert import_runs(other, tmp_path / "out") == 0
    report = run_plan(read_plan(written(tmp_path)), tmp_path / "other", places=HERE)
    assert report.trained == 0
    verified = CliRunner().invoke(cli, ["verify", "--runs", str(tmp_path / "other")])
    assert verified.exit_code == 0, verified.output


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
