"""One small run of every method: what the contract tests of tasks and of resuming share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from repeatlab.core.schema import parse
from repeatlab.tasks import TASKS
from repeatlab.training.config import Control, RunConfig

UPDATES = 7
METHODS = {
    "standard": {},
    "cosine": {"schedule": {"name": "cosine"}},
    "step": {"schedule": {"name": "step"}},
    "exponential": {"schedule": {"name": "exponential"}},
    "inverse_time": {"schedule": {"name": "inverse_time"}},
    "fixed3": {"mapping": {"name": "constant", "repeats": 3}},
    "random": {"mapping": {"name": "uniform"}},
    "threshold": {"mapping": {"name": "threshold", "t": "auto"}},
    "linear": {"mapping": {"name": "linear", "t": 0.3}},
    "control_limit": {"mapping": {"name": "control_limit", "window": 2, "k": 0.1}},
    "quantile": {"mapping": {"name": "quantile", "window": 2}},
    "zscore": {"mapping": {"name": "zscore", "window": 2}},
    "trace": {"mapping": {"name": "trace", "counts": [2, 1, 4, 3]}},
    "linear_linear": {"mapping": {"name": "linear", "t": 0.3}, "schedule": {"name": "linear"}},
    "until": {"mapping": {"name": "until", "t": 0.5, "max_repeats": 3}},
    "while": {"mapping": {"name": "while", "t": 0.5, "max_repeats": 3}},
    "cosine_repeats": {"mapping": {"name": "cosine", "high": 3}},
    "ramp": {"mapping": {"name": "ramp", "high": 3}},
    "hard_mining": {"sampler": {"name": "hard_mining"}},
    "prioritized": {
        "sampler": {"name": "hard_mining", "score": "gradient_norm", "beta": 0.4, "beta_end": 1.0}
    },
    "online": {"sampler": {"name": "online", "sort_every": 2}},
    "importance": {"sampler": {"name": "importance", "k": 100.0, "ema": 0.0}},
    "selective": {"sampler": {"name": "selective"}},
    "rho_loss": {"sampler": {"name": "rho_loss", "presample": 2, "holdout_updates": 2}},
    "importance_linear": {
        "sampler": {"name": "importance", "score": "loss", "k": 100.0, "ema": 0.0},
        "mapping": {"name": "linear", "t": 0.3},
    },
    "step_size": {"mapping": {"name": "linear", "t": 0.3}, "apply": "step_size"},
    "fresh_samples": {"mapping": {"name": "constant", "repeats": 3}, "apply": "fresh_samples"},
    **{
        control: {
            "mapping": {
                "name": "trace",
                "of": {"mapping": {"name": "uniform", "high": 3}},
                "control": control,
                "window": 3,
                "gap": 2,
            }
        }
        for control in get_args(Control)
    },
    "fresh_views": {"mapping": {"name": "constant", "repeats": 2}, "fresh_views": True},
    # Opponents; the window is short so that the limit is exceeded.
    "isgd": {
        "mapping": {"name": "until_limit", "window": 2, "k": 0.1, "repeats": 3},
        "apply": {"name": "conservative", "zeta": 0.1},
    },
    "proximal": {
        "mapping": {"name": "constant", "repeats": 3},
        "apply": {"name": "proximal", "strength": 2.0},
    },
    "multiplicity": {"sampler": {"name": "multiplicity", "views": 4}},
    "decayed": {"mapping": {"name": "constant", "repeats": 2}, "weight_decay": 0.1},
    "measured": {"mapping": {"name": "constant", "repeats": 2}, "gradient_norms": True},
}
SIX = (
    "supervised",
    "semisupervised",
    "selfsupervised",
    "reinforcement",
    "unsupervised",
    "generative",
)
# Tasks beyond the six are tried with methods that each ask something else of a task: all tasks with
# all methods are the longest part of the suite.
REPRESENTATIVE = (
    "standard",
    "fixed3",
    "threshold",
    "hard_mining",
    "importance_linear",
    "online",
    "step_size",
    "spaced",
    "fresh_views",
)
# Of tasks that are not small by themselves.
SMALL = {"language": {"context": 8, "width": 8, "samples": 48}}
# What a task refuses, with a word of its reason.
REFUSED = {
    ("semisupervised", "rho_loss"): "pseudo-labels",
    ("selfsupervised", "importance"): "unbiased",
    ("selfsupervised", "importance_linear"): "unbiased",
    ("selfsupervised", "prioritized"): "gradient of its own",
    ("selfsupervised", "rho_loss"): "irreducible",
    ("reinforcement", "hard_mining"): "prioritized replay",
    ("reinforcement", "rho_loss"): "irreducible",
    ("reinforcement", "fresh_views"): "not augmented",
    ("unsupervised", "fresh_views"): "binarize",
    ("generative", "rho_loss"): "irreducible",
    ("generative", "fresh_views"): "not augmented",
    ("continual", "rho_loss"): "first half",
    ("noisy_labels", "rho_loss"): "irreducible",
    ("ppo", "hard_mining"): "lived through",
    ("ppo", "importance_linear"): "lived through",
    ("ppo", "online"): "lived through",
    ("ppo", "spaced"): "policy of the moment",
    ("ppo", "fresh_views"): "not augmented",
    ("single_index", "hard_mining"): "one batch alone",
    ("single_index", "prioritized"): "one batch alone",
    ("single_index", "online"): "one batch alone",
    ("single_index", "rho_loss"): "one batch alone",
    ("single_index", "fresh_views"): "not augmented",
    ("language", "fresh_views"): "not augmented",
    ("semisupervised", "multiplicity"): "without labels",
    ("selfsupervised", "multiplicity"): "other images",
    ("reinforcement", "multiplicity"): "not augmented",
    ("unsupervised", "multiplicity"): "binarize",
    ("generative", "multiplicity"): "not augmented",
    ("single_index", "multiplicity"): "not augmented",
    ("language", "multiplicity"): "not augmented",
    # `repeatlab new task` writes lines here.
    **{(task, "fresh_samples"): "standard" for task in TASKS if task != "reinforcement"},
}


def tried(methods: Iterable[str] = METHODS) -> list[tuple[str, str]]:
    """Return every task with those of `methods` that it is tried with, or has to refuse."""
    return [
        (name, method)
        for name in TASKS
        for method in methods
        if name in (*SIX, "single_index", "language")
        or method in REPRESENTATIVE
        or (name, method) in REFUSED
    ]


def config(name: str, method: str | dict = "standard", seed: int = 0) -> RunConfig:
    """Return a run of a few updates at the task's defaults, without evaluation."""
    fields = {
        "task": {"name": name, "batch_size": 16} | SMALL.get(name, {}),
        "method": METHODS[method] if isinstance(method, str) else method,
        "max_updates": UPDATES,
        "seed": seed,
        "evaluation": {"splits": [], "test": False},
        "calibration": {"updates": 3},
    }
    return parse(RunConfig, fields)
