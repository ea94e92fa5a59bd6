"""Base models from the hub: a server that speaks as much of its protocol as the hub's own client needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "onnx/model.safetensors": b"copy",
    "README.md": b"text",
}
FINISH = [["steps", 1], ["finish"]]


class _Hub(BaseHTTPRequestHandler):
    """`/api/models/<id>/revision/main` and `/api/models/<id>/tree/<commit>` list the files of a model;
    `/<id>/resolve/<commit>/<file>` is one of them."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/api/models/some/model/revision/"):
            listing = {"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": file} for file in FILES]}
            self._send(json.dumps(listing).encode(), kind="application/json")
        elif path.startswith(f"/api/models/some/model/tree/{COMMIT}"):
            entries = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(body),
                    "oid": hashlib.sha1(body, usedforsecurity=False).hexdigest(),
                }
                for file, body in FILES.items()
            ]
            self._send(json.dumps(entries).encode(), kind="application/json")
        elif path.startswith("/some/model/") and name in FILES:
            self._send(FILES[name], kind="application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, body: bytes, *, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on a free port, named to the worker's downloads by the hub's own variable."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("hub")
def test_a_model_of_the_hub_is_fetched_without_code_and_pickles(bench: Any) -> None:
    job_id = bench.submit(FINISH, model="some/model")
    bench.node(hub_models=("some/*", "no/such")).work()
    assert bench.job(job_id).status == "succeeded", bench.messages(job_id)
    assert "Downloading some/model from the Hugging Face hub." in bench.messages(job_id)
    run = json.loads((bench.folder(job_id) / "attempt-1" / "run.json").read_text(encoding="utf-8"))
    snapshot = bench.settings.data_dir / "hub" / "models--some--model" / "snapshots" / COMMIT
    assert run["model_path"] == str(snapshot)
    assert sorted(path.name for path in snapshot.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.usefixtures("hub")
def test_a_model_that_the_hub_lacks_is_the_users_error(bench: Any) -> None:
    job_id = bench.submit(FINISH, model="no/such")
    bench.node(hub_models=("some/*", "no/such")).work()
    error = bench.job(job_id).error
    assert (error["code"], error["param"]) == ("model_download_failed", "model")
    assert "The hub has no model no/such" in error["message"]


def test_a_hub_out_of_reach_is_said_in_one_sentence(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    job_id = bench.submit(FINISH, model="some/model")
    bench.node(hub_models=("some/*", "no/such")).work()
    error = bench.job(job_id).error
    assert error["code"] == "model_download_failed"
    assert "could not be downloaded" in error["message"]
    assert "\n" not in error["message"]


def test_the_hub_is_asked_only_where_it_is_allowed(bench: Any) -> None:
    job_id = bench.submit(FINISH, model="some/model")
    bench.node().work()
    assert bench.job(job_id).error["code"] == "model_not_found"
