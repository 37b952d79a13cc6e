"""How many seeds a plan needs, from a pilot: by simulation of its own test.

The pilot's standard arm says, task by task, how its metric moves with the budget and how much its
seeds spread. Studies are drawn from that, normal and independent, with an arm that saves nothing or
a given share of updates, and put to the test of `updates_saved`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from repeatlab.analysis.updates_saved import Paired, saved
from repeatlab.core.schema import ConfigError

SEEDS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
STUDIES = 200
ENOUGH = 0.8


@dataclass(frozen=True)
class Pilot:
    """What is known of one task.

    Attributes:
        ratios: Shape (budgets,), in units of T.
        means: Shape (budgets,), of the standard arm's metric, more being better.
        spread: Standard deviation over seeds within a budget.
        hours: Training time of one seed of the whole comparison on this task: every arm, at its own
            rate and at the shared one, and every budget.
    """

    ratios: np.ndarray
    means: np.ndarray
    spread: float
    hours: float


def pilot_of(paired: Paired, hours: float) -> Pilot:
    """Return the pilot that a comparison's standard arm is; it needs two seeds at least."""
    return Pilot(paired.ratios, paired.standard.mean(axis=0), paired.scale, hours)


def draw(pilot: Pilot, n: int, share: float, random: np.random.Generator) -> Paired:
    """Return a comparison of `n` seeds on which the arm saves `share` of the updates.

    Raises:
        ConfigError: no budget of the pilot is so large that it would show this share.
    """
    most = 1 - 1 / pilot.ratios[-1]
    if share > most:
        raise ConfigError(
            f"share must be at most {most:.2g}, which the largest budget, {pilot.ratios[-1]:g} T, "
            f"shows; not {share:g}"
        )
    noise = pilot.spread * random.normal(size=(n, len(pilot.ratios) + 1))
    reached = np.interp(-np.log1p(-share), np.log(pilot.ratios), pilot.means)
    standard = pilot.means + noise[:, 1:]
    at_t = int(np.argmin(np.abs(pilot.ratios - 1)))
    arm = reached + noise[:, 0]
    return Paired(arm, standard[:, at_t], standard, pilot.ratios, np.arange(n))


def power_table(
    tasks: Mapping[str, Pilot],
    *,
    margin: float,
    share: float | None = None,
    family: int = 1,
    once: float = 0.0,
    seeds: Sequence[int] = SEEDS,
    studies: int = STUDIES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return one row per number of seeds: what a plan over these tasks would find, and its hours.

    Args:
        tasks: What is known of each.
        margin: The share of updates saved below which an effect is none.
        share: The effect to be found; by default the margin.
        family: Comparisons that share the 5 %: each has to be found at 0.05 / `family`.
        once: Hours that are spent whatever the number of seeds: on tuning.
        seeds: Which numbers.
        studies: Simulated for each.
        seed: Of the simulation.

    Returns:
        Columns seeds, equivalence (how often an arm without effect is called equivalent), power
        (how often the effect is called better), hours, enough (both reach 80 %).
    """
    effect = margin if share is None else share
    random = np.random.default_rng(seed)
    rows = []
    for n in seeds:
        null = [_study(tasks, n, 0.0, random) for _ in range(studies)]
        real = [_study(tasks, n, effect, random) for _ in range(studies)]
        equivalence = np.mean([one.equivalent(margin) for one in null])
        power = np.mean([one.direction(one.p * family) > 0 for one in real])
        hours = once + n * sum(pilot.hours for pilot in tasks.values())
        enough = min(equivalence, power) >= ENOUGH
        rows.append((n, float(equivalence), float(power), hours, bool(enough)))
    return pd.DataFrame(rows, columns=["seeds", "equivalence", "power", "hours", "enough"])


def _study(tasks: Mapping[str, Pilot], n: int, share: float, random: np.random.Generator):
    return saved({task: draw(pilot, n, share, random) for task, pilot in tasks.items()})
