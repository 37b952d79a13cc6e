"""Many runs of one study as one: the arms of small networks in lock-step.

At a fixed number of updates every arm makes exactly one update per step, and its mapping only
decides whether the next one is on a fresh batch or on the same. So arms that differ in method,
seed or learning rate alone train as one stacked network without masks, and what an update of a
small network mostly costs, the calls into the library, is shared among them. Each arm keeps its own
sequence of N, its batches, evaluations, records, checkpoints and run directory.

The results are those of the runs one by one, on a CPU to the bit where the batched products sum in
the order of single ones, as torch's do for layers of more than a few numbers where it was measured.
Where they do not, losses differ by some units in the last place, and an N where a loss lies that
close to a boundary of its mapping; from there on the two runs drift apart, as equal runs on two
processors do. What a record calls seconds is a run's share: the group's time, divided by its arms.

CNNs, transformers and autoencoders, too, are equal to the run alone to float tolerance; see
`functional`, and `plan` for where they go in step.

Each agent has its own environment and replay buffer: of a DQN's time less is shared than of an
MLP's on a data set. An evaluation's episodes are played by all networks at once; agents of one seed
share the steps before the first update.
"""

from __future__ import annotations

from repeatlab.studies.lockstep.group import train_group
from repeatlab.studies.lockstep.plan import groups

__all__ = ["groups", "train_group"]
