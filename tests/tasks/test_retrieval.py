"""Retrieval against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

import repeatlab.tasks.retrieval
from repeatlab.tasks.retrieval import retrieval


def made(seed: int, n: int = 60, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=draws)
    centres = torch.randn(classes, 5, generator=draws)
    return centres[labels] + 1.5 * torch.randn(n, 5, generator=draws), labels


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_against_scikit_learn_query_by_query(seed):
    embeddings, labels = made(seed)
    similarities, truth = cosine_similarity(embeddings), labels.numpy()
    hits, precisions = {1: [], 5: []}, []
    for query in range(len(truth)):
        others = np.arange(len(truth)) != query
        relevant = truth[others] == truth[query]
        nearest = np.argsort(-similarities[query, others])
        for k, found in hits.items():
            found.append(relevant[nearest[:k]].any())
        precisions.append(average_precision_score(relevant, similarities[query, others]))
    found = retrieval(embeddings, labels)
    assert found == pytest.approx(
        {
            "recall_at_1": np.mean(hits[1]),
            "recall_at_5": np.mean(hits[5]),
            "map": np.mean(precisions),
        },
        abs=1e-6,
    )
    assert 0.2 < found["recall_at_1"] < found["recall_at_5"] < 1


def test_four_directions_by_hand():
    """At 0, 10, 30 and 90 degrees: a b a b. The last a finds b first, the others too."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 30.0, 90.0]))
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = retrieval(embeddings, torch.tensor([0, 1, 0, 1]))
    # Its partner is second, third, second and second.
    assert found == pytest.approx(
        {"recall_at_1": 0.0, "recall_at_5": 1.0, "map": (1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4}
    )


def test_only_directions_count_and_what_finds_all_of_its_class_first_is_perfect():
    labels = torch.arange(30) % 3
    embeddings = torch.eye(3)[labels] * torch.arange(1.0, 31.0).unsqueeze(1)
    assert set(retrieval(embeddings, labels).values()) == {1.0}


def test_an_image_without_another_of_its_class_asks_nothing_but_answers():
    embeddings, labels = made(0)
    extra = embeddings[:1] + 1e-3  # nearest to the first image, and of no use to it
    found = retrieval(torch.cat([embeddings, extra]), torch.cat([labels, torch.tensor([9])]))
    without = retrieval(embeddings, labels)
    assert found["map"] < without["map"]
    assert found["map"] > without["map"] - 0.1


def test_the_number_of_queries_at_a_time_changes_nothing(monkeypatch):
    whole = retrieval(*made(1))
    monkeypatch.setattr(repeatlab.tasks.retrieval, "QUERIES", 7)
    assert retrieval(*made(1)) == pytest.approx(whole, abs=1e-6)


def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match="nothing to retrieve"):
        retrieval(torch.eye(3), torch.arange(3))
