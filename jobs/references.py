"""What a job that is to be made refers to: its files, and the room of the largest host. One statement on the event
loop, since every submission asks for them: one after the other in a thread, they took a fifth of its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, bindparam, func, select, text, true
from sqlalchemy.orm import Session

from jobs.async_reads import AsyncReads, CompiledQuery
from jobs.errors import InvalidRequestError
from jobs.file_expiry import is_current
from jobs.models import File
from jobs.owner import Owner, is_owned
from jobs.planning import Room
from jobs.reads import LARGEST_ROOM


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferredFile:
    """What a submission has to know of a file."""

    purpose: str
    num_lines: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What was found."""

    files: Mapping[str, ReferredFile]
    """By id; without those that the owner does not have."""
    room: Room | None
    """Of the live host with the most memory for one run (`reads.largest_room`)."""


_ROOM = LARGEST_ROOM.subquery()
_FILE = func.json_build_object("purpose", File.purpose, "num_lines", File.num_lines)
_FILES: ColumnElement[dict[str, dict[str, str | int | None]] | None] = (
    select(func.json_object_agg(File.id, _FILE))
    .where(File.id == func.any(bindparam("file_ids")), is_owned(File), is_current())
    .scalar_subquery()
)
_REFERENCES = CompiledQuery.of(
    # A row also where there is no host.
    select(_FILES, *_ROOM.c).select_from(select(true()).subquery().outerjoin(_ROOM, true()))
)


_HELD = text("""
    SELECT id FROM files WHERE id = ANY(:file_ids) AND organization_id = :organization_id ORDER BY id FOR KEY SHARE
""")


def hold_files(session: Session, *, organization_id: str, file_ids: Sequence[str]) -> None:
    """Keep files from being deleted until the end of the transaction, in which a job comes to be that needs them.

    Raises:
        InvalidRequestError: one has just been deleted.
    """
    if not file_ids:
        return
    found = set(session.scalars(_HELD, {"file_ids": list(file_ids), "organization_id": organization_id}))
    if missing := set(file_ids) - found:
        raise InvalidRequestError(f"The file {min(missing)} has just been deleted.", code="file_not_found")


async def read_references(db: AsyncReads, *, owner: Owner, file_ids: Sequence[str]) -> References:
    """The files that a job is to be made of, and the room that it may take."""
    ((files, host, available_bytes, overhead_bytes),) = await db.fetch(
        _REFERENCES, file_ids=list(file_ids), **owner.parameters
    )
    return References(
        files={file_id: ReferredFile(**found) for file_id, found in (files or {}).items()},
        room=None if host is None else Room(host=host, available_bytes=available_bytes, overhead_bytes=overhead_bytes),
    )
