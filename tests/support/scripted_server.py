"""A scripted HTTP server on loopback: the command talks to it as to a real one, and the test reads what it got."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-lomo-0123456789ab-scripted"


@dataclass(frozen=True)
class Request:
    """What the command sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Response:
    """What to answer. `chunks` is a body without a length; `breaks` leaves it without its end."""

    status: int = 200
    body: Any = None
    chunks: Sequence[bytes] | None = None
    breaks: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None
    """Waited for before the end of the body."""


class ScriptedServer:
    """Answers each `METHOD path` (without its query) by the next of its responses; the last one repeats."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._script: dict[tuple[str, str], list[Response]] = {}
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        """Of the API."""
        return f"http://127.0.0.1:{self._port}/v1"

    def on(self, method: str, path: str, *responses: Response) -> None:
        """Script the answers of a path below /v1, or of the root's where it begins with `//`."""
        self._script[method, path[1:] if path.startswith("//") else f"/v1{path}"] = list(responses)

    def start(self) -> None:
        """Listen, on the same port as before."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                owner._handle(self)

            def do_POST(self) -> None:
                owner._handle(self)

            def do_DELETE(self) -> None:
                owner._handle(self)

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more: a new connection is refused."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        self.requests.append(Request(handler.command, handler.path, dict(handler.headers), body))
        script = self._script.get((handler.command, handler.path.partition("?")[0]))
        if not script:
            error = {"message": "Unknown route.", "type": "invalid_request_error", "param": None, "code": "not_found"}
            _send(handler, Response(404, {"error": error}))
        else:
            _send(handler, script[0] if len(script) == 1 else script.pop(0))


def _send(handler: BaseHTTPRequestHandler, response: Response) -> None:
    body = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
    handler.send_response(response.status)
    for name, value in response.headers.items():
        handler.send_header(name, value)
    if response.chunks is None:
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return
    handler.close_connection = True
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for chunk in response.chunks:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        handler.wfile.flush()
    if response.hold is not None:
        response.hold.wait(30)
    if not response.breaks:
        handler.wfile.write(b"0\r\n\r\n")


def make_job(**changes: Any) -> dict[str, Any]:
    """A job as the server describes it; `lomo` is merged."""
    lomo_changes = changes.pop("lomo", {})
    numbers = {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 1.0}
    return {
        "object": "fine_tuning.job",
        "id": "ftjob-0123456789abcdef01234567",
        "model": "smollm2-135m-instruct",
        "created_at": 1_760_000_000,
        "finished_at": None,
        "fine_tuned_model": None,
        "organization_id": "org-local",
        "result_files": [],
        "status": "queued",
        "validation_file": None,
        "training_file": "file-abc",
        "hyperparameters": numbers,
        "trained_tokens": None,
        "error": None,
        "integrations": [],
        "seed": 42,
        "estimated_finish": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        "metadata": {},
        "lomo": {"optimizer": "lomo", "learning_rate": 0.01, "step": None, "total_steps": None, **lomo_changes},
        **changes,
    }


JOB_ID = make_job()["id"]


def make_event(seq: int, message: str, *, level: str = "info", data: dict[str, Any] | None = None) -> dict[str, Any]:
    """An event of the job above; a step where its data has `step_s`."""
    return {
        "object": "fine_tuning.job.event",
        "id": f"ftevent-0123456789abcdef01234567-{seq}",
        "seq": seq,
        "attempt": 1,
        "created_at": 1_760_000_000 + seq,
        "level": level,
        "message": message,
        "type": "metrics" if data and "step_s" in data else "message",
        "data": data,
    }


def make_step(seq: int, step: int, total_steps: int = 4, **changes: Any) -> dict[str, Any]:
    """A step event."""
    memory = {
        "parameters_bytes": 256 << 20,
        "gradients_bytes": 54 << 20,
        "optimizer_bytes": 1 << 20,
        "activations_bytes": 300 << 20,
        "other_bytes": 700 << 20,
        "peak_bytes": 1311 << 20,
    }
    data = {
        "step": step,
        "total_steps": total_steps,
        "loss": 2.5 / step,
        "step_s": 0.5,
        "tokens_per_s": 812.0,
        "memory": memory,
        **changes,
    }
    return make_event(seq, f"Step {step}/{total_steps}: training loss={2.5 / step:.2f}", data=data)


def frame(event: dict[str, Any]) -> bytes:
    """An event as a server-sent frame."""
    status = (event["data"] or {}).get("status")
    kind = "status" if status else event["type"]
    return f"id: {event['seq']}\nevent: {kind}\ndata: {json.dumps(event)}\n\n".encode()


RETRY = b"retry: 3000\n\n"
DONE = b"data: [DONE]\n\n"
