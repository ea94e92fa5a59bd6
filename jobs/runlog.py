"""What a job's engines print, by line: the log beside the events, for whoever wants to know what a library said.

The worker reads the file, the rows are kept here under the job's lease. `attempts.shipped_log_bytes` says how far an
attempt's file is in the database; a part that does not begin there is skipped, so that shipping twice is harmless,
whoever does it. Lines are numbered from 1 over all attempts; of a job the newest `MAX_LINES` are kept, and they keep
their numbers. A line is plain text: what a terminal would obey (colours, moves of its cursor) is taken out, and of a
progress bar that was drawn over itself the last state is left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlalchemy import delete, insert, select, update

from jobs.db import Database
from jobs.models import Attempt, Job, LogLine
from jobs.owner import Owner
from jobs.reads import Page, get_job
from jobs.repository import Lease, lock_leased, notify
from jobs.status import TERMINAL

MAX_LINES = 20_000
"""Of a job. At 100 characters a line 2 MB; the whole is in the attempts' `engine.log`."""

MAX_LINE_CHARS = 4096
"""Of a line: longer ones are cut. A traceback's lines have below 200, a configuration printed whole about 3000."""

# ECMA-48: CSI sequences, strings (OSC, DCS, ...) up to their terminator or the line's end, and other escapes.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c|$)|\x1b[ -/]*[0-~]"
)
# What is left of the control characters, a tab excepted; surrogates and NUL are none that Postgres can hold.
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]")


def clean_line(raw: bytes) -> str:
    """A line as text that is safe to print and to store."""
    text = _ESCAPES.sub("", raw.decode("utf-8", errors="replace"))
    # A terminal would show what came after the last return; one at the end only closes the line.
    text = text.rstrip("\r").rpartition("\r")[2]
    text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= MAX_LINE_CHARS else f"{text[:MAX_LINE_CHARS]}..."


def shipped_bytes(db: Database, *, job_id: str, attempt: int) -> int:
    """How much of an attempt's file is in the database."""
    with db.read() as session:
        query = select(Attempt.shipped_log_bytes).where(Attempt.job_id == job_id, Attempt.number == attempt)
        return session.scalar(query) or 0


def ship(db: Database, lease: Lease, lines: Sequence[str], *, attempt: int, first_byte: int, next_byte: int) -> None:
    """Write the lines that stand from `first_byte` up to `next_byte` of the file of `attempt` (the lease's own, or an
    earlier one of the same job); nothing where they have been written.

    Raises:
        LeaseLostError: the lease is gone; nothing was written.
    """
    with db.transaction() as session:
        job = lock_leased(session, lease)
        moved = session.execute(
            update(Attempt)
            .where(Attempt.job_id == job.id, Attempt.number == attempt, Attempt.shipped_log_bytes == first_byte)
            .values(shipped_log_bytes=next_byte)
            .returning(Attempt.number)
        ).all()
        if not moved or not lines:
            return
        last = session.execute(
            update(Job)
            .where(Job.id == job.id)
            .values(last_log_seq=Job.last_log_seq + len(lines))
            .returning(Job.last_log_seq)
        ).scalar_one()
        first = last - len(lines) + 1
        rows = [
            {"job_id": job.id, "seq": first + offset, "attempt": attempt, "text": line}
            for offset, line in enumerate(lines)
        ]
        session.execute(insert(LogLine), rows)
        session.execute(delete(LogLine).where(LogLine.job_id == job.id, LogLine.seq <= last - MAX_LINES))
        notify(session, job.id)


def lines_since(db: Database, *, job_id: str, seq: int, limit: int) -> Sequence[LogLine]:
    """Lines after number `seq`, oldest first: what a stream replays and follows."""
    with db.read() as session:
        return session.scalars(
            select(LogLine).where(LogLine.job_id == job_id, LogLine.seq > seq).order_by(LogLine.seq).limit(limit)
        ).all()


def follow(db: Database, *, job_id: str, seq: int, limit: int) -> tuple[Sequence[LogLine], bool]:
    """Lines after number `seq`, oldest first, and whether the job had ended before they were read: then no others
    come."""
    with db.read() as session:
        status = session.scalar(select(Job.status).where(Job.id == job_id))
    return lines_since(db, job_id=job_id, seq=seq, limit=limit), status is None or status in TERMINAL


def list_lines(db: Database, *, owner: Owner, job_id: str, limit: int, before: int | None = None) -> Page[LogLine]:
    """Lines of a job, newest first; with `before` only those with lower numbers.

    Raises:
        NotFoundError: no such job.
    """
    get_job(db, owner=owner, job_id=job_id)
    query = select(LogLine).where(LogLine.job_id == job_id).order_by(LogLine.seq.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(LogLine.seq < before)
    with db.read() as session:
        lines = session.scalars(query).all()
    return Page(lines[:limit], has_more=len(lines) > limit)
