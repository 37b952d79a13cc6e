"""Where the time of an update on an importance sample goes: `sampling_times(task, [2, 3])`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import count

import pandas as pd
import torch

from repeatlab.core.environment import pick_device
from repeatlab.methods.selection import draws, importance_sampling
from repeatlab.studies.diagnostics.measure import Watch, time_on
from repeatlab.tasks import TASKS, TaskConfig, load_task
from repeatlab.training.making import torch_settings

SAMPLING = ("drawing", "scoring", "choosing", "training")


def sampling_times(
    task_config: TaskConfig,
    presamples: Iterable[int],
    *,
    rounds: int = 40,
    device: str = "auto",
) -> pd.DataFrame:
    """Return what the parts of such an update take, the presamples in turn, round by round.

    The task trains meanwhile: scores differ as they do in a run. A tenth of the rounds come first
    and are not counted.

    Returns:
        Rows (presample, round, drawing, scoring, choosing, training), in seconds: p batches from
        the data, their gradient bounds, the draw with its weights, and the update. On the CPU; a
        GPU is waited for after each part.
    """
    device, rows, numbers = pick_device(device), [], count()
    with torch_settings(1, 0):
        task = load_task(TASKS[task_config.name])(task_config, seed=0, device=device)
        for place in range(-(rounds // 10), rounds):
            for presample in presamples:
                watch, index = Watch(partial(time_on, device)), next(numbers)
                watch.lap("start")
                blocks = [task.candidates(index, next(numbers)) for _ in range(presample)]
                watch.lap("drawing")
                scores = torch.cat([task.gradient_bounds(block) for block in blocks])
                watch.lap("scoring")
                picks, weights = importance_sampling(scores, task.batch_size, draws(0, index))
                batch = task.pick(blocks, picks, index)
                watch.lap("choosing")
                task.step(batch, lambda *_: None, weights)
                watch.lap("training")
                if place >= 0:
                    rows.append({"presample": presample, "round": place} | watch.totals)
    return pd.DataFrame(rows, columns=["presample", "round", *SAMPLING])
