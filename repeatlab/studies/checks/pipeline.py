"""What the networks really see: the numbers of the inputs, the labels beside them, the pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repeatlab.data.augment import as_pictures
from repeatlab.studies.checks.probe import Subject
from repeatlab.studies.checks.report import Result, Verdict, worst

BATCHES = 4
NEIGHBOURS = 1024  # samples among which neighbours are looked for
PICTURES = 32
RANGES = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0)}


def inputs(subject: Subject) -> Result:
    """Hold the scale of what the networks see against what the pipeline is to make of it.

    Standardised images: mean within 0.5 of 0, standard deviation from 0.5 to 2 (augmentation moves
    both a little). Images in a range: within it, and over most of it. Other numbers: the standard
    deviation of each, at best from 0.1 to 10. Samples that are all alike are a failure.
    """
    task, expected = subject.build(), subject.expected
    batches = [expected.inputs(task.fresh_batch(index)) for index in range(BATCHES)]
    if not batches[0]:
        return Result("inputs", "not applicable", note="what it sees are no numbers")
    numbers: dict[str, float | str] = {}
    verdicts: list[Verdict] = []
    for name in batches[0]:
        values = torch.cat([batch[name] for batch in batches]).double()
        measured, verdict = _scale(values, expected.scale)
        numbers |= {f"{name} {what}": number for what, number in measured.items()}
        verdicts.append("fail" if (values == values[0]).all() else verdict)
    note = (
        "normalisation: whether it is made, once, with the data's own mean and deviation; the "
        "pictures of the report"
    )
    return Result("inputs", worst(verdicts), numbers, note)


def _scale(values: Tensor, scale: str) -> tuple[dict[str, float], Verdict]:
    """Return the numbers that tell the scale of `values`, (n, ...), and whether it is `scale`."""
    if scale == "standard":
        mean, deviation = values.mean().item(), values.std().item()
        fine = abs(mean) <= 0.5 and 0.5 <= deviation <= 2
        return {"mean": mean, "deviation": deviation}, "pass" if fine else "fail"
    if scale == "order":
        deviations = values.flatten(1).std(0)
        low, high = deviations.min().item(), deviations.max().item()
        fine, bearable = 0.1 <= low <= high <= 10, 0.01 <= low <= high <= 100
        verdict = "pass" if fine else "warn" if bearable else "fail"
        return {"lowest deviation": low, "highest": high}, verdict
    low, high = RANGES[scale]
    least, largest = values.min().item(), values.max().item()
    fills = low <= least <= largest <= high and largest - least > 0.75 * (high - low)
    return {"lowest": least, "highest": largest}, "pass" if fills else "fail"


def labels(subject: Subject) -> Result:
    """See whether images that look alike have the same label, more often than by chance.

    The nearest neighbour of every image, as the network sees it, among up to 1024 others: by chance
    it has the same label as often as two images drawn at random. A warning below five standard
    errors above that, a failure below three.
    """
    if isinstance(subject.expected.labelled, str):
        return Result("labels", "not applicable", note=subject.expected.labelled)
    task = subject.build()
    needed = -(-NEIGHBOURS // task.batch_size)
    columns = [subject.expected.labelled(task.fresh_batch(index)) for index in range(needed)]
    images, classes, samples = (torch.cat(column) for column in zip(*columns, strict=True))
    distances = torch.cdist(images.flatten(1), images.flatten(1))
    # The same image in another view is not another image.
    distances[samples[:, None] == samples] = torch.inf
    agreement = (classes[distances.argmin(1)] == classes).double().mean().item()
    chance = classes.bincount().double().div(len(classes)).square().sum().item()
    # An image seen twice is no second observation.
    spread = (chance * (1 - chance) / len(samples.unique())) ** 0.5
    errors = (agreement - chance) / max(spread, 1e-12)  # no spread where all have one label
    numbers = {"agreement": agreement, "by chance": chance, "standard errors above": errors}
    verdict: Verdict = "pass" if errors >= 5 else "warn" if errors >= 3 else "fail"
    note = (
        "whether images and labels are permuted, cropped and indexed together; one picture of the "
        "report holds the images in the order of their labels"
    )
    return Result("labels", verdict, numbers, note)


def seen(subject: Subject) -> dict[str, np.ndarray]:
    """Return what the networks see of the first fresh batch: uint8, (n, height, width[, 3]).

    From each kind of input's least number, black, to its largest, white. Labelled images come in
    the order of their labels.
    """
    batch = subject.build().fresh_batch(0)
    pictures = {}
    for name, values in subject.expected.inputs(batch).items():
        if values.ndim == 4 and values.shape[1] in (1, 3):
            pictures[name] = _bytes(values[:PICTURES])
    if pictures and not isinstance(subject.expected.labelled, str):
        images, classes, _ = subject.expected.labelled(batch)
        order = classes.argsort(stable=True)
        name = next(n for n, v in subject.expected.inputs(batch).items() if v is images)
        del pictures[name]
        pictures[f"{name} in the order of their labels"] = _bytes(images[order])
    return pictures


def _bytes(images: Tensor) -> np.ndarray:
    low, high = images.min(), images.max()
    pixels = ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    return as_pictures(pixels)
