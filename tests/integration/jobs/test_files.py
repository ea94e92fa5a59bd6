"""Uploads are checked while they are copied, and nothing is left of one that is refused."""

from __future__ import annotations

import hashlib
import io
import os
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from jobs import file_check, files, lifecycle, reads, submission
from jobs.db import Database
from jobs.errors import InvalidRequestError, InvalidStateError, NotFoundError
from jobs.models import File
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec

from .conftest import ORGANIZATION, claim

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def store(
    db: Database,
    content: bytes,
    folder: Path,
    *,
    purpose: str = "fine-tune",
    filename: str = "../../etc/passwd",
    expires_after_s: int | None = None,
) -> File:
    return files.store_file(
        db,
        io.BytesIO(content),
        files_dir=folder / "files",
        owner=Owner(ORGANIZATION),
        filename=filename,
        purpose=purpose,
        expires_after_s=expires_after_s,
    )


def test_a_good_file_is_kept_byte_for_byte(db: Database, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + ROW.replace(b"\n", b"\r\n") * 3 + b"\n" + ROW.strip()
    stored = store(db, content, tmp_path)
    assert (tmp_path / "files" / stored.id).read_bytes() == content
    assert (stored.num_bytes, stored.num_lines) == (len(content), 4)
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    assert stored.filename == "../../etc/passwd"
    assert reads.get_file(db, owner=Owner(ORGANIZATION), file_id=stored.id).id == stored.id


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "The file is empty"),
        (b"\n \n", "no rows"),
        (ROW + b"{oops}\n", "Line 2 is not valid JSON"),
        (ROW + b"[1]\n", "Line 2 is not a JSON object"),
        (ROW + b'{"a": NaN}\n', "Line 2 is not valid JSON"),
        (ROW + b'{"a": "\xff"}\n', r"Line 2 is not UTF-8 \(byte 8\): save the file as UTF-8 text"),
        (ROW + b'{"a": "\\ud800"}\n', r"Line 2 is not valid JSON \(it holds half of a surrogate pair"),
        (ROW + b"{'a': 1}\n", "Line 2 is not valid JSON .*: JSON has double quotes"),
        (ROW + b'{"a": 1e400}\n', r"Line 2 is not valid JSON \(the number 1e400 is too large\)"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested deeper than 64"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "Line 1"),
        (ROW + b'{"a": "' + b"x" * file_check.MAX_LINE_BYTES + b'"}\n', "Line 2 is longer than 4 MiB"),
        (b"PK\x03\x04" + ROW, "The file is a zip archive"),
        (b"[" + ROW + b",\n3]", r"Row 2 \(line 3\): expected a JSON object, not a number"),
        (b"[" + ROW + b",\n{oops}]", r"Row 2 \(line 3\): not valid JSON"),
        (b"[" + ROW + b"] []", "something comes after the array's end"),
        (b"[" + ROW, "not valid JSON"),
        (b"[]", "no rows"),
        (b'[{"a": ' + b"[" * 70 + b"]" * 70 + b"}]", "more than 64 levels"),
        (b'[{"a": "' + b"x" * 2 * file_check.MAX_LINE_BYTES + b'"}]', "longer than 4 MiB"),
        (b"x" * (file_check.MAX_LINE_BYTES * 2), "Line 1 is longer than 4 MiB"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_leaves_nothing(
    db: Database, tmp_path: Path, content: bytes, said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        store(db, content, tmp_path)
    assert os.listdir(tmp_path / "files") == []  # noqa: PTH208 - hidden files count too
    assert reads.list_files(db, owner=Owner(ORGANIZATION), limit=10).items == []


def test_an_array_of_rows_is_kept_and_counted(db: Database, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf\n [" + b",".join([ROW] * 5000) + b"]\n"
    assert len(content) > 256 * 1024  # more than is read at once
    stored = store(db, content, tmp_path)
    assert stored.num_lines == 5000
    assert (tmp_path / "files" / stored.id).read_bytes() == content


def test_plain_text_is_kept_and_has_no_rows(db: Database, tmp_path: Path) -> None:
    # A letter of two bytes lies across the end of the first chunk that is read.
    content = b"x" * (1024 * 1024 - 1) + "é: once upon a time\n".encode()
    stored = store(db, content, tmp_path, filename="Tale.TXT")
    assert stored.num_lines is None
    assert (tmp_path / "files" / stored.id).read_bytes() == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" \n\xef", "not UTF-8"),
        (b"a\xffb", "not UTF-8"),
        (b" \n\t", "no text"),
        (b"a\0b", "zero bytes"),
        (b"\xff\xfea\0", "UTF-16"),
    ],
)
def test_text_that_cannot_be_read_is_refused(db: Database, tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        store(db, content, tmp_path, filename="a.txt")
    assert os.listdir(tmp_path / "files") == []  # noqa: PTH208 - hidden files count too


def test_another_purpose_may_hold_any_bytes(db: Database, tmp_path: Path) -> None:
    assert store(db, b"\x00\xff", tmp_path, purpose="user_data").num_lines is None


def test_a_file_that_a_job_needs_stays(db: Database, tmp_path: Path) -> None:
    stored = store(db, ROW, tmp_path)
    spec = JobSpec(model="m", training_file=stored.id, seed=1)
    submission.submit(db, planned=PlannedJob(spec=spec), owner=Owner(ORGANIZATION), api_key_id=None, metadata={})
    with pytest.raises(InvalidStateError, match="cancel the job first"):
        files.delete_file(db, stored, data_dir=tmp_path)
    lifecycle.succeed(db, claim(db).lease, model_path="m", weights_sha256="w", trained_tokens=1)
    files.delete_file(db, stored, data_dir=tmp_path)
    assert not (tmp_path / "files" / stored.id).exists()


def test_pages_follow_each_other(db: Database, tmp_path: Path) -> None:
    ids = [store(db, ROW, tmp_path).id for _ in range(5)]
    first = reads.list_files(db, owner=Owner(ORGANIZATION), limit=2)
    assert [file.id for file in first.items] == ids[:-3:-1]
    assert first.has_more
    rest = reads.list_files(db, owner=Owner(ORGANIZATION), limit=3, after=first.items[-1].id)
    assert [file.id for file in rest.items] == ids[2::-1]
    assert not rest.has_more
    oldest = reads.list_files(db, owner=Owner(ORGANIZATION), limit=1, ascending=True)
    assert [file.id for file in oldest.items] == ids[:1]


def test_an_expired_file_is_gone_at_once_and_its_bytes_by_the_next_sweep(db: Database, tmp_path: Path) -> None:
    lasting, other = store(db, ROW, tmp_path), store(db, ROW, tmp_path, expires_after_s=3600)
    assert lasting.expires_at is None
    assert other.expires_at == other.created_at + timedelta(seconds=3600)
    assert files.sweep_expired(db, data_dir=tmp_path) == []
    expire(db, other)
    with pytest.raises(NotFoundError, match=f"No such file: {other.id}"):
        reads.get_file(db, owner=Owner(ORGANIZATION), file_id=other.id)
    assert [file.id for file in reads.list_files(db, owner=Owner(ORGANIZATION), limit=9).items] == [lasting.id]
    assert files.sweep_expired(db, data_dir=tmp_path) == [other.id]
    assert files.sweep_expired(db, data_dir=tmp_path) == []
    assert [path.name for path in (tmp_path / "files").iterdir()] == [lasting.id]


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_an_expired_file_stays_for_the_job_that_needs_it(db: Database, tmp_path: Path, param: str) -> None:
    file = store(db, ROW, tmp_path, expires_after_s=3600)
    spec = JobSpec.model_validate({"model": "m", "training_file": "file-1", "seed": 1, param: file.id})
    for organization_id in (ORGANIZATION, "org-other"):
        submission.submit(db, planned=PlannedJob(spec=spec), owner=Owner(organization_id), api_key_id=None, metadata={})
    expire(db, file)
    assert files.sweep_expired(db, data_dir=tmp_path) == []
    assert (tmp_path / "files" / file.id).read_bytes() == ROW
    lifecycle.succeed(db, claim(db).lease, model_path="m", weights_sha256="w", trained_tokens=1)
    # The other organization's job names the file as well, which is not its own.
    assert files.sweep_expired(db, data_dir=tmp_path) == [file.id]
    assert list((tmp_path / "files").iterdir()) == []


def expire(db: Database, file: File) -> None:
    """Let a file's time be over."""
    with db.transaction() as session:
        session.execute(text("UPDATE files SET expires_at = now() WHERE id = :id"), {"id": file.id})
