"""What a plan declares before its first run: arms, endpoints, margin, seeds, order of tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repeatlab.analysis.frames import LOWER_IS_BETTER
from repeatlab.analysis.updates_saved import least_p

# The control of one larger step, which at equal updates goes further and sees more fresh data.
LARGER_STEP = "step_size"
LEAST_DOSE = 1.1  # mean N below which an arm has not been tested


@dataclass(frozen=True)
class Goal:
    """What a task is judged by.

    Attributes:
        metric: Of the evaluations.
        target: What a run should reach, for the time until it.
        updates: T.
    """

    metric: str
    target: float
    updates: int

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return -1 if self.metric in LOWER_IS_BETTER else 1


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The part of a plan that the verdicts follow.

    Attributes:
        goals: Task -> what it is judged by.
        seeds: n, how many each arm is to have on each task.
        margin: The share of updates saved below which an effect is none.
        against: The arm that everything is compared with.
        arms: What "loss-driven batch repetition" means in H1, H2 and H4.
        real: The arm whose mechanism H3 is about.
        controls: The arms that H3 compares it with, at their source's rate.
        variants: The mappings and values of t that H5 compares.
        budgets: Of the standard arm, in units of T, 1 among them.
        window: Fresh batches within which H3 asks who gets the extra updates.
        seeds_of: Tasks that have another n.
        left_out: Task -> arms that are not to run there.
    """

    goals: Mapping[str, Goal]
    seeds: int
    margin: float = 0.1
    against: str = "standard"
    arms: tuple[str, ...] = ()
    real: str = ""
    controls: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    budgets: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0)
    window: int = 50
    seeds_of: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def repeating(self) -> list[str]:
        """The arms that are to repeat batches: those that a hypothesis is about, but controls."""
        named = dict.fromkeys([*self.arms, self.real, *self.variants])
        return [arm for arm in named if arm]

    @property
    def family(self) -> int:
        """The comparisons that share 5 %: each arm in H1 and in H2, and H3."""
        return 2 * len(self.arms) + 1

    @property
    def most_seeds(self) -> int:
        """The seeds of the task that has most, whose signs are flipped as wholes over all tasks."""
        return max(map(self.seeds_on, self.goals), default=self.seeds)

    @property
    def least_p(self) -> float:
        """The smallest p, adjusted over the family, that the seeds can give."""
        return min(1.0, self.family * least_p(self.most_seeds))

    def seeds_on(self, task: str) -> int:
        """Return how many seeds are planned on `task`."""
        return self.seeds_of.get(task, self.seeds)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Declaration:
        """Return the declaration that a registered plan holds."""
        lists = ("arms", "controls", "variants", "budgets")
        goals = {task: Goal(**goal) for task, goal in content["goals"].items()}
        fields = {k: tuple(v) if k in lists else v for k, v in content.items()}
        return cls(**fields | {"goals": goals})
