"""Runs per hour of every task of a plan, one by one on one core, and what all of it would take.

    python tests/benchmarks/throughput.py [PLAN.yaml] [--task MNIST] [--seconds 20]

By default the reference study. Nothing is trained to its end: the standard arm of a task, and every
arm that chooses its samples, makes updates for so many seconds, is evaluated once, and the rest is
extrapolated to T updates with the plan's evaluations. An arm that only changes N or the step is
taken to cost what the standard arm does, an evaluation on the test split what one on validation
does. What learns by acting has episodes, and so evaluations, that grow longer as it learns: there
the hours are too few.

Runs are counted as the plan makes them: tuning, every arm at a rate of its own and at the shared
one, the budgets, and calibration. A widened grid would add to it. The table is
results/throughput.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import pandas as pd

from repeatlab.core.environment import processor
from repeatlab.store.records import Store
from repeatlab.studies.plan import Choice, Plan, compared, read_plan, tuning_study
from repeatlab.studies.study import Planned
from repeatlab.training.config import RunConfig
from repeatlab.training.making import build_task, torch_settings
from repeatlab.training.one_run import Training

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "throughput.csv"
WARM = 5  # updates that are not timed


def every_run(plan: Plan, label: str) -> dict[str, Planned]:
    """Return all runs of one task by their ids, as if tuning had moved every arm's rate."""
    arms = plan.arms(label)
    free = [name for name, method in arms.items() if not isinstance(method.source, str)]
    choices = {name: Choice(plan.tuning.rates[-1], {}, 0, False, 0) for name in free}
    studies = [tuning_study(plan, label, dict.fromkeys(free, plan.tuning.rates))]
    studies += compared(plan, {label: choices})
    return {run.config.run_id: run for study in studies for run in study.planned()}


def measure(config: RunConfig, seconds: float) -> dict[str, float]:
    """Return the seconds of an update, an evaluation and the start of a run, and what was timed."""
    with tempfile.TemporaryDirectory() as runs, torch_settings(1, config.stream_seed):
        start = perf_counter()
        store = Store(runs)
        writer = store.begin(store.run("timed", "timed"), config.to_json(), {})
        training = Training(config, build_task(config, "cpu"), writer, calibration={})
        training.begin()
        visit, begun = training.visit(), 0.0
        for number, batch in enumerate(training.visits(), 1):
            visit(batch)
            if number == WARM:
                begun = perf_counter()
            if number > WARM and perf_counter() - begun >= seconds:
                break
            if number == config.max_updates - 1:  # after the last one comes an evaluation
                break
        ended, made = perf_counter(), number - WARM
        training.evaluator.evaluate()
        evaluated = perf_counter() - ended
        writer.close("interrupted")
    update = (ended - begun) / made
    begin = max(0.0, begun - start - evaluated - WARM * update)
    return {"update": update, "evaluation": evaluated, "start": begin, "timed": made}


def row_of(plan: Plan, label: str, seconds: float) -> dict[str, object]:
    """Return what one task takes: a row of the table."""
    planned, arms, against = plan.tasks[label], plan.arms(label), plan.judged.against
    # One evaluation, outside what is timed.
    rarely = {"evaluation": planned.evaluation.model_copy(update={"every": planned.max_updates})}
    study = plan.study(label, "shared", arms).model_copy(update=rarely | {"device": "cpu"})
    of_arm = {run.method: run.config for run in study.planned() if run.seed == 0}
    chosen = [name for name, method in arms.items() if method.sampler is not None]
    costs = {name: measure(of_arm[name], seconds) for name in dict.fromkeys([against, *chosen])}

    def hours(updates: int, cost: dict[str, float], every: int) -> float:
        evaluations = 2 + updates // every  # before the first update, and on the test split
        spent = cost["start"] + updates * cost["update"] + evaluations * cost["evaluation"]
        return spent / 3600

    standard, every = costs[against], planned.evaluation.every
    one = hours(planned.max_updates, standard, every)
    runs, total, calibrated = every_run(plan, label), 0.0, set()
    for run in runs.values():
        updates = run.config.max_updates
        arm = next((name for name in chosen if run.method.split(" rate=")[0] == name), against)
        total += hours(updates, costs[arm], min(every, updates))
        if run.config.method.depends_on_calibration and run.seed not in calibrated:
            calibrated.add(run.seed)  # one run for all arms of a seed
            total += hours(planned.calibration.updates, standard, planned.calibration.updates)
    dearest = max(costs, key=lambda name: costs[name]["update"])
    return {
        "task": label,
        "T": planned.max_updates,
        "ms an update": round(1000 * standard["update"], 3),
        "s an evaluation": round(standard["evaluation"], 3),
        "s a run": round(3600 * one, 1),
        "runs per hour": round(1 / one, 1),
        "dearest arm": dearest,
        "its ms an update": round(1000 * costs[dearest]["update"], 3),
        "runs of the plan": len(runs) + len(calibrated),
        "hours of the plan": round(total, 2),
        "updates timed": int(standard["timed"]),
        "processor": f"one thread of {processor()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plan", nargs="?", default=ROOT / "params" / "reference" / "plan.yaml")
    parser.add_argument("--task", action="append", help="only this one; may be repeated")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each arm timed")
    options = parser.parse_args()
    plan = read_plan(options.plan)
    rows = []
    for label in options.task or plan.tasks:
        plan.tasks[label].task.prepare()
        rows.append(row_of(plan, label, options.seconds))
        print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    if RESULTS.exists():
        kept = pd.read_csv(RESULTS)
        table = pd.concat([kept, table]).drop_duplicates("task", keep="last")
    table = table.set_index("task").reindex([t for t in plan.tasks if t in set(table["task"])])
    table.reset_index().to_csv(RESULTS, index=False)
    lacking = [label for label in plan.tasks if label not in table.index]
    hours, runs = table["hours of the plan"].sum(), table["runs of the plan"].sum()
    without = f" without {', '.join(lacking)}" if lacking else ""
    print(f"{plan.name}{without}: {runs} runs, {hours:.1f} hours of one core, extrapolated")


if __name__ == "__main__":
    main()
