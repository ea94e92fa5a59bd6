"""Uploaded files: bytes on disk under the file's id, written and checked in bounded memory; a row that describes them.
What a job made lies in its own folder (`step_metrics.py`) and is a file like any other.

A file exists once its row is committed; the bytes are complete and synced before that. The uploader's name for it is
for display only and never becomes a path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import InvalidRequestError, InvalidStateError, QuotaError
from jobs.file_check import count_rows
from jobs.file_expiry import find_expired, is_needed
from jobs.ids import new_file_id
from jobs.models import File, Job
from jobs.quotas import check_storage
from jobs.status import TERMINAL

# OpenAI documents 512 MB for a file sent in one request.
MAX_FILE_BYTES = 512 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Written:
    """How many bytes were written, and their digest."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A file's bytes on disk, checked and synced, before there is a row for them."""

    file_id: str
    num_bytes: int
    sha256: str
    num_rows: int | None


def store_file(  # noqa: PLR0913 - the columns of a row
    db: Database,
    source: BinaryIO,
    *,
    files_dir: Path,
    organization_id: str,
    project_id: str | None = None,
    filename: str,
    purpose: str,
    expires_after_s: int | None = None,
) -> File:
    """Copy an upload to disk, check it, and record it. What a file to train on must be: see `file_check.py`. With
    `expires_after_s` it is there for that long.

    Raises:
        InvalidRequestError: the file is empty, too large, or cannot be trained on; names the line.
        QuotaError: the organization may not store so much.
    """
    stored = store_bytes(partial(_copy, source), files_dir=files_dir, filename=filename, purpose=purpose)
    try:
        with db.transaction() as session:
            check_storage(session, organization_id=organization_id, num_bytes=stored.num_bytes)
            return add_file(
                session,
                stored,
                organization_id=organization_id,
                project_id=project_id,
                filename=filename,
                purpose=purpose,
                expires_after_s=expires_after_s,
            )
    except QuotaError:
        (files_dir / stored.file_id).unlink(missing_ok=True)
        raise


def store_bytes(write: Callable[[BinaryIO], Written], *, files_dir: Path, filename: str, purpose: str) -> StoredBytes:
    """Let `write` make a file on disk, and check it. Nothing is left of one that is refused.

    Raises:
        InvalidRequestError: the file cannot be trained on; names the line.
    """
    file_id = new_file_id()
    files_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    unchecked = files_dir / f".{file_id}.partial"
    try:
        with unchecked.open("wb") as target:
            written = write(target)
            target.flush()
            os.fsync(target.fileno())
        num_rows = count_rows(unchecked, filename=filename) if purpose == "fine-tune" else None
        unchecked.rename(files_dir / file_id)
        sync_folder(files_dir)
    finally:
        unchecked.unlink(missing_ok=True)
    return StoredBytes(file_id, written.num_bytes, written.sha256, num_rows)


def add_file(  # noqa: PLR0913 - the columns of a row
    session: Session,
    stored: StoredBytes,
    *,
    organization_id: str,
    project_id: str | None,
    filename: str,
    purpose: str,
    expires_after_s: int | None = None,
) -> File:
    """Record a file whose bytes are on disk."""
    file = File(
        id=stored.file_id,
        organization_id=organization_id,
        project_id=project_id,
        filename=filename,
        purpose=purpose,
        num_bytes=stored.num_bytes,
        num_lines=stored.num_rows,
        sha256=stored.sha256,
        # The database's `now()` is one moment per transaction, so this is `created_at` and so many seconds.
        expires_at=None if expires_after_s is None else func.now() + timedelta(seconds=expires_after_s),
    )
    session.add(file)
    session.flush()
    session.refresh(file)
    return file


def stored_path(file: File, *, data_dir: Path) -> Path:
    """Where a file's bytes lie."""
    return data_dir / (f"files/{file.id}" if file.path is None else file.path)


def delete_file(db: Database, file: File, *, data_dir: Path) -> None:
    """Remove a file and its bytes; it is then no job's result any more.

    Raises:
        InvalidStateError: a job that has not ended needs it.
    """
    with db.transaction() as session:
        user = session.scalar(
            select(Job.id).where(
                Job.organization_id == file.organization_id,
                Job.status.not_in(TERMINAL),
                (Job.spec["training_file"].astext == file.id) | (Job.spec["validation_file"].astext == file.id),
            )
        )
        if user is not None:
            raise InvalidStateError(f"File {file.id} is used by {user}, which has not ended: cancel the job first.")
        session.execute(delete(File).where(File.id == file.id))
    stored_path(file, data_dir=data_dir).unlink(missing_ok=True)


def sweep_expired(db: Database, *, data_dir: Path) -> list[str]:
    """Remove files that have expired and that no job needs. Returns their ids. Any number of processes may sweep at
    once."""
    removed = []
    with db.read() as session:
        expired = find_expired(session)
    for file in expired:
        with db.transaction() as session:
            found = session.scalar(delete(File).where(File.id == file.id, ~is_needed()).returning(File.id))
        if found is not None:
            stored_path(file, data_dir=data_dir).unlink(missing_ok=True)
            removed.append(file.id)
    return removed


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder outlive a crash of the host."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: BinaryIO, target: BinaryIO) -> Written:
    digest, num_bytes = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        num_bytes += len(chunk)
        if num_bytes > MAX_FILE_BYTES:
            raise InvalidRequestError(
                f"The file is larger than {MAX_FILE_BYTES // 2**20} MiB.", code="file_too_large", param="file"
            )
        digest.update(chunk)
        target.write(chunk)
    if num_bytes == 0:
        raise InvalidRequestError("The file is empty.", code="invalid_file_format", param="file")
    return Written(num_bytes, digest.hexdigest())
