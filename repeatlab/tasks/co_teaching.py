"""Co-teaching (Han et al. 2018, arXiv 1804.06872): two networks choose what the other trusts.

A share of the training labels is false (`label_noise`, symmetric). Two networks with first weights
of their own see the same batch of b images. Each takes the R b samples of least cross-entropy
(nats, given labels), and its peer makes an SGD step on their mean: what one network wrongly trusts
need not mislead the other. With tau the forget rate, update t of the run keeps

    R(t) = 1 - tau min(1, t / ramp)

of a batch (the paper counts epochs, and ramps over 10 of them): at first all, when losses do not
yet tell false labels from true ones. Each network has a learning rate of its own. An update is one
step of each; 2 b samples go forward, and as many backward, for a gradient of 0 is computed too.

The driver loss is the mean over both networks of the mean loss on the samples that each learns
from (`selected`), or on `all` of the batch. The loss of a *sample* under `selected` is 1 / R times
its loss where it is selected and 0 where not, averaged over the networks: the mean over samples is
the driver. Whether a sample is selected depends on the others of its batch.

Under repetition: the selection is made anew at every visit, by networks that have just learnt from
it; a false label that slipped in looks safer at the next visit, and both networks see the same
batch again, which is what drives them together (`disagreement` falls) and weakens what each has to
teach. The forget rate follows updates, and so rises within fewer fresh batches where N is above 1.
With `driver: all` extra updates go to batches with many false labels, of which most are then not
learnt from; with `selected` they hardly count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from repeatlab.data import Batch
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.classification import (
    ClassifierConfig,
    ClassifierTask,
    make_classifier,
    metrics_of,
    noise_metrics,
)
from repeatlab.tasks.learner import Learner


class CoTeachingConfig(ClassifierConfig):
    """Settings of the co-teaching task; the defaults are for the embedded data."""

    name: Literal["co_teaching"] = "co_teaching"
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of training labels replaced by another class, each as likely; drawn from the seed."""
    second_lr: Annotated[float, Field(gt=0)] | None = None
    """Of the second network; null takes `lr`, which is the first one's."""
    forget_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """tau; null takes `label_noise`, as if that were known."""
    ramp: Annotated[int, Field(ge=1)] = 150
    """Updates until tau is reached."""
    driver: Literal["selected", "all"] = "selected"

    def refusals(self) -> dict[str, str]:
        reason = "which samples are learnt from depends on the others of their batch, so that "
        return super().refusals() | {
            **dict.fromkeys(
                ("importance", "weighted"), reason + "no weights make the gradient unbiased"
            ),
            "gradient_norm": reason + "no image has a gradient of its own to bound",
            "rho_loss": reason + "no loss has an irreducible part",
        }


class CoTeaching(ClassifierTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        corrupted: bool, (samples,): which training labels are false; None without noise.
        updates: Made so far.
    """

    Config: ClassVar[type[TaskConfig]] = CoTeachingConfig
    saved: ClassVar[Mapping[str, str]] = {"learners": "learners", "updates": "updates"}

    def __init__(self, config: CoTeachingConfig, *, seed: int, device: str) -> None:
        super().__init__(config, seed=seed, device=device)
        self.learn_noisy()
        rates = {"weights": config.lr, "second weights": config.second_lr or config.lr}
        learners = [
            Learner(
                make_classifier(config, self.data, self.data.classes, seed=seed, stream=stream),
                config.model_copy(update={"lr": lr}),
                device=device,
            )
            for stream, lr in rates.items()
        ]
        self.train_with(*learners)
        self.first, self.second = (learner.network for learner in learners)
        self.first_ema, self.second_ema = (learner.average for learner in learners)
        self.forward_samples = self.backward_samples = 2 * config.batch_size
        self.updates = 0

    @property
    def forget_rate(self) -> float:
        """1 - R of the next update."""
        config = self.config
        most = config.label_noise if config.forget_rate is None else config.forget_rate
        return most * min(1.0, self.updates / config.ramp)

    def step(
        self, batch: Batch, report: Callable[..., None], weights: Tensor | None = None
    ) -> None:
        losses = self.outputs(batch)
        taught = self._taught(losses)
        drivers = self._driver(losses, taught).detach()
        if weights is None:
            report(drivers.mean())
        else:
            report(drivers.mean(), drivers)
            taught = [weights * own for own in taught]
        for learner, own in zip(self.learners, taught, strict=True):
            learner.step(own.mean())
        self.updates += 1

    def outputs(self, batch: Batch) -> list[Tensor]:
        """Return the cross-entropy of the given labels under each network: (b,) each."""
        return [
            functional.cross_entropy(learner(batch.images), batch.labels, reduction="none")
            for learner in self.learners
        ]

    def losses(self, losses: list[Tensor], batch: Batch) -> tuple[Tensor, None]:
        """Return the driver loss of every sample, (b,); each network descends one of its own."""
        return self._driver(losses, self._taught(losses)), None

    def _taught(self, losses: list[Tensor]) -> list[Tensor]:
        """Return what each network descends, (b,) each: its losses on what its peer has chosen.

        Zero elsewhere, and scaled so that the mean over b is that over the chosen.
        """
        chosen = small_losses(torch.stack(losses).detach(), 1 - self.forget_rate)
        scale = chosen.shape[1] / chosen.sum(1, keepdim=True)
        of_peers = (chosen * scale).flip(0)
        return [own * mask for own, mask in zip(losses, of_peers, strict=True)]

    def _driver(self, losses: list[Tensor], taught: list[Tensor]) -> Tensor:
        return torch.stack(taught if self.config.driver == "selected" else losses).mean(0)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return loss, accuracy and macro-F1 by true labels, each the mean of both networks.

        `disagreement` is the share of images that they see differently. On "train", with noise,
        also `noise_metrics`, likewise averaged, and `label_precision`: the share of true labels
        among the 1 - `label_noise` of these images with the least losses.
        """
        data = self.data.evaluated(split)
        both = [each.classify(each.features(data, self.data)) for each in self.learners]
        metrics = _mean([metrics_of(logits, data.labels) for logits in both])
        differ = both[0].argmax(1) != both[1].argmax(1)
        metrics["disagreement"] = differ.cpu().double().mean().item()
        if split == "train" and self.corrupted is not None:
            chosen = self.data.train_subset().to(data.labels.device)
            given, false = self.stream.data.labels[chosen], self.corrupted[chosen]
            metrics |= _mean([noise_metrics(logits, given, false) for logits in both])
            losses = [functional.cross_entropy(o, given, reduction="none") for o in both]
            kept = small_losses(torch.stack(losses), 1 - self.config.label_noise)
            metrics["label_precision"] = (~false).expand(2, -1)[kept].cpu().double().mean().item()
        return metrics


def small_losses(losses: Tensor, share: float) -> Tensor:
    """Return which samples of each row have its least losses: bool, as `losses`.

    The whole number below share times n of them, and at least one; of equal losses the first.

    Args:
        losses: (rows, n).
        share: Of a row, from 0 to 1.
    """
    # Rounding must not lose a sample: (1 - 0.4) 5 is a little below 3.
    count = max(1, int(share * losses.shape[1] + 1e-9))
    order = losses.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(losses, dtype=torch.bool).scatter_(1, order, True)


def _mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}
