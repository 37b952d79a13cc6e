"""Sequences of characters as tensors in memory: stretches of a text, and lines of arithmetic.

    dataset: english           # the topics of Python's own help
    dataset: ./book.txt        # a text of one's own, in UTF-8
    dataset: gcd               # "12 gcd 18 = 06", all pairs of 1 to `numbers`
    dataset: addition          # "12 + 18 = 01", modulo `numbers`, all pairs of 0 to `numbers` - 1

A text is cut into stretches of `context` characters, each with the one that comes after them; the
last ones validate and test. Its name holds a digest of its content, since Python's topics are
others in another version. Lines of arithmetic are of one length, their numbers of digits to a
`base` with zeros before them; which of all pairs validate and test is random and always the same.
A stream draws no sample twice within a pass: what is longer than a run is seen once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repeatlab.core.seeding import generator
from repeatlab.data import own_data
from repeatlab.data.sources import DataError
from repeatlab.data.unlabelled import EpochOrder

ARITHMETIC = ("gcd", "addition")
HELD_OUT = 20  # a part in so many validates, and as large a one tests, but no more than
MOST_HELD_OUT = 2_000  # sequences


@dataclass(frozen=True)
class Sequences:
    """Sequences of the same length, split; characters are numbers from 0.

    Attributes:
        name: What they are; of a text with a digest of its content.
        train: int32, (n, length + 1): what updates are made on.
        validation: What is tuned on.
        test: Read once, at the end.
        classes: How many different characters there are.
        answer: How many characters at a sequence's end are to be predicted.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    classes: int
    answer: int

    def to(self, device: str | torch.device) -> Sequences:
        """Return the data on `device`."""
        parts = ("train", "validation", "test")
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})


def load(name: str, *, context: int, numbers: int, base: int) -> Sequences:
    """Return sequences in the memory of the CPU.

    Args:
        name: "english", "gcd", "addition", or the path of a file; see the module's docstring.
        context: Of a text, the characters that are seen.
        numbers: Of arithmetic, how many numbers there are.
        base: Of arithmetic, what digits are to.

    Raises:
        DataError: there is no such file, or it is no text that is long enough.
    """
    if name in ARITHMETIC:
        return _arithmetic(name, numbers, base)
    if name == "english":
        from pydoc_data.topics import topics

        return _stretches(name, "\n\n".join(topics[name] for name in sorted(topics)), context)
    path = own_data.find(name, what="a text file in UTF-8")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be a text file in UTF-8: {error}") from None
    return _stretches(path.stem, text, context)


@lru_cache(maxsize=2)  # a study builds many tasks
def _stretches(name: str, text: str, context: int) -> Sequences:
    """Return a text's stretches: each begins with the character that the one before ends with."""
    count, least = (len(text) - 1) // context, 2 * HELD_OUT
    if count < least:
        raise DataError(
            f"{name}: a text must have {least * context + 1} characters or more, {least} times the "
            f"context of {context}; not {len(text)}"
        )
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([numbers[character] for character in text], dtype=torch.int32)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    rows = tokens.unfold(0, context + 1, context)
    return Sequences(f"{name}-{digest}", *_split(rows), len(numbers), answer=context)


@lru_cache(maxsize=2)
def _arithmetic(name: str, numbers: int, base: int) -> Sequences:
    first = int(name == "gcd")  # 0 divides nothing
    every = torch.arange(first, first + numbers)
    left, right = torch.cartesian_prod(every, every).unbind(1)
    result = torch.gcd(left, right) if name == "gcd" else (left + right) % numbers
    digits = 1
    while base**digits <= int(every[-1]):
        digits += 1
    operator, equals = (torch.full((len(left), 1), base + sign) for sign in (0, 1))
    places = base ** torch.arange(digits - 1, -1, -1)
    written = [number[:, None] // places % base for number in (left, right, result)]
    rows = torch.cat([written[0], operator, written[1], equals, written[2]], 1).int()
    rows = rows[torch.randperm(len(rows), generator=generator(0, "arithmetic"))]
    return Sequences(f"{name}-{numbers}", *_split(rows), base + 2, answer=digits)


def _split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    held_out = min(len(rows) // HELD_OUT, MOST_HELD_OUT)
    return rows[: -2 * held_out], rows[-2 * held_out : -held_out], rows[-held_out:]


class SequenceBatch(NamedTuple):
    """One minibatch: int64 characters (b, length + 1) and samples (b,); which fresh batch it is."""

    characters: Tensor
    indices: Tensor
    index: int


class SequenceStream:
    """The endless sequence of fresh minibatches of one run.

    Every pass visits the samples in a new random order, and leaves none out. With a repeated set
    its samples, the first of `data`, are in no pass: a share of every batch is drawn from them,
    with replacement; of a run's first k batches floor(share b k) samples.

    Args:
        rows: (n, length + 1): what may be trained on; batches are made on its device.
        seed: The run's seed.
        config: With the batch size b, how many of `rows` are trained on (`samples`, chosen by the
            seed; None takes all), and the `repeated_set` of these with its `repeated_share`.

    Attributes:
        data: (samples, length + 1): what is trained on.

    Raises:
        ValueError: the repeated set leaves none for the passes.
    """

    def __init__(self, rows: Tensor, config: Any, *, seed: int) -> None:
        order = torch.randperm(len(rows), generator=generator(seed, "samples"))[: config.samples]
        self.data = rows.index_select(0, order.to(rows.device))
        self.batch_size, self.seed = config.batch_size, seed
        self._repeated, self._share = config.repeated_set, config.repeated_share
        once = len(self.data) - self._repeated
        if once < 1:
            raise ValueError(f"samples must be more than the repeated set's {self._repeated}")
        self._passes = EpochOrder(once, config.batch_size, seed=seed, name="order")

    def indices(self, index: int) -> Tensor:
        """Return which samples the fresh batch number `index` holds: int64, (batch_size,)."""
        if index < 0:
            raise ValueError(f"`index` of a fresh batch counts from 0; not {index}.")
        place, end = (self._drawn_once(batches) for batches in (index, index + 1))
        again = self.batch_size - (end - place)
        draws = generator(self.seed, "repeated", index)
        parts = [torch.randint(self._repeated, (again,), generator=draws)] if again else []
        parts.append(self._passes.between(place, end) + self._repeated)
        return torch.cat(parts).to(self.data.device, non_blocking=True)

    def _drawn_once(self, batches: int) -> int:
        """Return how many samples of the first `batches` batches are not of the repeated set."""
        samples = batches * self.batch_size
        return samples - int(samples * self._share)

    def batch_of(self, indices: Tensor, index: int, view: int = 0) -> SequenceBatch:
        """Return a batch of samples that the caller has chosen; every view shows the same."""
        indices = indices.to(self.data.device)
        return SequenceBatch(self.data.index_select(0, indices).long(), indices, index)
