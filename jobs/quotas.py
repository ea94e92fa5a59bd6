"""What an organization uses, and that it uses no more than it may.

A quota is checked in the transaction that uses it up, under a lock on the organization's row: of two requests at the
edge one passes. An organization without the quota in question takes no lock, and none waits for another. What workers
write (checkpoints, models, results) is never refused, only counted: so the next request is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import QuotaError
from jobs.models import Checkpoint, File, Job, Organization, TunedModel, Upload
from jobs.status import JobStatus, UploadStatus

WINDOW_DAYS = 30
"""Of the quota of GPU seconds."""

# Jobs that wait for a worker, or will once their files have been read.
_WAITING = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED)

# Of each attempt the part that lies within the window, times its devices. The options of a job that another version
# stored may be anything: what is no number counts as one device.
_GPU_SECONDS = text(f"""
    SELECT coalesce(sum(extract(epoch FROM coalesce(a.ended_at, now()) - greatest(a.started_at, w.start)) * CASE
        WHEN jsonb_typeof(j.spec -> 'lomo' -> 'devices') = 'number' THEN (j.spec -> 'lomo' ->> 'devices')::numeric
        ELSE 1 END), 0)::double precision
    FROM jobs j JOIN attempts a ON a.job_id = j.id
        CROSS JOIN (SELECT now() - interval '{WINDOW_DAYS} days' AS start) w
    WHERE j.organization_id = :organization_id AND coalesce(a.ended_at, now()) > w.start
""")  # noqa: S608 - a constant of ours


# Asked at every submission, and so built once.
_ORGANIZATION = select(Organization).where(Organization.id == bindparam("id"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBytes:
    """What lies on disk for an organization."""

    files: int
    uploads: int
    """Of pending ones the whole size, as announced: that is what they will need."""
    models: int
    checkpoints: int

    @property
    def total(self) -> int:
        """All together."""
        return self.files + self.uploads + self.models + self.checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an organization uses now, and may use."""

    organization: Organization
    num_queued_jobs: int
    num_running_jobs: int
    gpu_seconds: float
    """In the last 30 days."""
    stored: StoredBytes


def read_usage(db: Database, *, organization_id: str, data_dir: Path) -> Usage:
    """What an organization uses."""
    measure_models(db, organization_id=organization_id, data_dir=data_dir)
    with db.read() as session:
        return Usage(
            organization=session.get_one(Organization, organization_id),
            num_queued_jobs=_num_jobs(session, organization_id, *_WAITING),
            num_running_jobs=_num_jobs(session, organization_id, JobStatus.RUNNING),
            gpu_seconds=_gpu_seconds(session, organization_id),
            stored=_stored(session, organization_id),
        )


def check_submission(session: Session, *, organization_id: str, priority: int) -> None:
    """See that the organization may queue one more job. Until the transaction ends, nobody else of it can.

    Raises:
        QuotaError: it may not.
    """
    quotas = session.scalar(_ORGANIZATION, {"id": organization_id})
    if quotas is None:
        return
    if quotas.max_priority is not None and priority > quotas.max_priority:
        raise QuotaError(
            f"Priority {priority} is above {quotas.max_priority}, the highest that your organization may give.",
            quota="max_priority",
            used=priority,
            limit=quotas.max_priority,
            param="lomo.priority",
        )
    if quotas.max_queued_jobs is None and quotas.max_gpu_seconds is None:
        return
    quotas = _lock(session, organization_id)
    limit = quotas.max_queued_jobs
    if limit is not None and (queued := _num_jobs(session, organization_id, *_WAITING)) >= limit:
        raise QuotaError(
            f"Your organization has {queued} jobs in the queue and may have {limit}: wait for one to start, or cancel "
            "one.",
            quota="max_queued_jobs",
            used=queued,
            limit=limit,
        )
    limit = quotas.max_gpu_seconds
    if limit is not None and (used := _gpu_seconds(session, organization_id)) >= limit:
        raise QuotaError(
            f"Your organization has used {used:.0f} GPU seconds in the last {WINDOW_DAYS} days and may use {limit}.",
            quota="max_gpu_seconds",
            used=round(used, 1),
            limit=limit,
        )


def check_storage(session: Session, *, organization_id: str, num_bytes: int) -> None:
    """See that the organization may store `num_bytes` more. Until the transaction ends, nobody else of it can.

    Raises:
        QuotaError: it may not.
    """
    quotas = session.get(Organization, organization_id)
    if quotas is None or quotas.max_stored_bytes is None:
        return
    limit = _lock(session, organization_id).max_stored_bytes
    if limit is None:
        return
    stored = _stored(session, organization_id).total
    if stored + num_bytes > limit:
        raise QuotaError(
            f"Your organization stores {stored} bytes and may store {limit}, so that there is no room for {num_bytes} "
            "more: delete files, models or jobs.",
            quota="max_stored_bytes",
            used=stored,
            limit=limit,
        )


def may_run_one_more(session: Session, organization_id: str) -> bool:
    """Whether one more of the organization's jobs may start. If so, until the transaction ends no other can."""
    quotas = session.get(Organization, organization_id)
    if quotas is None or quotas.max_running_jobs is None:
        return True
    limit = _lock(session, organization_id).max_running_jobs
    return limit is None or _num_jobs(session, organization_id, JobStatus.RUNNING) < limit


def running_limits(db: Database, organization_ids: Collection[str]) -> dict[str, int]:
    """How many jobs each of these organizations may run at once, of those that have such a quota."""
    query = select(Organization.id, Organization.max_running_jobs).where(
        Organization.id.in_(organization_ids), Organization.max_running_jobs.is_not(None)
    )
    with db.read() as session:
        return {organization_id: limit for organization_id, limit in session.execute(query) if limit is not None}


def measure_models(db: Database, *, organization_id: str, data_dir: Path) -> None:
    """Write down the sizes of the models that nobody has asked for yet. Call it before a check of what is stored: the
    folders are not looked at in a transaction."""
    unmeasured = (TunedModel.organization_id == organization_id) & TunedModel.num_bytes.is_(None)
    with db.read() as session:
        found = session.execute(select(TunedModel.id, TunedModel.path).where(unmeasured)).all()
    for model_id, path in found:
        num_bytes = sum(file.lstat().st_size for file in (data_dir / path).rglob("*") if file.is_file())
        with db.transaction() as session:
            session.execute(update(TunedModel).where(TunedModel.id == model_id).values(num_bytes=num_bytes))


def _lock(session: Session, organization_id: str) -> Organization:
    """The organization as it is once nobody else holds it. New keys and projects, which only name it, do not wait."""
    return session.get_one(Organization, organization_id, with_for_update={"key_share": True}, populate_existing=True)


def _num_jobs(session: Session, organization_id: str, *statuses: JobStatus) -> int:
    query = select(func.count()).where(Job.organization_id == organization_id, Job.status.in_(statuses))
    return session.scalars(query).one()


def _gpu_seconds(session: Session, organization_id: str) -> float:
    return float(session.scalars(_GPU_SECONDS, {"organization_id": organization_id}).one())


def _stored(session: Session, organization_id: str) -> StoredBytes:
    files = select(func.sum(File.num_bytes)).where(File.organization_id == organization_id)
    uploads = select(func.sum(Upload.num_bytes)).where(
        Upload.organization_id == organization_id, Upload.status == UploadStatus.PENDING
    )
    models = select(func.sum(TunedModel.num_bytes)).where(TunedModel.organization_id == organization_id)
    checkpoints = select(func.sum(Checkpoint.num_bytes)).join(Job).where(Job.organization_id == organization_id)
    # One statement, so one moment: an upload that becomes a file in between is counted once.
    sums = session.execute(select(*(query.scalar_subquery() for query in (files, uploads, models, checkpoints)))).one()
    found = [int(value or 0) for value in sums]
    return StoredBytes(files=found[0], uploads=found[1], models=found[2], checkpoints=found[3])
