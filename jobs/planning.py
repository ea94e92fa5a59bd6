"""What memory a job takes, before it is one: its plan, what "auto" stands for, and what to do where it does not fit.

A run takes its plan's bytes and, on a CPU host, the process around them (`run_overhead_bytes` of the host). The largest
live host decides what fits: another one may be free earlier, but no host will be larger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.errors import InvalidRequestError
from jobs.spec import Choosable, JobSpec, LomoOptions
from lomo_core.memory.fit import Fitting, largest_that_fits, nearest_that_fits
from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import Norm, Plan, Setting, plan
from lomo_core.memory.process import as_measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the largest host can give to one run."""

    host: str
    available_bytes: int
    overhead_bytes: int
    """What a run takes there beside its plan."""

    @property
    def capacity_bytes(self) -> int:
        """The largest plan that fits."""
        return self.available_bytes - self.overhead_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """A job with every "auto" replaced, and the memory that it takes, where that can be told."""

    spec: JobSpec
    planned_bytes: int | None = None
    """The plan's peak."""
    plan: dict[str, Any] | None = None
    """For the job's row: `memory`, bytes by category as the meter measures them, and the `setting` planned."""
    why_unplanned: str | None = None
    check_files: bool = False
    """Whether a worker is to look through its files before it is queued."""
    file_ids: tuple[str, ...] = ()
    """Files that were found, and that have to be there still when the job comes to be."""


class WontFitError(InvalidRequestError):
    """No host can hold the run; `details` has its plan and the nearest setting that fits."""

    code = "wont_fit"

    def __init__(self, found: Fitting, nearest: Fitting | None, room: Room) -> None:
        changes = {} if nearest is None else nearest.changes(found.setting)
        super().__init__(_wont_fit_text(found, nearest, room, changes))
        self.details = {
            "host": {"name": room.host, "available_bytes": room.available_bytes, "overhead_bytes": room.overhead_bytes},
            "plan": memory_by_category(found.plan, overhead_bytes=room.overhead_bytes),
            "nearest": None
            if nearest is None
            else {**changes, "peak_bytes": nearest.plan.peak_bytes + room.overhead_bytes},
        }


def plan_job(shapes: ModelShapes, spec: JobSpec, room: Room | None) -> PlannedJob:
    """Plan a job, choosing what its `auto` names. Without any host to fit, "auto" means the defaults.

    Raises:
        WontFitError: no setting that was left to choose fits.
    """
    setting = to_setting(spec.lomo, batch_size=spec.batch_size, model_length=shapes.max_seq_length)
    chosen = choose(shapes, setting, spec.auto, room)
    if chosen is None:
        assert room is not None
        nearest = nearest_that_fits(shapes, setting, room.capacity_bytes)
        raise WontFitError(Fitting(setting, plan(shapes, setting)), nearest, room)
    found = plan(shapes, chosen)
    options = spec.lomo.model_copy(update={"activation_checkpointing": chosen.activation_checkpointing})
    return PlannedJob(
        spec=spec.model_copy(update={"batch_size": chosen.batch_size, "lomo": options}),
        planned_bytes=found.peak_bytes,
        plan={
            "memory": memory_by_category(found, overhead_bytes=0 if room is None else room.overhead_bytes),
            "setting": dataclasses.asdict(chosen),
        },
    )


def choose(shapes: ModelShapes, setting: Setting, auto: Sequence[Choosable], room: Room | None) -> Setting | None:
    """The setting with what `auto` names chosen; as it is without a host to fit. None where nothing fits."""
    if room is None:
        return setting
    found = largest_that_fits(
        shapes,
        setting,
        room.capacity_bytes,
        auto_batch="batch_size" in auto,
        auto_checkpointing="activation_checkpointing" in auto,
    )
    return None if found is None else found.setting


def to_setting(options: LomoOptions, *, batch_size: int, model_length: int | None = None) -> Setting:
    """What of a job's options decides its memory. Rows are taken to be as long as they may be (by the options, and by
    the model's positions), of different lengths, each token to have a loss, and the exact norm, where the way to it is
    left to the engine, to come from a second backward pass: the most that it may choose."""
    # `delayed` gets the norm of the step before, which the first step does not have, in the exact way.
    needs_norm = options.precision == "fp16" or options.clip.mode in ("norm", "delayed")
    norm: Norm = "second_backward" if options.clip.exact == "auto" else options.clip.exact
    return Setting(
        optimizer=options.optimizer,
        precision=options.precision,
        batch_size=batch_size,
        masks_one_row=True,
        seq_length=min(options.max_seq_length, model_length or options.max_seq_length),
        activation_checkpointing=options.activation_checkpointing,
        norm=norm if needs_norm else "one_pass",
        rounding=options.rounding or "stochastic",
    )


def memory_by_category(found: Plan, *, overhead_bytes: int) -> dict[str, int]:
    """A plan in the meter's categories, for JSON."""
    return dataclasses.asdict(as_measured(found, added_bytes=overhead_bytes))


def _wont_fit_text(found: Fitting, nearest: Fitting | None, room: Room, changes: dict[str, Any]) -> str:
    memory = memory_by_category(found.plan, overhead_bytes=room.overhead_bytes)
    rows = [(name.removesuffix("_bytes"), gib(value)) for name, value in memory.items()]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {value:>10}" for name, value in rows)
    head = f"This run does not fit: it needs {gib(memory['peak_bytes'])}, and the largest host, {room.host}, has "
    if nearest is None:
        advice = "No batch size and no length of rows makes it fit: take a smaller model, or a larger host."
    else:
        peak = nearest.plan.peak_bytes + room.overhead_bytes
        advice = f"The nearest setting that fits: {describe_changes(changes)} ({gib(peak)})."
    return f"{head}{gib(room.available_bytes, up=False)}.\n{table}\n{advice}"


def describe_changes(changes: Mapping[str, Any]) -> str:
    """`batch_size 2, activation_checkpointing true`."""
    return ", ".join(f"{name} {str(value).lower()}" for name, value in changes.items())


def gib(num_bytes: int, *, up: bool = True) -> str:
    """Bytes in GiB to a hundredth, what is needed rounded up and what there is down, so that they never look equal."""
    hundredths = num_bytes * 100 / 2**30
    return f"{(-(-hundredths // 1) if up else hundredths // 1) / 100:.2f} GiB"
