"""A small transformer that predicts characters: of a text, or of the answers of arithmetic.

The network is GPT-2's (Radford et al. 2019): embeddings of characters and places, layers of causal
attention and a two-layer perceptron with GELU, each behind a LayerNorm and added to what it came
from, a last LayerNorm, and logits of the next character, with the embedding's own weights if they
are `tied`. The first loss is ln(characters), and 1/6 since torch's first weights give logits of
variance 1/3. One update is one step of the optimizer (by default AdamW) on the mean cross-entropy
over a batch's predicted characters; a sample is a sequence, and the driver of each is the mean over
its characters. On one core 117,000 parameters and 16 sequences of 64 take 20 ms.

A text's characters are all predicted, arithmetic's are those of the answer; see `data.sequences`.
`samples` says how many sequences are trained on, again and again in passes; where passes are longer
than the run, every sequence is seen once. With `repeated_set` and `repeated_share` that share of
every batch is drawn from a small set of them, beside a pass over the others: the two-set training
of Charton and Kempe (2024, arXiv 2410.07041), where the two have to be mixed within batches.

Public reference for characters, of Shakespeare: 1.4697 nats (github.com/karpathy/nanoGPT).
"""

from __future__ import annotations

from math import log
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from repeatlab.core.schema import ConfigError
from repeatlab.data.sequences import ARITHMETIC, SequenceBatch, Sequences, SequenceStream, load
from repeatlab.tasks import TaskConfig
from repeatlab.tasks.classification import cross_entropy_bounds
from repeatlab.tasks.dataset import DatasetTask, check_batch_size, known_dataset
from repeatlab.tasks.learner import EVALUATION_BATCH, Learner
from repeatlab.tasks.models import drawn_from
from repeatlab.tasks.optimization import OptimizationConfig, OptimizerChoice, chosen


class LanguageConfig(TaskConfig, OptimizationConfig):
    """Settings of the language task; defaults for the embedded text."""

    # A layer's weights grow with the square of the width, arithmetic with that of its numbers.
    most: ClassVar = TaskConfig.most | {
        "context": 10_000,
        "numbers": 1_000,
        "base": 10_000,
        "layers": 100,
        "heads": 1_000,
    }
    name: Literal["language"] = "language"
    dataset: str = "english"
    """"english", "gcd", "addition", or the path of a text file in UTF-8; see `data.sequences`."""
    context: Annotated[int, Field(ge=1)] = 64
    """Characters of a text that are seen; arithmetic has lines of its own length."""
    numbers: Annotated[int, Field(ge=10)] = 97
    """How many numbers arithmetic has; addition is modulo this."""
    base: Annotated[int, Field(ge=2)] = 10
    """What arithmetic's digits are to; one digit a number where it is above all of them."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Sequences that are trained on, chosen by the seed; null takes all."""
    repeated_set: Annotated[int, Field(ge=0)] = 0
    """Of these, how many are drawn again and again beside the others; 0 has no such set."""
    repeated_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of a batch, those that are drawn from this set."""
    width: Annotated[int, Field(ge=1)] = 64
    layers: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 2
    """Of each layer's attention; they divide the width."""
    tied: bool = False
    """Whether logits are made with the embedding's weights."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    optimizer: OptimizerChoice = chosen("adamw")
    batch_size: Annotated[int, Field(ge=1)] = 16

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str) -> str:
        return known_dataset(value, ("english", *ARITHMETIC))

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width of {self.width}; not {self.heads}")
        if bool(self.repeated_set) != bool(self.repeated_share):
            raise ValueError("repeated_set and repeated_share must both be above 0, or both 0")
        return self

    def splits(self, seed: int, device: str | torch.device = "cpu") -> Sequences:
        """Return the data set, on the device; it is the same for every seed."""
        sizes = {"context": self.context, "numbers": self.numbers, "base": self.base}
        return load(self.dataset, **sizes).to(device)

    def prepare(self) -> None:
        most = len(self.splits(0).train)
        if (self.samples or 0) > most:
            raise ConfigError(
                f"task.samples: must be at most the {most} sequences that {self.dataset} trains on;"
                f" not {self.samples}"
            )
        once = (self.samples or most) - self.repeated_set
        what = f"{self.dataset} without its repeated set" if self.repeated_set else self.dataset
        check_batch_size("batch_size", self.batch_size, once, what)

    def refusals(self) -> dict[str, str]:
        refused = {
            "fresh_views": "characters are not augmented",
            "fresh_samples": "on a data set N fresh batches in place of N visits are standard "
            "training: use `{}`",
        }
        if self.repeated_set:
            why = "it chooses among all sequences, so that repeated_share means nothing"
            refused |= dict.fromkeys(("hard_mining", "online", "rho_loss"), why)
        return refused


class Layer(nn.Module):
    """Causal attention and a perceptron, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, length, width) for such an input."""
        parts = self.attention(self.attention_norm(x)).chunk(3, 2)
        queries, keys, values = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in parts)
        seen = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mixed(seen.transpose(1, 2).flatten(2))
        return x + self.out(functional.gelu(self.hidden(self.norm(x))))


class Transformer(nn.Module):
    """The logits of every next character, (b, length, classes), for characters (b, length)."""

    def __init__(
        self, classes: int, length: int, *, width: int, layers: int, heads: int, tied: bool
    ) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(classes, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)
        for table in (self.characters, self.places):  # as torch's linear layers
            nn.init.normal_(table.weight, std=(3 * width) ** -0.5)
        if tied:
            self.head.weight = self.characters.weight

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.places.weight[: characters.shape[1]]
        return self.head(self.norm(self.layers(x)))


class Language(DatasetTask):
    """See the module's docstring, and `repeatlab.tasks.Task` for the methods.

    Attributes:
        tokens: Characters that go forward in one update: the context times the batch size.
    """

    Config: ClassVar[type[TaskConfig]] = LanguageConfig
    data: Sequences
    stream: SequenceStream

    def __init__(
        self, config: LanguageConfig, *, seed: int, device: str, data: Sequences | None = None
    ) -> None:
        super().__init__(config, seed=seed, device=device, data=data)
        self.stream = SequenceStream(self.data.train, config, seed=seed)
        length = self.stream.data.shape[1] - 1
        self.tokens = length * config.batch_size
        sizes = {name: getattr(config, name) for name in ("width", "layers", "heads", "tied")}
        with drawn_from(seed):
            model = Transformer(self.data.classes, length, **sizes)
        self.train_with(Learner(model, config, device=device))

    def outputs(self, batch: SequenceBatch) -> Tensor:
        """Return the logits of the predicted characters, (b, answer, classes)."""
        return self._logits(self.learner.network, batch.characters)

    def losses(self, logits: Tensor, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Return every sequence's mean cross-entropy, (b,), which drives and is descended."""
        losses = self._losses(logits, batch.characters)
        return losses, losses

    def _logits(self, network: nn.Module, characters: Tensor) -> Tensor:
        return self.precision(network, characters[:, :-1])[:, -self.data.answer :]

    def _losses(self, logits: Tensor, characters: Tensor) -> Tensor:
        truth = characters[:, -self.data.answer :]
        return functional.cross_entropy(logits.transpose(1, 2), truth, reduction="none").mean(1)

    def bounds(self, logits: Tensor, batch: SequenceBatch) -> Tensor:
        """Return the norm of the loss's gradient at all of a sequence's logits, (b,)."""
        truth = batch.characters[:, -self.data.answer :]
        norms = cross_entropy_bounds(logits.flatten(0, 1), truth.flatten()).view(truth.shape)
        return norms.norm(dim=1) / self.data.answer

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return the loss in nats, and a text's bits a character or arithmetic's accuracy.

        An answer is right where all of its characters are, as when they are written one by one.
        """
        # Of training samples as many as validate, the last ones: a repeated set is the first.
        last = self.stream.data[-len(self.data.validation) :]
        rows = last if split == "train" else getattr(self.data, split)
        losses, right = [], []
        with self.evaluating():
            for part in rows.long().split(EVALUATION_BATCH):
                logits = self._logits(self.learner.evaluated, part)
                losses.append(self._losses(logits, part))
                right.append((logits.argmax(2) == part[:, -self.data.answer :]).all(1))
        # First to the CPU: not every device has float64.
        loss, accuracy = (
            torch.cat(found).cpu().double().mean().item() for found in (losses, right)
        )
        if self.config.dataset in ARITHMETIC:
            return {"loss": loss, "accuracy": accuracy}
        return {"loss": loss, "bits_per_character": loss / log(2)}
