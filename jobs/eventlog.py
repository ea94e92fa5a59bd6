"""From the engine's journal to Postgres: events, metrics, evaluations and checkpoints, in batches, each line once.

A batch is one transaction under the job's lease. `attempts.shipped_lines` says how far an attempt's journal is in the
database; a line below it is skipped, so that shipping twice is harmless, whoever does it: the attempt's own worker, or
the next attempt's, which first ships what a killed worker left in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import delete, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from jobs import series
from jobs.db import Database
from jobs.ids import new_checkpoint_id
from jobs.models import Attempt, Checkpoint, Evaluation, Job, Metric
from jobs.repository import Lease, NewEvent, append_many_events, copy_rows, lock_leased
from jobs.spec import JobSpec
from lomo_core import events as engine

NumberedLine = tuple[int, engine.JournalLine]

# A message is for reading: one that is longer was not written for people (64 KiB, as the log view cuts too).
_MAX_MESSAGE_CHARS = 65_536
_MIB = 1 << 20

_FIGURES = ("step", "epoch", "loss", "mean_token_accuracy", "learning_rate", "grad_norm", "tokens_per_s", "step_s")
_MEMORY = tuple(engine.MemoryBytes.__dataclass_fields__)
_STEP_FIELDS = tuple(engine.Step.__dataclass_fields__)
# 0.16 us for eight attributes, which one by one take 0.41.
_get_figures, _get_memory, _get_step = attrgetter(*_FIGURES), attrgetter(*_MEMORY), attrgetter(*_STEP_FIELDS)
_METRIC_COLUMNS = ("job_id", "attempt", "created_at", *_FIGURES, *_MEMORY)
_LOCK_SHIPPED = text("""
    SELECT shipped_lines, coalesce((SELECT max(step) FROM metrics WHERE job_id = :job_id), 0) AS last_step
    FROM attempts WHERE job_id = :job_id AND number = :attempt FOR UPDATE OF attempts
""")
_SET_SHIPPED = text("UPDATE attempts SET shipped_lines = :lines WHERE job_id = :job_id AND number = :attempt")
_DELETE_METRICS = text("DELETE FROM metrics WHERE job_id = :job_id AND step = ANY(:steps)")


def shipped_lines(db: Database, *, job_id: str, attempt: int) -> int:
    """How many lines of an attempt's journal are in the database."""
    with db.read() as session:
        return (
            session.scalar(select(Attempt.shipped_lines).where(Attempt.job_id == job_id, Attempt.number == attempt))
            or 0
        )


def ship(
    db: Database, lease: Lease, lines: Sequence[NumberedLine], *, attempt: int, relative: Callable[[str], str]
) -> int:
    """Write journal lines of `attempt` (the lease's own, or an earlier one of the same job), in order.

    `relative` turns an engine's absolute path into one relative to the data folder. Returns how many were new.

    Raises:
        LeaseLostError: the lease is gone; nothing was written.
    """
    with db.transaction() as session:
        job = lock_leased(session, lease)
        done, last_step = session.execute(_LOCK_SHIPPED, {"job_id": job.id, "attempt": attempt}).one()
        new = [(number, line) for number, line in lines if number >= done]
        if not new:
            return 0
        assert new[0][0] == done, f"journal line {done} is missing: got {new[0][0]}"
        # Made while Postgres takes those before them in: the two work side by side.
        append_many_events(session, job.id, attempt, len(new), (_event(number, line) for number, line in new))
        _write_metrics(session, job, attempt, new, last_step=last_step)
        _write_evaluations(session, job.id, new)
        _write_checkpoints(session, job, attempt, new, relative)
        _write_figures(session, job, attempt, new)
        session.execute(_SET_SHIPPED, {"job_id": job.id, "attempt": attempt, "lines": new[-1][0] + 1})
        return len(new)


def _event(number: int, line: engine.JournalLine) -> NewEvent:
    """An engine's event in the API's words."""
    event = line.event
    level, kind, data = "info", "message", None
    match event:
        case engine.Message():
            level, message = event.level, event.message
        case engine.Started():
            message = (
                f"Training {event.num_parameters:,} parameters on {event.device}: {event.num_train_rows:,} rows, "
                f"{event.total_steps:,} steps"
            ) + (f", from step {event.step:,}" if event.step else "")
            data = asdict(event)
        case engine.Step():
            kind, message = "metrics", f"Step {event.step}/{event.total_steps}: training loss={event.loss:.2f}"
            # `asdict` takes ten times as long; what is nested is serialised as it is.
            data = dict(zip(_STEP_FIELDS, _get_step(event), strict=True))
            data |= {"train_loss": event.loss, "train_mean_token_accuracy": event.mean_token_accuracy}
        case engine.MemoryProfile():
            message, data = _profile_message(event), asdict(event)
        case engine.Skipped():
            level, message = _skipped_message(event)
            data = asdict(event)
        case engine.RolledBack():
            level, data = "warn", asdict(event)
            message = (
                f"The run diverged and went back to {event.checkpoint or 'the base model'}; "
                f"steps {event.first_skipped} to {event.last_skipped} will be passed over"
            )
        case engine.Sample():
            message, data = f"Step {event.step}, asked {event.prompt!r}: {event.text}", asdict(event)
        case engine.Evaluation():
            kind, message, data = "metrics", _evaluation_message(event), asdict(event)
        case engine.Checkpoint():
            message = f"Checkpoint created at step {event.step}"
            data = {"step": event.step, "bytes": event.num_bytes, "manifest_sha256": event.manifest_sha256}
            data["best_step"] = event.best_step
        case engine.MemoryVerdict():
            message = _verdict_message(event)
            data = {"step": event.step, "planned": asdict(event.planned), "measured": asdict(event.measured)}
        case engine.Finished():
            chosen = f" of step {event.model_step}" if event.model_step not in (None, event.step) else ""
            message = f"Model{chosen} written after {event.seconds:.0f} s, weights sha256 {event.weights_sha256[:12]}"
            data = {"step": event.step, "weights_sha256": event.weights_sha256, "peak_bytes": event.peak_bytes}
            data |= {"model_step": event.model_step, "best_step": event.best_step}
        case engine.Failed():
            # An engine that stops because it was asked to (lomo_core.errors.InterruptedRunError) is nobody's error. Of
            # any other end the reason is given once, by the event that makes the job fail.
            asked = event.code == "interrupted"
            level, message = ("info", event.message) if asked else ("error", f"The engine ended: {event.code}.")
            data = {name: value for name, value in asdict(event).items() if name != "message"}
    return NewEvent(
        message=message[:_MAX_MESSAGE_CHARS],
        level=level,
        type=kind,
        data=data,
        line=number,
        created_at=_when(line),
    )


def _profile_message(event: engine.MemoryProfile) -> str:
    forward, saved, backward = (
        f"{max(0, size) / _MIB:,.0f} MiB"
        for size in (event.after_forward_bytes, event.saved_bytes, event.after_backward_bytes)
    )
    return (
        f"Step {event.step}: {forward} alive after the forward pass ({saved} kept for the backward pass), "
        f"{backward} after the backward pass"
    )


def _skipped_message(event: engine.Skipped) -> tuple[str, str]:
    """Level and text."""
    match event.what:
        case "window":
            return "info", f"Step {event.step} was passed over: the run diverged there before"
        case "overflow":
            scale = "" if event.loss_scale is None else f"; the loss scale is now {event.loss_scale:g}"
            return "info", f"Step {event.step} was skipped: its gradient is too large for fp16{scale}"
        case _:
            return "warn", f"Step {event.step} was skipped: its {event.what} is not finite"


def _verdict_message(event: engine.MemoryVerdict) -> str:
    planned, measured = event.planned.peak_bytes, event.measured.peak_bytes
    return f"Memory: planned {planned / _MIB:.0f} MiB, measured {measured / _MIB:.0f} MiB ({event.ratio:.2f} of it)."


def _evaluation_message(event: engine.Evaluation) -> str:
    parts = [
        f"{name}={value:.3f}"
        for name, value in (
            ("loss", event.valid_loss),
            ("token accuracy", event.valid_mean_token_accuracy),
            ("choice accuracy", event.choice_accuracy),
        )
        if value is not None
    ]
    return f"Evaluation at step {event.step} on {event.num_rows:,} rows: {', '.join(parts)}"


def _write_metrics(session: Session, job: Job, attempt: int, lines: Sequence[NumberedLine], *, last_step: int) -> None:
    """The figures of steps. One that stands already (none beyond `last_step` does) is repeated after a resume, and
    replaced."""
    rows = {
        line.event.step: (
            job.id,
            attempt,
            _when(line),
            *map(_finite, _get_figures(line.event)),
            *_get_memory(line.event.memory),
        )
        for _, line in lines
        if isinstance(line.event, engine.Step)
    }
    if rows:
        # Where nothing can stand, to look for each of 500 steps would take 2 of the batch's 25 ms.
        if min(rows) <= last_step:
            session.execute(_DELETE_METRICS, {"job_id": job.id, "steps": list(rows)})
        copy_rows(session, Metric, _METRIC_COLUMNS, rows.values())
        series.roll_up(session, job.id, before=min(job.step, min(rows) - 1), after=max(rows))


def _write_evaluations(session: Session, job_id: str, lines: Sequence[NumberedLine]) -> None:
    rows = {
        line.event.step: {
            "job_id": job_id,
            "step": line.event.step,
            "created_at": _when(line),
            "num_rows": line.event.num_rows,
            "valid_loss": line.event.valid_loss,
            "valid_mean_token_accuracy": line.event.valid_mean_token_accuracy,
            "choice_accuracy": line.event.choice_accuracy,
        }
        for _, line in lines
        if isinstance(line.event, engine.Evaluation)
    }
    _replace(session, Evaluation, list(rows.values()), keys=("job_id", "step"))


def _write_checkpoints(
    session: Session, job: Job, attempt: int, lines: Sequence[NumberedLine], relative: Callable[[str], str]
) -> None:
    rows: dict[int, dict[str, Any]] = {}
    for _, line in lines:
        event = line.event
        if isinstance(event, engine.RolledBack):
            # The run goes another way from there: nobody may go on from what lies behind.
            rows = {step: row for step, row in rows.items() if step <= event.step}
            session.execute(delete(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step > event.step))
        if isinstance(event, engine.Checkpoint):
            rows[event.step] = {
                "id": new_checkpoint_id(),
                "job_id": job.id,
                "attempt": attempt,
                "step": event.step,
                "path": relative(event.path),
                "manifest_sha256": event.manifest_sha256,
                "num_bytes": event.num_bytes,
                "train_loss": event.train_loss,
                "valid_loss": event.valid_loss,
                "created_at": _when(line),
            }
    if rows:
        _replace(session, Checkpoint, list(rows.values()), keys=("job_id", "step"), keep=("id",))
        _unpublish_checkpoints(session, job)


def _unpublish_checkpoints(session: Session, job: Job) -> None:
    """Keep the newest rows only, as many as the job asked for: the engine and the worker delete the other folders."""
    kept = (
        select(Checkpoint.id)
        .where(Checkpoint.job_id == job.id)
        .order_by(Checkpoint.step.desc())
        .limit(JobSpec.model_validate(job.spec).lomo.keep_checkpoints)
    )
    session.execute(delete(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.id.not_in(kept)))


def _replace(
    session: Session, table: type[Any], rows: list[dict[str, Any]], *, keys: tuple[str, ...], keep: tuple[str, ...] = ()
) -> None:
    """Insert rows; where one with the same keys stands (a step repeated after a resume), the new one wins."""
    if not rows:
        return
    statement = upsert(table)
    changed = {name: statement.excluded[name] for name in rows[0] if name not in (*keys, *keep)}
    session.execute(statement.on_conflict_do_update(index_elements=list(keys), set_=changed), rows)


def _write_figures(session: Session, job: Job, attempt: int, lines: Sequence[NumberedLine]) -> None:
    """Bring the latest figures of the run to the job's row, from where lists and pages read them."""
    values: dict[str, Any] = {}
    last: engine.JournalLine | None = None
    memory, peak = None, (job.memory or {}).get("peak_bytes", 0)
    has_started = job.run is not None and job.run.get("attempt") == attempt
    for _, line in lines:
        event = line.event
        if isinstance(event, engine.Step):
            values["step"], last = event.step, line
            if event.memory.peak_bytes > peak:
                memory, peak = event.memory, event.memory.peak_bytes
        elif isinstance(event, engine.Started):
            has_started = True
            values["run"] = {**asdict(event), "attempt": attempt}
            values |= {"step": event.step, "total_steps": event.total_steps}
        elif isinstance(event, engine.RolledBack | engine.Skipped):
            # A step that was passed over has no figures of its own.
            values["step"] = event.step
        elif isinstance(event, engine.Failed) and event.memory is not None and has_started:
            # What was held where memory ran out tells more than the peak of a step that fitted. Of an attempt whose
            # model could not be loaded the figures are its plan's.
            memory = event.memory
    if last is not None:
        values |= _figures(last)
    if memory is not None:
        values["memory"] = asdict(memory)
    if values:
        session.execute(update(Job).where(Job.id == job.id).values(**values))


def _figures(line: engine.JournalLine) -> dict[str, Any]:
    """Of a step, what the job's row keeps."""
    assert isinstance(line.event, engine.Step)
    return {
        "total_steps": line.event.total_steps,
        "loss": _finite(line.event.loss),
        "tokens_per_s": line.event.tokens_per_s,
        "trained_tokens": line.event.num_trained_tokens,
        "step_at": _when(line),
    }


def _finite(value: float | None) -> float | None:
    """Postgres could hold what is not finite; JSON, and so the API, could not."""
    return value if value is None or math.isfinite(value) else None


def _when(line: engine.JournalLine) -> datetime:
    return datetime.fromtimestamp(line.time, UTC)
