"""Learning from noisy labels: each label counts as far as the network bears it out.

A share of the training labels is false (`label_noise`, symmetric). With p the network's answer to a
sample, y its given label and H the cross-entropy in nats, an update descends the mean of

- `none`: H(y, p);
- `weighted`: (1 - p_y^q) / q, the generalised cross-entropy (Zhang and Sabuncu 2018, arXiv
  1805.07836), whose gradient is that of H(y, p) with the sample's weight p_y^q;
- `bootstrap`: w H(y, p) + (1 - w) H(z, p), the label mixed with the network's own prediction (Reed
  et al. 2014, arXiv 1412.6596). z is p itself (`soft`) or its largest class (`hard`). The paper has
  one w for all, `beta`; here w = beta + (1 - beta) p_y^q, which grows as the sample's loss falls.
  No gradient flows through w, nor through a hard z; it does through a soft one, as in the paper.

With beta 0 nothing holds a network that has begun to give one class to everything: where labels
count for nothing, its predictions bear themselves out. From beta 0.5 on a label never counts less
than the prediction.

All of this begins after `warm_up` updates on H(y, p): before, a network can bear out nothing. The
driver loss is what is descended (`corrected`) or the plain `cross_entropy` with the given labels.
It may jump where the warm-up ends.

Under repetition: mislabelled samples have high losses, so that the plain cross-entropy spends extra
updates on them. A visit raises p_y of the labels it has seen, true or not, and with it their weight
at the next visit: repetition can talk the network into a false label, and the correction less and
less objects. The warm-up counts updates, and so ends after fewer fresh batches where N is above 1.
The record has the share of visits and of extra visits that fell on false labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from repeatlab.data import Batch
from repeatlab.tasks import Report, TaskConfig
from repeatlab.tasks.classification import (
    ClassifierConfig,
    ClassifierTask,
    make_classifier,
    metrics_of,
    noise_metrics,
)
from repeatlab.tasks.learner import Learner


class NoisyLabelsConfig(ClassifierConfig):
    """Settings of the noisy-label task; the defaults are for the embedded data."""

    name: Literal["noisy_labels"] = "noisy_labels"
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of training labels replaced by another class, each as likely; drawn from the seed."""
    correction: Literal["none", "weighted", "bootstrap"] = "bootstrap"
    warm_up: Annotated[int, Field(ge=0)] = 200
    """Updates on the plain cross-entropy."""
    q: Annotated[float, Field(gt=0, le=1)] = 0.7
    """How fast a weight p_y^q falls; 0.7 is Zhang and Sabuncu's."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The least w of `bootstrap`."""
    per_sample: bool = True
    """Whether w depends on the sample's loss; else it is beta (the paper: 0.95 soft, 0.8 hard)."""
    target: Literal["soft", "hard"] = "hard"
    """z of `bootstrap`."""
    driver: Literal["corrected", "cross_entropy"] = "corrected"

    def refusals(self) -> dict[str, str]:
        return super().refusals() | {
            "rho_loss": "weights move with the network, so that no loss is irreducible"
        }


class NoisyLabels(ClassifierTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        corrupted: bool, (samples,): which training labels are false; None without noise.
        updates: Made so far.
    """

    Config: ClassVar[type[TaskConfig]] = NoisyLabelsConfig
    saved: ClassVar[Mapping[str, str]] = {"learner": "learner", "updates": "updates"}

    def __init__(self, config: NoisyLabelsConfig, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        self.learn_noisy()
        network = make_classifier(config, self.data, seed=seed)
        self.train_with(Learner(network, config, device=device))
        self.updates = 0

    def step(self, batch: Batch, report: Report, weights: Tensor | None = None) -> None:
        super().step(batch, report, weights)
        self.updates += 1

    @property
    def correction(self) -> str:
        """What the next update descends."""
        return "none" if self.updates < self.config.warm_up else self.config.correction

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the driver loss of every sample, and the loss that is descended: (b,) each."""
        config = self.config
        given = corrected = functional.cross_entropy(logits, batch.labels, reduction="none")
        if self.correction == "weighted":
            corrected = -torch.expm1(-config.q * given) / config.q
        elif self.correction == "bootstrap":
            trust, log_p = self._trust(given), logits.log_softmax(1)
            own = -log_p.amax(1) if config.target == "hard" else -(log_p.exp() * log_p).sum(1)
            corrected = trust * given + (1 - trust) * own
        return corrected if config.driver == "corrected" else given, corrected

    def _trust(self, given: Tensor) -> Tensor:
        """Return w of every sample, from the cross-entropy of its given label: (b,)."""
        beta = self.config.beta
        if not self.config.per_sample:
            return torch.full_like(given, beta)
        return beta + (1 - beta) * (-self.config.q * given.detach()).exp()

    def bounds(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the norm of the gradient of every sample's loss at its logits, (b,)."""
        p, log_p = logits.softmax(1), logits.log_softmax(1)
        gradient = p - functional.one_hot(batch.labels, logits.shape[1])
        if self.correction == "none":
            return gradient.norm(dim=1)
        given = functional.cross_entropy(logits, batch.labels, reduction="none")
        if self.correction == "weighted":
            return (-self.config.q * given).exp() * gradient.norm(dim=1)
        if self.config.target == "hard":
            own = p - functional.one_hot(p.argmax(1), p.shape[1])
        else:  # of the entropy
            own = p * ((p * log_p).sum(1, keepdim=True) - log_p)
        trust = self._trust(given).unsqueeze(1)
        return (trust * gradient + (1 - trust) * own).norm(dim=1)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return loss, accuracy and macro-F1 by true labels; on "train" what became of false ones.

        See `noise_metrics` for `memorized` and `noise_auc`; without noise there are none.
        """
        data = self.data.evaluated(split)
        logits = self.learner.classify(self.learner.features(data, self.data))
        metrics = metrics_of(logits, data.labels)
        if split == "train" and self.corrupted is not None:
            chosen = self.data.train_subset().to(data.labels.device)
            metrics |= noise_metrics(
                logits, self.stream.data.labels[chosen], self.corrupted[chosen]
            )
        return metrics
