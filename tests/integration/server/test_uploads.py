"""Uploads in parts: as the official client sends them, as strangers do, and in how much memory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import text

from jobs import keys
from local.ports import reserve_port
from server import middleware

from .conftest import TRAIN_ROW, Site, wait_until_true
from .test_hostile import send_chunks

MIB = 2**20
PART_HEAD = b'--b\r\nContent-Disposition: form-data; name="data"; filename="upload"\r\n\r\n'
MULTIPART = "multipart/form-data; boundary=b"


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def create(site: Site, num_bytes: int = len(TRAIN_ROW), **changes: Any) -> str:
    """Begin an upload. Returns its id."""
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": num_bytes, "mime_type": "text/jsonl"} | changes
    response = site.client().post("/v1/uploads", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def send_part(site: Site, upload_id: str, content: bytes = TRAIN_ROW, *, key: str | None = None) -> httpx.Response:
    return site.client(key).post(f"/v1/uploads/{upload_id}/parts", files={"data": ("upload", content)})


def add_part(site: Site, upload_id: str, content: bytes = TRAIN_ROW) -> str:
    """Send a part. Returns its id."""
    response = send_part(site, upload_id, content)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def complete(site: Site, upload_id: str, *part_ids: str, **more: Any) -> httpx.Response:
    return site.client().post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids, **more})


def left(site: Site) -> list[str]:
    """Every file below the folders of uploads and files, hidden ones too."""
    folders = (site.settings.uploads_dir, site.settings.files_dir)
    return sorted(path.name for folder in folders for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    """The official client, that refuses a response which is not as its types say."""
    with openai.OpenAI(
        api_key=site.key, base_url=f"{site.url}/v1", _strict_response_validation=True, max_retries=0
    ) as client:
        yield client


def test_a_file_in_chunks_by_the_official_client(site: Site, client: openai.OpenAI, tmp_path: Path) -> None:
    content = TRAIN_ROW * 5000
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=100_000, md5=md5(content).upper()
    )
    assert (upload.status, upload.bytes, upload.filename) == ("completed", len(content), "train.jsonl")
    assert upload.expires_at - upload.created_at == 3600
    assert upload.file is not None
    assert (upload.file.bytes, upload.file.status, upload.file.purpose) == (len(content), "processed", "fine-tune")
    assert client.files.content(upload.file.id).read() == content
    assert [file.id for file in client.files.list()] == [upload.file.id]
    assert client.fine_tuning.jobs.create(model="tiny", training_file=upload.file.id).status == "queued"
    assert left(site) == [upload.file.id]


def test_each_step_by_the_official_client(site: Site, client: openai.OpenAI) -> None:
    upload = client.uploads.create(
        bytes=2 * len(TRAIN_ROW), filename="../../evil.jsonl", mime_type="text/plain", purpose="fine-tune"
    )
    assert (upload.status, upload.filename, upload.file) == ("pending", "evil.jsonl", None)
    part = client.uploads.parts.create(upload.id, data=TRAIN_ROW)
    assert (part.upload_id, part.object) == (upload.id, "upload.part")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert left(site) == []
    with pytest.raises(openai.BadRequestError, match="has been cancelled") as caught:
        client.uploads.parts.create(upload.id, data=TRAIN_ROW)
    assert caught.value.code == "invalid_state"
    lasting = client.uploads.create(
        bytes=len(TRAIN_ROW),
        filename="a.jsonl",
        mime_type="text/plain",
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    part = client.uploads.parts.create(lasting.id, data=TRAIN_ROW)
    file = client.uploads.complete(lasting.id, part_ids=[part.id]).file
    assert file is not None
    assert file.expires_at == file.created_at + 7200
    in_memory = client.uploads.upload_file_chunked(
        file=b"\0\xff" * 10, filename="x.bin", bytes=20, mime_type="image/png", purpose="vision"
    )
    assert in_memory.file is not None
    assert in_memory.file.bytes == 20


def test_parts_at_once(site: Site) -> None:
    rows = [json.dumps({"text": f"row {number} " + "x" * 300_000}).encode() + b"\n" for number in range(8)]
    upload_id = create(site, sum(map(len, rows)))
    with ThreadPoolExecutor(8) as pool:
        part_ids = list(pool.map(lambda row: add_part(site, upload_id, row), rows))
    file = complete(site, upload_id, *part_ids, md5=md5(b"".join(rows))).json()["file"]
    assert (file["num_lines"], file["sha256"]) == (8, hashlib.sha256(b"".join(rows)).hexdigest())


def test_a_bad_line_is_named_and_nothing_is_left_of_the_file(site: Site) -> None:
    content = TRAIN_ROW + b"[1]\n"
    upload_id = create(site, len(content))
    parts = [add_part(site, upload_id, content[:-2]), add_part(site, upload_id, content[-2:])]
    response = complete(site, upload_id, *parts)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_file_format")
    assert "Line 2 is not a JSON object" in response.json()["error"]["message"]
    assert not list(site.settings.files_dir.iterdir())
    assert site.client().post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"
    assert left(site) == []


def test_what_cannot_be_completed(site: Site, subtests: pytest.Subtests) -> None:
    upload_id, other = create(site, 2 * len(TRAIN_ROW)), create(site)
    part, foreign = add_part(site, upload_id), add_part(site, other)
    cases: list[tuple[Any, int, str | None]] = [
        ({"part_ids": []}, 400, "part_ids"),
        ({"part_ids": [part]}, 400, "part_ids"),
        ({"part_ids": [part, part]}, 400, "part_ids"),
        ({"part_ids": [part, foreign]}, 404, "part_ids"),
        ({"part_ids": ["../../etc/passwd"]}, 404, "part_ids"),
        ({"part_ids": [".lock"]}, 404, "part_ids"),
        ({"part_ids": [part] * 10_001}, 400, "part_ids"),
        ({"part_ids": ["x" * 65]}, 400, "part_ids.0"),
        ({"part_ids": [1]}, 400, "part_ids.0"),
        ({"part_ids": part}, 400, "part_ids"),
        ({"part_ids": [part], "md5": "no digest"}, 400, "md5"),
        ({"part_ids": [part], "md5": "0" * 32 + "\n"}, 400, "md5"),
        ({"part_ids": [part], "sha1": ""}, 400, "sha1"),
        ({}, 400, "part_ids"),
        ([], 400, None),
    ]
    for body, status, param in cases:
        with subtests.test(body=repr(body)[:60]):
            response = site.client().post(f"/v1/uploads/{upload_id}/complete", json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    second = add_part(site, upload_id)
    wrong = complete(site, upload_id, part, second, md5="0" * 32)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "md5_mismatch")
    assert complete(site, upload_id, part, second).json()["status"] == "completed"


BAD_CREATIONS: list[tuple[dict[str, Any], str]] = [
    ({"bytes": 0}, "bytes"),
    ({"bytes": -1}, "bytes"),
    ({"bytes": 1.5}, "bytes"),
    ({"bytes": "1"}, "bytes"),
    ({"bytes": True}, "bytes"),
    ({"bytes": 8 * 2**30 + 1}, "bytes"),
    ({"bytes": 2**63 - 1}, "bytes"),
    ({"purpose": "fine-tune-results"}, "purpose"),
    ({"filename": ""}, "filename"),
    ({"filename": "x" * 1025}, "filename"),
    ({"filename": None}, "filename"),
    ({"mime_type": ""}, "mime_type"),
    ({"expires_after": {"anchor": "last_active_at", "seconds": 3600}}, "expires_after.anchor"),
    ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds"),
    ({"expires_after": {"anchor": "created_at", "seconds": "3600"}}, "expires_after.seconds"),
    ({"expires_after": {"anchor": "created_at", "seconds": 2_592_001}}, "expires_after.seconds"),
    ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
    ({"size": 1}, "size"),
]


def test_what_cannot_be_begun(site: Site, subtests: pytest.Subtests) -> None:
    good = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 8 * 2**30, "mime_type": "text/jsonl"}
    for change, param in BAD_CREATIONS:
        with subtests.test(change=repr(change)[:60]):
            response = site.client().post("/v1/uploads", json=good | change)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert site.client().post("/v1/uploads", json=good).status_code == 200


BAD_PARTS = [
    ("multipart/form-data", b"", "data"),
    (MULTIPART, b"", "data"),
    (MULTIPART, b"no form", "data"),
    (MULTIPART, b"--b--\r\n", "data"),
    (MULTIPART, PART_HEAD + b"\r\n--b--\r\n", "data"),  # no bytes
    (MULTIPART, PART_HEAD + b"x", "data"),  # breaks off
    (MULTIPART, PART_HEAD + b"x\r\n" + PART_HEAD + b"y\r\n--b--\r\n", "data"),
    (MULTIPART, PART_HEAD.replace(b"data", b"file", 2) + b"x\r\n--b--\r\n", "file"),
    (MULTIPART, b"--b\r\n\r\nx\r\n--b--\r\n", None),
    (MULTIPART, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", None),
    (MULTIPART, b"--b\r\nX: " + b"y" * 10_000 + b"\r\n\r\nx\r\n--b--\r\n", "data"),
    (MULTIPART, b"--b\r\n" + b"X: y\r\n" * 1000 + b"\r\nx\r\n--b--\r\n", "data"),
    ("multipart/form-data; boundary=" + "b" * 1000, b"x", "data"),
    ("application/octet-stream", b"x", "data"),
    ("application/x-www-form-urlencoded", b"data=x", "data"),
    ("", b"x", "data"),
]


def test_what_is_not_a_part(site: Site, subtests: pytest.Subtests) -> None:
    upload_id = create(site)
    for content_type, body, param in BAD_PARTS:
        with subtests.test(content_type=content_type[:30], body=repr(body)[:60]):
            response = site.client().post(
                f"/v1/uploads/{upload_id}/parts", content=body, headers={"Content-Type": content_type}
            )
            assert response.status_code == 400, response.text
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.json()["error"]["param"] == param
            wait_until_true(lambda: left(site) == [], 5, "the refused part to be removed")
    too_much = send_part(site, upload_id, TRAIN_ROW + b"x")
    assert (too_much.status_code, too_much.json()["error"]["param"]) == (400, "data")
    wait_until_true(lambda: left(site) == [], 5, "the refused part to be removed")
    assert complete(site, upload_id, add_part(site, upload_id)).status_code == 200


def test_a_part_may_have_64_mib_and_no_more(site: Site) -> None:
    upload_id = create(site, 100 * MIB, purpose="user_data")
    content = bytes(64 * MIB + 1)
    large = send_part(site, upload_id, content)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "part_too_large")
    wait_until_true(lambda: left(site) == [], 5, "the refused part to be removed")
    assert send_part(site, upload_id, content[:-1]).status_code == 200


def test_an_endless_part_ends_and_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_PART_UPLOAD_BYTES", 8 * MIB)
    upload_id = create(site)
    reply, sent = send_chunks(site, f"/v1/uploads/{upload_id}/parts", PART_HEAD, num_mib=200)
    assert not reply or b" 413 " in reply.splitlines()[0]
    assert sent < 200, "the server read on"
    wait_until_true(lambda: left(site) == [], 5, "the part to be removed")


def test_another_organization_sees_no_upload_and_sends_nothing(site: Site) -> None:
    upload_id = create(site)
    part = add_part(site, upload_id)
    foreign = keys.create_key(site.db, name="foreign", organization_id="org-foreign")
    for unknown, key in ((upload_id, foreign), ("upload_none", site.key), ("..%2f..%2fetc", site.key)):
        client = site.client(key)
        assert send_part(site, unknown, key=key).status_code == 404
        assert client.post(f"/v1/uploads/{unknown}/complete", json={"part_ids": [part]}).status_code == 404
        assert client.post(f"/v1/uploads/{unknown}/cancel").status_code == 404
    assert left(site) == [part]
    site.key = foreign
    reply, sent = send_chunks(site, f"/v1/uploads/{upload_id}/parts", PART_HEAD, num_mib=100)
    assert not reply or b" 404 " in reply.splitlines()[0]
    assert sent < 100


def test_an_upload_that_has_ended(site: Site) -> None:
    upload_id = create(site)
    part = add_part(site, upload_id)
    done = complete(site, upload_id, part).json()
    assert complete(site, upload_id, part).json() == done
    for response in (
        send_part(site, upload_id),
        complete(site, upload_id, "part_other"),
        site.client().post(f"/v1/uploads/{upload_id}/cancel"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_state")
        assert "already been completed" in response.json()["error"]["message"]
    assert left(site) == [done["file"]["id"]]


def test_an_expired_upload_is_gone_when_the_next_begins(site: Site) -> None:
    upload_id = create(site)
    part = add_part(site, upload_id)
    with site.db.transaction() as session:
        session.execute(text("UPDATE uploads SET expires_at = now()"))
    for response in (send_part(site, upload_id), complete(site, upload_id, part)):
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_state")
        assert "has expired" in response.json()["error"]["message"]
    create(site)
    assert left(site) == []


def test_the_servers_own_limit(site: Site) -> None:
    response = site.client().post(
        "/v1/uploads",
        json={"filename": "a", "purpose": "vision", "bytes": site.settings.max_upload_bytes + 1, "mime_type": "x"},
    )
    assert str(site.settings.max_upload_bytes) in response.json()["error"]["message"]
    assert "LOMO_MAX_UPLOAD_BYTES" in response.json()["error"]["message"]


@pytest.fixture
def server_process(site: Site, tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A second server on the same data, as a process of its own: its id and its address. Costs about 2 s."""
    port = reserve_port("127.0.0.1", 0)
    env = {
        **os.environ,
        "LOMO_DATABASE_URL": site.settings.database_url,
        "LOMO_BROKER_URL": site.settings.broker_url,
        "LOMO_DATA_DIR": str(site.settings.data_dir),
        "LOMO_SERVER_PORT": str(port),
    }
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "server"], env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "server.log").read_text()
        try:
            return httpx.get(f"{url}/healthz").status_code == 200
        except httpx.ConnectError:
            return False

    wait_until_true(answers, 60, "the server's process to answer")
    yield process.pid, url
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def memory_bytes(pid: int, name: str) -> int:
    """A line of the kernel's account of a process: `VmRSS`, or `VmHWM`, the highest that it has been."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_upload_of_300_mb_takes_little_memory(site: Site, server_process: tuple[int, str]) -> None:
    pid, url = server_process
    site.url = url
    row = json.dumps({"text": "x" * 16_000}).encode() + b"\n"
    part = row * (60 * MIB // len(row))
    # Once around, so that what any first upload loads is not counted.
    small = create(site)
    assert complete(site, small, add_part(site, small)).status_code == 200
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the highest begins anew
    before = memory_bytes(pid, "VmRSS")
    upload_id = create(site, 5 * len(part))
    with ThreadPoolExecutor(3) as pool:
        part_ids = list(pool.map(lambda _: add_part(site, upload_id, part), range(5)))
    response = site.client(timeout=120).post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids})
    assert response.json()["file"]["num_lines"] == 5 * len(part) // len(row)
    rise = memory_bytes(pid, "VmHWM") - before
    print(f"memory of the server rose by {rise / MIB:.1f} MiB at the most")
    assert rise < 64 * MIB
