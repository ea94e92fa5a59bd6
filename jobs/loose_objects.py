"""Objects of the store that no file's row names: not yet, or not any more. None of them is forgotten.

An object is announced here before it is written, and adopted by the transaction that makes the file's row; the one that
deletes the row drops the object. What stands here when its time has come is removed by the workers' reaper: of files
that were deleted at once, of processes that were killed between writing an object and its row after a day.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from jobs import storage
from jobs.db import Database
from jobs.orm import Base

# No request takes so long: 8 GiB in a day are 100 KB/s.
_WRITTEN_WITHIN = timedelta(days=1)
# Of a sweep. A deletion takes some 10 ms, and the next sweep is seconds away.
_BATCH_OBJECTS = 100


class LooseObject(Base):
    """An object that is to be removed unless a file's row comes to name it."""

    __tablename__ = "loose_objects"

    url: Mapped[str] = mapped_column(primary_key=True)
    remove_at: Mapped[datetime] = mapped_column(index=True)


def announce(db: Database, url: str) -> None:
    """Note an object that is about to be written."""
    with db.transaction() as session:
        _note(session, url, _WRITTEN_WITHIN)


def adopt(session: Session, url: str) -> None:
    """A file's row names the object now."""
    session.execute(delete(LooseObject).where(LooseObject.url == url))


def drop(session: Session, path: str | None) -> None:
    """No row names the bytes at this `path` of a file any more; concerns objects alone."""
    if path is not None and storage.is_object(path):
        _note(session, path, timedelta(0))


def sweep(db: Database) -> int:
    """Remove the objects whose time has come. Returns their number. Any number of processes may sweep at once.

    Raises:
        StorageError: the store does not answer, or refuses; what is left is for the next sweep.
    """
    with db.read() as session:
        due = session.scalars(
            select(LooseObject.url)
            .where(LooseObject.remove_at <= func.now())
            .order_by(LooseObject.remove_at)
            .limit(_BATCH_OBJECTS)
        ).all()
    for url in due:
        storage.remove(url)
        with db.transaction() as session:
            session.execute(delete(LooseObject).where(LooseObject.url == url))
    return len(due)


def _note(session: Session, url: str, wait: timedelta) -> None:
    row = insert(LooseObject).values(url=url, remove_at=func.now() + wait)
    session.execute(row.on_conflict_do_update(index_elements=["url"], set_={"remove_at": row.excluded.remove_at}))
