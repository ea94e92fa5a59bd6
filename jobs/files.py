"""Uploaded files: bytes on disk under the file's id, written and checked in bounded memory; a row that describes them.
What a job made lies in its own folder (`step_metrics.py`) and is a file like any other.

A file exists once its row is committed; the bytes are complete and synced before that. The uploader's name for it is
for display only and never becomes a path.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import delete, select

from jobs.db import Database
from jobs.errors import InvalidRequestError, InvalidStateError
from jobs.file_check import count_rows
from jobs.ids import new_file_id
from jobs.models import File, Job
from jobs.status import TERMINAL

# OpenAI documents 512 MB for a file sent in one request.
MAX_FILE_BYTES = 512 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Stored:
    num_bytes: int
    sha256: str


def store_file(
    db: Database, source: BinaryIO, *, files_dir: Path, organization_id: str, filename: str, purpose: str
) -> File:
    """Copy an upload to disk, check it, and record it. What a file to train on must be: see `file_check.py`.

    Raises:
        InvalidRequestError: the file is empty, too large, or cannot be trained on; names the line.
    """
    file_id = new_file_id()
    files_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = files_dir / f".{file_id}.partial"
    try:
        with partial.open("wb") as target:
            stored = _copy(source, target)
            target.flush()
            os.fsync(target.fileno())
        num_rows = count_rows(partial, filename=filename) if purpose == "fine-tune" else None
        partial.rename(files_dir / file_id)
        _sync_folder(files_dir)
    finally:
        partial.unlink(missing_ok=True)
    with db.transaction() as session:
        file = File(
            id=file_id,
            organization_id=organization_id,
            filename=filename,
            purpose=purpose,
            num_bytes=stored.num_bytes,
            num_lines=num_rows,
            sha256=stored.sha256,
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


def _copy(source: BinaryIO, target: BinaryIO) -> _Stored:
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
    return _Stored(num_bytes, digest.hexdigest())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
