"""Hyperparameters of a task and a method, searched for on the validation split.

    # params/search/supervised.yaml
    name: search-supervised
    task: {name: supervised, lr: 0.05}
    method: {mapping: {name: linear, t: 1.0}}
    space:                                    # dotted paths into the run's configuration
      task.lr: {low: 0.005, high: 0.5, log: true}
      method.mapping.max_repeats: {low: 2, high: 8, kind: int}
      task.batch_size: {choices: [32, 64]}
    sampler: {name: coarse_to_fine, factor: 3}  # or grid, random, tpe
    trials: 20
    seeds: 3
    metric: loss
    max_updates: 300

A trial is one run for each seed, an ordinary one of the store; its value is the mean over seeds of
the metric on the validation split at the last update. Optuna's journal of trials is
`runs/searches/<name>.log`, the result `runs/searches/<name>.json`. A search that is started again
goes on to its number of trials, which may be raised, and trains nothing twice.
"""

from repeatlab.studies.search.execution import run_search
from repeatlab.studies.search.model import Search
from repeatlab.studies.search.report import SearchReport, Trial
from repeatlab.studies.search.space import Choices, Range

__all__ = ["Choices", "Range", "Search", "SearchReport", "Trial", "run_search"]
