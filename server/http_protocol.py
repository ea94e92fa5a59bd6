"""HTTP/1.1 as uvicorn speaks it through llhttp (httptools), with the bound on a request's head that neither has.

Without it a stranger could fill the memory with one header that does not end.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and all headers, as uvicorn's other protocol has it; to this comes what one read brings, which is
256 KiB at most."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses a request whose head is too large, with 400, and hangs up."""

    _is_in_head = True
    _num_head_bytes = 0
    _num_arrived_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take what has arrived."""
        self._num_arrived_bytes = len(data)
        super().data_received(data)
        if not self._is_in_head or self.transport.is_closing():
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request's headers are too large.")

    def on_headers_complete(self) -> None:
        """The head has ended, and the body begins."""
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request has ended. What comes next is the head of another, to which what has brought the end of this one
        does not count."""
        self._is_in_head, self._num_head_bytes = True, -self._num_arrived_bytes
        super().on_message_complete()
