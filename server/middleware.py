"""What every request passes before a route sees it: pure ASGI, so that streams pass through unbuffered.

From the outside in: `RequestContext` (request id, security headers, one log line), `Gate` (host, encodings, NUL),
`BodyLimit` (bytes counted while they arrive, also where no length was announced).
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.files import MAX_FILE_BYTES
from jobs.uploads import MAX_PART_BYTES
from server.errors import ApiError, error_response, too_large
from server.prometheus import Metrics

# The largest JSON body is a job with 16 pairs of metadata, some 20 KB; 1 MiB is generous and cheap.
MAX_JSON_BYTES = 1024 * 1024
# The multipart frame around a file: boundaries, headers, the other fields.
MAX_UPLOAD_BYTES = MAX_FILE_BYTES + 1024 * 1024
MAX_PART_UPLOAD_BYTES = MAX_PART_BYTES + 1024 * 1024
# A client that sends nothing for this long in the middle of a body holds a connection for no good.
_BODY_SILENCE_S = 30.0
_UPLOAD_PATH = "/v1/files"
_PART_PATH = re.compile(r"/v1/uploads/[^/]+/parts")
# Probes come by address, not by name, and learn nothing worth protecting.
_PROBES = frozenset({"/healthz", "/readyz"})
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MAX_LENGTH_DIGITS = 20  # of 2**64
# A path longer than this was not written by people; it would only fill the log.
_MAX_LOGGED_PATH_CHARS = 200

RATE_HEADERS = "rate_headers"
"""Where in a request's state the headers lie that say how many more its key may send (`server/rate_limit.py`)."""

# In metrics: what no route took, and methods that nobody defines, which a stranger could make up without end.
_NO_ROUTE, _OTHER_METHOD = "none", "OTHER"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    # Not no-referrer: with it browsers send `Origin: null` on form posts, and the origin is what we check.
    "referrer-policy": "same-origin",
}

log = structlog.get_logger("server.access")


class RequestContext:
    """Gives each request an id, each response the security headers, and the log one line for both."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        # Never unbound: a request has a task, and so a context, of its own; uvicorn logs tracebacks in it.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = time.monotonic()
        status, start_s = 0, None

        async def send_with_headers(message: Message) -> None:
            nonlocal status, start_s
            if message["type"] == "http.response.start":
                status, start_s = message["status"], time.monotonic() - started
                headers = MutableHeaders(scope=message)
                complete_headers(headers, scope["path"], request_id)
                for name, value in scope["state"].get(RATE_HEADERS, {}).items():
                    headers[name] = value
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", _NO_ROUTE)
            method = scope["method"] if scope["method"] in _METHODS else _OTHER_METHOD
            self._metrics.note_request(method=method, route=route, status=status, start_s=start_s)
            say = log.debug if scope["path"] in _PROBES else log.info
            say(
                "request",
                method=scope["method"],
                path=scope["path"][:_MAX_LOGGED_PATH_CHARS],
                # 0: the route failed before it answered, or the client left.
                status=status,
                ms=round((time.monotonic() - started) * 1000, 1),
            )


class Gate:
    """Turns away what no route should have to think of."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: frozenset[str]) -> None:
        self.app = app
        self._allowed_hosts = allowed_hosts | _LOCAL_HOSTS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        error = self._find_fault(scope) if scope["type"] == "http" else None
        if error is not None:
            await error_response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _find_fault(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        # Of two, this server and a proxy before it may not believe the same one.
        host = _without_port(",".join(headers.getlist("host")))
        # A page of another site that points its own name at this address (DNS rebinding) still names itself here.
        if scope["path"] not in _PROBES and host not in self._allowed_hosts and "*" not in self._allowed_hosts:
            message = "This server is not known by that host name; LOMO_ALLOWED_HOSTS lists the names it answers to."
            return ApiError(400, message, code="unknown_host")
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return ApiError(400, "The address holds a NUL character.", code="invalid_value")
        # Nothing is ever unpacked here, so nothing can explode.
        if headers.get("transfer-encoding", "chunked").lower() != "chunked":
            return ApiError(
                415, "Send the body without a Transfer-Encoding but chunked.", code="unsupported_media_type"
            )
        if headers.get("content-encoding", "identity") != "identity":
            return ApiError(415, "Send the body without Content-Encoding.", code="unsupported_media_type")
        return None


class BodyLimit:
    """Ends a request whose body is too large or too slow, while it arrives."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with a counted body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = _max_body_bytes(scope)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:_MAX_LENGTH_DIGITS]) > limit:
            await error_response(_too_large(limit))(scope, receive, send)
            return
        body = _CountedBody(receive, limit)
        has_endless_body = "transfer-encoding" in Headers(scope=scope)

        async def send_or_hang_up(message: Message) -> None:
            # Uvicorn reads on what a route did not want. Where no length was announced that has no end.
            if message["type"] == "http.response.start" and has_endless_body and not body.has_ended:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self.app(scope, body, send_or_hang_up)


class _CountedBody:
    """`receive` with a limit on the body's bytes, and on silence until the body has ended."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._num_bytes = 0
        self.has_ended = False

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            ApiError: 413 beyond the limit, 408 after too long a silence.
        """
        if self.has_ended:
            return await self._receive()
        try:
            async with asyncio.timeout(_BODY_SILENCE_S):
                message: dict[str, Any] = dict(await self._receive())
        except TimeoutError as error:
            raise ApiError(408, "The request's body did not arrive.", code="request_timeout") from error
        self._num_bytes += len(message.get("body", b""))
        self.has_ended = not message.get("more_body", False)
        if self._num_bytes > self._limit:
            raise _too_large(self._limit)
        return message


def _max_body_bytes(scope: Scope) -> int:
    if scope["method"] == "POST" and scope["path"] == _UPLOAD_PATH:
        return MAX_UPLOAD_BYTES
    if scope["method"] == "POST" and _PART_PATH.fullmatch(scope["path"]):
        return MAX_PART_UPLOAD_BYTES
    return MAX_JSON_BYTES


def _too_large(limit: int) -> ApiError:
    """The refusal of a body; of a file's with the way that larger ones go."""
    return too_large(limit, advice=": send the file in parts, by POST /v1/uploads" if limit == MAX_UPLOAD_BYTES else "")


def new_request_id() -> str:
    """The id of one request, in its response and in the log."""
    return f"req_{secrets.token_hex(12)}"


def complete_headers(headers: MutableHeaders, path: str, request_id: str) -> None:
    """What every response has."""
    headers["x-request-id"] = request_id
    for name, value in _SECURITY_HEADERS.items():
        headers[name] = value
    if path.startswith("/assets/"):
        # The names hold no hash, so the browser asks each time and is answered 304.
        headers["cache-control"] = "no-cache"
    else:
        headers.setdefault("cache-control", "no-store")


def _without_port(host: str) -> str:
    """The name in a Host header, in lower case."""
    name, separator, port = host.lower().rpartition(":")
    return name if separator and port.isdecimal() else host.lower()
