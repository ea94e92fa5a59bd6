"""Uploaded files: bytes under the file's id, written and checked in bounded memory; a row that describes them. They lie
in the data folder, or in an object store (`storage.py`), to which they are sent once they are checked. What a job made
lies in its own folder (`step_metrics.py`), or there, and is a file like any other.

A file exists once its row is committed; the bytes are complete and synced before that. The uploader's name for it is
for display only and never becomes a path.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from jobs import loose_objects, storage
from jobs.db import Database
from jobs.errors import FileDamagedError, InvalidRequestError, InvalidStateError, NotFoundError, QuotaError
from jobs.file_check import count_rows, until_row
from jobs.file_expiry import find_expired, is_needed
from jobs.ids import new_file_id
from jobs.models import File, Job
from jobs.organizations import project_of
from jobs.owner import Owner, user_name
from jobs.quotas import check_storage
from jobs.status import TERMINAL

# OpenAI documents 512 MB for a file sent in one request.
MAX_FILE_BYTES = 512 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
# A preview reads some 100 MiB a second, and has 10 s (`row_preview.py`).
_MAX_COPIED_BYTES = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Written:
    """How many bytes were written, and their digest."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A file's bytes where they are to stay, checked and synced, before there is a row for them."""

    file_id: str
    num_bytes: int
    sha256: str
    num_rows: int | None
    path: str | None
    """As that of `File`."""


def store_file(  # noqa: PLR0913 - the columns of a row
    db: Database,
    source: BinaryIO,
    *,
    files_dir: Path,
    storage_url: str = "",
    owner: Owner,
    filename: str,
    purpose: str,
    expires_after_s: int | None = None,
) -> File:
    """Copy an upload to disk, check it, send it to the store if there is one, and record it. What a file to train on
    must be: see `file_check.py`. With `expires_after_s` it is there for that long.

    Raises:
        InvalidRequestError: the file is empty, too large, or cannot be trained on; names the line.
        QuotaError: the organization may not store so much.
        StorageError: the store does not take it.
    """
    stored = store_bytes(
        db, partial(_copy, source), files_dir=files_dir, storage_url=storage_url, filename=filename, purpose=purpose
    )
    try:
        with db.transaction() as session:
            check_storage(session, organization_id=owner.organization_id, num_bytes=stored.num_bytes)
            return add_file(
                session,
                stored,
                owner=owner,
                filename=filename,
                purpose=purpose,
                expires_after_s=expires_after_s,
            )
    except QuotaError:
        discard(db, stored, files_dir=files_dir)
        raise


def store_bytes(
    db: Database,
    write: Callable[[BinaryIO], Written],
    *,
    files_dir: Path,
    storage_url: str,
    filename: str,
    purpose: str,
) -> StoredBytes:
    """Let `write` make a file on disk, check it, and bring it to where it is to stay. Nothing is left of one that is
    refused.

    Raises:
        InvalidRequestError: the file cannot be trained on; names the line.
        StorageError: the store does not take it.
    """
    path = None
    file_id = new_file_id()
    files_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    unchecked = files_dir / f".{file_id}.partial"
    try:
        with unchecked.open("wb") as target:
            written = write(target)
            target.flush()
            os.fsync(target.fileno())
        num_rows = count_rows(unchecked, filename=filename) if purpose == "fine-tune" else None
        if storage_url:
            path = storage.object_url(storage_url, file_id)
            loose_objects.announce(db, path)
            storage.put(unchecked, path)
        else:
            unchecked.rename(files_dir / file_id)
            sync_folder(files_dir)
    finally:
        unchecked.unlink(missing_ok=True)
    return StoredBytes(file_id, written.num_bytes, written.sha256, num_rows, path)


def discard(db: Database, stored: StoredBytes, *, files_dir: Path) -> None:
    """Take back what `store_bytes` has stored: there will be no row for it."""
    with db.transaction() as session:
        loose_objects.drop(session, stored.path)
    if stored.path is None:
        (files_dir / stored.file_id).unlink(missing_ok=True)


def add_file(
    session: Session,
    stored: StoredBytes,
    *,
    owner: Owner,
    filename: str,
    purpose: str,
    expires_after_s: int | None = None,
) -> File:
    """Record a file whose bytes are where they are to stay."""
    file = File(
        id=stored.file_id,
        organization_id=owner.organization_id,
        project_id=project_of(session, owner),
        filename=filename,
        purpose=purpose,
        num_bytes=stored.num_bytes,
        num_lines=stored.num_rows,
        sha256=stored.sha256,
        path=stored.path,
        # The database's `now()` is one moment per transaction, so this is `created_at` and so many seconds.
        expires_at=None if expires_after_s is None else func.now() + timedelta(seconds=expires_after_s),
    )
    session.add(file)
    if stored.path is not None:
        loose_objects.adopt(session, stored.path)
    session.flush()
    session.refresh(file)
    return file


def stored_path(file: File, *, data_dir: Path) -> Path | None:
    """Where a file's bytes lie in the data folder; None: they lie in an object store."""
    if storage.is_object(file.path):
        return None
    return data_dir / (f"files/{file.id}" if file.path is None else file.path)


def read_content(file: File, *, data_dir: Path) -> Path | Iterator[bytes]:
    """A file's bytes: the path of those on disk, or, of those in a store, their parts, the first of which has come.

    Raises:
        NotFoundError: they are gone.
        StorageError: the store does not answer, or refuses.
    """
    path = stored_path(file, data_dir=data_dir)
    if path is not None:
        if not path.is_file():
            raise NotFoundError(f"The bytes of {file.id} are no longer on this server.", param="file_id")
        return path
    assert file.path is not None
    parts = storage.read(file.path, num_bytes=file.num_bytes)
    return chain([next(parts, b"")], parts)


@contextmanager
def local_rows(file: File, *, data_dir: Path, num_rows: int) -> Iterator[Path]:
    """A file on disk, to be read once; of one in a store a copy that goes at the end of the block, and reaches as far
    as the first `num_rows` of its lines. Arrays and plain text, whose rows are not lines, come whole.

    Raises:
        InvalidRequestError: that would be more than a GiB.
        NotFoundError, StorageError, FileDamagedError: see `read_content`; whole copies are compared with their digest.
    """
    content = read_content(file, data_dir=data_dir)
    if isinstance(content, Path):
        yield content
        return
    with tempfile.TemporaryDirectory(prefix="lomo-file-") as folder:
        path = Path(folder) / file.id
        digest, num_bytes = hashlib.sha256(), 0
        with path.open("wb") as target:
            for part in content if file.num_lines is None else until_row(content, num_rows):
                digest.update(part)
                num_bytes += target.write(part)
                if num_bytes > _MAX_COPIED_BYTES:
                    raise InvalidRequestError(
                        f"Row {num_rows} is more than {_MAX_COPIED_BYTES // 2**20} MiB into the file, or the file is "
                        "one array or text of more: that is too far to be shown out of an object store.",
                        code="invalid_row",
                        param="row",
                    )
        if num_bytes == file.num_bytes and digest.hexdigest() != file.sha256:
            raise FileDamagedError(f"The object {file.id} in the store is not what was uploaded: its digest differs.")
        yield path


def delete_file(db: Database, file: File, *, data_dir: Path) -> None:
    """Remove a file and its bytes; it is then no job's result any more. An object is removed by the workers' reaper, so
    that a store that does not answer keeps nobody from deleting.

    Raises:
        InvalidStateError: a job that has not ended needs it.
    """
    with db.transaction() as session:
        # Whoever queues a job that needs the file holds its row (`references.hold_files`).
        session.get(File, file.id, with_for_update=True)
        user = session.scalar(
            select(user_name(file)).where(
                Job.organization_id == file.organization_id,
                Job.status.not_in(TERMINAL),
                (Job.spec["training_file"].astext == file.id) | (Job.spec["validation_file"].astext == file.id),
            )
        )
        if user is not None:
            raise InvalidStateError(f"File {file.id} is used by {user}, which has not ended: cancel the job first.")
        session.execute(delete(File).where(File.id == file.id))
        loose_objects.drop(session, file.path)
    _unlink(file, data_dir=data_dir)


def sweep_expired(db: Database, *, data_dir: Path) -> list[str]:
    """Remove files that have expired and that no job needs. Returns their ids. Any number of processes may sweep at
    once."""
    removed = []
    with db.read() as session:
        expired = find_expired(session)
    for file in expired:
        with db.transaction() as session:
            session.get(File, file.id, with_for_update=True)  # as `delete_file`
            found = session.scalar(delete(File).where(File.id == file.id, ~is_needed()).returning(File.id))
            if found is not None:
                loose_objects.drop(session, file.path)
        if found is not None:
            _unlink(file, data_dir=data_dir)
            removed.append(file.id)
    return removed


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder outlive a crash of the host."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unlink(file: File, *, data_dir: Path) -> None:
    """Remove a file's bytes on disk; those in a store are the reaper's (`loose_objects.sweep`)."""
    path = stored_path(file, data_dir=data_dir)
    if path is not None:
        path.unlink(missing_ok=True)


def _copy(source: BinaryIO, target: BinaryIO) -> Written:
    digest, num_bytes = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        num_bytes += len(chunk)
        if num_bytes > MAX_FILE_BYTES:
            raise InvalidRequestError(
                f"The file is larger than {MAX_FILE_BYTES // 2**20} MiB: send it in parts, by POST /v1/uploads.",
                code="file_too_large",
                param="file",
            )
        digest.update(chunk)
        target.write(chunk)
    if num_bytes == 0:
        raise InvalidRequestError("The file is empty.", code="invalid_file_format", param="file")
    return Written(num_bytes, digest.hexdigest())
