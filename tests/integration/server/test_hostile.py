"""What strangers send: never a 5xx, never a traceback, never more memory than the limits say."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from server import http_protocol, middleware
from server.settings import ServerSettings

from .conftest import MODEL, TRAIN_ROW, Site, WaitUntil, running_site

CREATE = "/v1/fine_tuning/jobs"
MIB = 2**20
MULTIPART = "multipart/form-data; boundary=b"

BODIES = [
    b"",
    b"{}",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b'{"model":"tiny","training_file":"f","seed":NaN}',
    b'{"model":"tiny","training_file":"f","lomo":{"learning_rate":NaN}}',
    b'{"model":"tiny","training_file":"f","lomo":{"learning_rate":1e400}}',
    b'{"model":"tiny","training_file":"f","lomo":{"learning_rate":-Infinity}}',
    b'{"model":"tiny","training_file":"f","seed":' + b"9" * 5000 + b"}",
    b'{"model":"tiny","training_file":"f","seed":9223372036854775808}',
    b'{"model":"tiny\\u0000","training_file":"f"}',
    b'{"model":"tiny","training_file":"f\\u0000"}',
    b'{"model":"tiny","training_file":"f","suffix":"\\ud800"}',
    b'{"model":"tiny","training_file":"f","metadata":{"\\u0000":"x"}}',
    b'{"model":"tiny","training_file":"f","metadata":{"a":"\xff\xfe"}}',
    b'{"model":"tiny","model":"tiny","training_file":"f"}',
    b'{"model":"../../etc","training_file":"f"}',
    b'{"model":"/etc/passwd","training_file":"f"}',
    b'{"model":"file:///etc","training_file":"f"}',
    b'{"model":"..\\\\..\\\\x","training_file":"f"}',
    b'{"model":"tiny; touch /tmp/x","training_file":"f"}',
    b'{"model":"$(id)","training_file":"f"}',
    b'{"model":"tiny\\n","training_file":"f"}',
    b'{"model":"ft:","training_file":"f"}',
    b'{"model":"tiny","training_file":"../../../etc/passwd"}',
    b'{"model":"tiny","training_file":"f","lomo":' + b'{"a":' * 100 + b"1" + b"}" * 101,
    b'{"model":"tiny","training_file":"f","lomo":' + b"[" * 100_000,
    b'{"model":"tiny","training_file":"f","lomo":{"optimizer":{"a":[]}}}',
    b'{"model":"tiny","training_file":"f","lomo":{"clip":null}}',
    b'{"model":"tiny","training_file":"f","__proto__":{"x":1}}',
    b"model=tiny&training_file=f",
    b"\x00\x01\x02",
    b"\xef\xbb\xbf{}",
]


def test_create_refuses(site: Site, subtests: pytest.Subtests) -> None:
    for body in BODIES:
        with subtests.test(body=repr(body)[:60]):
            response = site.client().post(CREATE, content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 400
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert 0 < len(error["message"]) < 500
            assert "Traceback" not in response.text
            assert "/etc/passwd" not in (error["param"] or "")


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", ""])
def test_json_is_json_whatever_it_is_called(site: Site, content_type: str) -> None:
    """`curl -d` without a header says that it sends a form."""
    body = json.dumps({"model": "tiny", "training_file": site.upload()})
    response = site.client().post(CREATE, content=body, headers={"Content-Type": content_type})
    assert response.status_code == 200, response.text


WRONG_ADDRESSES = [
    "/v1/fine_tuning/jobs/%00",
    "/v1/fine_tuning/jobs/x%00y/events",
    "/v1/files/%00/content",
    "/v1/models/%00",
    "/v1/files?after=%00",
    "/v1/files?purpose=%00",
    "/v1/fine_tuning/jobs?metadata%5B%00%5D=x",
    "/v1/fine_tuning/jobs?metadata[a]=%00",
    "/v1/fine_tuning/jobs?metadata=x",
    "/v1/fine_tuning/jobs?metadata[a=x",
    "/v1/fine_tuning/jobs?metadata=null&metadata[a]=x",
    "/v1/fine_tuning/jobs?limit=0",
    "/v1/fine_tuning/jobs?limit=-1",
    "/v1/fine_tuning/jobs?limit=1e3",
    "/v1/fine_tuning/jobs?limit=" + "9" * 5000,
    "/v1/fine_tuning/jobs?stream=perhaps",
    "/v1/files?limit=10001",
    "/v1/files?order=up",
    "/v1/fine_tuning/jobs?metadata[a]=1&metadata[a]=2",
]


def test_wrong_addresses_are_400(site: Site, subtests: pytest.Subtests) -> None:
    for path in WRONG_ADDRESSES:
        with subtests.test(path=repr(path)[:60]):
            response = site.client().get(path)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["type"] == "invalid_request_error"


STRANGE_ADDRESSES = [
    "/v1/fine_tuning/jobs/%ff",
    "/v1/fine_tuning/jobs/%ed%a0%80",
    "/v1/fine_tuning/jobs/' OR 1=1 --",
    "/v1/fine_tuning/jobs/%2e%2e%2f%2e%2e",
    "/v1/fine_tuning/jobs/" + "x" * 10_000,
    "/v1/files/..%2f..%2fetc%2fpasswd/content",
    "/v1/files/%252e%252e%252fetc/content",
    "/v1/files/..%5c..%5cetc/content",
    "/v1/models/../../etc/passwd",
    "/v1/models/%2e%2e/%2e%2e",
    "/v1/models/file:///etc/passwd",
    "/v1/models/",
    "/v1/files/",
    "/v1/fine_tuning/jobs?after=%ff",
    "/v1/files?after=file-none",
    "/v1/nothing",
    "//v1/files",
    "/v1/embeddings",
    "/docs",
]


def test_strange_addresses_are_404(site: Site, subtests: pytest.Subtests) -> None:
    for path in STRANGE_ADDRESSES:
        with subtests.test(path=repr(path)[:60]):
            parts = urlsplit(site.url)
            with socket.create_connection((parts.hostname, parts.port)) as connection:
                request = f"GET {path.replace(' ', '%20')} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                connection.sendall(f"{request}Authorization: Bearer {site.key}\r\n\r\n".encode())
                reply = b"".join(iter(lambda: connection.recv(65536), b""))
            head, _, body = reply.partition(b"\r\n\r\n")
            assert b" 404 " in head.splitlines()[0], reply[:300]
            assert json.loads(body)["error"]["code"] in {"not_found", "model_not_found"}


def test_wrong_method_is_405_and_says_which_are_right(site: Site) -> None:
    response = site.client().put("/v1/files")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "GET, POST"
    model = site.client().post(f"/v1/models/{MODEL}")
    assert (model.status_code, model.headers["allow"]) == (405, "DELETE, GET")


BAD_FILES = [
    b"",
    b"\n\n",
    b"not json\n",
    b"[1]\n",
    b'{"a":NaN}\n',
    b'{"a":"\\ud800"}\n',
    b'{"\\ud800":1,"\\ud800":2}\n',
    b'[{"\\ud800":1,"\\ud800":2}]',
    b'{"a":"\xff"}\n',
    b"{" + b'"a":{' * 100 + b"}" * 101 + b"\n",
    b'{"a":' + b"[" * 200_000 + b"\n",
    b'{"a":"' + b"x" * (4 * MIB) + b'"}\n',
]


def test_upload_refuses(site: Site, subtests: pytest.Subtests) -> None:
    for content in BAD_FILES:
        with subtests.test(content=repr(content)[:60]):
            response = site.client().post(
                "/v1/files", files={"file": ("x.jsonl", content)}, data={"purpose": "fine-tune"}, timeout=30
            )
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "file"
            assert list(site.settings.files_dir.iterdir()) == []


BAD_FIELDS = [
    ({}, "purpose"),
    ({"purpose": ""}, "purpose"),
    ({"purpose": "fine-tune-results"}, "purpose"),
    ({"purpose": "x\0"}, "purpose"),
    ({"purpose": "fine-tune", "expires_after": "3600"}, "expires_after"),
    ({"purpose": "fine-tune", "expires_after[anchor]": "created_at"}, "expires_after.seconds"),
    ({"purpose": "fine-tune", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
    *(
        ({"purpose": "fine-tune", "expires_after[anchor]": anchor, "expires_after[seconds]": seconds}, param)
        for anchor, seconds, param in (
            ("last_active_at", "3600", "expires_after.anchor"),
            ("created_at", "3599", "expires_after.seconds"),
            ("created_at", "2592001", "expires_after.seconds"),
            ("created_at", "-3600", "expires_after.seconds"),
            ("created_at", "3600.0", "expires_after.seconds"),
            ("created_at", "\u0663\u0666\u0660\u0660", "expires_after.seconds"),
            ("created_at", "9" * 5000, "expires_after.seconds"),
            ("created_at", "", "expires_after.seconds"),
        )
    ),
]


def test_upload_fields(site: Site, subtests: pytest.Subtests) -> None:
    for data, param in BAD_FIELDS:
        with subtests.test(data=repr(data)[:60]):
            response = site.client().post("/v1/files", files={"file": ("x.jsonl", TRAIN_ROW)}, data=data)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)


BAD_FORMS = [
    ("multipart/form-data", b""),
    (MULTIPART, b"no parts"),
    (
        "multipart/form-data; boundary=b",
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--b--\r\n',
    ),
    (MULTIPART, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
    (
        "multipart/form-data; boundary=b",
        (b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 50) + b"--b--",
    ),
    ("application/json", b"{}"),
    ("application/x-www-form-urlencoded", b"file=x&purpose=fine-tune"),
    ("application/x-www-form-urlencoded", b"&".join(b"a%d=" % number for number in range(10_000))),
]


def test_upload_forms(site: Site, subtests: pytest.Subtests) -> None:
    for content_type, body in BAD_FORMS:
        with subtests.test(content_type=repr(content_type)[:60]):
            response = site.client().post("/v1/files", content=body, headers={"Content-Type": content_type})
            assert response.status_code == 400, response.text
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_uploaders_name_is_never_a_path(site: Site) -> None:
    response = site.client().post(
        "/v1/files", files={"file": ("../../../evil.jsonl", TRAIN_ROW)}, data={"purpose": "fine-tune"}
    )
    file = response.json()
    assert file["filename"] == "evil.jsonl"
    assert [path.name for path in site.settings.files_dir.iterdir()] == [file["id"]]


def test_content_is_a_download(site: Site) -> None:
    page = b"<script>alert(1)</script>"
    file = site.client().post(
        "/v1/files", files={"file": ('<img src=x>"\r\nX: y.html', page, "text/html")}, data={"purpose": "user_data"}
    )
    response = site.client().get(f"/v1/files/{file.json()['id']}/content")
    assert response.content == page
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"].startswith("attachment;")
    assert "x" not in response.headers


def test_the_head_of_a_file_tells_its_length(site: Site) -> None:
    content = f"/v1/files/{site.upload(TRAIN_ROW)}/content"
    head, whole = site.client().head(content), site.client().get(content)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-disposition", "accept-ranges", "etag"):
        assert head.headers[name] == whole.headers[name]
    part = site.client().head(content, headers={"Range": "bytes=0-9"})
    assert (part.status_code, part.headers["content-length"]) == (206, "10")
    assert site.client().head("/v1/files/file-none/content").status_code == 404


def test_ranges_of_a_file_are_bounded(site: Site) -> None:
    file_id = site.upload()
    ranges = "bytes=" + ",".join(f"{number}-{number}" for number in range(5_000))
    response = site.client().get(f"/v1/files/{file_id}/content", headers={"Range": ranges})
    assert response.status_code < 500


@pytest.mark.parametrize(
    "header",
    ["bytes=5-1", "bytes=a-b", "lines=0-1", "bytes=", "bytes=-", "bytes=0-" + "9" * 5000, "bytes=\u0663-", "bytes=--1"],
)
def test_a_range_that_is_none_is_left_out(site: Site, header: str) -> None:
    path = f"/v1/files/{site.upload()}/content"
    response = site.client().get(path, headers={"Range": header.encode()})
    assert (response.status_code, response.content) == (200, TRAIN_ROW)


def test_a_range_beyond_the_file(site: Site) -> None:
    path = f"/v1/files/{site.upload()}/content"
    response = site.client().get(path, headers={"Range": "bytes=0-1, -3"})
    assert response.status_code == 206
    response = site.client().get(path, headers={"Range": "bytes=-5"})
    assert (response.status_code, response.content) == (206, TRAIN_ROW[-5:])
    response = site.client().get(path, headers={"Range": f"bytes=0-1, {len(TRAIN_ROW)}-"})
    assert (response.status_code, response.content) == (200, TRAIN_ROW)
    for header in (f"bytes={len(TRAIN_ROW)}-", "bytes=-0"):
        response = site.client().get(path, headers={"Range": header})
        assert (response.status_code, response.json()["error"]["code"]) == (416, "range_not_satisfiable")
        assert response.headers["content-range"] == f"bytes */{len(TRAIN_ROW)}"


@pytest.mark.parametrize("header", [b"a", b"a: b\r\n"], ids=["one without end", "many"])
def test_a_head_without_end_is_cut_off(site: Site, header: bytes) -> None:
    parts = urlsplit(site.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
        reply, sent = b"", 0
        with contextlib.suppress(ConnectionError):  # it may hang up while we send
            # The kernel takes some MiB before the server has read any.
            while sent < 64 * MIB and not select.select([connection], [], [], 0)[0]:
                sent += connection.send(header * 4096)
            reply = connection.recv(4096)
    assert sent < 64 * MIB
    assert reply.startswith(b"HTTP/1.1 400 ") or not reply


def test_a_head_is_counted_anew_for_each_request(site: Site) -> None:
    client = site.client()
    for _ in range(8):
        assert client.get("/v1/models", headers={"X-Long": "a" * 20_000}).status_code == 200


def answer_to(site: Site, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes back for bytes that no client library would send."""
    parts = urlsplit(site.url)
    reply = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(raw)
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                reply += data
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


HEAD = b"Host: localhost\r\nConnection: close\r\n"
UNREADABLE = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + b"\0" * 100,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "zero byte in a header": b"GET /v1/files HTTP/1.1\r\n" + HEAD + b"X: a\0b\r\n\r\n",
    "bytes in the address": b"GET /v1/files/\xff HTTP/1.1\r\n" + HEAD + b"\r\n",
    "wrong chunk": b"POST /v1/files HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "two lengths": b"POST /v1/files HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "length and chunks": b"POST /v1/files HTTP/1.1\r\n"
    + HEAD
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "too large": b"GET /v1/files HTTP/1.1\r\nX: " + b"a" * MIB,
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_no_request_is_answered_as_every_error_is(site: Site, what: str) -> None:
    status, headers, body = answer_to(site, UNREADABLE[what])
    assert status == 400
    assert headers["x-request-id"].startswith("req_")
    assert headers["x-content-type-options"] == "nosniff"
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("start", [b"", b"GET /v1/fi"], ids=["nothing", "half a head"])
def test_a_head_that_does_not_come(site: Site, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    status, _, body = answer_to(site, start)
    assert (status, json.loads(body)["error"]["code"]) == (408, "request_timeout")


def test_more_connections_than_may_be(settings: ServerSettings, wait_until: WaitUntil) -> None:
    with running_site(settings.model_copy(update={"max_connections": 3}), wait_until) as site:
        parts = urlsplit(site.url)
        request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        with socket.create_connection((parts.hostname, parts.port)) as first:
            first.sendall(b"GET /")
            assert answer_to(site, request)[0] == 200
            with socket.create_connection((parts.hostname, parts.port)) as second:
                second.sendall(b"GET /")
                status, headers, body = answer_to(site, request)
        assert (status, json.loads(body)["error"]["code"]) == (503, "overloaded")
        assert headers["x-request-id"].startswith("req_")
        assert headers["retry-after"] == "5"
        wait_until(lambda: answer_to(site, request)[0] == 200, 30, "the connections to be given back")


def test_a_second_head_that_does_not_come(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    parts = urlsplit(site.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(65536).splitlines()[0]
        connection.sendall(b"GET /he")
        assert b" 408 " in connection.recv(65536).splitlines()[0]


@pytest.mark.parametrize(
    ("header", "status"), [(b"Host: localhost\r\n", 400), (b"Transfer-Encoding: gzip, chunked\r\n", 415)]
)
def test_headers_that_proxies_may_read_otherwise(site: Site, header: bytes, status: int) -> None:
    answered, _, body = answer_to(site, b"POST /v1/files HTTP/1.1\r\n" + HEAD + header + b"\r\n0\r\n\r\n")
    assert answered == status, body


def test_announced_body_too_large(site: Site) -> None:
    response = site.client().post(CREATE, content=b"x" * (MIB + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert response.headers["connection"] == "close"


def test_a_file_too_large_for_one_request_is_told_the_other_way(site: Site) -> None:
    # The length that is announced is what counts; nothing of the body is sent.
    parts = urlsplit(site.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        request = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {600 * MIB}\r\n"
        connection.sendall(f"{request}Authorization: Bearer {site.key}\r\n\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"in parts, by POST /v1/uploads" in reply


def send_chunks(site: Site, path: str, head: bytes, *, num_mib: int) -> tuple[bytes, int]:
    """Send a chunked body of unknown length. Returns what was answered, and how many MiB had been taken by then."""
    parts = urlsplit(site.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {site.key}\r\n".encode()
            + b"Transfer-Encoding: chunked\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
            + b"%x\r\n%b\r\n" % (len(head), head)
        )
        chunk = b"%x\r\n%b\r\n" % (MIB, b"x" * MIB)
        sent = 0
        try:
            for _ in range(num_mib):
                connection.sendall(chunk)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
        try:
            reply = connection.recv(65536)
        except ConnectionResetError:
            reply = b""
    return reply, sent


def test_chunked_body_too_large(site: Site) -> None:
    reply, _ = send_chunks(site, CREATE, b"{", num_mib=3)
    assert not reply or b" 413 " in reply.splitlines()[0]
    assert site.client().get("/healthz").status_code == 200


def test_chunked_upload_too_large_takes_no_memory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_UPLOAD_BYTES", 64 * MIB)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    process = psutil.Process()
    before = process.memory_info().rss
    reply, sent = send_chunks(site, "/v1/files", head, num_mib=200)
    assert not reply or b" 413 " in reply.splitlines()[0]
    assert sent < 200, "the server read on"
    # The server is a thread of this process.
    assert process.memory_info().rss - before < 32 * MIB
    assert not site.settings.files_dir.exists() or not list(site.settings.files_dir.iterdir())


def test_an_upload_without_a_key_is_not_read(site: Site) -> None:
    site.key = "sk-lomo-wrong"
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    reply, sent = send_chunks(site, "/v1/files", head, num_mib=100)
    assert not reply or b" 401 " in reply.splitlines()[0]
    assert sent < 100


def test_compressed_bodies_are_refused(site: Site) -> None:
    response = site.client().post(CREATE, content=b"x", headers={"Content-Encoding": "gzip"})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_a_body_that_does_not_come(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_BODY_SILENCE_S", 0.1)
    parts = urlsplit(site.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        request = f"POST {CREATE} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {site.key}\r\n"
        connection.sendall(f"{request}Content-Length: 10\r\n\r\n".encode())
        assert b" 408 " in connection.recv(65536).splitlines()[0]


def test_a_client_that_leaves_in_the_middle(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    parts = urlsplit(site.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        request = f"POST {CREATE} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {site.key}\r\n"
        connection.sendall(f'{request}Content-Length: 10\r\n\r\n{{"a"'.encode())
    assert site.client().get("/v1/models").status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_hostile_text_comes_back_as_it_is(site: Site) -> None:
    text = "<img src=x onerror=alert(1)>"
    job_id = site.submit(suffix=text, metadata={text: text})
    job = site.get(job_id)
    assert (job["user_provided_suffix"], job["metadata"]) == (text, {text: text})
    run = site.claim(job_id)
    run.message(f"{text}\n\ndata: [DONE]\n\n", "\x1b[31mred", "nul \0 here")
    follower = site.follow_job(job_id)
    follower.wait_for(lambda: len(follower.seqs) == 6, "the events")
    assert [frame.body["message"] for frame in follower.frames[3:]] == [
        f"{text}\n\ndata: [DONE]\n\n",
        "\x1b[31mred",
        "nul \ufffd here",
    ]
    assert isinstance(httpx.Response(200, json=job).json(), dict)
