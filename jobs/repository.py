"""The statements that write rows. Only `submission.py`, `lifecycle.py`, `checking.py`, `eventlog.py`, `runlog.py` and
`deletion.py` may import this module.

Every write of a running job names its lease: `WHERE id AND lease_token`. No row touched means the lease is lost.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import orjson
import psycopg
from sqlalchemy import TextClause, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs.errors import LeaseLostError, NotFoundError
from jobs.models import NOTIFY_CHANNEL, Event, Job, Metric
from jobs.owner import Owner

# Listeners wake at the commit; Postgres folds equal notifications of one transaction into one.
_INSERT_EVENTS = text(f"""
    WITH inserted AS (
        INSERT INTO events (job_id, seq, attempt, line, level, type, message, data, status, created_at)
        SELECT :job_id, seq, :attempt, line, level, type, message, data, status, coalesce(created_at, now())
        FROM json_to_recordset(:rows) AS row (
            seq bigint, line bigint, level text, type text, message text, data jsonb, status text,
            created_at timestamptz
        )
    ) SELECT pg_notify('{NOTIFY_CHANNEL}', :job_id)
""")  # noqa: S608 - a constant of ours
_EVENT_COLUMNS = ("job_id", "seq", "attempt", "line", "level", "type", "message", "data", "status", "created_at")
_COUNT_EVENTS = text(f"""
    UPDATE jobs SET last_seq = last_seq + :num_events WHERE id = :job_id
    RETURNING last_seq, pg_notify('{NOTIFY_CHANNEL}', id)
""")  # noqa: S608 - a constant of ours
_NUL_ESCAPE = b"\\u0000"


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


def lock_owned(session: Session, *, owner: Owner, job_id: str) -> Job:
    """A job's row, locked, for what its user asks of it.

    Raises:
        NotFoundError: no such job of this owner.
    """
    job = session.scalar(select(Job).where(Job.id == job_id, owner.owns(Job)).with_for_update())
    if job is None:
        raise NotFoundError(f"No such fine-tuning job: {job_id}", param="fine_tuning_job_id")
    return job


def append_events(session: Session, job_id: str, attempt: int, events: Sequence[NewEvent]) -> int:
    """Insert events with the next sequence numbers, gap-free, and wake the listeners once.

    The counter lives in the job's row, so the row's lock orders writers, and a rolled-back insert takes its numbers
    back. Returns the last sequence number.
    """
    last_seq = _count_events(session, job_id, len(events))
    insert_events(session, job_id, attempt, last_seq - len(events) + 1, events)
    return last_seq


def append_many_events(
    session: Session, job_id: str, attempt: int, num_events: int, events: Iterable[NewEvent]
) -> None:
    """The same for hundreds of events, each with its time; they may be made one by one while they are sent."""
    first = _count_events(session, job_id, num_events) - num_events + 1
    rows = (
        (
            job_id,
            first + offset,
            attempt,
            event.line,
            event.level,
            event.type,
            event.message.replace("\0", "\ufffd"),
            None if event.data is None else _dump(event.data),
            event.status,
            event.created_at,
        )
        for offset, event in enumerate(events)
    )
    copy_rows(session, Event, _EVENT_COLUMNS, rows)


def copy_rows(
    session: Session, table: type[Event | Metric], columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Write new rows as a stream (COPY): Postgres takes two thirds of the time that it takes to insert as many rows out
    of JSON, and begins while the last ones are still being made.

    Raises:
        DBAPIError: as a statement of the session would.
    """
    connection = session.connection()
    driver = cast("psycopg.Connection[Any]", connection.connection.dbapi_connection)
    statement = f"COPY {table.__tablename__} ({', '.join(columns)}) FROM STDIN"
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except psycopg.Error as error:
        # SQLAlchemy was not asked, and so does not know.
        if driver.closed:
            connection.invalidate(error)
        raise DBAPIError.instance(statement, None, error, psycopg.Error, dialect=connection.dialect) from error


def _count_events(session: Session, job_id: str, num_events: int) -> int:
    """Count more events of a job, and wake the listeners. Returns the last one's sequence number."""
    last_seq: int = session.execute(_COUNT_EVENTS, {"job_id": job_id, "num_events": num_events}).scalar_one()
    return last_seq


def _dump(data: Any) -> str:
    """JSON that Postgres can hold: see `insert_rows`."""
    document = orjson.dumps(data)
    if _NUL_ESCAPE in document:
        document = orjson.dumps(_without_nul(orjson.loads(document)))
    return document.decode()


def insert_rows(session: Session, statement: TextClause, rows: Sequence[Mapping[str, Any]], **constants: Any) -> None:
    """Run a statement that reads its rows from `json_to_recordset(:rows)`.

    One parameter for a whole batch: a statement for each row costs three times as much of the sender's time. A number
    that is not finite becomes null; so does, in a string, a NUL the replacement character, since Postgres has neither.
    """
    session.execute(statement, {"rows": _dump(rows), **constants})


def insert_events(session: Session, job_id: str, attempt: int, first: int, events: Sequence[NewEvent]) -> None:
    """Insert events numbered from `first` on, which the job's counter has passed already, and wake the listeners."""
    rows = [
        {
            "seq": first + offset,
            "line": event.line,
            "level": event.level,
            "type": event.type,
            "message": event.message,
            "data": event.data,
            "status": event.status,
            "created_at": event.created_at,
        }
        for offset, event in enumerate(events)
    ]
    insert_rows(session, _INSERT_EVENTS, rows, job_id=job_id, attempt=attempt)


def _without_nul(value: Any) -> Any:
    match value:
        case str():
            return value.replace("\0", "\ufffd")
        case list():
            return [_without_nul(item) for item in value]
        case dict():
            return {_without_nul(key): _without_nul(item) for key, item in value.items()}
        case _:
            return value


def notify(session: Session, job_id: str) -> None:
    """Wake the listeners at commit. Postgres folds equal notifications of one transaction into one."""
    session.execute(text("SELECT pg_notify(:channel, :job_id)"), {"channel": NOTIFY_CHANNEL, "job_id": job_id})
