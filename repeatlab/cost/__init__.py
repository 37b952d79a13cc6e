"""What training costs: counted while it runs, and predicted from its parts."""

from repeatlab.cost.ledger import Ledger, cost_units, spent_on
from repeatlab.cost.model import (
    CostModel,
    break_even_keep,
    break_even_presample,
    cost_ratio,
    tau_threshold,
)

__all__ = [
    "CostModel",
    "Ledger",
    "break_even_keep",
    "break_even_presample",
    "cost_ratio",
    "cost_units",
    "spent_on",
    "tau_threshold",
]
