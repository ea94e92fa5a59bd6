"""How a job changes: the only writer of status and lease. Each function is one transaction, its event included.

A worker's right to a running job is its lease: `claim` gives a fresh token, every later write names it, and a write
that touches no row raises `LeaseLostError`, upon which the worker kills its engine and writes nothing more. Time is
the database's alone. What a lost message or a lost worker leaves behind, `reap` finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from jobs import quotas, webhooks
from jobs.db import Database
from jobs.errors import InvalidStateError
from jobs.ids import tuned_model_id
from jobs.models import Attempt, Checkpoint, Job, ReaperState, TunedModel
from jobs.owner import Owner
from jobs.placement import lock_next_job
from jobs.repository import Lease, NewEvent, append_events, lock_leased, lock_owned
from jobs.spec import JobSpec
from jobs.status import TERMINAL, TRANSITIONS, JobStatus
from jobs.step_metrics import ResultFile, add_result_file

# One reaper at a time, whatever number of beats and workers there is; the number only has to be nobody else's.
_REAPER_LOCK = 0x10_0D_0001

# A job's status as part of a sentence, for what it does not allow.
_STATES = {
    JobStatus.VALIDATING_FILES: "is having its files checked",
    JobStatus.QUEUED: "is queued",
    JobStatus.RUNNING: "is running",
    JobStatus.PAUSED: "is already paused",
    JobStatus.SUCCEEDED: "has already succeeded",
    JobStatus.FAILED: "has already failed",
    JobStatus.CANCELLED: "has already been cancelled",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job as handed to a worker: what to do, and the lease to do it under."""

    lease: Lease
    organization_id: str
    spec: JobSpec
    failures: int


@dataclass(frozen=True, slots=True)
class Requests:
    """What users asked of a running job, as seen at a renewal of its lease."""

    cancel: bool
    pause: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailure:
    """Why a job failed; becomes the job's `error`."""

    code: str
    message: str
    param: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """The three keys of the API's error object."""
        return {"code": self.code, "message": self.message, "param": self.param}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a job whose engine or worker died is tried again, and after which wait (doubling)."""

    max_failures: int
    backoff_s: float

    def wait_s(self, failures: int) -> float:
        """Seconds to wait after the `failures`-th failure (1-based)."""
        return self.backoff_s * float(2 ** (failures - 1))


def claim(db: Database, *, owner: str, lease_s: float) -> Claim | None:
    """Take the best queued job that fits this host: by priority, then fairness between organizations, then age. None if
    there is none.

    `owner` is `<host>/<incarnation>`; what fits, and what a job that does not fit yet holds up, is the matter of
    `jobs/placement.py`. A claimer on another host skips the locked row, so nobody waits and nobody shares. A job whose
    stored spec is not valid fails here, and None is returned.
    """
    with db.transaction() as session:
        job_id = lock_next_job(session, owner=owner)
        if job_id is None:
            return None
        job = session.execute(
            update(Job)
            .where(Job.id == job_id)
            .values(
                status=JobStatus.RUNNING,
                attempt=Job.attempt + 1,
                lease_token=func.gen_random_uuid(),
                lease_expires_at=_after(lease_s),
                lease_owner=owner,
                started_at=func.coalesce(Job.started_at, func.now()),
            )
            .returning(Job)
        ).scalar_one()
        session.add(Attempt(job_id=job.id, number=job.attempt, owner=owner))
        host = owner.partition("/")[0]
        message = "Fine-tuning job started" if job.attempt == 1 else f"Attempt {job.attempt} started"
        append_events(
            session, job.id, job.attempt, [NewEvent(message=f"{message} on {host}.", status=JobStatus.RUNNING)]
        )
        assert job.lease_token is not None
        lease = Lease(job.id, job.attempt, job.lease_token)
        try:
            spec = JobSpec.model_validate(job.spec)
        except ValidationError as error:
            # Written by another version of this program. It must not stand at the head of the queue for ever.
            message = f"This version cannot read the job's options: {error.error_count()} of them are not valid."
            _fail(session, job, JobFailure(code="invalid_spec", message=message))
            return None
        return Claim(lease=lease, organization_id=job.organization_id, spec=spec, failures=job.failures)


def renew(db: Database, lease: Lease, *, lease_s: float) -> Requests:
    """Keep a lease alive and learn what was asked of the job.

    Raises:
        LeaseLostError: somebody else may own the job by now.
    """
    with db.transaction() as session:
        job = lock_leased(session, lease)
        session.execute(update(Job).where(Job.id == job.id).values(lease_expires_at=_after(lease_s)))
        return Requests(cancel=job.cancel_requested_at is not None, pause=job.pause_requested_at is not None)


def say(db: Database, lease: Lease, message: str, *, level: str = "info") -> None:
    """Append a message of the worker's own to a running job's events.

    Raises:
        LeaseLostError: see `renew`.
    """
    with db.transaction() as session:
        lock_leased(session, lease)
        append_events(session, lease.job_id, lease.attempt, [NewEvent(message=message, level=level)])


def succeed(
    db: Database,
    lease: Lease,
    *,
    model_path: str,
    weights_sha256: str,
    trained_tokens: int,
    result_file: ResultFile | None = None,
) -> str:
    """End a job well; publish its result file, and its model, at `model_path` of the data folder. Returns its name.

    Success wins over a late cancel: the work is done.

    Raises:
        LeaseLostError: see `renew`.
    """
    with db.transaction() as session:
        job = lock_leased(session, lease)
        spec = JobSpec.model_validate(job.spec)
        name = tuned_model_id(base_model=spec.model, suffix=spec.suffix, job_id=job.id)
        session.add(
            TunedModel(
                id=name,
                organization_id=job.organization_id,
                project_id=job.project_id,
                job_id=job.id,
                path=model_path,
                weights_sha256=weights_sha256,
            )
        )
        if result_file is not None:
            add_result_file(session, job, result_file)
        _change(
            session,
            job,
            JobStatus.SUCCEEDED,
            [
                NewEvent(message=f"New fine-tuned model created: {name}"),
                NewEvent(message="The job has successfully completed", status=JobStatus.SUCCEEDED),
            ],
            values={
                "fine_tuned_model": name,
                "weights_sha256": weights_sha256,
                "trained_tokens": trained_tokens,
            },
        )
        return name


def fail(db: Database, lease: Lease, failure: JobFailure) -> None:
    """End a job for a reason that another attempt would not change.

    Raises:
        LeaseLostError: see `renew`.
    """
    with db.transaction() as session:
        _fail(session, lock_leased(session, lease), failure)


def cancelled(db: Database, lease: Lease) -> None:
    """End a running job as its user asked, after its engine has stopped.

    Raises:
        LeaseLostError: see `renew`.
    """
    with db.transaction() as session:
        _cancel(session, lock_leased(session, lease))


def paused(db: Database, lease: Lease) -> JobStatus:
    """Give a running job back as its user asked, after its engine has stopped. Returns the new status: a cancel that
    came later wins, and where the pause was taken back the job is queued.

    Raises:
        LeaseLostError: see `renew`.
    """
    with db.transaction() as session:
        job = lock_leased(session, lease)
        _give_back(session, job, reason="The pause was taken back", failures=job.failures, wait_s=0.0)
        return JobStatus(job.status)


def retry(db: Database, lease: Lease, *, reason: str, policy: RetryPolicy) -> JobStatus:
    """Requeue a job whose engine died, or fail it when it has died too often. Returns the new status.

    Raises:
        LeaseLostError: see `renew`.
    """
    with db.transaction() as session:
        return _retry(session, lock_leased(session, lease), reason, policy)


def release(db: Database, lease: Lease, *, reason: str) -> None:
    """Give a job back unfinished without counting a failure: the worker is told to stop.

    Raises:
        LeaseLostError: see `renew`.
    """
    with db.transaction() as session:
        job = lock_leased(session, lease)
        _give_back(session, job, reason=reason, failures=job.failures, wait_s=0.0)


def end_check(session: Session, job: Job, failure: JobFailure | None, events: Sequence[NewEvent]) -> None:
    """Move a locked row on from `validating_files`: to the queue, or to its end by `failure` (`jobs/checking.py`)."""
    if failure is not None:
        if events:
            append_events(session, job.id, job.attempt, events)
        _fail(session, job, failure)
        return
    validated = NewEvent(message="Files validated, moving job to queued state.", status=JobStatus.QUEUED)
    # The wait for a turn begins now: what the check took is not the job's fault.
    _change(session, job, JobStatus.QUEUED, [*events, validated], values={"run_after": func.now()})


def request_cancel(db: Database, *, owner: Owner, job_id: str) -> Job:
    """Cancel a job: at once where it does not run, else by asking its worker (seen at the next renewal).

    Raises:
        NotFoundError: no such job of this owner.
        InvalidStateError: the job has ended.
    """
    with db.transaction() as session:
        job = lock_owned(session, owner=owner, job_id=job_id)
        if JobStatus(job.status) in TERMINAL:
            raise InvalidStateError(f"Job {job_id} {_STATES[JobStatus(job.status)]} and cannot be cancelled.")
        if job.status != JobStatus.RUNNING:
            _cancel(session, job)
        elif job.cancel_requested_at is None:
            job.cancel_requested_at = session.scalar(select(func.now()))
            session.flush()
            append_events(session, job.id, job.attempt, [NewEvent(message="Cancellation requested.")])
        session.refresh(job)
        return job


def request_pause(db: Database, *, owner: Owner, job_id: str) -> Job:
    """Pause a job: at once where it is queued, else by asking its worker (seen at the next renewal).

    Raises:
        NotFoundError: no such job of this owner.
        InvalidStateError: the job does not wait or run, or is being cancelled.
    """
    with db.transaction() as session:
        job = lock_owned(session, owner=owner, job_id=job_id)
        if job.status not in (JobStatus.QUEUED, JobStatus.RUNNING):
            raise InvalidStateError(f"Job {job_id} {_STATES[JobStatus(job.status)]} and cannot be paused.")
        if job.cancel_requested_at is not None:
            raise InvalidStateError(f"Job {job_id} is being cancelled and cannot be paused.")
        if job.status == JobStatus.QUEUED:
            _pause(session, job, failures=job.failures)
        elif job.pause_requested_at is None:
            job.pause_requested_at = session.scalar(select(func.now()))
            session.flush()
            message = "Pause requested: the job stops at its next step, with a checkpoint."
            append_events(session, job.id, job.attempt, [NewEvent(message=message)])
        session.refresh(job)
        return job


def resume(db: Database, *, owner: Owner, job_id: str) -> Job:
    """Queue a paused job again, or take back a pause that has not happened yet. The caller rings the doorbell.

    Raises:
        NotFoundError: no such job of this owner.
        InvalidStateError: the job is not paused.
        QuotaError: the organization may not queue one more job.
    """
    with db.transaction() as session:
        job = lock_owned(session, owner=owner, job_id=job_id)
        if job.status == JobStatus.RUNNING and job.pause_requested_at is not None:
            job.pause_requested_at = None
            session.flush()
            append_events(session, job.id, job.attempt, [NewEvent(message="The pause was taken back.")])
        elif job.status == JobStatus.PAUSED:
            quotas.check_submission(session, organization_id=job.organization_id, priority=job.priority)
            event = NewEvent(message="The job was resumed and is queued again.", status=JobStatus.QUEUED)
            _change(session, job, JobStatus.QUEUED, [event], values={"run_after": func.now()})
        else:
            raise InvalidStateError(f"Job {job_id} {_STATES[JobStatus(job.status)]}: only a paused job can be resumed.")
        session.refresh(job)
        return job


def release_dead(db: Database, *, host: str, incarnation: str, policy: RetryPolicy) -> list[str]:
    """Requeue what an earlier incarnation of this host's worker held when it was killed.

    Its leases would run out by themselves; this makes recovery take seconds. Returns the jobs' ids.
    """
    with db.transaction() as session:
        rows = session.scalars(
            select(Job)
            .where(
                Job.status == JobStatus.RUNNING,
                func.split_part(Job.lease_owner, "/", 1) == host,
                Job.lease_owner != f"{host}/{incarnation}",
            )
            .with_for_update(skip_locked=True)
        ).all()
        for job in rows:
            _retry(session, job, f"The worker on {host} was restarted", policy)
        return [job.id for job in rows]


def reap(db: Database, *, every_s: float, lease_s: float, grace_s: float, policy: RetryPolicy) -> list[str]:
    """Requeue (or fail, or cancel) running jobs whose lease ended more than `grace_s` ago. Returns their ids.

    Holds its fire for a lease and a grace after any gap in its own ticks: after an outage of the database every lease
    has expired, and the live workers must get the time to renew (measured: without the hold, all are lost).
    """
    with db.transaction() as session:
        if not session.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _REAPER_LOCK}):
            return []
        state = session.get_one(ReaperState, 1, with_for_update=True)
        now: datetime = session.scalars(select(func.now())).one()
        if (now - state.last_tick_at).total_seconds() > 3 * every_s:
            state.hold_until = session.scalars(select(_after(lease_s + grace_s))).one()
        state.last_tick_at = now
        if now < state.hold_until:
            return []
        rows = session.scalars(
            select(Job)
            .where(Job.status == JobStatus.RUNNING, Job.lease_expires_at < _after(-grace_s))
            .with_for_update(skip_locked=True)
        ).all()
        for job in rows:
            host = (job.lease_owner or "").partition("/")[0]
            _retry(session, job, f"The worker on {host} has not been heard of", policy)
        return [job.id for job in rows]


def _retry(session: Session, job: Job, reason: str, policy: RetryPolicy) -> JobStatus:
    """A cancel that was asked for wins over another try, and so does a pause."""
    failures = job.failures + 1
    if job.cancel_requested_at is None and failures >= policy.max_failures:
        times = f"{failures} time{'s' if failures > 1 else ''}"
        _fail(session, job, JobFailure(code="engine_lost", message=f"{reason}. The job was lost {times}; giving up."))
    else:
        _give_back(session, job, reason=reason, failures=failures, wait_s=policy.wait_s(failures))
    return JobStatus(job.status)


def _give_back(session: Session, job: Job, *, reason: str, failures: int, wait_s: float) -> None:
    """End an attempt that has not ended the job: as its user asked, or else by another one."""
    if job.cancel_requested_at is not None:
        _cancel(session, job)
    elif job.pause_requested_at is not None:
        _pause(session, job, failures=failures)
    else:
        _requeue(session, job, reason=reason, failures=failures, wait_s=wait_s)


def _requeue(session: Session, job: Job, *, reason: str, failures: int, wait_s: float) -> None:
    _change(
        session,
        job,
        JobStatus.QUEUED,
        [
            NewEvent(
                message=f"{reason}. The job is queued again and goes on from its last checkpoint.",
                level="warn",
                status=JobStatus.QUEUED,
            )
        ],
        values={"failures": failures, "run_after": _after(wait_s)},
    )


def _pause(session: Session, job: Job, *, failures: int) -> None:
    step = session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job.id))
    where = "from the beginning" if step is None else f"from its checkpoint at step {step}"
    event = NewEvent(message=f"The job is paused. Resumed, it goes on {where}.", status=JobStatus.PAUSED)
    _change(session, job, JobStatus.PAUSED, [event], values={"failures": failures})


def _fail(session: Session, job: Job, failure: JobFailure) -> None:
    event = NewEvent(
        message=f"The job failed: {failure.message}", level="error", status=JobStatus.FAILED, data=failure.as_dict()
    )
    _change(session, job, JobStatus.FAILED, [event], values={"error": failure.as_dict()})


def _cancel(session: Session, job: Job) -> None:
    event = NewEvent(message="The job was cancelled.", status=JobStatus.CANCELLED)
    now = func.coalesce(Job.cancel_requested_at, func.now())
    _change(session, job, JobStatus.CANCELLED, [event], values={"cancel_requested_at": now})


def _change(
    session: Session, job: Job, status: JobStatus, events: Sequence[NewEvent], *, values: dict[str, Any]
) -> None:
    """Move a locked row to `status`, end its lease and attempt, and append the events that say so. Whatever comes of a
    request to pause, it is then over."""
    before = JobStatus(job.status)
    assert status in TRANSITIONS[before], f"{before} -> {status}"
    ended = {"finished_at": func.now()} if status in TERMINAL else {}
    no_lease = {"lease_token": None, "lease_expires_at": None, "lease_owner": None}
    over = {**no_lease, **ended, "pause_requested_at": None}
    session.execute(update(Job).where(Job.id == job.id).values(status=status, **over, **values))
    if before is JobStatus.RUNNING:
        outcome = "requeued" if status is JobStatus.QUEUED else status.value
        session.execute(
            update(Attempt)
            .where(Attempt.job_id == job.id, Attempt.number == job.attempt)
            .values(ended_at=func.now(), outcome=outcome, detail=events[-1].message)
        )
    append_events(session, job.id, job.attempt, events)
    webhooks.announce(session, job, status)
    session.refresh(job)


def _after(seconds: float) -> Any:
    """The database's time, `seconds` from now."""
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
