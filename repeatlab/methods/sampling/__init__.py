"""Samplers: which samples form the next fresh batch.

A sampler is a frozen dataclass of its parameters; `start` gives the object that draws for one run.
To add one: write the class, its running part in a file of this folder, and name it in `SAMPLERS`.

| sampler        | draws                                          | extra forwards an update     |
|----------------|------------------------------------------------|------------------------------|
| `hard_mining`  | by the last loss seen, all samples             | none                         |
| `online`       | by the rank of the last loss seen, all samples | none                         |
| `importance`   | by gradient bound, unbiased, of a presample    | `presample` b while it is on |
| `selective`    | by the loss's percentile, of fresh samples     | b (beta + 1) on average      |
| `rho_loss`     | the largest reducible losses, of a presample   | `presample` b; two models    |
| `multiplicity` | b / M samples as they come, M views of each    | none                         |

Scoring is done in evaluation mode, batch by batch, inside the clock, and charged in the ledger.
This module never imports torch: a configuration is read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from repeatlab.methods.sampling.running import RunningSampler
    from repeatlab.tasks import Task

Score = Literal["loss", "gradient_norm"]
Progress = Callable[[], float]


class Sampler:
    """Base of all samplers' parameters.

    Class attributes:
        ranges: Lowest and highest value by field; of a count, the least alone.
        unbiased: Whether the weighted batch gradient equals the mean gradient in expectation.
        running: What draws, "module:class", of this folder: its module imports torch.
    """

    ranges: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    unbiased: ClassVar[bool] = False
    running: ClassVar[str]

    def __post_init__(self) -> None:
        for field, (low, *high) in self.ranges.items():
            value = getattr(self, field)
            if value is None:
                continue
            if high and not low <= value <= high[0]:
                raise ValueError(f"{field} must lie between {low} and {high[0]}, not {value!r}")
            if not high and (type(value) is not int or value < low):
                raise ValueError(f"{field} must be an integer of at least {low}, not {value!r}")

    def start(
        self, task: Task, *, seed: int, progress: Progress, rebuild: Callable[[str], Task]
    ) -> RunningSampler:
        """Return what draws the fresh batches of one run.

        Args:
            task: The task that is trained.
            seed: The run's seed; draws are functions of (seed, fresh-batch index).
            progress: Returns which share of the run is over, in [0, 1], for what moves over it: of
                T, or of what the run may spend.
            rebuild: Returns another task of the same configuration, its initial weights drawn
                from the random stream that it is given.
        """
        module, name = self.running.split(":")
        kind = getattr(import_module(f"{__name__}.{module}"), name)
        return kind(task, seed, self, progress=progress, rebuild=rebuild)


@dataclass(frozen=True)
class HardMining(Sampler):
    """Samples drawn with probability p_i proportional to max(s_i, floor * mean s)^alpha.

    s_i is the sample's last seen score; one never seen counts as the largest so far, so that all
    are seen soon, and the floor lets none starve. Without correction (beta = 0) a batch holds
    different samples and its gradient is biased towards the hard ones: that is the method. With
    beta > 0 each is drawn with replacement and weighted by w_i = (n p_i)^-beta / max w, the largest
    of the batch. At beta = 1 the weights before this division are unbiased; it brings a factor that
    differs from batch to batch.

    Prioritized experience replay (Schaul et al. 2015, arXiv 1511.05952, section 3) is
    alpha = 0.6, beta from 0.4 to 1 and the score |delta|, `gradient_norm` of the Huber loss.

    Attributes:
        score: What a sample is ranked by: its driver loss or its gradient bound.
        alpha: Exponent of the priority; 0 draws uniformly.
        floor: Smallest priority, as a share of the mean score.
        beta: Exponent of the weights at the first update.
        beta_end: The same at the last update, reached linearly; by default `beta`. Under a budget
            both go by the share of it that is spent.
    """

    score: Score = "loss"
    alpha: float = 1.0
    floor: float = 0.1
    beta: float = 0.0
    beta_end: float | None = None

    ranges: ClassVar = {"alpha": (0, 10), "floor": (1e-6, 1), "beta": (0, 1), "beta_end": (0, 1)}
    running = "history:RunningHardMining"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_end is not None and not self.beta < self.beta_end:
            raise ValueError(f"beta_end must exceed beta, but {self.beta_end} <= {self.beta}")


@dataclass(frozen=True)
class OnlineBatchSelection(Sampler):
    """Samples drawn by the rank r of their last seen loss: p proportional to pressure^(-r / n).

    Loshchilov and Hutter 2015, arXiv 1511.06343, equation 3: the largest loss is `pressure` times
    as likely as the smallest, whatever the losses are. A sample never seen ranks first. The paper's
    repeated recomputation of all losses is left out: it would be n forwards each time.

    Attributes:
        pressure: s_e at the first update, at least 1.
        pressure_end: s_e at the last update, reached exponentially; by default `pressure`. Under a
            budget both go by the share of it that is spent.
        sort_every: Fresh batches between two sortings.
    """

    pressure: float = 100.0
    pressure_end: float | None = None
    sort_every: int = 20

    ranges: ClassVar = {"pressure": (1, 1e9), "pressure_end": (1, 1e9), "sort_every": (1,)}
    running = "history:RunningOnlineSelection"


@dataclass(frozen=True)
class Importance(Sampler):
    """Importance sampling (Katharopoulos and Fleuret 2018, arXiv 1803.00942, algorithm 1).

    While it is off, batches are uniform and their scores, a by-product of the update, only move
    tau. It is on while the smoothed tau exceeds tau_th = (p + 1 + k) / (1 + k): then B = p b
    samples are scored, b of them drawn with replacement with probability g_i proportional to the
    score, and weighted by 1 / (B g_i), so that the expected gradient is that of all B.

    tau = sqrt(B) ||g||_2 = sqrt(1 + CV(scores)^2) is by how much the variance falls, as a factor
    on the batch size.

    Attributes:
        presample: p, batches that are scored for one that is trained on.
        score: The upper bound of a sample's gradient norm, or its driver loss.
        k: A backward's time in forwards on this machine and task, as `repeatlab measure` finds it.
        ema: Decay of the moving average of tau.
    """

    presample: int = 3
    score: Score = "gradient_norm"
    k: float = 2.0
    ema: float = 0.9

    ranges: ClassVar = {"presample": (2,), "k": (0.01, 100), "ema": (0, 0.9999)}
    unbiased: ClassVar[bool] = True
    running = "importance:RunningImportance"


@dataclass(frozen=True)
class SelectiveBackprop(Sampler):
    """Selective backprop (Jiang et al. 2019, arXiv 1910.00762, algorithm 1).

    Every fresh sample is forwarded once and kept with probability percentile^beta, the percentile
    of its loss among the last `history`; kept samples wait until they fill a batch. Percentiles are
    uniform, so a share 1 / (beta + 1) is kept. No weights: the gradient is biased towards large
    losses.

    Attributes:
        beta: Selectivity; 0 keeps all.
        history: R, recent losses that percentiles are taken in.
    """

    beta: float = 1.0
    history: int = 1024

    ranges: ClassVar = {"beta": (0, 20), "history": (1,)}
    running = "selective:RunningSelective"


@dataclass(frozen=True)
class RhoLoss(Sampler):
    """RHO-LOSS (Mindermann et al. 2022, arXiv 2206.07137): the b largest reducible losses of p b.

    The reducible loss is the sample's loss less its irreducible one, the loss of a model that was
    trained on other data. Two such models are trained beforehand, each on one half of the training
    samples and asked about the other half, so that no data is held out (the paper's section 4.2);
    their updates are charged to the run. No weights: the gradient is biased.

    Attributes:
        presample: p; the paper takes b = 32 of 320.
        holdout_updates: Updates of each of the two models.
    """

    presample: int = 10
    holdout_updates: int = 1000

    ranges: ClassVar = {"presample": (2,), "holdout_updates": (1,)}
    running = "rho:RunningRhoLoss"


@dataclass(frozen=True)
class Multiplicity(Sampler):
    """M views of each of b / M samples in a batch of b: augmentation multiplicity, at equal cost.

    Hoffer et al. 2020 (batch augmentation, there on top of a batch); Fort et al. 2021, arXiv
    2105.13343, with b kept. Each fresh batch of standard training is taken in M parts, so that
    a pass over the data has M times as many updates, and the same samples in the same order.

    Attributes:
        views: M; it divides b.
    """

    views: int = 4

    ranges: ClassVar = {"views": (2,)}
    running = "views:RunningMultiplicity"


SAMPLERS: dict[str, type[Sampler]] = {
    "hard_mining": HardMining,
    "online": OnlineBatchSelection,
    "importance": Importance,
    "selective": SelectiveBackprop,
    "rho_loss": RhoLoss,
    "multiplicity": Multiplicity,
}
