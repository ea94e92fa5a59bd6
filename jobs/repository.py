"""The statements that write rows. Only `submission.py`, `lifecycle.py`, `checking.py` and
`eventlog.py` may import this module.

Every write of a running job names its lease: `WHERE id AND lease_token`. No row touched means the lease is lost.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, select, text, update
from sqlalchemy.orm import Session

from jobs.errors import LeaseLostError
from jobs.models import NOTIFY_CHANNEL, Event, Job


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write a running job: what every guarded statement names."""

    job_id: str
    attempt: int
    token: uuid.UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event that has no sequence number yet. `created_at` is the engine's time, or None for the database's now."""

    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] | None = None
    status: str | None = None
    line: int | None = None
    created_at: datetime | None = None


def lock_leased(session: Session, lease: Lease) -> Job:
    """The running job's row, locked, if the lease still holds. An expired lease that nobody has reaped still does:
    a database outage must not throw away live work.

    Raises:
        LeaseLostError: the job was reaped, claimed again or ended.
    """
    job = session.scalar(
        select(Job).where(Job.id == lease.job_id, Job.lease_token == lease.token).with_for_update(key_share=True)
    )
    if job is None:
        raise LeaseLostError(lease.job_id, lease.attempt)
    return job


def append_events(session: Session, job_id: str, attempt: int, events: Sequence[NewEvent]) -> int:
    """Insert events with the next sequence numbers, gap-free, and wake the listeners once.

    The counter lives in the job's row, so the row's lock orders writers, and a rolled-back insert takes its numbers
    back. Returns the last sequence number.
    """
    last_seq: int = session.execute(
        update(Job).where(Job.id == job_id).values(last_seq=Job.last_seq + len(events)).returning(Job.last_seq)
    ).scalar_one()
    first = last_seq - len(events) + 1
    _insert_events(session, job_id, attempt, first, events)
    notify(session, job_id)
    return last_seq


def _insert_events(session: Session, job_id: str, attempt: int, first: int, events: Sequence[NewEvent]) -> None:
    now = None if all(event.created_at for event in events) else session.scalar(select(func.now()))
    session.execute(
        insert(Event),
        [
            {
                "job_id": job_id,
                "seq": first + offset,
                "attempt": attempt,
                "line": event.line,
                "level": event.level,
                "type": event.type,
                "message": event.message,
                "data": event.data,
                "status": event.status,
                "created_at": event.created_at or now,
            }
            for offset, event in enumerate(events)
        ],
    )


def notify(session: Session, job_id: str) -> None:
    """Wake the listeners at commit. Postgres folds equal notifications of one transaction into one."""
    session.execute(text("SELECT pg_notify(:channel, :job_id)"), {"channel": NOTIFY_CHANNEL, "job_id": job_id})
