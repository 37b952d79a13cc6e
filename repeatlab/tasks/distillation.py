"""Image classification that also imitates a teacher (Hinton et al. 2015, arXiv 1503.02531).

The loss of a sample with label y, student p and teacher's soft targets q, both at temperature T:

    (1 - share) CE(y, p) + share T^2 KL(q_T || p_T)

with p_T = softmax(logits / T). Gradients of the second term shrink as 1 / T^2, which T^2 makes up
for (section 2). The paper has the cross-entropy in the place of the divergence; the two differ by
the entropy of q_T, which has no gradient, and the divergence is 0 where the student is the teacher.
The mean over the batch is the driver loss; it is no cross-entropy, so that a t found on one does
not carry over. Evaluation is that of the supervised task.

The targets are of the images as they are: a student under augmentation is to answer a crop as the
teacher answers the whole. A batch that is repeated has the same targets at every visit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

from repeatlab.data import Batch
from repeatlab.tasks.classification import ClassifierTask
from repeatlab.tasks.supervised import Supervised


class Distilled(Supervised):
    """See the module's docstring; `imitate` gives it the teacher before the first update.

    Attributes:
        pretraining: What the teacher has cost, by the names of `Ledger`.
    """

    pretraining: Mapping[str, float]

    def imitate(
        self,
        targets: Tensor,
        *,
        temperature: float,
        share: float,
        spent: Mapping[str, float],
    ) -> None:
        """Learn from a teacher from now on.

        Args:
            targets: (train samples, classes): q_T.
            temperature: T.
            share: Of the teacher in the loss, from 0 to 1.
            spent: What the teacher has cost.
        """
        self.targets = targets.float().to(self.device)
        self.temperature, self.of_teacher, self.pretraining = temperature, share, spent

    def step(
        self, batch: Batch, report: Callable[..., None], weights: Tensor | None = None
    ) -> None:
        # Not by the fused mean of the supervised task: this loss has none.
        ClassifierTask.step(self, batch, report, weights)

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return every sample's mixed loss, (b,), which drives and is descended."""
        targets = self.targets[batch.indices]
        student = (logits / self.temperature).log_softmax(1)
        soft = functional.kl_div(student, targets, reduction="none").sum(1)
        soft = self.temperature**2 * soft
        hard, _ = super().losses(logits, batch)
        mixed = (1 - self.of_teacher) * hard + self.of_teacher * soft
        return mixed, mixed

    def bounds(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the norm of every sample's gradient at the logits, (b,)."""
        classes, smoothing = logits.shape[1], self.config.label_smoothing
        label = (1 - smoothing) * functional.one_hot(batch.labels, classes) + smoothing / classes
        soft = (logits / self.temperature).softmax(1) - self.targets[batch.indices]
        hard = logits.softmax(1) - label
        return ((1 - self.of_teacher) * hard + self.of_teacher * self.temperature * soft).norm(
            dim=1
        )
