"""The multipart form of a part: its one field, `data`, goes to disk as it arrives.

Starlette's own reading of forms would keep it in a temporary file first, so that each byte would be written twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import python_multipart
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool

from jobs.errors import InvalidRequestError
from jobs.uploads import IncomingPart

if TYPE_CHECKING:
    # It does not exist at run time.
    from python_multipart.multipart import MultipartCallbacks

# Uvicorn hands on 64 KB at a time; each write is a step into another thread.
_WRITE_BYTES = 1024 * 1024
_FIELD = "data"
_MAX_NAME_CHARS = 64


async def read_part(request: Request, part: IncomingPart) -> None:
    """Write the field `data` of a request's form to a part. Holds a megabyte of it at the most.

    Raises:
        InvalidRequestError: it is not such a form, or the part is too large.
    """
    form = _DataField()
    try:
        parser = python_multipart.MultipartParser(_boundary(request), form.callbacks())
        async for chunk in request.stream():
            parser.write(chunk)
            if len(form.unwritten) >= _WRITE_BYTES:
                await run_in_threadpool(part.write, form.take())
    except FormParserError as error:
        raise _refused("The body is not multipart form data.") from error
    if form.num_seen == 0:
        raise InvalidRequestError(
            "Send the part as multipart form data in the field 'data'.",
            code="missing_required_parameter",
            param=_FIELD,
        )
    if not form.has_ended:
        raise _refused("The form breaks off: its closing boundary is missing.")
    await run_in_threadpool(part.write, form.take())


class _DataField:
    """What the parser calls: keeps the bytes of the field `data` until they are taken, and refuses any other field."""

    def __init__(self) -> None:
        self.unwritten = bytearray()
        self.num_seen = 0
        self.has_ended = False
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""

    def callbacks(self) -> MultipartCallbacks:
        """For the parser."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._check_field,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }

    def take(self) -> bytes:
        """The bytes since the last call."""
        taken = bytes(self.unwritten)
        self.unwritten.clear()
        return taken

    def _begin(self) -> None:
        self._disposition = b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _check_field(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")[:_MAX_NAME_CHARS]
        if name != _FIELD:
            raise InvalidRequestError(
                f"The field {name!r} is not supported: a part has the field 'data' alone.",
                code="unknown_parameter",
                param=name or None,
            )
        self.num_seen += 1
        if self.num_seen > 1:
            raise InvalidRequestError("Send one part per request: the field 'data' comes twice.", param=_FIELD)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self.unwritten += data[start:end]

    def _end(self) -> None:
        self.has_ended = True


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise _refused("The body is not multipart form data with a boundary.")
    return options[b"boundary"]


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{message} Send the part in the field 'data' of a form.", param=_FIELD)
