"""Files that are there for a time: what has expired, and its removal.

An expired file is there for nobody at once, by the database's clock: every read of files asks `is_current`. Its row and
its bytes go with the next sweep, unless a job that has not ended was created with it: that one keeps its data, and the
sweep after its end takes them.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from jobs.models import File, Job
from jobs.status import TERMINAL

# OpenAI's limits of `expires_after.seconds`: an hour and 30 days.
MIN_SECONDS, MAX_SECONDS = 3600, 2_592_000
# Of a sweep: a deletion is a statement and an unlink, some milliseconds, and the next sweep is seconds away.
_BATCH_FILES = 100


def is_current() -> ColumnElement[bool]:
    """The condition that a file has not expired."""
    return or_(File.expires_at.is_(None), File.expires_at > func.now())


def is_needed() -> ColumnElement[bool]:
    """The condition that a job which has not ended was created with a file."""
    return (
        select(Job.id)
        .where(
            Job.organization_id == File.organization_id,
            Job.status.not_in(TERMINAL),
            or_(Job.spec["training_file"].astext == File.id, Job.spec["validation_file"].astext == File.id),
        )
        .exists()
    )


def find_expired(session: Session) -> list[File]:
    """Some of the files that have expired and that no job needs, the oldest first."""
    query = select(File).where(File.expires_at <= func.now(), ~is_needed()).order_by(File.expires_at)
    return list(session.scalars(query.limit(_BATCH_FILES)))
