"""Whether an uploaded file can be trained on: JSON lines, a JSON array of objects, or plain text.

What the fields of a row must be is left to the engine, which knows the formats; here a file is read once, in bounded
memory, so that what could never be read is refused while its uploader waits.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path, PurePath
from typing import BinaryIO

import orjson

from jobs.errors import InvalidRequestError
from lomo_core.data.fields import MAX_DEPTH, depth_exceeds
from lomo_core.data.json_rows import array_elements, describe_binary, is_array, read_line
from lomo_core.data.rows import RowError

# Ten times the largest public chat sets; the check of a job's files keeps 20 bytes of each.
MAX_ROWS = 16_000_000
# A training row is a conversation; 4 MB of JSON is some million tokens, beyond any context length.
MAX_LINE_BYTES = 4 * 1024 * 1024
_HALF = re.compile(rb"\\u[dD][89abAB]")
_HALF_PAIR = r"not valid JSON (it holds half of a surrogate pair, an escape such as \ud83d alone)"
_CHUNK_BYTES = 1024 * 1024
_UTF8_BOM = b"\xef\xbb\xbf"


def count_rows(path: Path, *, filename: str) -> int | None:
    """Rows of the file at `path`, or None if it is plain text, which the uploader's `filename` says by ending in .txt.

    JSON lines: one object per line, UTF-8, no line over 4 MB, at least one line. A JSON array: of objects, at least
    one. Plain text: UTF-8, not blank.

    Raises:
        InvalidRequestError: it is none of these; names the line.
    """
    with path.open("rb") as stream:
        if what := describe_binary(stream):
            raise _refused(f"The file is {what}.")
        if PurePath(filename).suffix.lower() == ".txt":
            _check_text(stream)
            return None
        num_rows = _count_elements(stream) if is_array(stream) else _count_lines(stream)
    if num_rows == 0:
        raise _refused("The file is empty: it has no rows.")
    if num_rows > MAX_ROWS:
        raise _refused(f"The file has {num_rows} rows, more than {MAX_ROWS}: give fewer.")
    return num_rows


def until_row(parts: Iterator[bytes], num_rows: int) -> Iterator[bytes]:
    """The parts of a file until one line more than `num_rows` has ended; of an array all of them."""
    num_found, rest, is_lines = 0, b"", True
    for number, part in enumerate(parts):
        yield part
        if number == 0 and is_array(BytesIO(part)):
            is_lines = False
        if is_lines:
            *lines, rest = (rest + part).split(b"\n")
            num_found += sum(1 for line in lines if line.strip())
            if num_found > num_rows:
                return


def _count_lines(stream: BinaryIO) -> int:
    lines = _LineChecker()
    for chunk in iter(partial(stream.read, _CHUNK_BYTES), b""):
        lines.feed(chunk)
    lines.close()
    return lines.num_lines


def _count_elements(stream: BinaryIO) -> int:
    num_rows = 0
    for where, row in array_elements(stream, max_row_bytes=MAX_LINE_BYTES):
        if isinstance(row, RowError):
            raise _refused(f"{where.capitalize()}: {row}. The file is a JSON array: its elements must be objects.")
        if depth_exceeds(row, MAX_DEPTH):
            raise _refused(f"{where.capitalize()} is nested deeper than {MAX_DEPTH} levels.")
        num_rows += 1
    return num_rows


def _check_text(stream: BinaryIO) -> None:
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    is_blank = True
    try:
        for chunk in iter(partial(stream.read, _CHUNK_BYTES), b""):
            is_blank = not utf8.decode(chunk).strip() and is_blank
        utf8.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _refused("The file is not UTF-8: save it as UTF-8 text.") from error
    if is_blank:
        raise _refused("The file has no text.")


def _fault_of(line: bytes) -> str | None:
    """What is wrong with a line, in the words of the reader that the check of a job has; None: it reads the line, since
    it is less strict than the parser that is fast."""
    try:
        read_line(line, is_first=False)
    except RowError as error:
        return str(error)
    return _HALF_PAIR if _HALF.search(line) else None


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_file_format", param="file")


class _LineChecker:
    """Checks JSON lines as their bytes pass; holds one line at the most. Faster by far than reading an array."""

    def __init__(self) -> None:
        self.num_lines = 0
        """Lines that hold a row."""
        self._line_number = 0
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes and check the lines that they complete."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._check(line)
        if len(self._rest) > MAX_LINE_BYTES:
            self._check(self._rest)

    def close(self) -> None:
        """Check the last line."""
        self._check(self._rest)

    def _check(self, line: bytes) -> None:
        self._line_number += 1
        line = line.removeprefix(_UTF8_BOM).strip() if self._line_number == 1 else line.strip()
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise self._error(f"is longer than {MAX_LINE_BYTES // 2**20} MiB")
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise self._error(f"is {_fault_of(line) or f'not valid JSON ({error})'}") from error
        if not isinstance(row, dict):
            raise self._error("is not a JSON object")
        if depth_exceeds(row, MAX_DEPTH):
            raise self._error(f"is nested deeper than {MAX_DEPTH} levels")
        self.num_lines += 1

    def _error(self, what: str) -> InvalidRequestError:
        return _refused(f"Line {self._line_number} {what}. A training file holds one JSON object per line.")
