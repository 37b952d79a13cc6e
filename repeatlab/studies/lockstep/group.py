"""A group of runs in lock-step: opened, led from update to update, closed each at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from repeatlab.core.environment import pick_device
from repeatlab.core.files import write_json
from repeatlab.core.signals import Interrupted, Stop, held_back
from repeatlab.core.stopwatch import Stopwatch
from repeatlab.store.records import Store
from repeatlab.studies.lockstep.arm import Arm
from repeatlab.studies.lockstep.kinds import stack_of
from repeatlab.tasks import Task
from repeatlab.tasks.dataset import DatasetTask
from repeatlab.tasks.reinforcement import Reinforcement
from repeatlab.tasks.single_index import SingleIndex
from repeatlab.training import making
from repeatlab.training.config import RunConfig
from repeatlab.training.one_run import CheckpointPlan
from repeatlab.training.stand_ins import StandIn

# Of fresh batches that arms of one seed share: one that was dropped is made again.
SHARED_BYTES = 2**25
# So many are made at a time, since of small images most of a batch's time is that of the calls; of
# large ones fewer, so that as many blocks are remembered: arms are at many places of their data.
TOGETHER = 16


def train_group(
    configs: Sequence[RunConfig],
    runs: str | Path | Store = "runs",
    *,
    plan: CheckpointPlan | None = None,
    watch: making.Watch = nullcontext,
    stop: Stop | None = None,
) -> dict[str, str | None]:
    """Make these runs in lock-step, and return by run id why one has failed, or None.

    As `making.train` on each of them: what the store has is not made again, a run that was begun
    goes on from its checkpoint, one that diverges or fails leaves and the others go on. Their
    environment notes how many there were (`lockstep`).

    Args:
        configs: The runs, of one task and equal but for method, seed, learning rate and length;
            `plan.groups` finds them. None needs another of them.
        runs: The run store, or its directory.
        plan: When checkpoints are written.
        watch: As of `making.train`.
        stop: As of `making.train`.

    Raises:
        StoreError: the store cannot be written.
        Interrupted: `stop` was set; every run has left a checkpoint.
    """
    if stop is None:
        with held_back() as stop:
            return train_group(configs, runs, plan=plan, watch=watch, stop=stop)
    store = runs if isinstance(runs, Store) else Store(runs)
    store.check_writable()
    group = Group(store, pick_device(configs[0].device), plan=plan, stop=stop)
    for config in configs:
        making.make_needs(config, store, watch=watch, stop=stop)
    with ExitStack() as held:
        # In one order everywhere: two processes with common runs wait, and never for each other.
        for config in sorted(configs, key=lambda config: config.run_id):
            run = store.run(config.task.name, config.run_id)
            held.enter_context(store.locked(run, waiting=partial(making.leave_if_stopped, stop)))
        held.enter_context(watch(configs))
        with making.torch_settings(configs[0].threads, configs[0].stream_seed):
            group.open(configs)
            group.train()
    if "interrupted" in group.outcomes.values():
        raise Interrupted("the runs in lock-step were stopped; they go on from there")
    return group.outcomes


class SharedBatches(StandIn):
    """A task whose fresh batches all arms of its seed share: they are functions of (seed, index).

    Args:
        task: The task.
        other: What stands for the task of another of these arms; None for the first one.
    """

    def __init__(self, task: DatasetTask | SingleIndex, other: SharedBatches | None = None) -> None:
        super().__init__(task)
        inputs, make = task.fresh_batch(0)[0], task.fresh_batches
        kept = (SHARED_BYTES if inputs.is_cpu else 8 * SHARED_BYTES) // inputs.nbytes
        self._count = count = min(max(1, kept // TOGETHER), TOGETHER)
        made = lru_cache(1 + kept // count)(lambda number: make(number * count, count))
        self.together: Callable[[int], list[Any]] = other.together if other else made

    def fresh_batch(self, index: int) -> Any:
        """See `Task`."""
        number, place = divmod(index, self._count)
        return self.together(number)[place]


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
        stop: Asks them to stop.

    Attributes:
        arms: Those that are not done.
        outcomes: Run id to why it has failed, or None.
    """

    def __init__(
        self, store: Store, device: str, *, plan: CheckpointPlan | None, stop: Stop
    ) -> None:
        self.store, self.device, self.plan, self.stop = store, device, plan, stop
        self.arms: list[Arm] = []
        self.outcomes: dict[str, str | None] = {}
        self._clock = Stopwatch()
        self._data: dict[int | None, Any] = {}
        self._batches: dict[int, SharedBatches] = {}
        self._beginnings: dict[int, dict[str, Any]] = {}
        self._stack: Any = None

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
        opened = making.open_run(config, self.store, run, device=self.device)
        try:
            write_json(run.path / "environment.json", {**run.environment, "lockstep": arms})
            task, through = self._build_task(config)
            arm = Arm(
                config,
                task,
                opened.writer,
                calibration=opened.calibration,
                source=opened.source,
                plan=self.plan,
                stop=self.stop,
                clock=self._clock,
                through=through,
            )
            arm.begin(opened.state)
            arm.life = arm.lived()
        except BaseException as error:
            opened.writer.fail(error)
            raise
        self.arms.append(arm)

    def _build_task(self, config: RunConfig) -> tuple[Task, Task | StandIn]:
        """Return the run's task and what stands for it, with what is equal in all arms shared."""
        by_seed = getattr(config.task, "split", "fixed") == "by_seed"
        whose = config.seed if by_seed else None  # else the data are those of all seeds
        parts = {"data": self._data[whose]} if whose in self._data else {}
        if config.seed in self._beginnings:
            parts["beginning"] = self._beginnings[config.seed]
        kind = stack_of(config.task, self.device).task
        task = making.build_task(config, self.device, kind=kind, **parts)
        if isinstance(task, Reinforcement):
            self._beginnings.setdefault(config.seed, task.lived())
            return task, task
        if data := getattr(task, "data", None):  # what is generated has none
            self._data[whose] = data
        sharing = SharedBatches(task, self._batches.get(config.seed))
        self._batches[config.seed] = sharing
        return task, sharing

    def train(self) -> None:
        """Make all updates that are left, and close every run at its end."""
        try:
            with self._clock.running():
                self._regroup()
                while self.arms:
                    for place, arm in enumerate(self.arms):
                        batch = self._go_on(arm)
                        if batch is not None and batch is not arm.batch:
                            arm.batch = batch
                            self._stack.stage(place, batch)
                    self._regroup()
                    if self.arms:
                        for arm, loss in zip(self.arms, self._stack.losses(), strict=True):
                            self._go_on(arm, loss)
                        self._stack.step()
                        self._regroup()
        except BaseException as error:
            for arm in self.arms:
                if arm.life is None:
                    continue
                if isinstance(error, KeyboardInterrupt):
                    arm.writer.close("interrupted")
                else:
                    arm.writer.fail(error)
            raise

    def _go_on(self, arm: Arm, loss: float | None = None) -> Any:
        """Let a run live until it waits for the others; return its batch, if it has come to one."""
        outcome = None
        try:
            return arm.life.send(loss)
        except StopIteration:
            pass
        except Interrupted:
            arm.writer.close("interrupted")
            outcome = "interrupted"
        except Exception as error:
            with suppress(OSError):  # where it cannot be written, the caller still hears of it
                arm.writer.fail(error)
            outcome = f"{type(error).__name__}: {error}"
        arm.life, self.outcomes[arm.config.run_id] = None, outcome
        return None

    def _regroup(self) -> None:
        """Stack the networks of the arms that are left, if any has gone, and at the beginning."""
        left = [arm for arm in self.arms if arm.life is not None]
        if self._stack is not None and len(left) == len(self.arms):
            return
        self.arms = left
        if not left:
            return
        self._clock.arms = len(left)
        self._stack = None  # before another one takes as much memory
        self._stack = stack_of(left[0].config.task, self.device)([arm.task for arm in left])
        for place, arm in enumerate(left):
            if arm.batch is not None:
                self._stack.stage(place, arm.batch)
