"""From the bytes of a file to its rows as parsed JSON, or to pieces of plain text, a bounded part at a time.

Rows are JSON lines, or the elements of one JSON array: an array is decoded element by element, so that a file of any
size is read in bounded memory either way. Strict JSON and strict UTF-8. Torch-free.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from lomo_core.data.fields import (
    MAX_DEPTH,
    TOO_DEEP,
    depth_exceeds,
    kind_name,
    parse_float,
    parse_int,
    parse_json,
    refuse_constant,
    refuse_repeats,
)
from lomo_core.data.rows import RowError, TextRow, WrongRow

# A row is read whole; the longest row of public chat sets is below 1 MiB.
MAX_ROW_BYTES = 16 * 1024 * 1024
# A text is tokenised in pieces of this many characters, so that a document of any size is; long enough for the cuts
# (at ends of lines) not to matter.
PIECE_CHARS = 64 * 1024
_CHUNK_BYTES = 256 * 1024
_HEAD_BYTES = 4096
_BOM = b"\xef\xbb\xbf"
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_ARRAY_START = re.compile(rb"\s*\[\s*[{\]]")
_UTF16 = "UTF-16 text: save it as UTF-8"
_NOT_TEXT = {
    b"PK\x03\x04": "a zip archive: unpack it and give the file in it",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"\xfd7zXZ\0": "compressed with xz: unpack it",
    b"BZh91AY&SY": "compressed with bzip2: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it and give the file in it",
    b"Rar!\x1a\x07": "a RAR archive: unpack it and give the file in it",
    b"PAR1": "a Parquet file: write its rows as JSON lines",
    b"ARROW1": "an Arrow file: write its rows as JSON lines",
    b"SQLite format 3\0": "an SQLite database: write its rows as JSON lines",
    b"\x93NUMPY": "a NumPy array: write its rows as JSON lines",
    **dict.fromkeys(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle: write its rows as JSON lines"
    ),
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"), "a picture"),
    b"%PDF-": "a PDF document: give its text",
    b"\xd0\xcf\x11\xe0": "an Office document: give its text",
    b"\x7fELF": "a program",
    b"\xff\xfe\0\0": "UTF-32 text: save it as UTF-8",
    b"\0\0\xfe\xff": "UTF-32 text: save it as UTF-8",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
"""First bytes, the longer before the shorter."""
_TAR_MARK, _TAR_MARK_AT = b"ustar", 257

RawRow = tuple[str, "dict[str, Any] | RowError"]
"""Where the row is, and its object or what is wrong with it."""


def describe_binary(stream: BinaryIO) -> str | None:
    """What a file is that cannot be text, or None; the stream is at its start again afterwards."""
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    for magic, what in _NOT_TEXT.items():
        if head.startswith(magic):
            return what
    if head.startswith(_TAR_MARK, _TAR_MARK_AT):
        return "a tar archive: unpack it and give the file in it"
    if _is_unmarked_utf16(head):
        return _UTF16
    return "not text (it has zero bytes)" if b"\0" in head else None


def _is_unmarked_utf16(head: bytes) -> bool:
    """Whether every other byte is zero, as far as Latin letters go: in one of the two orders, and never in both."""
    num_even, num_odd = head[::2].count(0), head[1::2].count(0)
    return len(head) % 2 == 0 and min(num_even, num_odd) == 0 and 4 * max(num_even, num_odd) > len(head)


def json_rows(stream: BinaryIO) -> Iterator[RawRow]:
    """The rows of JSON lines or of a JSON array, from the start of a stream."""
    return array_elements(stream) if is_array(stream) else _json_lines(stream)


def is_array(stream: BinaryIO) -> bool:
    """Whether a file's rows are the elements of a JSON array; the stream is at its start again afterwards."""
    head = stream.read(_HEAD_BYTES).removeprefix(_BOM)
    stream.seek(0)
    return _ARRAY_START.match(head) is not None


def _json_lines(stream: BinaryIO) -> Iterator[RawRow]:
    for line, raw in _lines(stream):
        try:
            yield f"line {line}", read_line(raw, is_first=line == 1)
        except RowError as error:
            yield f"line {line}", error


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines (from 1), blank ones left out; of a line too long only so much that it is seen to be."""
    line = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        line += 1
        rest = raw
        while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_ROW_BYTES + 1)
        if line == 1:
            raw = raw.removeprefix(_BOM)
        if raw.strip():
            yield line, raw


def read_line(raw: bytes, *, is_first: bool) -> dict[str, Any]:
    """The object of one line.

    Raises:
        RowError: there is none, or it is too long or too deep.
    """
    if len(raw) > MAX_ROW_BYTES:
        raise RowError(_too_long(MAX_ROW_BYTES))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start + 1}): save the file as UTF-8 text") from error
    try:
        body = parse_json(text)
    except RowError as error:
        cure = "; the file must be JSON lines, one object per line" if is_first and str(error) != TOO_DEEP else ""
        raise RowError(f"{error}{cure}") from error
    return _as_object(body)


def _too_long(max_bytes: int) -> str:
    return f"the row is longer than {max_bytes // 2**20} MiB"


def _as_object(body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise RowError(f"expected a JSON object, not {kind_name(body)}")
    if depth_exceeds(body, MAX_DEPTH):
        raise RowError(TOO_DEEP)
    return body


def array_elements(stream: BinaryIO, *, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[RawRow]:
    """The elements of an array. After an error of syntax nothing is known of the rest: it ends there."""
    text = _Window(stream, max_row_bytes)
    number = 0
    try:
        text.skip_white_space()
        text.take("[")
        text.skip_white_space()
        is_over = text.take("]")
        while not is_over:
            number += 1
            text.skip_white_space()
            where = f"row {number} (line {text.line})"
            body = text.decode()
            try:
                yield where, _as_object(body)
            except RowError as error:
                yield where, error
            text.skip_white_space()
            is_over = not text.take(",")
        if number:
            text.require("]", "expected a comma or the array's end")
        text.skip_white_space()
        text.require("", "something comes after the array's end")
    except RowError as error:
        yield f"row {max(number, 1)} (line {text.line})", error


class _Window:
    """A moving window over the text of a stream: what comes next, and its line. Bounded by one row."""

    def __init__(self, stream: BinaryIO, max_row_bytes: int) -> None:
        self._stream = stream
        self._max_row_bytes = max_row_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(
            parse_constant=refuse_constant,
            parse_int=parse_int,
            parse_float=parse_float,
            object_pairs_hook=refuse_repeats,
        )
        self._text = ""
        self._at = 0
        self._is_end = False
        self.line = 1

    def skip_white_space(self) -> None:
        """Move to the next character that is not white space."""
        while True:
            blank = _WHITE_SPACE.match(self._text, self._at)
            assert blank is not None
            self._move(len(blank[0]))
            if self._at < len(self._text) or not self._fill():
                return

    def take(self, char: str) -> bool:
        """Move past `char` if it comes next."""
        if self._text[self._at : self._at + 1] != char:
            return False
        self._move(1)
        return True

    def require(self, char: str, problem: str) -> None:
        """Move past `char` (empty: be at the end), or complain."""
        if self._text[self._at : self._at + 1] != char:
            raise RowError(f"not valid JSON ({problem})")
        self._move(len(char))

    def decode(self) -> Any:
        """The JSON value that comes next; the window grows until it holds the whole of it."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > self._max_row_bytes:
                    raise RowError(f"not valid JSON ({error.msg}), or {_too_long(self._max_row_bytes)}") from error
                if not self._fill():
                    self.line += error.lineno - 1 - self._text.count("\n", 0, self._at)
                    raise RowError(f"not valid JSON ({error.msg})") from error
                continue
            except RecursionError as error:
                raise RowError(TOO_DEEP) from error
            except ValueError as error:
                raise RowError(f"not valid JSON ({error})") from error
            self._move(end - self._at)
            return value

    def _move(self, num_chars: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + num_chars)
        self._at += num_chars

    def _fill(self) -> bool:
        """Read on, as much again as the window holds; False at the end."""
        if self._is_end:
            return False
        self._text = self._text[self._at :]
        self._at = 0
        raw = self._stream.read(max(_CHUNK_BYTES, len(self._text)))
        self._is_end = not raw
        try:
            self._text += self._utf8.decode(raw, final=self._is_end)
        except UnicodeDecodeError as error:
            raise RowError("not UTF-8: save the file as UTF-8 text") from error
        return bool(self._text) or not self._is_end


def text_pieces(stream: BinaryIO) -> Iterator[TextRow | WrongRow]:
    """A file of plain text as pieces of one document, cut at ends of lines."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    text = ""
    line = 1
    is_end = False
    while not is_end:
        raw = stream.read(_CHUNK_BYTES)
        is_end = not raw
        try:
            text += utf8.decode(raw, final=is_end)
        except UnicodeDecodeError:
            yield WrongRow(f"byte {stream.tell() - len(raw) + 1} or later", "not UTF-8: save the file as UTF-8 text")
            return
        while text and (is_end or len(text) > PIECE_CHARS):
            end = cut_of_piece(text)
            piece, text = text[:end], text[end:]
            yield TextRow(f"line {line}", piece, is_end=is_end and not text)
            line += piece.count("\n")


def cut_of_piece(text: str) -> int:
    """Where the first piece of a text ends: after the last line, else after the last word, that fits."""
    if len(text) <= PIECE_CHARS:
        return len(text)
    for separator in ("\n", " "):
        if (end := text.rfind(separator, 0, PIECE_CHARS)) > 0:
            # A word's own space belongs to the word that follows it: so do tokens.
            return end + 1 if separator == "\n" else end
    return PIECE_CHARS
