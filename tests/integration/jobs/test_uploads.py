"""Uploads in parts: what becomes of them, and that nothing is left on disk of those that end otherwise."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from jobs import files, reads, uploads
from jobs.db import Database
from jobs.errors import BusyError, InvalidRequestError, InvalidStateError, NotFoundError
from jobs.models import File, Upload, UploadPart
from jobs.owner import Owner
from jobs.settings import JobsSettings
from jobs.uploads import Completion

from .conftest import ORGANIZATION

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


class Uploader:
    """Somebody of the test's organization, over a data folder of the test's own."""

    def __init__(self, db: Database, settings: JobsSettings) -> None:
        self.db = db
        self.settings = settings

    def create(self, num_bytes: int, *, purpose: str = "fine-tune", expires_after_s: int | None = None) -> Upload:
        return uploads.create(
            self.db,
            owner=Owner(ORGANIZATION),
            filename="a.jsonl",
            purpose=purpose,
            num_bytes=num_bytes,
            file_expires_after_s=expires_after_s,
        )

    def open(self, upload: Upload) -> uploads.IncomingPart:
        return uploads.open_part(self.db, self.settings, owner=Owner(ORGANIZATION), upload_id=upload.id)

    def add(self, upload: Upload, content: bytes) -> UploadPart:
        incoming = self.open(upload)
        try:
            incoming.write(content)
            return uploads.add_part(self.db, incoming)
        finally:
            incoming.discard()

    def complete(self, upload: Upload, *parts: UploadPart, md5: str | None = None) -> File:
        completion = Completion([part.id for part in parts], md5)
        _, file = uploads.complete(
            self.db, self.settings, owner=Owner(ORGANIZATION), upload_id=upload.id, completion=completion
        )
        return file

    def cancel(self, upload: Upload) -> Upload:
        return uploads.cancel(self.db, self.settings, owner=Owner(ORGANIZATION), upload_id=upload.id)

    def sweep(self) -> list[str]:
        return uploads.sweep(self.db, self.settings)

    def end_hour(self, upload: Upload) -> None:
        """As if the upload had been created an hour ago."""
        with self.db.transaction() as session:
            session.execute(text("UPDATE uploads SET expires_at = now() WHERE id = :id"), {"id": upload.id})

    def status(self, upload: Upload) -> str:
        with self.db.read() as session:
            return session.get_one(Upload, upload.id).status

    @property
    def num_parts(self) -> int:
        with self.db.read() as session:
            return int(session.scalars(text("SELECT count(*) FROM upload_parts")).one())

    def names(self, folder: str) -> list[str]:
        """What is in a folder of the data folder, hidden files too."""
        path = self.settings.data_dir / folder
        return sorted(os.listdir(path)) if path.exists() else []  # noqa: PTH208 - hidden files count too


@pytest.fixture
def uploader(db: Database, database_url: str, tmp_path: Path) -> Uploader:
    """See `Uploader`. Costs nothing beside the database."""
    settings = JobsSettings(database_url=database_url, broker_url="redis://unused", data_dir=tmp_path)
    return Uploader(db, settings)


def test_parts_become_one_checked_file(uploader: Uploader) -> None:
    content = ROW * 5
    upload = uploader.create(len(content))
    assert (upload.status, (upload.expires_at - upload.created_at).total_seconds()) == ("pending", 3600)
    # In another order than that of the file, and cut in the middle of rows.
    last = uploader.add(upload, content[100:])
    first = uploader.add(upload, content[:100])
    file = uploader.complete(upload, first, last, md5=hashlib.md5(content, usedforsecurity=False).hexdigest())
    assert (uploader.settings.files_dir / file.id).read_bytes() == content
    assert (file.num_bytes, file.num_lines) == (len(content), 5)
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert reads.get_file(uploader.db, owner=Owner(ORGANIZATION), file_id=file.id).filename == "a.jsonl"
    assert (uploader.status(upload), uploader.num_parts) == ("completed", 0)
    assert (uploader.names("uploads"), uploader.names("files")) == ([], [file.id])


def test_a_completion_that_is_repeated_has_the_same_answer(uploader: Uploader) -> None:
    upload = uploader.create(len(ROW))
    part = uploader.add(upload, ROW)
    file = uploader.complete(upload, part)
    assert uploader.complete(upload, part).id == file.id
    with pytest.raises(InvalidStateError, match="already been completed"):
        uploader.complete(upload, part, md5="0" * 32)
    files.delete_file(uploader.db, file, data_dir=uploader.settings.data_dir)
    with pytest.raises(InvalidStateError, match="already been completed"):
        uploader.complete(upload, part)


def test_a_completion_that_is_repeated_after_its_file_has_expired(uploader: Uploader) -> None:
    upload = uploader.create(len(ROW), expires_after_s=3600)
    part = uploader.add(upload, ROW)
    file = uploader.complete(upload, part)
    assert file.expires_at == file.created_at + timedelta(seconds=3600)
    with uploader.db.transaction() as session:
        session.execute(text("UPDATE files SET expires_at = now()"))
    with pytest.raises(InvalidStateError, match="already been completed"):
        uploader.complete(upload, part)


def test_a_file_that_cannot_be_trained_on_is_refused_with_its_line(uploader: Uploader) -> None:
    content = ROW + b"{oops}\n"
    upload = uploader.create(len(content))
    parts = [uploader.add(upload, content[:-3]), uploader.add(upload, content[-3:])]
    with pytest.raises(InvalidRequestError, match="Line 2 is not valid JSON") as caught:
        uploader.complete(upload, *parts)
    assert (caught.value.code, caught.value.param) == ("invalid_file_format", "file")
    assert uploader.names("files") == []
    assert (uploader.status(upload), uploader.num_parts) == ("pending", 2)


def test_another_purpose_may_hold_any_bytes(uploader: Uploader) -> None:
    upload = uploader.create(2, purpose="user_data")
    assert uploader.complete(upload, uploader.add(upload, b"\x00\xff")).num_lines is None


def test_what_does_not_make_up_the_file_is_refused_and_can_be_put_right(uploader: Uploader) -> None:
    upload = uploader.create(2 * len(ROW))
    other = uploader.create(len(ROW))
    first, foreign = uploader.add(upload, ROW), uploader.add(other, ROW)
    with pytest.raises(InvalidRequestError, match="Name the parts"):
        uploader.complete(upload)
    with pytest.raises(InvalidRequestError, match=f"{first.id} is named twice"):
        uploader.complete(upload, first, first)
    with pytest.raises(NotFoundError, match=f"has no part {foreign.id}"):
        uploader.complete(upload, first, foreign)
    with pytest.raises(InvalidRequestError, match=f"The 1 parts have {len(ROW)} bytes"):
        uploader.complete(upload, first)
    second = uploader.add(upload, ROW)
    with pytest.raises(InvalidRequestError, match="MD5") as caught:
        uploader.complete(upload, first, second, md5="0" * 32)
    assert (caught.value.code, caught.value.param) == ("md5_mismatch", "md5")
    assert uploader.names("files") == []
    # A part that is not named is not in the file.
    uploader.add(upload, ROW)
    assert uploader.complete(upload, second, first).num_bytes == 2 * len(ROW)
    assert uploader.names("uploads") == [other.id]


def test_parts_have_limits(uploader: Uploader, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = uploader.create(10)
    with pytest.raises(InvalidRequestError, match="empty"):
        uploader.add(upload, b"")
    with pytest.raises(InvalidRequestError, match=r"11 bytes, but upload .* was created for 10"):
        uploader.add(upload, b"x" * 11)
    monkeypatch.setattr(uploads, "MAX_PART_BYTES", 8)
    with pytest.raises(InvalidRequestError) as caught:
        uploader.add(upload, b"x" * 9)
    assert caught.value.code == "part_too_large"
    monkeypatch.setattr(uploads, "_SPARE_BYTES", 6)
    uploader.add(upload, b"x" * 8)
    uploader.add(upload, b"x" * 8)
    with pytest.raises(InvalidRequestError, match="come to 16 bytes"):
        uploader.add(upload, b"x")
    monkeypatch.setattr(uploads, "MAX_PARTS", 2)
    with pytest.raises(InvalidStateError, match="has 2 parts"):
        uploader.open(upload)
    assert [len(name) for name in uploader.names(f"uploads/{upload.id}")] == [29, 29]
    assert uploader.num_parts == 2


@pytest.mark.parametrize("ended", ["cancelled", "expired", "completed"])
def test_an_upload_that_has_ended_takes_nothing(uploader: Uploader, ended: str) -> None:
    upload = uploader.create(len(ROW))
    part = uploader.add(upload, ROW)
    incoming = uploader.open(upload)
    incoming.write(ROW)
    if ended == "cancelled":
        assert uploader.cancel(upload).status == "cancelled"
    elif ended == "expired":
        uploader.end_hour(upload)
    else:
        uploader.complete(upload, part)
    acts: list[Callable[[], object]] = [
        lambda: uploads.add_part(uploader.db, incoming),
        lambda: uploader.open(upload),
        lambda: uploader.complete(upload, part, md5="0" * 32),
        lambda: uploader.cancel(upload),
    ]
    for act in acts:
        with pytest.raises(InvalidStateError, match=ended):
            act()
    incoming.discard()
    assert uploader.sweep() == ([upload.id] if ended == "expired" else [])
    assert uploader.sweep() == []
    assert (uploader.status(upload), uploader.num_parts) == (ended, 0)
    assert uploader.names("uploads") == []


def test_a_part_that_arrives_while_its_upload_is_cancelled_leaves_nothing(uploader: Uploader) -> None:
    upload = uploader.create(len(ROW))
    incoming = uploader.open(upload)
    incoming.write(ROW)
    with uploader.db.transaction() as session:  # cancelled by a server that was killed before it removed the folder
        session.execute(text("UPDATE uploads SET status = 'cancelled'"))
    with pytest.raises(InvalidStateError, match="cancelled"):
        uploads.add_part(uploader.db, incoming)
    assert uploader.names(f"uploads/{upload.id}") == []


def test_the_sweep_removes_what_no_pending_upload_needs(uploader: Uploader) -> None:
    pending = uploader.create(len(ROW))
    part = uploader.add(pending, ROW)
    empty = uploader.create(1)
    uploader.end_hour(empty)
    left = uploader.settings.uploads_dir / "upload_000000000000000000000000"
    left.mkdir()
    (left / ".part_0.partial").write_bytes(b"x")
    assert uploader.sweep() == [empty.id]
    assert uploader.names("uploads") == [pending.id]
    assert uploader.complete(pending, part).num_bytes == len(ROW)


def test_bytes_that_vanished_or_changed_are_told(uploader: Uploader) -> None:
    upload = uploader.create(len(ROW))
    part = uploader.add(upload, ROW)
    path = uploader.settings.uploads_dir / upload.id / part.id
    path.write_bytes(ROW[:-1])
    with pytest.raises(InvalidStateError, match=f"{part.id} is damaged"):
        uploader.complete(upload, part)
    path.unlink()
    with pytest.raises(NotFoundError, match="no longer on this server"):
        uploader.complete(upload, part)
    assert uploader.names("files") == []


class Pause:
    """A completion in a thread of its own that stands still, lock in hand, before it joins the parts."""

    def __init__(self, uploader: Uploader, upload: Upload, part: UploadPart) -> None:
        self.errors: list[Exception] = []
        self._uploader, self._upload, self._part = uploader, upload, part
        self._started = threading.Event()
        self._go_on = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on joining waits, then does what it always does."""
        join = uploads._join

        def wait_and_join(*arguments: object) -> object:
            self._started.set()
            assert self._go_on.wait(30)
            return join(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(uploads, "_join", wait_and_join)

    def start(self) -> None:
        self.thread.start()
        assert self._started.wait(30)

    def finish(self) -> None:
        self._go_on.set()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def _run(self) -> None:
        try:
            self._uploader.complete(self._upload, self._part)
        except (InvalidStateError, NotFoundError) as error:
            self.errors.append(error)


@pytest.fixture
def upload(uploader: Uploader) -> Upload:
    """An upload of one row."""
    return uploader.create(len(ROW))


def test_two_completions_at_once_make_one_file(
    uploader: Uploader, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = uploader.add(upload, ROW)
    pause = Pause(uploader, upload, part)
    pause.install(monkeypatch)
    pause.start()
    with pytest.raises(BusyError, match="being completed"):
        uploader.complete(upload, part)
    pause.finish()
    assert pause.errors == []
    assert len(uploader.names("files")) == 1
    assert uploader.names("uploads") == []


def test_an_upload_does_not_expire_while_it_is_completed(
    uploader: Uploader, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = uploader.add(upload, ROW)
    pause = Pause(uploader, upload, part)
    pause.install(monkeypatch)
    pause.start()
    uploader.end_hour(upload)
    assert uploader.sweep() == []
    pause.finish()
    assert pause.errors == []
    assert uploader.status(upload) == "completed"
    assert uploader.sweep() == []


def test_a_cancel_wins_over_a_completion_under_way(
    uploader: Uploader, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = uploader.add(upload, ROW)
    pause = Pause(uploader, upload, part)
    pause.install(monkeypatch)
    pause.start()
    uploader.cancel(upload)
    pause.finish()
    assert [str(error) for error in pause.errors] == [
        f"Upload {upload.id} has been cancelled: create another to send more."
    ]
    assert (uploader.names("files"), uploader.names("uploads")) == ([], [])
