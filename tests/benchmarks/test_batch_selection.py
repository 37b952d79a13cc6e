"""Batch selection on real data, with every scoring forward charged, and the tau that switches it.

MNIST, small CNN (width 16), batches of 64, one thread. Learning rate 0.05 with a cosine, the recipe
of `test_training.py`, is the same for all and was chosen before, on the standard arm; every method
has its default settings. Two comparisons:

- equal updates: 1,500 of each, whatever they cost;
- equal cost: as many as 1,500 standard updates cost, in forward equivalents with the k measured
  here. The schedule then follows the spent share, so that every arm ends at rate 0.

Charged are the presample's forwards, RHO-LOSS's two models (200 updates each, chosen beforehand)
and their forward over the whole training set; the paper shares these among many runs, a single run
cannot. At equal cost they are about 60 % of the budget, so that RHO-LOSS's own updates also begin
where the cosine has come down to a third of the rate: that row says what so short a run can pay
for, not how well the method selects. k is far below the 2 of a ResNet, because max pooling makes
this network's forward slow: a scored sample is dear here.

Three seeds decide nothing: a sign-flip p cannot fall below 0.25. The table tells sizes. Its seconds
are processor time of whole runs, the evaluation on the test split included.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from time import process_time
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from repeatlab.analysis.frames import mean_interval
from repeatlab.core.environment import processor
from repeatlab.core.schema import parse
from repeatlab.cost import Ledger, tau_threshold
from repeatlab.data.sources import DIRECTORY_VARIABLE
from repeatlab.figures import tau_over_time
from repeatlab.store.records import Run, Store
from repeatlab.studies.diagnostics.measure import measure
from repeatlab.tasks.supervised import Supervised, SupervisedConfig
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.training.one_run import Training

RESULTS = Path(__file__).parent / "results"
SEEDS, UPDATES, BATCH = 3, 1500, 64
LR = 0.05
SCALE = "CNN of width 16, batch 64, cosine from lr 0.05"
MODES = ("equal updates", "equal cost")
PRESAMPLE = 3


def methods(k: float) -> dict[str, dict]:
    samplers = {
        "standard": None,
        "hard_mining": {"name": "hard_mining"},
        "online": {"name": "online"},
        "importance": {"name": "importance", "presample": PRESAMPLE, "k": k},
        "selective": {"name": "selective"},
        "rho_loss": {"name": "rho_loss", "holdout_updates": 200},
    }
    return {
        name: {"schedule": {"name": "cosine"}} | ({"sampler": sampler} if sampler else {})
        for name, sampler in samplers.items()
    }


def config(method: str, mode: str, *, k: float, seed: int) -> RunConfig:
    return parse(
        RunConfig,
        {
            "task": {"name": "supervised", "dataset": "mnist", "lr": LR, "batch_size": BATCH},
            "method": methods(k)[method],
            "max_updates": UPDATES,
            "budget": {"unit": "cost", "k": k} if mode == "equal cost" else None,
            "evaluation": {"splits": []},
            "seed": seed,
            "device": "cpu",
        },
    )


def need(marker: str) -> None:
    root = os.environ.get(DIRECTORY_VARIABLE)
    if not root or not (Path(root) / marker).exists():
        pytest.skip(f"set {DIRECTORY_VARIABLE} to a directory that holds {marker}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return the store that both tests share, so that no run is made twice."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def backward_ratio() -> Callable[[str], float]:
    """Return a function: the small CNN's k on a data set, measured in processor time."""
    known: dict[str, float] = {}

    def of(dataset: str) -> float:
        if dataset not in known:
            task = SupervisedConfig(dataset=dataset, lr=LR, batch_size=BATCH)
            found = measure(task, device="cpu", clock=process_time)
            known[dataset] = round(found.sample_ratio, 2)
        return known[dataset]

    return of


# --- equal updates, equal cost --------------------------------------------------------------------


def test_batch_selection_at_equal_updates_and_at_equal_cost(runs, backward_ratio, capsys):
    need("MNIST/raw/train-images-idx3-ubyte")
    k = backward_ratio("mnist")
    done = {
        (method, mode): [made(config(method, mode, k=k, seed=s), runs) for s in range(SEEDS)]
        for mode in MODES
        for method in methods(k)
    }
    table = pd.DataFrame([row(*key, done, k=k) for key in done])
    with capsys.disabled():
        print(f"\n{table.drop(columns=['data', 'scale', 'processor']).to_string(index=False)}")
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "batch_selection.csv", index=False)
    limit = UPDATES * (1 + k) * BATCH
    for (method, mode), of_arm in done.items():
        for one in of_arm:
            if mode == "equal updates":
                assert one.ledger.updates == UPDATES
            else:
                # The last update is made whole, with the presample that it was chosen from.
                spent = one.ledger.cost_units(k)
                assert limit * (1 - 1e-9) <= spent < limit + (1 + k + 10) * BATCH, method
    # Without anything to score, both budgets make the same run.
    for method in ("standard", "hard_mining", "online"):
        first, second = ([(o.ledger.updates, o.accuracy) for o in done[method, m]] for m in MODES)
        assert first == second
    assert min(one.accuracy for one in done["standard", "equal updates"]) > 0.97


class Made(NamedTuple):
    """A run: its test accuracy, what it counted, and its processor time, evaluation included."""

    accuracy: float
    ledger: Ledger
    seconds: float


def made(run_config: RunConfig, store: Path) -> Made:
    start = process_time()
    summary = train(run_config, store).summary
    seconds = process_time() - start
    # A diverged run has no accuracy, and so neither has its arm.
    accuracy = summary["final"].get("test.accuracy", np.nan)
    return Made(accuracy, Ledger(**summary["ledger"]), seconds)


def row(method: str, mode: str, done: dict[tuple[str, str], list[Made]], *, k: float) -> dict:
    """Return what a method's runs came to, and its difference to standard, paired by seed."""
    of_arm = done[method, mode]
    accuracies = np.array([one.accuracy for one in of_arm])
    differences = accuracies - [one.accuracy for one in done["standard", mode]]
    names = ("test accuracy", "low", "high")
    paired = ("against standard", "difference low", "difference high")
    both = zip(names + paired, mean_interval(accuracies) + mean_interval(differences), strict=True)
    return {
        "data": "MNIST",
        "scale": SCALE,
        "method": method,
        "mode": mode,
        "n": len(of_arm),
        "updates": round(mean(one.ledger.updates for one in of_arm)),
        "cost units": round(mean(one.ledger.cost_units(k) for one in of_arm)),
        "of which scoring": round(mean(one.ledger.scoring_samples for one in of_arm)),
        "processor seconds": round(mean(one.seconds for one in of_arm), 1),
        **{name: round(float(value), 4) for name, value in both},
        "k": k,
        "processor": processor(),
    }


# --- tau ------------------------------------------------------------------------------------------

RECORDED, TRAINED = 500, 3000
FIGURE = RESULTS / "tau.png"


def test_tau_and_the_switch(runs, tmp_path, backward_ratio, capsys):
    """On CIFAR-10 from untrained and from trained weights, and on MNIST from untrained ones.

    On CIFAR-10 this network fits too little for its scores to differ: the switch stays off.
    """
    for marker in ("cifar-10-batches-py/test_batch", "MNIST/raw/train-images-idx3-ubyte"):
        need(marker)
    k = {dataset: backward_ratio(dataset) for dataset in ("cifar10", "mnist")}
    threshold = {dataset: tau_threshold(PRESAMPLE, k[dataset]) for dataset in k}
    weights, reached = trained_weights(tmp_path)
    panels = {
        "CIFAR-10, untrained": recorded(k["cifar10"], tmp_path / "untrained"),
        f"CIFAR-10, after {TRAINED:,} updates": recorded(
            k["cifar10"], tmp_path / "trained", weights=weights
        ),
        f"MNIST, the table's {UPDATES:,} updates": train(
            config("importance", "equal updates", k=k["mnist"], seed=0), runs
        ).sampler,
    }
    thresholds = dict(zip(panels, [threshold["cifar10"]] * 2 + [threshold["mnist"]], strict=True))
    with capsys.disabled():
        print(f"\nCIFAR-10 test accuracy of the trained network: {reached:.3f} ({processor()})")
        for title, rows in panels.items():
            first, last = rows["tau"].head(20).mean(), rows["tau"].tail(20).mean()
            print(
                f"{title}: tau {first:.3f} (first 20), {last:.3f} (last 20), tau_th"
                f" {thresholds[title]:.2f}, on for {rows['presampled'].mean():.1%} of the batches"
            )
    figure = tau_over_time(panels, thresholds=thresholds)
    figure.savefig(FIGURE, dpi=130, metadata={"Software": None})
    plt.close(figure)
    assert FIGURE.stat().st_size <= 100_000
    untrained, trained, mnist = panels.values()
    assert trained["tau"].head(20).mean() > untrained["tau"].head(20).mean()
    # Untrained softmax outputs are nearly equal, and so are the scores.
    assert untrained["tau"].iloc[0] == pytest.approx(1, abs=0.01)
    assert mnist["tau"].tail(100).mean() > mnist["tau"].head(100).mean()
    for title, rows in panels.items():
        before = rows["tau_average"].shift(fill_value=0.0)
        assert (rows["presampled"] == (before > thresholds[title])).all()


def cifar(updates: int, *, lr: float, method: dict) -> RunConfig:
    return parse(
        RunConfig,
        {
            "task": {"name": "supervised", "dataset": "cifar10", "lr": lr, "batch_size": BATCH},
            "method": method,
            "max_updates": updates,
            "evaluation": {"splits": []},
            "device": "cpu",
        },
    )


def trained_weights(directory: Path) -> tuple[dict, float]:
    """Return the weights of a network after a standard run, and its test accuracy."""
    run_config = cifar(TRAINED, lr=LR, method={"schedule": {"name": "cosine"}})
    task, run = train_here(run_config, directory / "standard")
    return task.model.state_dict(), run.summary["final"]["test.accuracy"]


def recorded(k: float, directory: Path, *, weights: dict | None = None) -> pd.DataFrame:
    """Return what importance sampling records from these weights on, at a fifth of the rate."""
    method = {"sampler": {"name": "importance", "presample": PRESAMPLE, "k": k}}
    _, run = train_here(cifar(RECORDED, lr=LR / 5, method=method), directory, weights=weights)
    return run.sampler


def train_here(
    run_config: RunConfig, directory: Path, *, weights: dict | None = None
) -> tuple[Supervised, Run]:
    """Return the task after a run, and the run; `train` begins from untrained weights only."""
    task = Supervised(run_config.task, seed=run_config.seed, device="cpu")
    if weights is not None:
        task.model.load_state_dict(weights)
    store = Store(directory)
    run = store.run("supervised", run_config.run_id)
    writer = store.begin(run, run_config.to_json(), {})
    Training(run_config, task, writer, calibration={}).run()
    return task, run
