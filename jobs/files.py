"""Uploaded files: bytes on disk under the file's id, written and checked in bounded memory; a row that describes them.

A file exists once its row is committed; the bytes are complete and synced before that. The uploader's name for it is
for display only and never becomes a path.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson
from sqlalchemy import delete, select

from jobs.db import Database
from jobs.errors import InvalidRequestError, InvalidStateError
from jobs.ids import new_file_id
from jobs.models import File, Job
from jobs.status import TERMINAL

# OpenAI documents 512 MB for a file sent in one request.
MAX_FILE_BYTES = 512 * 1024 * 1024
# A training row is a conversation; 4 MB of JSON is some million tokens, beyond any context length.
MAX_LINE_BYTES = 4 * 1024 * 1024
# orjson itself stops at 1024 levels; no chat row is deeper than a few.
MAX_DEPTH = 64
_CHUNK_BYTES = 1024 * 1024
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class _Stored:
    num_bytes: int
    num_lines: int | None
    sha256: str


def store_file(
    db: Database, source: BinaryIO, *, files_dir: Path, organization_id: str, filename: str, purpose: str
) -> File:
    """Copy an upload to disk, checking it as it passes, and record it.

    A file to train on must be JSON lines: one object per line, UTF-8, no line over 4 MB, at least one line.

    Raises:
        InvalidRequestError: the file is empty, too large, or a line is not a JSON object; names the line.
    """
    file_id = new_file_id()
    files_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = files_dir / f".{file_id}.partial"
    try:
        with partial.open("wb") as target:
            stored = _copy(source, target, check_lines=purpose == "fine-tune")
            target.flush()
            os.fsync(target.fileno())
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
            num_lines=stored.num_lines,
            sha256=stored.sha256,
        )
        session.add(file)
        session.flush()
        session.refresh(file)
        return file


def delete_file(db: Database, file: File, *, files_dir: Path) -> None:
    """Remove a file and its bytes.

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
    (files_dir / file.id).unlink(missing_ok=True)


def _copy(source: BinaryIO, target: BinaryIO, *, check_lines: bool) -> _Stored:
    digest, num_bytes, lines = hashlib.sha256(), 0, _LineChecker()
    while chunk := source.read(_CHUNK_BYTES):
        num_bytes += len(chunk)
        if num_bytes > MAX_FILE_BYTES:
            raise InvalidRequestError(
                f"The file is larger than {MAX_FILE_BYTES // 2**20} MiB.", code="file_too_large", param="file"
            )
        if check_lines:
            lines.feed(chunk)
        digest.update(chunk)
        target.write(chunk)
    if num_bytes == 0:
        raise InvalidRequestError("The file is empty.", code="invalid_file_format", param="file")
    if check_lines:
        lines.close()
    return _Stored(num_bytes, lines.num_lines if check_lines else None, digest.hexdigest())


class _LineChecker:
    """Checks JSON lines as their bytes pass; holds one line at the most."""

    def __init__(self) -> None:
        self.num_lines = 0
        """Lines that hold a row."""
        self._line_number = 0
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes and check the lines that they complete."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._check(line)
        if len(self._rest) > MAX_LINE_BYTES:
            self._check(self._rest)

    def close(self) -> None:
        """Check the last line and that there was a row at all."""
        self._check(self._rest)
        if self.num_lines == 0:
            raise InvalidRequestError("The file has no rows.", code="invalid_file_format", param="file")

    def _check(self, line: bytes) -> None:
        self._line_number += 1
        line = line.removeprefix(_UTF8_BOM).strip() if self._line_number == 1 else line.strip()
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise self._error(f"is longer than {MAX_LINE_BYTES // 2**20} MiB")
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise self._error(f"is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise self._error("is not a JSON object")
        if _depth_exceeds(row, MAX_DEPTH):
            raise self._error(f"is nested deeper than {MAX_DEPTH} levels")
        self.num_lines += 1

    def _error(self, what: str) -> InvalidRequestError:
        message = f"Line {self._line_number} {what}. A training file holds one JSON object per line."
        return InvalidRequestError(message, code="invalid_file_format", param="file")


def _depth_exceeds(value: object, limit: int) -> bool:
    """Whether nested dicts and lists go deeper than `limit`; by levels, without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
