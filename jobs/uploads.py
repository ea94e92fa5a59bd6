"""Files that arrive in parts: each part a file in the upload's folder, joined and checked when the upload is completed.

A row of `uploads` stands before its folder does, so a folder without a pending row is a leftover, whoever left it, and
`sweep` removes it: of uploads that expired, and of servers that were killed between a commit and a deletion. A part
exists once its row is committed; its bytes are complete and synced before that. Parts may arrive at once. Only the
completion, which may outlast the upload's hour, holds a lock: one on a file, so that it ends with its process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import BusyError, InvalidRequestError, InvalidStateError, JobsError, NotFoundError
from jobs.file_expiry import is_current
from jobs.files import Written, add_file, discard, store_bytes, sync_folder
from jobs.ids import new_part_id, new_upload_id
from jobs.models import File, Upload, UploadPart
from jobs.organizations import project_of
from jobs.owner import Owner
from jobs.quotas import check_storage
from jobs.settings import JobsSettings
from jobs.status import UploadStatus

# OpenAI documents 64 MB for a part, and an hour for an upload; its client sends parts of 64 MiB.
MAX_PART_BYTES = 64 * 1024 * 1024
EXPIRES_AFTER_S = 3600.0
# S3's limit. The names of so many parts are 330 KB of JSON, a third of what a body may have.
MAX_PARTS = 10_000
# A client that did not hear the answer sends a part again, and both are kept: room for some parts more than the file's.
_SPARE_BYTES = 4 * MAX_PART_BYTES
_CHUNK_BYTES = 1024 * 1024
_LOCK_NAME = ".lock"
_ENDED = {
    UploadStatus.COMPLETED: "has already been completed",
    UploadStatus.CANCELLED: "has been cancelled",
    UploadStatus.EXPIRED: "has expired (an upload must be completed within an hour)",
}


@dataclass(frozen=True, slots=True)
class Completion:
    """What an upload is to be completed from."""

    part_ids: Sequence[str]
    """In the order of their bytes in the file."""
    md5: str | None = None
    """Of the whole file, in lower-case hexadecimal digits."""


class IncomingPart:
    """A part on its way to disk. Whoever opened it calls `discard` at the end, whatever came of it."""

    def __init__(self, upload_id: str, folder: Path) -> None:
        self.upload_id = upload_id
        self.id = new_part_id()
        self.num_bytes = 0
        self.path = folder / self.id
        self._unfinished = folder / f".{self.id}.partial"
        self._file: BinaryIO = self._unfinished.open("wb")

    def write(self, chunk: bytes) -> None:
        """Append bytes.

        Raises:
            InvalidRequestError: the part becomes too large.
        """
        self.num_bytes += len(chunk)
        if self.num_bytes > MAX_PART_BYTES:
            raise InvalidRequestError(
                f"The part is larger than {MAX_PART_BYTES // 2**20} MiB: send the file in smaller parts.",
                code="part_too_large",
                param="data",
            )
        self._file.write(chunk)

    def finish(self) -> None:
        """Give the bytes their name, safe from a crash of the host."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._unfinished.rename(self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what has not been finished."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)


def create(
    db: Database,
    *,
    owner: Owner,
    filename: str,
    purpose: str,
    num_bytes: int,
    file_expires_after_s: int | None = None,
) -> Upload:
    """Begin an upload of `num_bytes` in all, which from now on count as stored. With `file_expires_after_s` the file
    that it becomes is there for that long.

    Raises:
        QuotaError: the organization may not store so much.
    """
    with db.transaction() as session:
        check_storage(session, organization_id=owner.organization_id, num_bytes=num_bytes)
        upload = Upload(
            id=new_upload_id(),
            organization_id=owner.organization_id,
            project_id=project_of(session, owner),
            filename=filename,
            purpose=purpose,
            num_bytes=num_bytes,
            file_expires_after_s=file_expires_after_s,
            expires_at=func.now() + func.make_interval(0, 0, 0, 0, 0, 0, EXPIRES_AFTER_S),
        )
        session.add(upload)
        session.flush()
        session.refresh(upload)
        return upload


def open_part(db: Database, settings: JobsSettings, *, owner: Owner, upload_id: str) -> IncomingPart:
    """A part to write to.

    Raises:
        NotFoundError: no such upload of this owner.
        InvalidStateError: the upload takes no more parts.
    """
    with db.read() as session:
        upload = _owned(session, upload_id, owner)
        _check_room(session, upload, num_bytes=0)
    folder = settings.uploads_dir / upload.id
    with _while_pending(db, upload):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return IncomingPart(upload.id, folder)


def add_part(db: Database, incoming: IncomingPart) -> UploadPart:
    """Keep a part whose bytes have all been written.

    Raises:
        InvalidRequestError: the part is empty, or more than the upload can need.
        InvalidStateError: the upload has ended while the part arrived, or has too many parts.
    """
    if incoming.num_bytes == 0:
        raise InvalidRequestError("The part is empty.", param="data")
    with db.read() as session:
        upload = session.get_one(Upload, incoming.upload_id)
    with _while_pending(db, upload):
        incoming.finish()
    try:
        with db.transaction() as session:
            upload = session.get_one(Upload, incoming.upload_id, with_for_update=True)
            _check_room(session, upload, num_bytes=incoming.num_bytes)
            part = UploadPart(id=incoming.id, upload_id=upload.id, num_bytes=incoming.num_bytes)
            session.add(part)
            session.flush()
            session.refresh(part)
            return part
    except JobsError:
        incoming.path.unlink(missing_ok=True)
        raise


def complete(
    db: Database,
    settings: JobsSettings,
    *,
    owner: Owner,
    upload_id: str,
    completion: Completion,
) -> tuple[Upload, File]:
    """Join the parts into a file, checked as if it had come in one piece, and record it. A request that is repeated
    after it has succeeded gets the same answer. One that is refused leaves the upload and its parts as they were.

    Raises:
        NotFoundError: no such upload of this owner, or no such part of it.
        InvalidRequestError: the parts do not make up the file, or it cannot be trained on; names the line.
        InvalidStateError: the upload has ended.
        BusyError: it is being completed by another request.
        StorageError: the store does not take the file.
    """
    with db.read() as session:
        upload = _owned(session, upload_id, owner)
        file = _find_repeated(session, upload, completion)
        if file is not None:
            return upload, file
        _check_pending(session, upload)
        parts = _ordered_parts(session, upload, completion.part_ids)
    folder = settings.uploads_dir / upload.id
    with _while_pending(db, upload), _lock(folder) as is_free:
        if not is_free:
            raise BusyError(f"Upload {upload.id} is being completed by another request.")
        stored = store_bytes(
            db,
            partial(_join, folder, parts, completion.md5),
            files_dir=settings.files_dir,
            storage_url=settings.storage_url,
            filename=upload.filename,
            purpose=upload.purpose,
        )
        try:
            with db.transaction() as session:
                # Not whether it has expired by now: that it was pending when the completion began is what counts.
                upload = _owned(session, upload_id, owner, lock=True)
                _check_status(upload)
                file = add_file(
                    session,
                    stored,
                    owner=Owner(upload.organization_id, upload.project_id),
                    filename=upload.filename,
                    purpose=upload.purpose,
                    expires_after_s=upload.file_expires_after_s,
                )
                values = {"file_id": file.id, "part_ids": list(completion.part_ids), "md5": completion.md5}
                _end(session, upload, UploadStatus.COMPLETED, **values)
        except JobsError:
            discard(db, stored, files_dir=settings.files_dir)
            raise
    _remove(folder)
    return upload, file


def cancel(db: Database, settings: JobsSettings, *, owner: Owner, upload_id: str) -> Upload:
    """End an upload and remove its parts; one that is being completed, too, unless it has just been.

    Raises:
        NotFoundError: no such upload of this owner.
        InvalidStateError: it has ended.
    """
    with db.transaction() as session:
        upload = _owned(session, upload_id, owner, lock=True)
        _check_pending(session, upload)
        _end(session, upload, UploadStatus.CANCELLED)
    _remove(settings.uploads_dir / upload.id)
    return upload


def sweep(db: Database, settings: JobsSettings) -> list[str]:
    """End the uploads whose hour is over and remove every folder that no pending upload needs. Returns the ids of the
    expired ones. Any number of processes may sweep at once."""
    expired = []
    with db.read() as session:
        overdue = session.scalars(
            select(Upload).where(Upload.status == UploadStatus.PENDING, Upload.expires_at <= func.now())
        ).all()
    for upload in overdue:
        folder = settings.uploads_dir / upload.id
        try:
            with _lock(folder) as is_free:
                is_mine = is_free and _expire(db, upload)
        except FileNotFoundError:
            # No folder, so no parts, and nothing that could be completed.
            is_mine = _expire(db, upload)
        if is_mine:
            expired.append(upload.id)
    # First the folders, then the rows: of a folder that is seen here the row, if there is one, is seen as well.
    folders = list(settings.uploads_dir.iterdir()) if settings.uploads_dir.is_dir() else []
    if folders:
        with db.read() as session:
            pending = set(
                session.scalars(
                    select(Upload.id).where(
                        Upload.id.in_([folder.name for folder in folders]), Upload.status == UploadStatus.PENDING
                    )
                )
            )
        for folder in folders:
            if folder.name not in pending:
                _remove(folder)
    return expired


def _expire(db: Database, upload: Upload) -> bool:
    """End an overdue upload. Whether this did it, and not somebody else before."""
    with db.transaction() as session:
        locked = session.get_one(Upload, upload.id, with_for_update=True)
        if locked.status != UploadStatus.PENDING:
            return False
        _end(session, locked, UploadStatus.EXPIRED)
        return True


def _owned(session: Session, upload_id: str, owner: Owner, *, lock: bool = False) -> Upload:
    query = select(Upload).where(Upload.id == upload_id, owner.owns(Upload))
    upload = session.scalar(query.with_for_update() if lock else query)
    if upload is None:
        raise NotFoundError(f"No such upload: {upload_id}", param="upload_id")
    return upload


def _check_pending(session: Session, upload: Upload) -> None:
    _check_status(upload)
    if session.scalars(select(func.now() >= upload.expires_at)).one():
        raise _ended(upload.id, UploadStatus.EXPIRED)


def _check_status(upload: Upload) -> None:
    if upload.status != UploadStatus.PENDING:
        raise _ended(upload.id, UploadStatus(upload.status))


def _ended(upload_id: str, status: UploadStatus) -> InvalidStateError:
    return InvalidStateError(f"Upload {upload_id} {_ENDED[status]}: create another to send more.")


def _check_room(session: Session, upload: Upload, *, num_bytes: int) -> None:
    """Whether a pending upload may have one more part, of `num_bytes`."""
    _check_pending(session, upload)
    num_parts, stored_bytes = session.execute(
        select(func.count(), func.coalesce(func.sum(UploadPart.num_bytes), 0)).where(UploadPart.upload_id == upload.id)
    ).one()
    if num_parts >= MAX_PARTS:
        raise InvalidStateError(f"Upload {upload.id} has {num_parts} parts, which is as many as there may be.")
    if num_bytes > upload.num_bytes:
        raise InvalidRequestError(
            f"The part has {num_bytes} bytes, but upload {upload.id} was created for {upload.num_bytes} in all.",
            param="data",
        )
    if stored_bytes + num_bytes > upload.num_bytes + _SPARE_BYTES:
        raise InvalidRequestError(
            f"The parts of upload {upload.id} come to {stored_bytes} bytes, but it was created for {upload.num_bytes}: "
            "complete it, or cancel it and begin again.",
            param="data",
        )


def _find_repeated(session: Session, upload: Upload, completion: Completion) -> File | None:
    """The file of an upload that this very request has completed before, if it is still there."""
    same = upload.part_ids == list(completion.part_ids) and upload.md5 == completion.md5
    return session.scalar(select(File).where(File.id == upload.file_id, is_current())) if same else None


def _ordered_parts(session: Session, upload: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    if not part_ids:
        raise InvalidRequestError("Name the parts of the file, in their order.", param="part_ids")
    if len(set(part_ids)) < len(part_ids):
        twice, _ = Counter(part_ids).most_common(1)[0]
        raise InvalidRequestError(f"The part {twice} is named twice.", param="part_ids")
    known = {part.id: part for part in session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id))}
    unknown = [part_id for part_id in part_ids if part_id not in known]
    if unknown:
        raise NotFoundError(f"Upload {upload.id} has no part {unknown[0]}.", param="part_ids")
    parts = [known[part_id] for part_id in part_ids]
    num_bytes = sum(part.num_bytes for part in parts)
    if num_bytes != upload.num_bytes:
        raise InvalidRequestError(
            f"The {len(parts)} parts have {num_bytes} bytes, but upload {upload.id} was created for "
            f"{upload.num_bytes}: name every part, or create an upload of the right size.",
            param="part_ids",
        )
    return parts


def _join(folder: Path, parts: Sequence[UploadPart], expected_md5: str | None, target: BinaryIO) -> Written:
    sha256, md5, num_bytes = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    for part in parts:
        with (folder / part.id).open("rb") as source:
            if os.fstat(source.fileno()).st_size != part.num_bytes:
                raise InvalidStateError(f"Part {part.id} is damaged on this server's disk: send it again.")
            for chunk in iter(partial(source.read, _CHUNK_BYTES), b""):
                sha256.update(chunk)
                if expected_md5 is not None:
                    md5.update(chunk)
                num_bytes += len(chunk)
                target.write(chunk)
    if expected_md5 not in (None, md5.hexdigest()):
        raise InvalidRequestError(
            f"The MD5 digest of the parts joined is {md5.hexdigest()} and not the one given: a part was damaged on its "
            "way, or the order is another.",
            code="md5_mismatch",
            param="md5",
        )
    return Written(num_bytes, sha256.hexdigest())


def _end(session: Session, upload: Upload, status: UploadStatus, **values: Any) -> None:
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload.id))
    session.execute(update(Upload).where(Upload.id == upload.id).values(status=status, **values))
    session.refresh(upload)


@contextmanager
def _while_pending(db: Database, upload: Upload) -> Iterator[None]:
    """Explain why the files of an upload vanished during the block: because it ended, or somebody removed them.

    Raises:
        InvalidStateError: the upload has ended.
        NotFoundError: it has not.
    """
    try:
        yield
    except FileNotFoundError as error:
        with db.read() as session:
            status = UploadStatus(session.get_one(Upload, upload.id).status)
        if status is not UploadStatus.PENDING:
            raise _ended(upload.id, status) from error
        message = f"Parts of upload {upload.id} are no longer on this server: create another upload."
        raise NotFoundError(message, param="upload_id") from error


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the right to complete an upload, or to let it expire, if it can be had at once: whether that is so. It ends
    with the process.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    with (folder / _LOCK_NAME).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _remove(folder: Path) -> None:
    """Remove what is there; what a part leaves there that is just arriving is for the next sweep."""
    shutil.rmtree(folder, ignore_errors=True)
