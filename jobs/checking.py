"""The check of a job's files before it is queued: who does it, what it found, and what becomes of the job.

A worker claims a check as it claims a job: with a token that its end has to name, and for a time that it prolongs. A
check whose worker died is begun again by whoever comes next; one that ended three workers fails its job, since its
files then cost more than they could bring. The check itself is the engine's (`lomo_core.data.check`), in a process of
its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import LeaseLostError, NotFoundError
from jobs.lifecycle import JobFailure, end_check
from jobs.models import DataCheck, File, Job
from jobs.owner import Owner
from jobs.repository import NewEvent
from jobs.spec import JobSpec
from jobs.status import JobStatus

# Named in the job's error; the report has twenty, and the number of all.
_NAMED_ERRORS = 5
_NAMED_LINES = 3
# Jobs whose speed is looked at for an estimate of time: the latest, since drivers and hosts change.
_COMPARED_JOBS = 20
_FILES = ("training_file", "validation_file")
_SHORT_FIELDS = ("format", "num_rows", "num_errors", "num_duplicates", "num_untrained")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckClaim:
    """A check as handed to a worker."""

    job_id: str
    token: uuid.UUID
    number: int
    organization_id: str
    spec: JobSpec


def claim_check(db: Database, *, owner: str, lease_s: float, max_failures: int) -> CheckClaim | None:
    """Take the check that waits longest, the jobs of a higher priority first. None if there is none.

    A job whose check was begun `max_failures` times, or whose stored spec is not valid, fails here, and None is
    returned.
    """
    with db.transaction() as session:
        job = session.scalar(
            select(Job)
            .join(DataCheck, DataCheck.job_id == Job.id)
            .where(
                Job.status == JobStatus.VALIDATING_FILES,
                or_(DataCheck.expires_at.is_(None), DataCheck.expires_at < func.now()),
            )
            .order_by(Job.priority.desc(), Job.created_at)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        if job is None:
            return None
        check = session.get_one(DataCheck, job.id)
        if check.number >= max_failures:
            message = f"The check of the files was lost {check.number} times; giving up."
            _end(session, job, check, JobFailure(code="data_check_failed", message=message))
            return None
        try:
            spec = JobSpec.model_validate(job.spec)
        except ValidationError as error:
            message = f"This version cannot read the job's options: {error.error_count()} of them are not valid."
            _end(session, job, check, JobFailure(code="invalid_spec", message=message))
            return None
        expires_at = session.scalar(select(_after(lease_s)))
        check.number += 1
        check.token, check.owner, check.expires_at = uuid.uuid4(), owner, expires_at
        return CheckClaim(
            job_id=job.id,
            token=check.token,
            number=check.number,
            organization_id=job.organization_id,
            spec=spec,
        )


def renew_check(db: Database, claim: CheckClaim, *, lease_s: float) -> bool:
    """Prolong a claim. False where the job is to be checked no more, or by another: it was cancelled, or given up."""
    with db.transaction() as session:
        found = session.execute(
            update(DataCheck)
            .where(DataCheck.job_id == claim.job_id, DataCheck.token == claim.token, _is_waited_for())
            .values(expires_at=_after(lease_s))
            .returning(DataCheck.job_id)
        )
        return found.scalar_one_or_none() is not None


def release_check(db: Database, claim: CheckClaim) -> None:
    """Give a check back undone, without counting it: the worker is told to stop."""
    with db.transaction() as session:
        session.execute(
            update(DataCheck)
            .where(DataCheck.job_id == claim.job_id, DataCheck.token == claim.token)
            .values(token=None, expires_at=None, number=DataCheck.number - 1)
        )


def release_dead_checks(db: Database, *, host: str, incarnation: str) -> None:
    """Free what an earlier incarnation of this host's worker held when it was killed; it stays counted."""
    with db.transaction() as session:
        session.execute(
            update(DataCheck)
            .where(
                DataCheck.token.is_not(None),
                func.split_part(DataCheck.owner, "/", 1) == host,
                DataCheck.owner != f"{host}/{incarnation}",
            )
            .values(token=None, expires_at=None)
        )


def finish_check(db: Database, claim: CheckClaim, report: dict[str, Any]) -> JobStatus:
    """Store the report, and queue the job or fail it by that. Returns its new status.

    Raises:
        LeaseLostError: the job is to be checked no more, or by another.
    """
    with db.transaction() as session:
        job, check = _lock(session, claim)
        if report["estimate"] is not None:
            speed = _usual_tokens_per_s(session, claim.spec.model)
            tokens = report["estimate"]["tokens"]
            report["estimate"]["duration_s"] = None if not speed else round(tokens / speed, 1)
            report["estimate"]["peak_bytes"] = job.planned_bytes
        check.report = report
        check.summary = _summary(report)
        _end(session, job, check, _failure(report), warnings=_warnings(report))
        return JobStatus(job.status)


def give_up_check(db: Database, claim: CheckClaim, failure: JobFailure) -> None:
    """Fail a job whose files could not be checked, for a reason that another try would not change.

    Raises:
        LeaseLostError: see `finish_check`.
    """
    with db.transaction() as session:
        job, check = _lock(session, claim)
        _end(session, job, check, failure)


def find_job_report(db: Database, *, owner: Owner, job_id: str) -> dict[str, Any] | None:
    """The report on a job's files; None: there is none yet, or the job was not checked.

    Raises:
        NotFoundError: no such job of this owner.
    """
    with db.read() as session:
        if session.scalar(select(Job.id).where(Job.id == job_id, owner.owns(Job))) is None:
            raise NotFoundError(f"No such fine-tuning job: {job_id}", param="fine_tuning_job_id")
        check = session.get(DataCheck, job_id)
        return None if check is None else check.report


def find_file_report(db: Database, file: File, *, owner: Owner) -> tuple[DataCheck, dict[str, Any]] | None:
    """The newest report on a file, with the check that it is from; None: no job of this owner's with it was checked."""
    with db.read() as session:
        checks = [_newest(session, file.id, param, owner) for param in _FILES]
        found = [
            (check, check.report[param])
            for check, param in zip(checks, _FILES, strict=True)
            if check is not None and check.report is not None
        ]
    return max(found, key=lambda item: str(item[0].checked_at), default=None)


def _newest(session: Session, file_id: str, param: str, owner: Owner) -> DataCheck | None:
    column = DataCheck.training_file if param == "training_file" else DataCheck.validation_file
    return session.scalar(
        select(DataCheck)
        .join(Job, Job.id == DataCheck.job_id)
        .where(column == file_id, DataCheck.report.is_not(None), owner.owns(Job))
        .order_by(DataCheck.checked_at.desc())
        .limit(1)
    )


def _lock(session: Session, claim: CheckClaim) -> tuple[Job, DataCheck]:
    job = session.scalar(
        select(Job).where(Job.id == claim.job_id, Job.status == JobStatus.VALIDATING_FILES).with_for_update()
    )
    check = session.get(DataCheck, claim.job_id)
    if job is None or check is None or check.token != claim.token:
        raise LeaseLostError(claim.job_id, claim.number)
    return job, check


def _end(
    session: Session, job: Job, check: DataCheck, failure: JobFailure | None, *, warnings: Sequence[NewEvent] = ()
) -> None:
    now = session.scalar(select(func.now()))
    check.token, check.expires_at, check.checked_at = None, None, now
    session.flush()
    end_check(session, job, failure, warnings)


def _is_waited_for() -> Any:
    return select(Job.id).where(Job.id == DataCheck.job_id, Job.status == JobStatus.VALIDATING_FILES).exists()


def _usual_tokens_per_s(session: Session, model: str) -> float | None:
    """The median speed of the latest jobs on this model that ended well; None: there were none."""
    speeds = session.scalars(
        select(Job.tokens_per_s)
        .where(Job.status == JobStatus.SUCCEEDED, Job.spec["model"].astext == model, Job.tokens_per_s.is_not(None))
        .order_by(Job.finished_at.desc())
        .limit(_COMPARED_JOBS)
    ).all()
    return sorted(speeds, key=float)[len(speeds) // 2] if speeds else None  # type: ignore[arg-type]  # none is None


def _failure(report: dict[str, Any]) -> JobFailure | None:
    """What is wrong with the first file that is, its first errors by their lines; None: nothing."""
    for param in _FILES:
        found = report[param]
        if found is None or not found["num_errors"]:
            continue
        count, named = found["num_errors"], found["errors"][:_NAMED_ERRORS]
        texts = "; ".join(_error_text(error) for error in named)
        rows = "" if count == 1 else f" ({count} errors{', the first of them' if count > len(named) else ''})"
        message = f"The {param.replace('_', ' ')} cannot be used{rows}: {texts}."
        return JobFailure(code="invalid_training_file", message=message, param=param)
    return None


def _error_text(error: dict[str, Any]) -> str:
    where = "" if error["where"] == "the file" else f"{error['where']}: "
    return f"{where}{error['reason']}".rstrip(".")


def _warnings(report: dict[str, Any]) -> list[NewEvent]:
    """What does not fail a job but may surprise its owner."""
    texts = []
    for param in _FILES:
        found, name = report[param], param.replace("_", " ")
        if found is None:
            continue
        if found["num_duplicates"]:
            lines = ", ".join(f"line {item['line']} repeats line {item['first_line']}" for item in _first(found))
            count, verb = _counted(found["num_duplicates"], "repeats", "repeat")
            texts.append(f"{count} of the {name} {verb} earlier ones: {lines}.")
        if found["num_with_special_tokens"]:
            count, verb = _counted(found["num_with_special_tokens"], "has", "have")
            lines = ", ".join(map(str, found["special_token_lines"][:_NAMED_LINES]))
            texts.append(
                f"{count} of the {name} {verb} special tokens of the model in a message's text (line {lines}): they "
                "count as tokens there, too, and may end the message."
            )
        tokens = found["tokens"]
        if tokens is not None and tokens["num_truncated"]:
            texts.append(
                f"{tokens['num_truncated']} of {tokens['num_sequences']} rows of the {name} are longer than "
                f"max_seq_length and lose their beginning."
            )
    overlap = report["overlap"]
    if overlap is not None and overlap["num_rows"]:
        count, verb = _counted(overlap["num_rows"], "is", "are")
        lines = ", ".join(map(str, overlap["validation_lines"][:_NAMED_LINES]))
        texts.append(
            f"{count} of the validation file {verb} in the training file, too (line {lines}): the validation loss will "
            "look better than it is."
        )
    return [NewEvent(message=text, level="warn") for text in texts]


def _counted(num_rows: int, one: str, several: str) -> tuple[str, str]:
    """A number of rows, and the verb after it."""
    return ("1 row", one) if num_rows == 1 else (f"{num_rows} rows", several)


def _first(found: dict[str, Any]) -> list[dict[str, int]]:
    duplicates: list[dict[str, int]] = found["duplicates"][:_NAMED_LINES]
    return duplicates


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures that a list of jobs shows."""
    short: dict[str, Any] = {"is_valid": report["is_valid"], "estimate": report["estimate"]}
    for param in _FILES:
        found = report[param]
        if found is None:
            short[param] = None
            continue
        tokens = found["tokens"] or {}
        short[param] = {
            **{name: found[name] for name in _SHORT_FIELDS},
            "num_truncated": tokens.get("num_truncated"),
            "num_tokens": tokens.get("total"),
            "num_trained_tokens": tokens.get("trained"),
        }
    short["num_overlapping"] = None if report["overlap"] is None else report["overlap"]["num_rows"]
    return short


def _after(seconds: float) -> Any:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
