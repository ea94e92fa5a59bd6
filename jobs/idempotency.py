"""One job for one request, however often the request comes.

Two clients repeat themselves. One names its request with an `Idempotency-Key`, which is its project's for 24 h.
The other is OpenAI's official client: it sends a POST again when the connection breaks or no answer comes, without a
key, but says which try it is (`x-stainless-retry-count`); a first try is always a new request, and a later one belongs
to a first try with the same body, API key and project. Either way the request is a row of `submissions`, found or made
when it arrives and locked when its job is made. So of tries that run at the same time, even of a first one that is
slower than its repetition, one makes the job and the others are answered with it. A request that was refused has made
no job: its key is free.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import ConflictError, InvalidRequestError
from jobs.models import Job, Submission
from jobs.owner import Owner

KEY_LIFETIME = timedelta(hours=24)
"""As long as Stripe and others remember a key."""

RETRY_WINDOW = timedelta(minutes=25)
"""From a first try to its last repetition: the official client waits 600 s for an answer, twice, and between the
tries as long as a server asks for, which is at most 120 s."""

MAX_KEY_CHARS = 255
"""As Stripe's."""

# Rows that one arrival clears away: it brings one itself, so that any number above it empties the table in time.
_NUM_CLEARED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestIdentity:
    """What tells a request from another."""

    owner: Owner
    """Whose the job is to be, with its project."""
    api_key_id: str
    body_sha256: str
    idempotency_key: str | None
    num_retries: int | None
    """How often the client has tried before; None where it does not say."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that has arrived: its row, and the job where an earlier try has made it."""

    submission_id: int
    body_sha256: str
    job: Job | None


def hash_body(body: Mapping[str, Any]) -> str:
    """SHA-256 of a request's body as it was sent, before any default; the order of its keys does not count."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_key(key: str) -> str:
    """The value of an `Idempotency-Key` if it may be one.

    Raises:
        InvalidRequestError: it is empty, too long, or not printable ASCII.
    """
    if key and len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable():
        return key
    raise InvalidRequestError(
        f"The Idempotency-Key must have 1 to {MAX_KEY_CHARS} printable ASCII characters.",
        code="invalid_idempotency_key",
        param="Idempotency-Key",
    )


def arrive(db: Database, request: RequestIdentity) -> Arrival | None:
    """Note that a request is here, before anything is done for it. None where no repetition of it could be told.

    Raises:
        ConflictError: its key has made a job of another body.
    """
    if request.idempotency_key is None and request.num_retries is None:
        return None
    with db.transaction() as session:
        _clear(session)
        submission = _keyed(session, request) if request.idempotency_key is not None else _tried(session, request)
        return Arrival(submission.id, request.body_sha256, _find_job(session, submission, request.body_sha256))


def find_made(session: Session, arrival: Arrival) -> Job | None:
    """The job that another try of the request has made; None: this try makes it, and calls `record`. The other tries
    wait until the end of the transaction.

    Raises:
        ConflictError: meanwhile its key has made a job of another body.
    """
    submission = session.get_one(Submission, arrival.submission_id, with_for_update=True, populate_existing=True)
    return _find_job(session, submission, arrival.body_sha256)


def record(session: Session, arrival: Arrival, job: Job) -> None:
    """Write down that the request has made its job."""
    session.execute(
        update(Submission)
        .where(Submission.id == arrival.submission_id)
        .values(job_id=job.id, body_sha256=arrival.body_sha256)
    )


def _keyed(session: Session, request: RequestIdentity) -> Submission:
    """The row of a key: a new one, or the one that stands. One that is too old, or has made no job, begins anew."""
    row = upsert(Submission).values(
        **request.owner.parameters,
        api_key_id=request.api_key_id,
        idempotency_key=request.idempotency_key,
        body_sha256=request.body_sha256,
    )
    is_free = Submission.job_id.is_(None) | (Submission.created_at < func.now() - KEY_LIFETIME)
    columns = (Submission.project_id, Submission.idempotency_key)
    anew = {"api_key_id": request.api_key_id, "body_sha256": request.body_sha256}
    session.execute(
        row.on_conflict_do_update(
            index_elements=columns, set_={**anew, "job_id": None, "created_at": func.now()}, where=is_free
        )
    )
    return session.scalars(
        select(Submission).where(
            request.owner.owns(Submission),
            Submission.idempotency_key == request.idempotency_key,
        )
    ).one()


def _tried(session: Session, request: RequestIdentity) -> Submission:
    """The row of a first try, which is always new, or the one that a later try belongs to: the newest that has not seen
    this retry yet, so that of several equal requests that are repeated at once each finds one of its own."""
    if request.num_retries:
        # Two tries that both find no row must not both make one.
        session.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"),
            {"name": f"submission {request.api_key_id} {request.body_sha256}"},
        )
        found = session.scalar(
            select(Submission)
            .where(
                request.owner.owns(Submission),
                Submission.api_key_id == request.api_key_id,
                Submission.body_sha256 == request.body_sha256,
                Submission.idempotency_key.is_(None),
                Submission.created_at >= func.now() - RETRY_WINDOW,
            )
            .order_by((Submission.num_retries < request.num_retries).desc(), Submission.created_at.desc())
            .limit(1)
        )
        if found is not None:
            found.num_retries = max(found.num_retries, request.num_retries)
            return found
    made = Submission(
        **request.owner.parameters,
        api_key_id=request.api_key_id,
        body_sha256=request.body_sha256,
        num_retries=request.num_retries or 0,
    )
    session.add(made)
    session.flush()
    return made


def _find_job(session: Session, submission: Submission, body_sha256: str) -> Job | None:
    if submission.job_id is None:
        return None
    if submission.body_sha256 != body_sha256:
        raise ConflictError(
            f"This Idempotency-Key was used for another request, which made {submission.job_id}: send the same body "
            "again, or another key.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return session.get_one(Job, submission.job_id)


def _clear(session: Session) -> None:
    """Remove rows that nobody can ask for any more. Those that another arrival is removing are left to it."""
    old = (
        select(Submission.id)
        .where(Submission.created_at < func.now() - KEY_LIFETIME)
        .limit(_NUM_CLEARED)
        .with_for_update(skip_locked=True)
    )
    session.execute(delete(Submission).where(Submission.id.in_(old)).execution_options(synchronize_session=False))
