"""HTTP/1.1 as uvicorn speaks it through llhttp (httptools), with what it lacks: a bound on a request's head, in bytes
and in time, and errors that look like those of every route.

Without it a stranger could fill the memory with one header that does not end, or hold all connections by heads that
never come.
"""

from __future__ import annotations

import asyncio

import structlog
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import ApiError, error_response
from server.middleware import complete_headers, new_request_id

MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and all headers, as uvicorn's other protocol has it; to this comes what one read brings, which is
256 KiB at most."""
HEAD_TIMEOUT_S = 30.0
"""From the connection, or from a request's first byte, to the end of its head: as long as a body may be silent."""
# A client that keeps nothing open gives its connection back within the 5 s for which uvicorn waits for another request.
_RETRY_AFTER_S = 5

log = structlog.get_logger("server.access")


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses a request whose head is too large, too slow or no HTTP, and hangs up."""

    _is_in_head = True
    _num_head_bytes = 0
    _num_arrived_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """A client is there."""
        # What uvicorn answers beyond the limit is plain text without an id.
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._served_app = self.app
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has arrived."""
        self._num_arrived_bytes = len(data)
        super().data_received(data)
        if not self._is_in_head or self.transport.is_closing():
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request's headers are too large.")
        elif self._num_head_bytes > 0 and self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """The head has ended, and the body begins."""
        self._is_in_head = False
        self._stop_waiting()
        self.app = _overloaded if self._has_too_many() else self._served_app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request has ended. What comes next is the head of another, to which what has brought the end of this one
        does not count."""
        self._is_in_head, self._num_head_bytes = True, -self._num_arrived_bytes
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, and hang up. Called by uvicorn, too."""
        self._refuse(ApiError(400, msg, code="invalid_request"))

    def _has_too_many(self) -> bool:
        """Whether as many connections, or requests, are open as may be: as uvicorn counts them."""
        most = self._max_connections
        return most is not None and (len(self.connections) >= most or len(self.tasks) >= most)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._has_waited)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _has_waited(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # The answer before is still being sent, perhaps a stream of days.
            self._await_head()
            return
        self._refuse(ApiError(408, f"No request came within {HEAD_TIMEOUT_S:g} s.", code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        response = error_response(error)
        request_id = new_request_id()
        complete_headers(response.headers, "", request_id)
        response.headers["connection"] = "close"
        log.info("request_refused", request_id=request_id, status=error.status, reason=error.message)
        head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        self.transport.write(b"".join((STATUS_LINE[error.status], head, b"\r\n", bytes(response.body))))
        self.transport.close()


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    """In place of the application, which never sees the request."""
    headers = {"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"}
    message = "Too many connections to this server are open: try again in a few seconds."
    response = error_response(ApiError(503, message, code="overloaded", headers=headers))
    request_id = new_request_id()
    complete_headers(response.headers, scope["path"], request_id)
    log.warning("overloaded", request_id=request_id)
    await response(scope, receive, send)
