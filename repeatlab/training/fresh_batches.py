"""Where a run's fresh batches come from: a task, what chooses their samples, and a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from repeatlab.core.seeding import derive
from repeatlab.methods import controls
from repeatlab.methods.sampling.running import RunningSampler, Selection
from repeatlab.tasks import Task
from repeatlab.training.config import RunConfig


class AsTheyCome(RunningSampler):
    """No sampler: the task's own fresh batches, without weights."""

    def fresh_batch(self, index: int) -> Any:
        """See `RunningSampler`."""
        return self.task.fresh_batch(index)


def start_sampler(
    config: RunConfig, task: Task, *, kind: type[Task], progress: Callable[[], float]
) -> RunningSampler:
    """Return what chooses the samples of the run's fresh batches.

    Args:
        config: The run.
        task: Its task, or what stands for it.
        kind: The task's class, of which a sampler may train others beforehand.
        progress: Returns which share of the run is over, in [0, 1].
    """
    if config.method.sampler is None:
        return AsTheyCome(task, config.stream_seed)

    def rebuild(stream: str) -> Task:
        return kind(config.task, seed=derive(config.stream_seed, stream), device=str(task.device))

    return config.method.sampler.build().start(
        task, seed=config.stream_seed, progress=progress, rebuild=rebuild
    )


class FreshBatches:
    """A run's fresh batches as a loader without end, and what is known of those it has yielded.

    Args:
        task: The task.
        sampler: What chooses their samples; None takes them as they come.
        prefetch: Whether the next batch is made while updates run.
        seen: Called with the indices of every batch that is handed out for the first time.

    Attributes:
        handed_out: How many were, each counted once.
    """

    def __init__(
        self,
        task: Task,
        sampler: RunningSampler | None = None,
        *,
        prefetch: bool = False,
        seen: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._make: Callable[[int], Any] = (sampler or task).fresh_batch
        self._task, self._prefetch, self._tell = task, prefetch, seen
        self._latest: Selection | None = None
        self.handed_out = 0
        self._indices: list[torch.Tensor] = []
        self._seen = torch.zeros(0, dtype=torch.bool)

    def __iter__(self) -> Iterator[Any]:
        return self.iter_from(0)

    def iter_from(self, position: int) -> Iterator[Any]:
        """Yield the fresh batches from number `position` on."""
        if self._latest is not None and self._latest.batch.index == position:
            # Resumed in mid-repeat: a sampler has moved on since it chose this one.
            yield self._latest
            position += 1
        elif position < self.handed_out:
            yield self._make(position)
            position += 1
        for batch in self._made_from(position):
            self._note(batch.indices)
            self._latest = batch if isinstance(batch, Selection) else None
            yield batch

    def _note(self, indices: torch.Tensor) -> None:
        self._indices.append(indices)
        self.handed_out += 1
        if self._tell is not None:
            self._tell(indices)

    def _made_from(self, position: int) -> Iterator[Any]:
        if not self._prefetch:
            while True:
                yield self._make(position)
                position += 1
        # In no `with`, whose end joins the pool's thread: where the garbage collector ends this
        # iterator, it may do so while `threading` starts another thread, and holds the lock that
        # joining needs. A pool that is dropped ends its thread without being waited for.
        pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        coming = pool.submit(self._make, position)
        while True:
            batch = coming.result()
            position += 1
            coming = pool.submit(self._make, position)
            yield batch

    def resampled(self, indices: torch.Tensor) -> None:
        """See the samples that came in the place of a batch's."""
        self._indices.append(indices)

    def rows(self, updates: np.ndarray) -> dict[str, np.ndarray]:
        """Return which batch and which visit each of `updates` is, where a repeater cannot know."""
        return {}

    def distinct(self) -> int:
        """Return how many different training samples have been trained on so far."""
        if self._indices:
            indices = torch.cat(self._indices).cpu()
            self._indices.clear()
            missing = int(indices.max()) + 1 - len(self._seen)
            if missing > 0:
                self._seen = torch.cat([self._seen, torch.zeros(missing, dtype=torch.bool)])
            self._seen[indices] = True
        return int(self._seen.sum())

    def state_dict(self) -> dict[str, Any]:
        """Return what was handed out, and the batch that a sampler chose last."""
        self.distinct()
        latest = self._latest
        return {
            "handed_out": self.handed_out,
            "seen": self._seen,
            "latest": None if latest is None else [list(latest.batch), latest.weights],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.handed_out, self._seen = state["handed_out"], state["seen"]
        if state["latest"] is not None:
            batch, weights = state["latest"]
            on_device = [v.to(self._task.device) if torch.is_tensor(v) else v for v in batch]
            kind = type(self._task.candidates(batch[-1], batch[-1]))
            self._latest = Selection(kind(*on_device), weights.to(self._task.device))


class SpacedBatches(FreshBatches):
    """The visits of `controls.spaced` as a loader: each item is one visit.

    A batch is kept, not made again, from its first visit to its last.

    Attributes:
        order: int64, (updates,): the fresh batch that each update visits.
        counts: int64, (fresh batches,): visits of each.
        visits: int64, (updates,): the number of each visit to its batch, from 0.
    """

    def __init__(self, task: Task, counts: np.ndarray, *, gap: int, **options: Any) -> None:
        super().__init__(task, **options)
        self.counts, self.order = counts, controls.spaced(counts, gap=gap)
        places = np.argsort(self.order, kind="stable")
        self.visits = np.empty_like(self.order)
        self.visits[places] = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)

    def iter_from(self, position: int) -> Iterator[Any]:
        kept: dict[int, Any] = {}
        coming = self._made_from(self.fresh(position))
        # A resume makes those anew whose first visit lies behind it.
        for place in range(position, len(self.order)):
            batch = int(self.order[place])
            if batch not in kept:
                kept[batch] = self._make(batch) if self.visits[place] else next(coming)
            if self.visits[place] == 0 and batch == self.handed_out:
                self._note(kept[batch].indices)
            yield kept[batch]
            if self.visits[place] + 1 == self.counts[batch]:
                del kept[batch]

    def rows(self, updates: np.ndarray) -> dict[str, np.ndarray]:
        """Return which batch, which visit to it and of how many each of `updates` is."""
        batches = self.order[updates]
        return {
            "fresh_batch": batches,
            "repeat": self.visits[updates],
            "repeats": self.counts[batches],
        }

    def fresh(self, updates: int) -> int:
        """Return how many different batches the first `updates` updates visit."""
        return int((self.visits[:updates] == 0).sum())
