"""Users' files in an object store: over HTTP, and what its failures look like from there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from jobs import files, loose_objects, organizations, reads, storage
from jobs.errors import InvalidRequestError
from jobs.owner import Owner
from server.settings import ServerSettings
from tests.support.tiny_model import make_tiny_model

from ...conftest import Bucket, WaitUntil
from .conftest import TRAIN_ROW, Site, running_site


@pytest.fixture
def site(settings: ServerSettings, bucket: Bucket, wait_until: WaitUntil) -> Iterator[Site]:
    """A server whose files lie in a bucket."""
    with running_site(settings.model_copy(update={"storage_url": bucket.url}), wait_until) as site:
        yield site


def local_files(site: Site) -> list[str]:
    """What of files and uploads lies in the data folder, hidden files too."""
    folders = (site.settings.uploads_dir, site.settings.files_dir)
    return sorted(path.name for folder in folders for path in folder.rglob("*") if path.is_file())


def num_loose(site: Site) -> int:
    with site.db.read() as session:
        return int(session.scalars(text("SELECT count(*) FROM loose_objects")).one())


def test_a_file_from_upload_to_deletion(site: Site, bucket: Bucket) -> None:
    client = site.client()
    content = TRAIN_ROW * 3
    uploaded = client.post(
        "/v1/files", files={"file": ("übung 1.jsonl", content)}, data={"purpose": "fine-tune"}
    ).json()
    assert (uploaded["bytes"], uploaded["num_lines"]) == (len(content), 3)
    assert uploaded["sha256"] == hashlib.sha256(content).hexdigest()
    assert bucket.names() == [f"files/{uploaded['id']}"]
    assert (local_files(site), num_loose(site)) == ([], 0)
    response = client.get(f"/v1/files/{uploaded['id']}/content")
    assert response.content == content
    assert response.headers["Content-Disposition"] == "attachment; filename*=utf-8''%C3%BCbung%201.jsonl"
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["Content-Length"] == str(len(content))
    assert client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": uploaded["id"]}).is_success
    assert client.delete(f"/v1/files/{uploaded['id']}").status_code == 400  # the job needs it
    other = site.upload()
    assert client.delete(f"/v1/files/{other}").json() == {"id": other, "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{other}/content").status_code == 404
    assert loose_objects.sweep(site.db) == 1
    assert loose_objects.sweep(site.db) == 0
    assert bucket.names() == [f"files/{uploaded['id']}"]


def test_a_large_file_goes_and_comes_in_parts(site: Site, bucket: Bucket) -> None:
    content = os.urandom(20 * 2**20 + 1)  # three parts of what is sent at once
    client = site.client(timeout=60)
    form = {"file": ("a.bin", content)}
    file_id = client.post("/v1/files", files=form, data={"purpose": "user_data"}).json()["id"]
    head = bucket.client.head_object(Bucket=bucket.name, Key=f"files/{file_id}")
    assert head["ETag"].endswith('-3"')  # S3's mark of an object that came in so many parts
    assert client.get(f"/v1/files/{file_id}/content").content == content
    head = client.head(f"/v1/files/{file_id}/content")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(content)))


def test_an_upload_in_parts(site: Site, bucket: Bucket) -> None:
    client = site.client()
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 2 * len(TRAIN_ROW), "mime_type": "x"}
    upload_id = client.post("/v1/uploads", json=body).json()["id"]
    parts = [
        client.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("x", TRAIN_ROW)}).json()["id"] for _ in range(2)
    ]
    bucket.go_away()
    response = client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": parts}, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_unavailable")
    assert len(local_files(site)) == 3  # the parts, and the lock of their folder
    bucket.come_back()
    done = client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": parts}).json()
    assert bucket.names() == [f"files/{done['file']['id']}"]
    assert client.get(f"/v1/files/{done['file']['id']}/content").content == 2 * TRAIN_ROW
    assert local_files(site) == []


def test_a_file_that_the_quota_refuses_goes_again(site: Site, bucket: Bucket) -> None:
    organizations.update_organization(site.db, "org-local", {"max_stored_bytes": 1})
    response = site.client().post("/v1/files", files={"file": ("a.jsonl", TRAIN_ROW)}, data={"purpose": "fine-tune"})
    assert response.json()["error"]["code"] == "insufficient_quota"
    assert len(bucket.names()) == 1
    assert loose_objects.sweep(site.db) == 1
    assert bucket.names() == []


def test_a_store_that_is_away(site: Site, bucket: Bucket) -> None:
    client = site.client(timeout=60)
    kept, deleted = site.upload(), site.upload()
    bucket.go_away()
    refused = client.post("/v1/files", files={"file": ("a.jsonl", TRAIN_ROW)}, data={"purpose": "fine-tune"})
    unread = client.get(f"/v1/files/{kept}/content")
    for response, verb in ((refused, "write"), (unread, "read")):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (503, "storage_unavailable", "server_error")
        assert error["message"].startswith(f"Could not {verb} file-")
        assert "the object store does not answer as it should" in error["message"]
        assert response.headers["Retry-After"] == "2"
    assert local_files(site) == []
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [deleted, kept]
    assert client.delete(f"/v1/files/{deleted}").json()["deleted"] is True
    bucket.come_back()
    assert client.get(f"/v1/files/{kept}/content").content == TRAIN_ROW
    # The one that could not be written may lie there all the same: it goes when a day has passed.
    assert loose_objects.sweep(site.db) == 1
    assert (num_loose(site), bucket.names()) == (1, [f"files/{kept}"])
    with site.db.transaction() as session:
        session.execute(text("UPDATE loose_objects SET remove_at = remove_at - interval '1 day'"))
    assert loose_objects.sweep(site.db) == 1


def test_a_store_that_refuses_our_keys(site: Site, bucket: Bucket) -> None:
    with bucket.refusing_keys():
        response = site.client(timeout=60).post(
            "/v1/files", files={"file": ("a.jsonl", TRAIN_ROW)}, data={"purpose": "fine-tune"}
        )
    assert response.status_code == 503
    assert response.json()["error"]["message"].endswith(
        "the object store refuses access: whoever runs the server must check its credentials."
    )


def test_a_bucket_that_is_not_there(settings: ServerSettings, bucket: Bucket, wait_until: WaitUntil) -> None:
    wrong = settings.model_copy(update={"storage_url": "s3://no-such-bucket"})
    with running_site(wrong, wait_until) as site:
        response = site.client(timeout=60).post(
            "/v1/files", files={"file": ("a.jsonl", TRAIN_ROW)}, data={"purpose": "fine-tune"}
        )
    assert response.status_code == 503
    assert "no such bucket" in response.json()["error"]["message"]


def test_objects_that_somebody_else_has_changed(site: Site, bucket: Bucket) -> None:
    gone, short = site.upload(), site.upload()
    bucket.client.delete_object(Bucket=bucket.name, Key=f"files/{gone}")
    bucket.put(f"files/{short}", TRAIN_ROW[:-1])
    missing = site.client().get(f"/v1/files/{gone}/content")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "file_id")
    assert "no longer in the object store" in missing.json()["error"]["message"]
    damaged = site.client().get(f"/v1/files/{short}/content")
    assert (damaged.status_code, damaged.json()["error"]["code"]) == (500, "file_damaged")
    assert damaged.headers["x-should-retry"] == "false"


def test_files_from_before_the_setting_stay_where_they_are(
    settings: ServerSettings, bucket: Bucket, wait_until: WaitUntil
) -> None:
    with running_site(settings, wait_until) as site:
        local = site.upload()
    with running_site(settings.model_copy(update={"storage_url": bucket.url}), wait_until) as site:
        stored = site.upload(TRAIN_ROW * 2)
        assert site.client().get(f"/v1/files/{local}/content").content == TRAIN_ROW
    with running_site(settings, wait_until) as site:
        assert site.client().get(f"/v1/files/{stored}/content").content == TRAIN_ROW * 2
        assert local_files(site) == [local]


def test_a_local_copy_is_there_for_the_block_alone(site: Site) -> None:
    file = reads.get_file(site.db, owner=Owner("org-local"), file_id=site.upload())
    with files.local_rows(file, data_dir=site.settings.data_dir, num_rows=1) as path:
        assert path.read_bytes() == TRAIN_ROW
        assert not path.is_relative_to(site.settings.data_dir)
    assert not path.exists()
    assert not Path(path.parent).exists()


def test_a_local_copy_reaches_as_far_as_the_row(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [b"\xef\xbb\xbf" + TRAIN_ROW, b"\n", *[TRAIN_ROW] * 97]
    array = b"[" + b",\n".join([TRAIN_ROW] * 98) + b"]"

    def copied(content: bytes, num_rows: int) -> bytes:
        form = {"file": ("rows.jsonl", content)}
        file_id = site.client().post("/v1/files", files=form, data={"purpose": "fine-tune"}).json()["id"]
        file = reads.get_file(site.db, owner=Owner("org-local"), file_id=file_id)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "_PART_BYTES", 1000)  # S3 takes none so small
            with files.local_rows(file, data_dir=site.settings.data_dir, num_rows=num_rows) as path:
                return path.read_bytes()

    some = copied(b"".join(lines), 20)
    assert b"".join(lines).startswith(some)
    assert 20 < some.count(TRAIN_ROW) < 40
    assert copied(b"".join(lines), 98) == b"".join(lines)
    assert copied(array, 1) == array
    monkeypatch.setattr(files, "_MAX_COPIED_BYTES", 3000)
    assert copied(b"".join(lines), 2)
    for content, num_rows in ((b"".join(lines), 90), (array, 1)):
        with pytest.raises(InvalidRequestError, match="too far"):
            copied(content, num_rows)


def test_a_row_of_a_stored_file_is_previewed_and_no_copy_stays(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model(site.settings.data_dir / "models" / "shown")
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    path = f"/v1/files/{site.upload(TRAIN_ROW * 3)}/preview"
    shown = site.client(timeout=60).get(path, params={"model": "shown", "row": 3})
    assert shown.status_code == 200, shown.text
    assert any(token["trained"] for token in shown.json()["tokens"])
    missing = site.client(timeout=60).get(path, params={"model": "shown", "row": 4})
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "invalid_row")
    assert list(copies.iterdir()) == []
