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
from typing import Any

from sqlalchemy import delete, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from jobs import series
from jobs.db import Database
from jobs.ids import new_checkpoint_id
from jobs.models import Attempt, Checkpoint, Evaluation, Job
from jobs.repository import Lease, NewEvent, append_events, insert_rows, lock_leased
from jobs.spec import JobSpec
from lomo_core import events as engine

NumberedLine = tuple[int, engine.JournalLine]

# A message is for reading: one that is longer was not written for people (64 KiB, as the log view cuts too).
_MAX_MESSAGE_CHARS = 65_536
_MIB = 1 << 20

_FIGURES = ("step", "epoch", "loss", "mean_token_accuracy", "learning_rate", "grad_norm", "tokens_per_s", "step_s")


# A step that stands already (repeated after a resume) is replaced.
_REPLACE_METRICS = text("""
    INSERT INTO metrics (
        job_id, attempt, created_at,
        step, epoch, loss, mean_token_accuracy, learning_rate, grad_norm, tokens_per_s, step_s,
        parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes, other_bytes, peak_bytes
    )
    SELECT :job_id, :attempt, row.* FROM json_to_recordset(:rows) AS row (
        created_at timestamptz,
        step bigint, epoch float8, loss float8, mean_token_accuracy float8, learning_rate float8, grad_norm float8,
        tokens_per_s float8, step_s float8,
        parameters_bytes bigint, gradients_bytes bigint, optimizer_bytes bigint, activations_bytes bigint,
        other_bytes bigint, peak_bytes bigint
    )
    ON CONFLICT (job_id, step) DO UPDATE SET
        attempt = excluded.attempt, created_at = excluded.created_at, epoch = excluded.epoch, loss = excluded.loss,
        mean_token_accuracy = excluded.mean_token_accuracy, learning_rate = excluded.learning_rate,
        grad_norm = excluded.grad_norm, tokens_per_s = excluded.tokens_per_s, step_s = excluded.step_s,
        parameters_bytes = excluded.parameters_bytes, gradients_bytes = excluded.gradients_bytes,
        optimizer_bytes = excluded.optimizer_bytes, activations_bytes = excluded.activations_bytes,
        other_bytes = excluded.other_bytes, peak_bytes = excluded.peak_bytes
""")


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
        done: int = session.scalars(
            select(Attempt.shipped_lines).where(Attempt.job_id == job.id, Attempt.number == attempt).with_for_update()
        ).one()
        new = [(number, line) for number, line in lines if number >= done]
        if not new:
            return 0
        assert new[0][0] == done, f"journal line {done} is missing: got {new[0][0]}"
        append_events(session, job.id, attempt, [_event(number, line) for number, line in new])
        _write_metrics(session, job, attempt, new)
        _write_evaluations(session, job.id, new)
        _write_checkpoints(session, job.id, attempt, new, relative)
        _unpublish_checkpoints(session, job)
        _write_figures(session, job, attempt, new)
        session.execute(
            update(Attempt)
            .where(Attempt.job_id == job.id, Attempt.number == attempt)
            .values(shipped_lines=new[-1][0] + 1)
        )
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
            data = {**_fields(event), "train_loss": event.loss, "train_mean_token_accuracy": event.mean_token_accuracy}
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


def _write_metrics(session: Session, job: Job, attempt: int, lines: Sequence[NumberedLine]) -> None:
    rows = {
        line.event.step: {
            "created_at": _when(line),
            **{name: getattr(line.event, name) for name in _FIGURES},
            **_fields(line.event.memory),
        }
        for _, line in lines
        if isinstance(line.event, engine.Step)
    }
    if rows:
        insert_rows(session, _REPLACE_METRICS, list(rows.values()), job_id=job.id, attempt=attempt)
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
    session: Session, job_id: str, attempt: int, lines: Sequence[NumberedLine], relative: Callable[[str], str]
) -> None:
    rows: dict[int, dict[str, Any]] = {}
    for _, line in lines:
        event = line.event
        if isinstance(event, engine.RolledBack):
            # The run goes another way from there: nobody may go on from what lies behind.
            rows = {step: row for step, row in rows.items() if step <= event.step}
            session.execute(delete(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step > event.step))
        if isinstance(event, engine.Checkpoint):
            rows[event.step] = {
                "id": new_checkpoint_id(),
                "job_id": job_id,
                "attempt": attempt,
                "step": event.step,
                "path": relative(event.path),
                "manifest_sha256": event.manifest_sha256,
                "num_bytes": event.num_bytes,
                "train_loss": event.train_loss,
                "valid_loss": event.valid_loss,
                "created_at": _when(line),
            }
    _replace(session, Checkpoint, list(rows.values()), keys=("job_id", "step"), keep=("id",))


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
    peak = (job.memory or {}).get("peak_bytes", 0)
    has_started = job.run is not None and job.run.get("attempt") == attempt
    for _, line in lines:
        event = line.event
        if isinstance(event, engine.Started):
            has_started = True
            values |= {
                "run": {**asdict(event), "attempt": attempt},
                "step": event.step,
                "total_steps": event.total_steps,
            }
        elif isinstance(event, engine.RolledBack | engine.Skipped):
            # A step that was passed over has no figures of its own.
            values["step"] = event.step
        elif isinstance(event, engine.Step):
            values |= {
                "step": event.step,
                "total_steps": event.total_steps,
                "loss": _finite(event.loss),
                "tokens_per_s": event.tokens_per_s,
                "trained_tokens": event.num_trained_tokens,
                "step_at": _when(line),
            }
            if event.memory.peak_bytes > peak:
                peak = event.memory.peak_bytes
                values["memory"] = asdict(event.memory)
        elif isinstance(event, engine.Failed) and event.memory is not None and has_started:
            # What was held where memory ran out tells more than the peak of a step that fitted. Of an attempt whose
            # model could not be loaded the figures are its plan's.
            values["memory"] = asdict(event.memory)
    if values:
        session.execute(update(Job).where(Job.id == job.id).values(**values))


def _fields(event: Any) -> dict[str, Any]:
    """A dataclass's fields, shallow: what is nested is serialised as it is. `asdict` takes ten times as long."""
    return {name: getattr(event, name) for name in event.__dataclass_fields__}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _when(line: engine.JournalLine) -> datetime:
    return datetime.fromtimestamp(line.time, UTC)
