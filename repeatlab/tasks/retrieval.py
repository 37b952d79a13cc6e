"""How good an embedding is for finding images of one's own class: R@1, R@5 and mAP.

Every image asks once, all others of the set answer, ordered by cosine similarity. That is the
protocol of metric learning (Musgrave et al. 2020, arXiv 2003.08505): no classifier is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

QUERIES = 500  # at a time: bounds memory at QUERIES times n similarities
RANKS = (1, 5)


@torch.no_grad()
def retrieval(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `recall_at_1`, `recall_at_5` and `map`, each from 0 to 1.

    R@k is the share of queries with one of their class among the k nearest. mAP is the mean of the
    queries' average precision over the whole order: with r images of the query's class,
    1 / r times the sum, over their ranks, of the precision up to there. Equally similar images
    keep the order of the set. A query whose class has no other image is left out.

    Args:
        embeddings: float, (n, d); their length does not matter.
        labels: int64, (n,).

    Raises:
        ValueError: no two images share a class.
    """
    unit = functional.normalize(embeddings, dim=1)
    pieces = torch.arange(len(unit), device=unit.device).split(QUERIES)
    found = torch.cat([_answers(unit, labels, piece) for piece in pieces]).cpu().double()
    if not len(found):
        raise ValueError("no two images share a class: there is nothing to retrieve")
    *recalls, precision = found.mean(0).tolist()
    return {
        **{f"recall_at_{k}": value for k, value in zip(RANKS, recalls, strict=True)},
        "map": precision,
    }


def _answers(unit: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Return hit at 1, hit at 5 and average precision of the queries that have an answer."""
    similarities = unit[queries] @ unit.T
    # Itself comes last, and is cut off.
    similarities[torch.arange(len(queries), device=unit.device), queries] = float("-inf")
    order = similarities.argsort(dim=1, descending=True, stable=True)[:, :-1]
    relevant = labels[order] == labels[queries].unsqueeze(1)
    relevant = relevant[relevant.any(1)]
    ranks = torch.arange(1, relevant.shape[1] + 1, device=unit.device)
    precision = relevant.cumsum(1) / ranks
    average = (precision * relevant).sum(1) / relevant.sum(1)
    return torch.stack([*(relevant[:, :k].any(1).float() for k in RANKS), average], dim=1)
