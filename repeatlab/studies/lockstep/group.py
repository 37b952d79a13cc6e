"""A group of runs in lock-step: opened, led from update to update, closed each at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from repeatlab.core.environment import pick_device
from repeatlab.core.files import write_json
from repeatlab.core.stopwatch import Stopwatch
from repeatlab.data import Batch, TrainStream
from repeatlab.repetition.repeater import NonFiniteLoss
from repeatlab.store.records import Store
from repeatlab.studies.lockstep.arm import Arm
from repeatlab.studies.lockstep.kinds import STACKS, Stack
from repeatlab.tasks import Task
from repeatlab.tasks.dataset import DatasetTask
from repeatlab.tasks.reinforcement import Reinforcement
from repeatlab.training import loop
from repeatlab.training.config import RunConfig
from repeatlab.training.training import CheckpointPlan, Interrupted

# Of fresh batches that arms of one seed share: one that was dropped is made again.
SHARED_BYTES = 2**25
# So many are made at a time: of small images, most of a batch's time is that of the calls.
TOGETHER = 16


def train_group(
    configs: Sequence[RunConfig],
    runs: str | Path | Store = "runs",
    *,
    plan: CheckpointPlan | None = None,
    watch: loop.Watch = nullcontext,
) -> dict[str, str | None]:
    """Make these runs in lock-step, and return by run id why one has failed, or None.

    As `loop.train` on each of them: what the store has is not made again, a run that was begun goes
    on from its checkpoint, one that diverges or fails leaves and the others go on. Their
    environment notes how many there were (`lockstep`).

    Args:
        configs: The runs, of one task and equal but for method, seed, learning rate and length;
            `plan.groups` finds them. None needs another of them.
        runs: The run store, or its directory.
        plan: When checkpoints are written.
        watch: As of `loop.train`.

    Raises:
        StoreError: the store cannot be written.
        Interrupted: `training.STOP` was set; every run has left a checkpoint.
    """
    store = runs if isinstance(runs, Store) else Store(runs)
    store.check_writable()
    group = Group(store, pick_device(configs[0].device), plan=plan)
    for config in configs:
        loop.make_needs(config, store, watch=watch)
    with ExitStack() as held:
        # In one order everywhere: two processes with common runs wait, and never for each other.
        for config in sorted(configs, key=lambda config: config.run_id):
            run = store.run(config.task.name, config.run_id)
            held.enter_context(store.locked(run, waiting=loop.leave_if_stopped))
        held.enter_context(watch(configs))
        held.enter_context(loop.interrupted_at_an_update())
        with loop.torch_settings(configs[0]):
            group.open(configs)
            group.train()
    if "interrupted" in group.outcomes.values():
        raise Interrupted("the runs in lock-step were stopped; they go on from there")
    return group.outcomes


def _shared(stream: TrainStream) -> Callable[[int], Batch]:
    """Return `stream.fresh_batch` with a memory: a batch is a function of (seed, index)."""
    size = 4 * stream.batch_size * stream.data.images[0].numel()

    @lru_cache(maxsize=1 + SHARED_BYTES // (TOGETHER * size))
    def together(number: int) -> list[Batch]:
        return stream.fresh_batches(number * TOGETHER, TOGETHER)

    def fresh_batch(index: int) -> Batch:
        number, place = divmod(index, TOGETHER)
        return together(number)[place]

    return fresh_batch


def _rates(config: RunConfig) -> str:
    """Return what says how a run's learning rate goes: the optimizer moves neighbours as one."""
    method = config.method
    return repr((config.task.lr, method.schedule, method.apply))


class Group:
    """The runs that go in step.

    Args:
        store: Where their records are.
        device: Where they train.
        plan: When checkpoints are written.

    Attributes:
        arms: Those that are not done.
        outcomes: Run id to why it has failed, or None.
    """

    def __init__(self, store: Store, device: str, *, plan: CheckpointPlan | None = None) -> None:
        self.store, self.device, self.plan = store, device, plan
        self.arms: list[Arm] = []
        self.outcomes: dict[str, str | None] = {}
        self._clock = Stopwatch()
        self._data: Any = None
        self._batches: dict[int, Callable[[int], Any]] = {}
        self._beginnings: dict[int, dict[str, Any]] = {}
        self._gone: set[Arm] = set()
        self._stack: Stack | None = None

    def open(self, configs: Sequence[RunConfig]) -> None:
        """Begin the runs that the store lacks, or get ready to go on with them."""
        missing = [c for c in configs if not self.store.run(c.task.name, c.run_id).done]
        self.outcomes = {config.run_id: None for config in configs}
        for config in sorted(missing, key=_rates):
            try:
                self._open(config, len(missing))
            except Exception as error:
                self.outcomes[config.run_id] = f"{type(error).__name__}: {error}"

    def _open(self, config: RunConfig, arms: int) -> None:
        run = self.store.run(config.task.name, config.run_id)
        opened = loop.open_run(config, self.store, run, device=self.device)
        try:
            write_json(run.path / "environment.json", {**run.environment, "lockstep": arms})
            task = self._build_task(config)
            parts = {"calibration": opened.calibration, "source": opened.source}
            arm = Arm(config, task, opened.writer, plan=self.plan, **parts)
            arm.start(opened.state, self._clock)
        except BaseException as error:
            opened.writer.fail(error)
            raise
        self.arms.append(arm)

    def _build_task(self, config: RunConfig) -> Task:
        """Return the run's task, which shares what is equal in all: data, how an agent begins."""
        parts = {} if self._data is None else {"data": self._data}
        if config.seed in self._beginnings:
            parts["beginning"] = self._beginnings[config.seed]
        task = loop.build_task(config, self.device, **parts)
        if isinstance(task, Reinforcement):
            self._beginnings.setdefault(config.seed, task.actor.state_dict())
        if isinstance(task, DatasetTask):
            self._data = task.data
            task.fresh_batch = self._batches.setdefault(config.seed, _shared(task.stream))
        return task

    def train(self) -> None:
        """Make all updates that are left, and close every run at its end."""
        try:
            with self._clock.running():
                self._regroup()
                while self.arms:
                    self._next_batches()
                    self._regroup()
                    if self.arms:
                        self._report(self._stack.losses())
                        self._stack.step()
                        self._regroup()
        except KeyboardInterrupt:
            for arm in self._under_way:
                arm.writer.close("interrupted")
            raise
        except BaseException as error:
            for arm in self._under_way:
                arm.writer.fail(error)
            raise

    @property
    def _under_way(self) -> list[Arm]:
        """The arms that have not left."""
        return [arm for arm in self.arms if arm not in self._gone]

    def _next_batches(self) -> None:
        """Bring every arm to the batch of its next update, by way of a pause where one is due."""
        stage = self._stack.stage
        for place, arm in enumerate(self.arms):
            try:
                batch = next(arm.coming)
                if batch is not arm.batch:
                    arm.batch = batch
                    stage(place, batch)
            except StopIteration:
                self._close(arm)
            except NonFiniteLoss as error:
                self._close(arm, error)
            except Interrupted:
                arm.writer.close("interrupted")
                self._leave(arm, "interrupted")
            except Exception as error:
                self._fail(arm, error)

    def _report(self, losses: Sequence[float]) -> None:
        for arm, loss in zip(self.arms, losses, strict=True):
            try:
                arm.report(loss)
            except NonFiniteLoss as error:
                self._close(arm, error)
            except Exception as error:
                self._fail(arm, error)

    def _close(self, arm: Arm, error: NonFiniteLoss | None = None) -> None:
        """End a run, complete or diverged, before the others' next update."""
        try:
            with self._clock.standing():
                arm.end(error)
        except Exception as failure:
            self._fail(arm, failure)
        else:
            self._leave(arm, None)

    def _fail(self, arm: Arm, error: Exception) -> None:
        with suppress(OSError):  # where it cannot be written, the caller still hears of it
            arm.writer.fail(error)
        self._leave(arm, f"{type(error).__name__}: {error}")

    def _leave(self, arm: Arm, outcome: str | None) -> None:
        self.outcomes[arm.config.run_id] = outcome
        self._gone.add(arm)

    def _regroup(self) -> None:
        """Stack the networks of the arms that are left, if any has gone, and at the beginning."""
        if self._stack is not None and not self._gone:
            return
        self.arms = [arm for arm in self.arms if arm not in self._gone]
        self._gone.clear()
        if not self.arms:
            return
        self._clock.arms = len(self.arms)
        self._stack = STACKS[self.arms[0].config.task.name]([arm.task for arm in self.arms])
        for place, arm in enumerate(self.arms):
            if arm.batch is not None:
                self._stack.stage(place, arm.batch)
