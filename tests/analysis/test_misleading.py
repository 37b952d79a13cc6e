"""Runs that invite a wrong verdict: curves that fall, targets nobody meets, tasks that differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from simulated_plans import ARMS, CONTROLS, EVERY_ARM, RATIOS, Truth, draw, evidence, write

from repeatlab.analysis.evidence import Dose, Evidence, final_values, gather
from repeatlab.analysis.frames import Records
from repeatlab.analysis.plan_tables import plan_tables
from repeatlab.analysis.plans import load_plan
from repeatlab.analysis.updates_saved import Paired, saved, saved_until
from repeatlab.analysis.verdicts import judge

SEEDS = np.arange(8)


def comparison(gain: float, curve: np.ndarray, *, noise: float = 0.1, seed: int = 0) -> Paired:
    """Return an arm that ends `gain` above the standard one, whose means by budget are `curve`."""
    random = np.random.default_rng(seed)
    standard = curve + noise * random.normal(size=(len(SEEDS), len(RATIOS)))
    arm = curve[2] + gain + noise * random.normal(size=len(SEEDS))
    return Paired(arm, standard[:, 2], standard, RATIOS, SEEDS)


def verdicts(seen: Evidence, runs) -> dict[str, str]:
    return {v.hypothesis: v.verdict for v in judge(seen, runs.declared)}


# --- the standard arm's curve -----------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_a_curve_that_falls_with_the_budget_does_not_turn_better_into_worse(sign):
    """The standard arm gets worse beyond 0.7 T: its metric at 0.5 or 0.7 T equals the arm's."""
    curve = np.array([0.5, 2.0, 1.0, 0.0, -1.0])
    found = saved({"a": comparison(0.8 * sign, curve)})
    assert found.p < 0.05
    assert found.direction() == sign
    assert (found.ratio - 1) * sign > 0


def test_a_better_arm_that_no_larger_budget_equals_has_no_upper_limit():
    found = saved({"a": comparison(0.8, np.array([3.0, 2.0, 1.0, 0.0, -1.0]))})
    assert (found.ratio, found.interval.high) == (np.inf, np.inf)
    assert found.interval.low > 1


def test_a_flat_curve_leaves_open_how_much_is_saved():
    found = saved({"a": comparison(0.0, np.zeros(5))})
    assert (found.interval.low, found.interval.high) == (0, np.inf)
    assert not found.equivalent(0.45)


@pytest.mark.parametrize("gain", [0.004, -0.004])
def test_a_difference_below_the_grid_of_ratios_has_its_direction(gain):
    steep = 1.0 * np.log(RATIOS)
    found = saved({"a": comparison(gain, steep, noise=1e-4)})
    assert found.p < 0.05
    assert found.direction() == np.sign(gain)
    assert found.equivalent(0.1)


def test_standard_runs_that_diverge_at_a_small_budget_decide_nothing():
    one = comparison(0.0, np.log(RATIOS), noise=0.1)
    lost = one.standard.copy()
    lost[:3, 0] = -10.0
    found = saved({"a": replace(one, standard=lost)})
    assert found.p == saved({"a": one}).p
    assert found.direction() == 0


def test_budgets_out_of_order_are_refused_and_read_in_order_from_runs():
    one = comparison(0.0, np.log(RATIOS))
    with pytest.raises(ValueError, match="ratios must increase, with 1 among them"):
        replace(one, ratios=RATIOS[::-1])
    with pytest.raises(ValueError, match="with 1 among them"):
        replace(one, ratios=RATIOS + 0.01)


def test_an_arm_that_is_worse_on_every_seed_of_a_task_without_spread_is_worse():
    """Standard 1.0 and arm 0.95 in every seed: its spread is 0, its difference is not."""
    perfect = np.ones((8, 5))
    found = saved({"a": Paired(np.full(8, 0.95), perfect[:, 2], perfect, RATIOS, SEEDS)})
    assert (found.p, found.direction()) == (2 / 2**8, -1)


def test_exchanging_the_runs_of_a_pair_changes_no_task_s_weight():
    """Without other budgets too, where the spread is that of the two arms."""
    random = np.random.default_rng(0)
    arm, other = random.normal(size=(2, 8))
    one = Paired(arm, other, other[:, None], np.ones(1), SEEDS)
    swap = SEEDS % 2 == 0
    mine, theirs = np.where(swap, other, arm), np.where(swap, arm, other)
    exchanged = Paired(mine, theirs, theirs[:, None], np.ones(1), SEEDS)
    assert exchanged.scale == pytest.approx(one.scale)


# --- the target -------------------------------------------------------------------------------


def test_a_target_that_nobody_meets_shows_no_equivalence():
    missed = np.full(8, 20.0)
    found = saved_until({"a": (SEEDS, missed, missed)}, limits={"a": 20.0})
    assert (found.interval.low, found.interval.high) == (0, np.inf)
    runs = draw(Truth(), np.random.default_rng(0))
    nobody = {arm: dict.fromkeys(runs.declared.goals, (SEEDS, missed, missed)) for arm in ARMS}
    seen = replace(evidence(runs), until=nobody)
    assert verdicts(seen, runs)["H1"] == "inconclusive"


def test_a_miss_says_that_a_gain_is_as_large_or_larger():
    """Everybody of the arm is there at 0.95 T, nobody of the other: at least 5 %, maybe more."""
    ours, theirs = np.linspace(18.5, 19.5, 8), np.full(8, 20.0)
    blind = saved_until({"a": (SEEDS, ours, theirs)})
    found = saved_until({"a": (SEEDS, ours, theirs)}, limits={"a": 20.0})
    assert blind.equivalent(0.1)
    assert not found.equivalent(0.1)
    assert found.p == blind.p < 0.05
    assert (found.interval.high, found.direction()) == (np.inf, 1)


def test_times_between_two_evaluations_are_equivalent_to_nothing_but_themselves(tmp_path):
    """All runs cross the target between the same two of five evaluations, on lines like these."""
    runs = draw(Truth(tasks=1, seeds=8, slope=30.0, evaluations=5), np.random.default_rng(1))
    write(runs, tmp_path)
    seen, found = load_plan(tmp_path, "simulated").views["own rates, validation"]
    assert seen.coarse == {"task0": 0.25}  # 4 of 16 updates
    assert saved_until(seen.until["linear"]).equivalent(0.1)
    assert found[0].verdict == "inconclusive"
    assert "evaluations are too far apart for equivalence (25 % on task0" in found[0].sentence
    wide = replace(runs.declared, margin=0.3)
    assert judge(seen, wide)[0].verdict == "equivalent"
    same = {arm: {t: (s, a, a) for t, (s, a, _) in of.items()} for arm, of in seen.until.items()}
    assert judge(replace(seen, until=same), runs.declared)[0].verdict == "equivalent"


# --- runs that diverge ------------------------------------------------------------------------


def lost_once(runs, *, arm: str = "linear"):
    """Return the runs with one of them diverged, having had a number of any size before."""
    vars(runs)["values"][arm, 1.0][0, 0] = np.nan
    return replace(runs, start=runs.start - 1e6)


def test_one_diverged_seed_does_not_silence_its_task_or_the_others(tmp_path):
    """Seven seeds of eight are four spreads better, one diverged after a metric of -1e6."""
    truth = Truth(tasks=2, gains=dict.fromkeys(ARMS, 4.0))
    write(lost_once(draw(truth, np.random.default_rng(0))), tmp_path)
    seen, found = load_plan(tmp_path, "simulated").views["own rates, validation"]
    assert saved({"task0": seen.at_end["linear"]["task0"]}).p < 0.05
    assert {v.hypothesis: v.verdict for v in found}["H2"] == "supported"


def test_a_diverged_run_ranks_last_and_both_of_a_pair_tie(tmp_path):
    runs = lost_once(lost_once(draw(Truth(tasks=1), np.random.default_rng(0))), arm="quantile")
    write(runs, tmp_path)
    values = load_plan(tmp_path, "simulated").values("own", "validation")["task0"]
    one = values.paired("linear", "standard")
    assert one.arm[0] == min(one.arm.min(), one.other.min(), one.standard.min())
    assert one.arm[0] > -1000
    both = values.paired("linear", "quantile")
    assert both.arm[0] == both.other[0]
    for key in [*((arm, 1.0) for arm in EVERY_ARM), *(("standard", r) for r in RATIOS if r != 1)]:
        vars(runs)["values"][key][:] = np.nan
    write(runs, tmp_path / "all")
    plan = load_plan(tmp_path / "all", "simulated")
    assert {v.verdict for v in plan.views["own rates, validation"][1]} <= {
        "inconclusive",
        "equivalent",
    }


def test_runs_that_were_not_evaluated_on_a_split_are_not_taken_for_diverged_ones(tmp_path):
    runs = draw(Truth(tasks=2), np.random.default_rng(0))
    write(runs, tmp_path)
    plan = load_plan(tmp_path, "simulated")
    table = plan.stages["own"].runs.copy()
    table.loc[table["task"] == "task1", "test.accuracy"] = np.nan
    goal = plan.declared.goals["task1"]
    assert final_values(Records(table), "task1", goal, "test") == {}
    assert final_values(Records(table), "task0", goal, "test").keys() == {*EVERY_ARM}


# --- tasks that differ ------------------------------------------------------------------------


def test_effects_that_cancel_over_tasks_are_not_called_equivalent():
    runs = draw(Truth(tasks=2, seeds=12, slope=40.0), np.random.default_rng(0))
    seen = evidence(runs)
    assert verdicts(seen, runs)["H2"] == "equivalent"
    shift = {"task0": 12.0, "task1": -12.0}
    opposed = {
        arm: {t: replace(p, arm=p.arm + shift[t] * p.scale) for t, p in seen.at_end[arm].items()}
        for arm in ARMS
    }
    assert verdicts(replace(seen, at_end=opposed), runs)["H2"] == "inconclusive"


def at_n(seen: Evidence, n: dict[str, float]) -> Evidence:
    """Return the evidence with other doses, and the arms bit-equal to standard where N is 1."""
    dose = {arm: {task: Dose(n[task], 0.5) for task in seen.seeds} for arm in ARMS}
    at_end = {
        arm: {t: replace(p, arm=p.other) if n[t] == 1 else p for t, p in seen.at_end[arm].items()}
        for arm in ARMS
    }
    return replace(seen, dose=dose, at_end=at_end)


def test_tasks_on_which_an_arm_never_repeats_make_it_neither_equivalent_nor_general():
    """N is 1 on five of six tasks: pooled with them the arms would be equal on average."""
    n = {f"task{i}": 4.0 if i == 0 else 1.0 for i in range(6)}
    runs = draw(Truth(slope=20.0, gains={"linear": 8.0, "quantile": 8.0}), np.random.default_rng(0))
    found = {v.hypothesis: v for v in judge(at_n(evidence(runs), n), runs.declared)}
    assert found["H2"].verdict == "supported"
    assert "on 1 of 6 tasks" in found["H2"].sentence
    assert found["H4"].verdict != "supported"
    nothing = draw(Truth(slope=2.0), np.random.default_rng(1))
    assert verdicts(at_n(evidence(nothing), n), nothing)["H2"] == "inconclusive"
    none = dict.fromkeys(n, 1.0)
    said = verdicts(at_n(evidence(nothing), none), nothing)
    assert {said[h] for h in ("H1", "H2", "H3", "H4")} == {"not tested"}


def test_an_arm_that_the_plan_leaves_out_on_a_task_is_not_awaited_there(tmp_path):
    runs = draw(Truth(tasks=2, gains=dict.fromkeys(ARMS, 5.0)), np.random.default_rng(0))
    write(runs, tmp_path)
    plan = load_plan(tmp_path, "simulated")
    own = plan.stages["own"].runs
    without = Records(own[(own["task"] != "task1") | (own["method"] != "quantile")])
    seen = gather(plan.declared, without, plan.budgets)
    assert seen.lacking == ["task1, quantile: 0 of 8 seeds"]
    planned = replace(plan.declared, left_out={"task1": ("quantile",)})
    seen = gather(planned, without, plan.budgets)
    assert seen.lacking == []
    found = {v.hypothesis: v for v in judge(seen, planned)}
    assert (
        "quantile better than at every budget [+50, open] on 1 of 2 tasks" in found["H2"].sentence
    )


def test_the_table_over_tasks_says_what_the_verdicts_say(tmp_path):
    """Effects that cancel are not equivalent, and one beyond the budgets has no place in a mean."""
    runs = draw(Truth(tasks=2, seeds=12, slope=40.0), np.random.default_rng(0))
    before = evidence(runs).at_end["linear"]
    for task, gain in enumerate((12.0, -12.0)):
        vars(runs)["values"]["linear", 1.0][task] += gain * before[f"task{task}"].scale
    vars(runs)["values"]["quantile", 1.0][1] += 200.0
    write(runs, tmp_path)
    plan = load_plan(tmp_path, "simulated")
    table = plan_tables(plan)["over_tasks"].set_index("arm")
    assert saved(plan.evidence("own", "validation").at_end["linear"]).equivalent(0.1)
    assert table.loc["linear", "state"] == "undecided"
    assert (table.loc["linear", "note"], np.isfinite(table.loc["linear", "mean"])) == ("", True)
    assert table.loc["quantile", "note"] == "no mean: limits beyond the budgets on task1"
    assert np.isnan(table.loc["quantile", ["mean", "tau", "new_low"]].astype(float)).all()
    # Where N is 1, an arm that is to repeat says nothing; a control has no need to.
    once = plan.stages["own"].runs.copy()
    once.loc[once["task"] == "task1", "fresh_batches"] = once["updates"]
    stages = {**plan.stages, "own": Records(once)}
    hardly = plan_tables(replace(plan, stages=stages))
    table = hardly["over_tasks"].set_index("arm")
    assert table["tasks"].to_dict() == {"linear": 1, "quantile": 1} | dict.fromkeys(CONTROLS, 2)
    state = hardly["arms"].set_index(["arm", "task"])["state"]
    assert state["linear", "task0"] == "better"
    assert state["linear", "task1"] == "not tested"
    once["fresh_batches"] = once["updates"]
    table = plan_tables(replace(plan, stages=stages))["over_tasks"].set_index("arm")
    assert table.loc["linear", ["state", "tasks"]].to_list() == ["not tested", 2]


def test_seeds_that_only_some_tasks_have_are_flipped_where_they_are():
    """Five seeds on one task, eight on another: the p of all 2^8 flips by hand."""
    long = comparison(0.2, np.log(RATIOS))
    short = comparison(0.3, np.log(RATIOS), seed=1)
    five = Paired(
        *(values[:5] for values in (short.arm, short.other, short.standard)), RATIOS, SEEDS[:5]
    )
    total = np.zeros(8)
    total += (long.arm - long.other) / long.scale / 8 / 2
    total[:5] += (five.arm - five.other) / five.scale / 5 / 2
    signs = 1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1)
    expected = np.mean(np.abs(signs @ total) >= abs(total.sum()) - 1e-12)
    assert saved({"a": long, "b": five}).p == pytest.approx(expected)


def test_hardness_is_flipped_by_seed_whichever_seeds_a_task_has():
    """Of one task seeds 0 to 7, of the other 8 to 15: sixteen signs, not eight."""
    runs = draw(Truth(tasks=2, gains={"linear": 9.0}), np.random.default_rng(0))
    seen = evidence(runs)
    values = np.linspace(0.4, 0.5, 8)
    together = {"task0": (SEEDS, values), "task1": (SEEDS, values)}
    apart = together | {"task1": (SEEDS + 8, values)}
    strong = {
        c: {t: replace(p, arm=p.other + 9) for t, p in of.items()}
        for c, of in seen.controls.items()
    }
    few, many = (
        judge(replace(seen, hardness=h, controls=strong), runs.declared)[2]
        for h in (together, apart)
    )
    assert "jointly p = 0.0078" not in many.sentence
    assert few.verdict == many.verdict == "supported"


# --- from runs --------------------------------------------------------------------------------


def test_the_shared_rate_is_read_on_the_curve_at_the_standard_arm_s_own_rate(tmp_path):
    """At a shared rate at which everything is worse, equal arms still save nothing."""
    runs = draw(Truth(tasks=1, slope=5.0), np.random.default_rng(0))
    write(runs, tmp_path)
    plan = load_plan(tmp_path, "simulated")
    worse = plan.stages["own"].runs.copy()
    worse["validation.accuracy"] -= 30.0
    own = gather(plan.declared, plan.stages["own"], plan.budgets)
    shared = gather(plan.declared, Records(worse), plan.budgets)
    for arm in ARMS:
        mine, theirs = saved(own.at_end[arm]), saved(shared.at_end[arm])
        assert theirs.ratio == pytest.approx(mine.ratio)
        assert theirs.interval.high == pytest.approx(mine.interval.high)


@pytest.mark.parametrize("metric", ["loss", "negative_elbo"])
def test_less_is_better_where_it_is_and_metrics_may_be_negative(metric, tmp_path):
    """The same runs by a metric of which less is better, all its values below 0."""
    runs = draw(Truth(tasks=1, gains=dict.fromkeys(ARMS, 4.0)), np.random.default_rng(0))
    write(runs, tmp_path)
    plan = load_plan(tmp_path, "simulated")
    (label, goal) = next(iter(plan.declared.goals.items()))
    shift = 100.0

    def turned(records: Records) -> Records:
        table = records.runs.copy()
        table[f"validation.{metric}"] = -table["validation.accuracy"] - shift
        found = Records(table)
        evals = records.evals.assign(metric=metric, value=-records.evals["value"] - shift)
        found.__dict__["evals"] = evals
        found.__dict__["updates"] = records.updates
        return found

    declared = replace(
        plan.declared, goals={label: replace(goal, metric=metric, target=-goal.target - shift)}
    )
    budgets = {ratio: turned(records) for ratio, records in plan.budgets.items()}
    seen = gather(declared, turned(plan.stages["own"]), budgets)
    expected = evidence(runs)
    for arm in ARMS:
        assert saved(seen.at_end[arm]).ratio == pytest.approx(saved(expected.at_end[arm]).ratio)
        times = seen.until[arm][label][1]
        assert times == pytest.approx(expected.until[arm][label][1])
    said = [v.verdict for v in judge(seen, declared)]
    assert said == [v.verdict for v in judge(expected, runs.declared)]
    assert not pd.isna(seen.hardness[label][1]).any()
