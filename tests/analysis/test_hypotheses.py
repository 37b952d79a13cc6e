"""Verdicts on planted effects, on none, and on studies that lack something."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from repeatlab.analysis.frames import Records, load
from repeatlab.analysis.hypotheses import HYPOTHESES, judge, verdict_table
from repeatlab.analysis.paired_differences import Endpoint
from repeatlab.analysis.planned_comparisons import Evidence, Plan, gather, hardness
from repeatlab.analysis.statistics import flip_interval
from repeatlab.cost import Ledger
from repeatlab.store.records import Store

PLAN = Plan()
ARMS = ["standard", *dict.fromkeys([*PLAN.arms, *PLAN.variants]), *PLAN.controls]


def rows(ours: np.ndarray, theirs: np.ndarray, method: str, against: str) -> pd.DataFrame:
    """Return the pairs of two arms, each (tasks, seeds), in the columns of `pairs.pairs`."""
    tasks, seeds = ours.shape
    return pd.DataFrame(
        {
            "task": np.repeat([f"task {i}" for i in range(tasks)], seeds),
            "method": method,
            "seed": np.tile(np.arange(seeds), tasks),
            "against": against,
            "status": "paired",
            "x": 1.0,
            "sign": 1,
            "value": ours.ravel(),
            "other": theirs.ravel(),
            "difference": (ours - theirs).ravel(),
        }
    )


def evidence(random, *, tasks=2, seeds=8, gain=None, sooner=None, association=0.8) -> Evidence:
    """Return a study of normal runs whose seeds are half of their variance.

    `gain` and `sooner` map an arm to what it has above the standard one, in sd, on all tasks or
    task by task.
    """
    shared = random.normal(size=(tasks, seeds))

    def runs(above: dict | None) -> dict[str, np.ndarray]:
        return {
            arm: (shared + random.normal(size=shared.shape)) / np.sqrt(2)
            + np.reshape((above or {}).get(arm, 0.0), (-1, 1))
            for arm in ARMS
        }

    end, speed = runs(gain), runs(sooner)
    among = combinations(PLAN.variants, 2)
    noise = 0.05 * random.normal(size=shared.shape)
    return Evidence(
        speed=pd.concat(rows(speed[a], speed["standard"], a, "standard") for a in PLAN.arms),
        cost=pd.concat(
            rows(end[a], end["standard"], a, "standard")
            for a in dict.fromkeys([*PLAN.arms, *PLAN.variants])
        ),
        controls=pd.concat(rows(end[PLAN.real], end[c], PLAN.real, c) for c in PLAN.controls),
        variants=pd.concat(rows(end[a], end[b], a, b) for a, b in among),
        hardness=rows(association + noise, np.zeros_like(noise), PLAN.real, "chance"),
    )


def verdicts(found: Evidence, plan: Plan = PLAN) -> dict[str, str]:
    return {verdict.hypothesis: verdict.verdict for verdict in judge(found, plan)}


# --- what is there is found -------------------------------------------------------------------

EVERY = dict.fromkeys(PLAN.variants, 3.0)


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        # H1 to H5: s(upported), r(efuted), i(nconclusive).
        ({"sooner": {"linear": 3}}, "siiii"),
        ({"sooner": {"threshold": -3}}, "riiii"),
        ({"sooner": {"linear": 3, "threshold": -3}}, "iiiii"),
        ({"gain": EVERY}, "issss"),
        ({"gain": {"control_limit": 3}}, "iiiii"),
        ({"gain": {"threshold": 3}}, "isisr"),
        ({"gain": {"linear": [3, -3]}}, "iiiri"),
        ({"gain": {"linear": -3}}, "irrri"),
        ({"gain": {"linear": 3, "windowed": 3}}, "isisr"),
        ({"gain": {"windowed": 4}}, "iirii"),
        ({"gain": EVERY, "association": -0.8}, "isrss"),
        ({"gain": EVERY, "association": 0.0}, "isiss"),
    ],
)
def test_a_planted_effect_is_what_the_verdicts_say(planted, expected):
    found = verdicts(evidence(np.random.default_rng(1), **planted))
    assert "".join(verdict[0] for verdict in found.values()) == expected


def test_a_part_that_is_not_shown_keeps_h3_open():
    gain = EVERY | {"step_size": 2.9}
    assert verdicts(evidence(np.random.default_rng(2), gain=gain))["H3"] == "inconclusive"


def test_a_larger_step_that_has_seen_more_data_does_not_refute_h3():
    gain = EVERY | {"step_size": 6.0}
    assert verdicts(evidence(np.random.default_rng(2), gain=gain))["H3"] == "inconclusive"
    gain = EVERY | {"spaced": 6.0}
    assert verdicts(evidence(np.random.default_rng(2), gain=gain))["H3"] == "refuted"


def test_one_task_has_nothing_to_hold_across():
    found = judge(evidence(np.random.default_rng(3), tasks=1, gain=EVERY), PLAN)
    assert found[1].verdict == "supported"
    assert found[3].verdict == "inconclusive"
    assert found[3].sentence.startswith("There is only one task")


def test_numbers_are_those_of_the_comparison():
    study = evidence(np.random.default_rng(4), tasks=1, seeds=10, gain={"linear": 1.0})
    numbers = judge(study, PLAN)[1].numbers["linear"]
    mine = study.cost[study.cost["method"] == "linear"]
    limits = flip_interval(mine["difference"])
    assert numbers["estimate"] == pytest.approx(mine["difference"].mean())
    assert (numbers["low"], numbers["high"], numbers["interval"]) == limits
    assert (numbers["n"], numbers["tasks"], numbers["comparisons"]) == (10, 1, 5)
    p = stats.permutation_test(
        (mine["difference"],), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert numbers["p"] == pytest.approx(p.pvalue)


# --- what cannot be decided is not ------------------------------------------------------------


def test_five_seeds_on_one_task_cannot_decide_and_it_is_said():
    study = evidence(np.random.default_rng(5), tasks=1, seeds=5, gain={"linear": 50, **EVERY})
    found = judge(study, PLAN)
    assert {verdict.verdict for verdict in found} == {"inconclusive"}
    assert "linear +" in found[1].sentence
    # Five entries share the 5 %: 5 x 0.0625 for the first of them.
    assert "(too few: p cannot fall below 0.312)" in found[1].sentence
    assert "jointly p = 0.312 (too few: it cannot fall below 0.312)" in found[2].sentence


def test_five_seeds_on_six_tasks_can():
    study = evidence(np.random.default_rng(6), tasks=6, seeds=5, gain=EVERY)
    assert verdicts(study)["H2"] == "supported"


@pytest.mark.parametrize("part", ["speed", "cost", "controls", "hardness"])
def test_a_missing_run_is_said_and_decides_nothing(part):
    study = evidence(np.random.default_rng(7), gain=EVERY, sooner=EVERY)
    assert set(verdicts(study).values()) == {"supported"}
    frame = getattr(study, part).reset_index(drop=True)
    frame.loc[0, ["status", "value", "difference"]] = ["missing", np.nan, np.nan]
    found = {v.hypothesis: v for v in judge(replace(study, **{part: frame}), PLAN)}
    touched = {"speed": ["H1"], "cost": ["H2", "H4", "H5"], "controls": ["H3"], "hardness": ["H3"]}
    for name, verdict in found.items():
        if name in touched[part]:
            assert verdict.verdict == "inconclusive"
            assert verdict.sentence.startswith("Runs are missing - ")
            assert "pairs missing (task 0 seed 0)" in verdict.sentence
        else:
            assert verdict.verdict == "supported"


def test_an_arm_that_nobody_planned_is_missing():
    study = evidence(np.random.default_rng(8), gain=EVERY)
    for verdict in judge(study, replace(PLAN, arms=("linear", "quantile"))):
        if verdict.hypothesis in ("H1", "H2"):
            assert verdict.verdict == "inconclusive"
            assert "quantile: no run is planned" in verdict.sentence


def test_a_diverged_run_counts_against_its_arm():
    study = evidence(np.random.default_rng(9), seeds=12, tasks=1, gain={"linear": 1.5})
    assert verdicts(study)["H2"] == "supported"
    cost = study.cost.reset_index(drop=True)
    lost = cost.index[cost["method"] == "linear"][:4]
    cost.loc[lost, ["status", "value", "difference"]] = ["diverged", -np.inf, -np.inf]
    found = judge(replace(study, cost=cost), PLAN)[1]
    assert found.verdict == "inconclusive"
    assert "(4 diverged)" in found.sentence
    assert found.numbers["linear"]["n"] == 12
    # With every run of it diverged the arm is the worse one.
    cost.loc[cost["method"] == "linear", ["status", "difference"]] = ["diverged", -np.inf]
    assert judge(replace(study, cost=cost), PLAN)[1].verdict == "refuted"


def test_without_effect_the_whole_table_seldom_says_supported():
    """200 studies without effect; at 5 % more than 18 happen once in 100. Seeds are not chosen."""
    random = np.random.default_rng(0)
    most = stats.binom.ppf(0.99, 200, 0.05)
    hits = 0
    for study in range(200):
        tasks, seeds = [(1, 8), (2, 6), (3, 3), (1, 12)][study % 4]
        hits += "supported" in verdicts(evidence(random, tasks=tasks, seeds=seeds)).values()
    assert hits <= most


# --- from records -----------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path) -> Records:
    """Return a store of two tasks: the mechanism's controls on one, one run of them missing."""
    random, store, planned = np.random.default_rng(1), Store(tmp_path), []
    arms = {"digits": ARMS, "letters": ["standard", *PLAN.variants]}
    for task in arms:
        for seed in range(8):
            for arm in arms[task]:
                run = store.run("made", f"{task}-{arm}-{seed}")
                planned.append(
                    {"task": task, "method": arm, "seed": seed, "run": ["made", run.path.name]}
                )
                if (task, arm, seed) == ("digits", "spaced", 3):
                    continue
                writer = store.begin(run, {}, {})
                better = 5 * (arm in PLAN.variants) + random.normal()
                for done, value in ((0, 0.0), (50, 0.9 * better), (100, better)):
                    counts = Ledger(forward_samples=done, backward_samples=done).to_json()
                    writer.evals(done, {"validation": {"accuracy": value}}, counts)
                loss = random.normal(size=100)
                repeats = 1 + (loss > 0).astype(int)
                columns = {"update": np.arange(100), "fresh_batch": np.arange(100), "loss": loss}
                zeros = {name: np.zeros(100) for name in ("repeat", "lr", "seconds")}
                writer.updates(columns | {"repeats": repeats} | zeros)
                writer.finish("complete", {"ledger": counts, "final": {}})
    store.write_study("made", {"name": "made", "max_updates": 100, "runs": planned})
    return load(tmp_path, "made")


def test_evidence_comes_from_records(records):
    endpoints = {
        task: Endpoint(metric="accuracy", target=3.0, k=1.5) for task in ("digits", "letters")
    }
    found = gather(records, endpoints, PLAN)
    assert {len(group) for _, group in found.cost.groupby(["method"])} == {16}
    # The controls are planned on one task: on the other none is missing.
    assert found.controls.groupby("against").size().to_dict() == dict.fromkeys(PLAN.controls, 8)
    assert found.controls["difference"].isna().sum() == 1
    assert len(found.hardness) == 16
    result = verdict_table(judge(found, PLAN)).set_index("hypothesis")
    assert result["verdict"].tolist() == [
        "supported",
        "supported",
        "inconclusive",
        "supported",
        "supported",
    ]
    missing = "spaced: 1 of 8 pairs missing (digits seed 3)"
    assert missing in result.loc["H3", "sentence"]


def test_a_task_without_records_is_missing_everywhere(records):
    endpoints = {t: Endpoint(metric="accuracy", k=1.5) for t in ("digits", "letters", "images")}
    for verdict in judge(gather(records, endpoints, PLAN), PLAN):
        assert verdict.verdict == "inconclusive"
        assert "pairs missing (images" in verdict.sentence


def test_no_records_at_all_are_five_inconclusive_verdicts():
    empty = Records(pd.DataFrame(columns=["task", "method", "seed", "id", "path", "status"]))
    found = judge(gather(empty, {"digits": Endpoint(metric="accuracy", k=1.5)}, PLAN), PLAN)
    assert [verdict.verdict for verdict in found] == ["inconclusive"] * 5
    assert all(verdict.sentence.startswith("Runs are missing") for verdict in found)


def test_hardness_is_the_rank_correlation_within_windows():
    random = np.random.default_rng(2)
    loss = random.exponential(size=90) + np.linspace(9, 0, 90)
    repeats = random.integers(1, 6, size=90)
    table = pd.DataFrame({"fresh_batch": np.arange(90), "repeats": repeats, "loss": loss})
    ranks = [
        [stats.rankdata(column[w]) - 15.5 for w in (slice(0, 30), slice(30, 60), slice(60, 90))]
        for column in (loss, repeats)
    ]
    expected = np.corrcoef(*map(np.concatenate, ranks))[0, 1]
    assert hardness(table, window=30) == pytest.approx(expected)


def test_a_clock_has_no_hardness_within_its_windows():
    """N falls with training time alone, and so does the loss: within a window nothing is left."""
    time = np.arange(1000)
    loss = 3 - time / 500 + np.random.default_rng(3).normal(size=1000)
    batches = pd.DataFrame({"fresh_batch": time, "repeats": 5 - time // 200, "loss": loss})
    assert np.corrcoef(batches["loss"], batches["repeats"])[0, 1] > 0.3
    assert hardness(batches, window=50) == 0.0


def test_a_loss_that_ended_the_run_decided_nothing():
    loss = np.array([0.3, 0.1, 0.2, np.inf])
    batches = pd.DataFrame({"fresh_batch": np.arange(4), "repeats": [3, 1, 2, 1], "loss": loss})
    assert hardness(batches) == pytest.approx(1.0)


def test_calibration_does_not_decide_between_an_arm_and_its_controls(records):
    """The real arm's calibration costs it half of the updates at equal cost, none at equal T."""
    charged = records.evals["method"].isin(["linear"])
    for name in ("calibration_forward_samples", "calibration_backward_samples"):
        records.evals.loc[charged, name] = 50
    found = gather(records, {"digits": Endpoint(metric="accuracy", k=1.5)}, PLAN)
    cost, controls = found.cost, found.controls
    assert set(controls["x"].dropna()) == {100}
    mine = cost[cost["method"] == "linear"].set_index("seed")["value"]
    at_end = controls[controls["against"] == "windowed"].set_index("seed")["value"]
    assert mine.tolist() == pytest.approx((0.9 * at_end).tolist())


def test_every_hypothesis_is_declared_with_its_criterion():
    table = verdict_table(judge(evidence(np.random.default_rng(0)), PLAN))
    assert table["hypothesis"].tolist() == ["H1", "H2", "H3", "H4", "H5"]
    assert table["criterion"].tolist() == [h.criterion for h in HYPOTHESES]
    assert table["claim"].str.len().min() > 0
