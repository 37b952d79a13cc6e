"""The arithmetic of double Q-learning with a Huber loss (van Hasselt et al. 2016)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from repeatlab.tasks.replay_buffer import Transitions


def double_q_targets(batch: Transitions, next_values: Tensor, later: Tensor) -> Tensor:
    """Return the targets of double Q-learning, (..., b).

    Args:
        batch: Transitions, b of each agent.
        next_values: What the agents' networks say of where they end, (..., b, actions): it picks
            the action.
        later: What the target networks say of the same, likewise: it gives the action's value.
    """
    best = next_values.argmax(-1, keepdim=True)
    return batch.returns + batch.discounts * later.gather(-1, best).squeeze(-1)


def taken(values: Tensor, batch: Transitions) -> Tensor:
    """Return the values of the actions that were taken, (..., b), out of (..., b, actions)."""
    return values.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)


def greedy(values: Tensor) -> int:
    """Return the action of the highest of the values, (actions,): the first of equal ones."""
    of_actions = values.tolist()  # faster than a tensor's own argmax
    return of_actions.index(max(of_actions))


def huber_bounds(values: Tensor, targets: Tensor) -> Tensor:
    """Return min(1, |delta|), (batch,): the Huber loss's gradient, and what replay ranks by."""
    return (values - targets).abs().clamp(max=1.0)


def q_network(hidden: tuple[int, ...]) -> nn.Sequential:
    """Return the MLP from four observed numbers to the values of the two actions."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((4, *hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((4, *hidden)[-1], 2))
