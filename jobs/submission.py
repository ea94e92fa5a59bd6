"""How a job comes to be: one row, queued or to be checked first, with the events that say so."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.checkpoint_names import hold_maker
from jobs.db import Database
from jobs.idempotency import Arrival, find_made, record
from jobs.ids import new_job_id
from jobs.models import ApiKey, DataCheck, Job
from jobs.planning import PlannedJob, describe_changes, gib
from jobs.quotas import check_submission
from jobs.repository import NewEvent, append_events
from jobs.status import JobStatus


def submit(
    db: Database,
    *,
    planned: PlannedJob,
    organization_id: str,
    api_key_id: str | None,
    metadata: dict[str, str],
) -> Job:
    """Queue a job, or have its files checked before that (`checking.py`).

    The caller rings the doorbell (`dispatch.ring`) afterwards, never before the commit. Without a plan any host may
    take it.

    Raises:
        QuotaError: the organization may not have another job.
    """
    job = _new_job(planned, organization_id=organization_id, api_key_id=api_key_id, metadata=metadata)
    with db.transaction() as session:
        _queue(session, job, planned)
        return job


def submit_once(
    db: Database,
    arrival: Arrival,
    *,
    planned: PlannedJob,
    organization_id: str,
    api_key_id: str | None,
    metadata: dict[str, str],
) -> tuple[Job, bool]:
    """Queue the job of a request that may come twice. Returns it, and False where another try has queued it meanwhile.

    Raises:
        ConflictError: another request with the same key has.
        QuotaError: see `submit`.
    """
    job = _new_job(planned, organization_id=organization_id, api_key_id=api_key_id, metadata=metadata)
    with db.transaction() as session:
        made = find_made(session, arrival)
        if made is not None:
            return made, False
        _queue(session, job, planned)
        record(session, arrival, job)
        return job, True


def _new_job(planned: PlannedJob, *, organization_id: str, api_key_id: str | None, metadata: dict[str, str]) -> Job:
    spec = planned.spec
    return Job(
        id=new_job_id(),
        organization_id=organization_id,
        api_key_id=api_key_id,
        project_id=select(ApiKey.project_id).where(ApiKey.id == api_key_id).scalar_subquery(),
        status=JobStatus.QUEUED,
        spec=spec.model_dump(mode="json"),
        metadata_=metadata,
        priority=spec.lomo.priority,
        plan=planned.plan,
        planned_bytes=planned.planned_bytes,
    )


def _queue(session: Session, job: Job, planned: PlannedJob) -> None:
    hold_maker(session, organization_id=job.organization_id, name=planned.spec.model)
    check_submission(session, organization_id=job.organization_id, priority=job.priority)
    check = planned.check_files
    status = JobStatus.VALIDATING_FILES if check else JobStatus.QUEUED
    job.status = status
    session.add(job)
    session.flush()
    if check:
        spec = planned.spec
        session.add(DataCheck(job_id=job.id, training_file=spec.training_file, validation_file=spec.validation_file))
        session.flush()
    begun = _validating(planned) if check else "Queued"
    now = NewEvent(message=begun + _memory_message(planned), status=status, data=planned.plan)
    events = [NewEvent(message=f"Created fine-tuning job: {job.id}"), now]
    append_events(session, job.id, 0, events)
    session.refresh(job)


def _validating(planned: PlannedJob) -> str:
    names = [name for name in (planned.spec.training_file, planned.spec.validation_file) if name is not None]
    return f"Validating {' and '.join(names)}"


def _memory_message(planned: PlannedJob) -> str:
    """The memory that the job will take, and what was chosen by that."""
    if planned.plan is None:
        reason = planned.why_unplanned
        return "." if reason is None else f", its memory not planned: {reason}"
    spec = planned.spec
    values = {**dict(spec.lomo), "batch_size": spec.batch_size}
    chosen: dict[str, Any] = {name: values[name] for name in spec.auto}
    choice = f"; chosen by that: {describe_changes(chosen)}" if chosen else ""
    return f". Planned memory: {gib(planned.plan['memory']['peak_bytes'])}{choice}."
