"""One run's whole configuration, and the identity that follows from it."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, WrapValidator, model_serializer, model_validator

from repeatlab.core.files import digest_of_content
from repeatlab.core.schema import Model, choice, choices, did_you_mean, named, parse, shown
from repeatlab.core.seeding import derive
from repeatlab.methods.pulling import PULLS
from repeatlab.methods.sampling import SAMPLERS
from repeatlab.methods.schedules import SCHEDULES
from repeatlab.repetition.mappings import MAPPINGS, Trace
from repeatlab.tasks import TASKS, load_task, version
from repeatlab.training.early_stopping import EarlyStopping

# Part of every run's identity: raise it when the same configuration would give other records.
RECORD_VERSION = 6

PositiveInt = Annotated[int, Field(ge=1)]
# More threads than any machine has end the process rather than raise.
Threads = Annotated[int, Field(ge=1, le=1024)]
Device = Literal["auto", "cpu", "cuda", "mps"]
Control = Literal[
    "replay",
    "permuted",
    "windowed",
    "time_only",
    "anti_hard",
    "spaced",
    "falling_linear",
    "falling_cosine",
]
# What N does, without settings; see `MethodConfig.apply`.
PLAIN = ("repeat", "step_size", "fresh_samples")


def _plain_or_pull(value: Any, pull: Any) -> Any:
    if isinstance(value, str) and value not in PLAIN:
        hint = did_you_mean(value, (*PLAIN, *(f"{{name: {name}}}" for name in PULLS)))
        raise ValueError(f"unknown apply {shown(value)}; {hint}")
    return value if isinstance(value, str) else pull(value)


TaskChoice = named("task", TASKS, lambda target: load_task(target).Config)


class TraceConfig(Model):
    """The mapping `trace`: counts that are given, or those of another method's run as a control.

    The source is the run of `of` on the same task with the same seed and budget; it is found in the
    store or made first.
    """

    most: ClassVar = {"window": 10**6, "gap": 10**6}

    name: Literal["trace"]
    counts: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    of: str | MethodConfig | None = None
    """The source: in a study the name of one of its methods."""
    control: Control = "replay"
    """What is changed, see `repeatlab.methods.controls`; `replay` changes nothing."""
    window: PositiveInt = 50
    """Fresh batches in a window of `windowed`, `time_only` and `anti_hard`."""
    gap: PositiveInt = 5
    """Fresh batches between two visits of `spaced`."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.counts is None) == (self.of is None):
            raise ValueError("give either counts, or of: the method whose counts are replayed")
        if self.counts is not None:
            self.build()
            if self.control != "replay":
                raise ValueError("control needs of: the method whose counts it changes")
        if isinstance(self.of, MethodConfig):
            self.of.check_source()
        return self

    def build(self) -> Trace:
        """Return the mapping of counts that are given."""
        return Trace(self.counts)


MAPPING_MODELS = choices(MAPPINGS, without=("seed",)) | {"trace": TraceConfig}


class MethodConfig(Model):
    """Which samples make a batch, how often it is visited and at what rate; `{}` is standard."""

    sampler: choice("sampler", SAMPLERS) | None = None
    mapping: named("mapping", MAPPING_MODELS) | None = None
    schedule: choice("schedule", SCHEDULES) | None = None
    rate: Annotated[float, Field(gt=0)] = 1.0
    """The arm's learning rate in units of the task's, on top of the schedule. The short run of
    `t: auto`, and models that a sampler trains beforehand, keep the task's own."""
    apply: Annotated[choice("apply", PULLS), WrapValidator(_plain_or_pull)] = "repeat"
    """What N does: N visits of the batch; one update at N times the learning rate (`step_size`); N
    updates on samples drawn anew each time (`fresh_samples`: from the replay buffer, without
    another environment step); or N visits, held near the weights of the first: `{name: proximal}`
    and others of `repeatlab.methods.pulling`."""
    fresh_views: bool = False
    """Whether a repeat draws its augmentation anew; by default it sees the same view."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """The arm's, of all its optimizers; null keeps the task's own, as do those that `rate` spares.
    """
    gradient_norms: bool = False
    """Whether |g|^2 of every update is recorded, inside the clock."""

    @model_serializer(mode="wrap")
    def _known_by_what_is_set(self, handler: Any) -> dict[str, Any]:
        """Leave later fields out where they are not set: earlier runs keep their identity."""
        unset = {"weight_decay": None, "gradient_norms": False}
        return {k: v for k, v in handler(self).items() if k not in unset or v is not unset[k]}

    @property
    def way(self) -> str:
        """The name of what N does."""
        return self.apply if isinstance(self.apply, str) else self.apply.name

    @property
    def source(self) -> MethodConfig | None:
        """The method whose recorded counts this one replays."""
        return self.mapping.of if isinstance(self.mapping, TraceConfig) else None

    @property
    def calibrated(self) -> bool:
        """Whether the mapping has a field that says `auto`."""
        return self.mapping is not None and "auto" in dict(self.mapping).values()

    @property
    def depends_on_calibration(self) -> bool:
        """Whether it, or the method that it replays, is calibrated."""
        return self.calibrated or (
            isinstance(self.source, MethodConfig) and self.source.depends_on_calibration
        )

    def check_source(self) -> None:
        """Raise a ValueError unless a trace can be taken of this method."""
        if self.mapping is None or self.mapping.name == "trace" or self.apply == "step_size":
            raise ValueError(
                "of must be a method with a mapping of its own: no control, and not step_size"
            )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.apply != "repeat" and self.mapping is None:
            raise ValueError(f"apply: {self.way} needs a mapping, whose N it applies")
        if self.way in PULLS and self.fresh_views:
            raise ValueError(f"apply: {self.way} pulls on one view of a batch: no fresh_views")
        if self.way == "conservative" and self.mapping.name != "until_limit":
            raise ValueError("apply: conservative needs the mapping until_limit, for its limit")
        if self.apply == "fresh_samples" and self.fresh_views:
            raise ValueError("fresh_views has no effect with apply: fresh_samples")
        if self.apply == "fresh_samples" and self.sampler is not None:
            raise ValueError("apply: fresh_samples draws uniformly, so it takes no sampler")
        kind = getattr(type(self.mapping), "target", Trace)
        if self.apply == "step_size" and (kind is Trace or kind.asks_again):
            raise ValueError(f"apply: step_size has no visits for the mapping {self.mapping.name}")
        spaced = getattr(self.mapping, "control", None) == "spaced"
        if spaced and (self.sampler or self.apply != "repeat" or self.fresh_views):
            raise ValueError("control: spaced stands alone: no sampler, apply or fresh_views")
        return self


class BudgetConfig(Model):
    """What ends a run before `max_updates`: what was spent on the arm, calibration included."""

    unit: Literal["cost", "seconds"]
    """`cost` counts forward equivalents; a run may spend as many as `max_updates` standard ones."""
    k: Annotated[float, Field(gt=0)] | None = None
    """For `cost`: a backward's time in forwards, as `repeatlab measure` finds it."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """For `seconds`: of training."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for field, unit in {"seconds": "seconds", "k": "cost"}.items():
            if (self.unit == unit) != (getattr(self, field) is not None):
                raise ValueError(f"{field} must be given for unit: {unit}, and only for it")
        return self


class LoaderConfig(Model):
    """An artificially slow loader, as over a network (data echoing, Choi et al. 2019)."""

    delay_ms: Annotated[float, Field(ge=0, le=60_000)] = 0.0
    """Milliseconds that every batch takes, on top of its making; at most a minute."""
    prefetch: bool = False
    """Whether the next batch is made while updates run."""


class CalibrationConfig(Model):
    """How `t: auto` is found: from the fresh-batch losses of a short standard run."""

    updates: PositiveInt = 500
    """Updates of the short run; they are charged to the arm that asks for them."""
    target_repeats: Annotated[float, Field(gt=1)] = 2.0
    """For `linear`: E[N] on the loss distribution of the short run."""


class EvaluationConfig(Model):
    """When the task is evaluated; never inside the clock."""

    every: PositiveInt = 1000
    """Updates between evaluations; they are also made at update 0 and at T."""
    splits: Annotated[tuple[Literal["train", "validation"], ...], Field(strict=False)] = (
        "train",
        "validation",
    )
    """What is evaluated; "train" is a fixed part of the training split."""
    test: bool = True
    """Whether the test split is read, once, after the last update."""
    early_stopping: EarlyStopping | None = None
    """When the run ends before T, for want of a better validation metric."""
    keep: Annotated[int, Field(ge=0)] = 0
    """Of how many evaluations, the last ones, the networks' weights stay in the run's directory;
    1 keeps those at the end. Under `restore_best`, of the last that were a new best."""

    @model_validator(mode="after")
    def _sees_what_it_stops_by(self) -> Self:
        if self.early_stopping is not None and "validation" not in self.splits:
            raise ValueError("early_stopping needs the validation split among splits")
        return self


class Common(Model):
    """What all runs of a study have in common."""

    max_updates: PositiveInt
    budget: BudgetConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    calibration: CalibrationConfig | None = None
    loader: LoaderConfig = LoaderConfig()
    device: Device = "auto"
    threads: Threads = 1
    """CPU threads of torch: sums, and so the records, depend on their number."""


class RunConfig(Common):
    """Everything that one run depends on."""

    most: ClassVar = {"seed": 2**63 - 1}

    task: TaskChoice
    method: MethodConfig = MethodConfig()
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        method = self.method
        if isinstance(method.source, str):
            raise ValueError(
                f"method.mapping.of: {method.source!r} names a method of a study; a single run "
                "needs the method itself"
            )
        # Of the method, or of the one that it is replayed of.
        target = (self.calibration or CalibrationConfig()).target_repeats
        for arm in (method, method.source):
            linear = arm is not None and arm.calibrated and arm.mapping.name == "linear"
            if linear and target >= arm.mapping.max_repeats:
                raise ValueError(
                    "calibration.target_repeats: must be less than the mapping's max_repeats, "
                    f"{arm.mapping.max_repeats}; not {target}"
                )
        counts = getattr(method.mapping, "counts", None)
        if counts is not None and sum(counts) < self.max_updates:
            raise ValueError(
                f"method.mapping.counts: they end after {sum(counts)} updates, before "
                f"max_updates: {self.max_updates}"
            )
        return self

    @model_validator(mode="after")
    def _is_for_its_task(self) -> Self:
        method, refusals = self.method, self.task.refusals()
        if self.loader.prefetch and method.sampler is not None:
            raise ValueError("loader.prefetch: a sampler chooses by the latest losses")
        # What a step is scaled by, a task has to know before it.
        scaled = {"conservative": "step_size"}.get(method.way, method.way)
        parts = {f"method.apply: {method.way}": scaled}
        parts["method.fresh_views"] = "fresh_views" if method.fresh_views else None
        parts["method.mapping.control: spaced"] = getattr(method.mapping, "control", None)
        parts["loader.prefetch"] = "prefetch" if self.loader.prefetch else None
        if method.sampler is not None:
            name, score = method.sampler.name, getattr(method.sampler, "score", None)
            weighted = "weighted" if getattr(method.sampler, "beta", 0) else "unweighted"
            parts[f"method.sampler: {name}"] = name
            parts[f"method.sampler.score: {score}"] = score
            if name == "multiplicity":
                parts[f"method.sampler: {name} of views"] = "fresh_views"
                if self.task.batch_size % method.sampler.views:
                    raise ValueError("method.sampler.views: it must divide task.batch_size")
            if name == "hard_mining":
                parts[f"method.sampler: {weighted} {name}"] = weighted
        for path, part in parts.items():
            if part in refusals:
                raise ValueError(f"{path} is not for the task {self.task.name}: {refusals[part]}")
        return self

    @property
    def stream_seed(self) -> int:
        """The seed of the run's random streams: one for all arms of a task, another on each task.

        Tasks on the same data would otherwise draw the same batches, and their differences between
        arms would not be independent.
        """
        return derive(self.seed, f"task {self.task.name}")

    @cached_property
    def run_id(self) -> str:
        """Sixteen hex digits that identify the configuration and what the code makes of it.

        The code counts by two numbers, `RECORD_VERSION` and its task's (`repeatlab.tasks.version`;
        for a task of one's own a digest of its source): they say where it means something else.
        """
        return digest_of_content([RECORD_VERSION, version(self.task.name), self.to_json()])

    def model_copy(self, **changes: Any) -> Self:
        """Return a copy with changes, which has an identity of its own."""
        copied = super().model_copy(**changes)
        copied.__dict__.pop("run_id", None)
        return copied

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON-safe values; `parse` reads it back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunConfig:
        """Return what `to_json` wrote."""
        return parse(cls, data)
