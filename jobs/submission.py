"""How a job comes to be: one row, queued or to be checked first, with the events that say so."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import Table, insert, inspect
from sqlalchemy.orm import Session

from jobs.checkpoint_names import hold_maker
from jobs.db import Database
from jobs.idempotency import Arrival, find_made, record
from jobs.ids import new_job_id
from jobs.models import DataCheck, Job
from jobs.organizations import project_of
from jobs.owner import Owner
from jobs.planning import PlannedJob, describe_changes, gib
from jobs.quotas import check_submission
from jobs.references import hold_files
from jobs.repository import NewEvent, insert_events
from jobs.status import JobStatus

# Built once, and of tables and not of classes: the session takes as long to build its own as to send it.
_INSERT = insert(cast(Table, Job.__table__)).returning(
    *(attribute.columns[0] for attribute in inspect(Job).column_attrs)
)
_NAMES = [attribute.key for attribute in inspect(Job).column_attrs]
_INSERT_CHECK = insert(cast(Table, DataCheck.__table__))


def submit(
    db: Database,
    *,
    planned: PlannedJob,
    owner: Owner,
    api_key_id: str | None,
    metadata: dict[str, str],
) -> Job:
    """Queue a job, or have its files checked before that (`checking.py`).

    The caller has the doorbell rung (`dispatch.ring`) afterwards, never before the commit. Without a plan any host may
    take it.

    Raises:
        QuotaError: the organization may not have another job.
    """
    values = _values(planned, owner=owner, api_key_id=api_key_id, metadata=metadata)
    with db.transaction() as session:
        return _queue(session, values, planned, owner)


def submit_once(
    db: Database,
    arrival: Arrival,
    *,
    planned: PlannedJob,
    owner: Owner,
    api_key_id: str | None,
    metadata: dict[str, str],
) -> tuple[Job, bool]:
    """Queue the job of a request that may come twice. Returns it, and False where another try has queued it meanwhile.

    Raises:
        ConflictError: another request with the same key has.
        QuotaError: see `submit`.
    """
    values = _values(planned, owner=owner, api_key_id=api_key_id, metadata=metadata)
    with db.transaction() as session:
        made = find_made(session, arrival)
        if made is not None:
            return made, False
        job = _queue(session, values, planned, owner)
        record(session, arrival, job)
        return job, True


def _values(planned: PlannedJob, *, owner: Owner, api_key_id: str | None, metadata: dict[str, str]) -> dict[str, Any]:
    spec = planned.spec
    return {
        "id": new_job_id(),
        "organization_id": owner.organization_id,
        "api_key_id": api_key_id,
        "status": JobStatus.VALIDATING_FILES if planned.check_files else JobStatus.QUEUED,
        "spec": spec.model_dump(mode="json"),
        "metadata": metadata,
        "priority": spec.lomo.priority,
        "plan": planned.plan,
        "planned_bytes": planned.planned_bytes,
    }


def _queue(session: Session, values: dict[str, Any], planned: PlannedJob, owner: Owner) -> Job:
    """The job, of no session, made with as few statements as there are tables: each takes longer than what it does."""
    spec, check = planned.spec, planned.check_files
    hold_maker(session, organization_id=owner.organization_id, name=spec.model)
    hold_files(session, organization_id=owner.organization_id, file_ids=planned.file_ids)
    check_submission(session, organization_id=owner.organization_id, priority=values["priority"])
    project_id = project_of(session, owner)
    begun = _validating(planned) if check else "Queued"
    now = NewEvent(message=begun + _memory_message(planned), status=values["status"], data=planned.plan)
    events = [NewEvent(message=f"Created fine-tuning job: {values['id']}"), now]
    row = session.execute(_INSERT, {**values, "project_id": project_id, "last_seq": len(events)}).one()
    if check:
        files = {"training_file": spec.training_file, "validation_file": spec.validation_file}
        session.execute(_INSERT_CHECK, {"job_id": values["id"], **files})
    insert_events(session, values["id"], 0, 1, events)
    return Job(**dict(zip(_NAMES, row, strict=True)))


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
