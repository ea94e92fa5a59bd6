"""Files of rows: which format a file has, and its rows one at a time, each error with its place, field and cure.

| format     | a row                                                    | what is learnt                     |
|------------|----------------------------------------------------------|------------------------------------|
| chat       | `messages` as OpenAI's fine-tuning takes them, `tools`   | the assistant's messages and calls |
| sharegpt   | `conversations` of `from` and `value`, `tools`           | the same                           |
| alpaca     | `instruction`, `input`, `output`                         | the output                         |
| completion | `prompt`, `completion`                                   | the completion and an end token    |
| text       | `text`                                                   | everything                         |
| plain      | none: the file is one document (`.txt`)                  | everything                         |
| choice     | `messages`, `choices`, `answer` (validation only)        | nothing: accuracy by likelihood    |

A file has one format: the first row decides, unless it is given. Rows are JSON lines or the elements of a JSON array,
and are read one at a time: a file may be larger than memory. Torch-free: a server checks uploads with the same code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lomo_core.config import DataFormat
from lomo_core.data.chat_format import chat_row, choice_row
from lomo_core.data.fields import names_of
from lomo_core.data.json_rows import describe_binary, json_rows, text_pieces
from lomo_core.data.other_formats import alpaca_row, completion_row, sharegpt_row, text_row
from lomo_core.data.rows import Row, RowError, WrongRow
from lomo_core.errors import DataError

# Enough to see the pattern of what is wrong, few enough to read.
MAX_LISTED_ERRORS = 20

_PARSERS: dict[DataFormat, Callable[[dict[str, Any], str], Row]] = {
    "chat": chat_row,
    "choice": choice_row,
    "sharegpt": sharegpt_row,
    "alpaca": alpaca_row,
    "completion": completion_row,
    "text": text_row,
}
# The first whose fields a row has all of is its format.
_FIELDS: tuple[tuple[DataFormat, tuple[str, ...]], ...] = (
    ("choice", ("messages", "choices")),
    ("chat", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("completion", ("prompt", "completion")),
    ("text", ("text",)),
)
_PREFERENCES = (("preferred_output", "non_preferred_output"), ("chosen", "rejected"))


class RowErrors:
    """What is wrong with the rows of a file: the first ones in words, the others as a number."""

    def __init__(self, param: str) -> None:
        self._param = param
        self._listed: list[str] = []
        self.count = 0

    def add(self, wrong: WrongRow) -> None:
        """Note one wrong row."""
        self.count += 1
        if len(self._listed) < MAX_LISTED_ERRORS:
            self._listed.append(f"{wrong.where}: {wrong.reason}")

    def raise_if_any(self) -> None:
        """End with what was noted.

        Raises:
            DataError: there was a wrong row.
        """
        if not self.count:
            return
        head = "1 row is wrong" if self.count == 1 else f"{self.count} rows are wrong"
        if self.count > len(self._listed):
            head += f", the first {len(self._listed)} of them"
        raise DataError(head + ":\n" + "\n".join(self._listed), param=self._param)


class RowReader:
    """The rows of one file, read one at a time; `num_bytes_read` of its `num_bytes` are done.

    Raises:
        DataError: the file cannot be read, or holds no rows of any kind (binary, empty, preferences).
    """

    def __init__(self, path: str | Path, *, data_format: DataFormat = "auto", param: str) -> None:
        self.path = Path(path)
        self.param = param
        self.format = data_format
        if data_format == "auto" and self.path.suffix == ".txt":
            self.format = "plain"
        self.num_bytes_read = 0
        try:
            with self.path.open("rb") as stream:
                self.num_bytes = stream.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._unreadable(error) from error

    def __iter__(self) -> Iterator[Row | WrongRow]:
        """Every row, or what is wrong with it, in the file's order."""
        num_rows = 0
        try:
            with self.path.open("rb") as stream:
                if what := describe_binary(stream):
                    raise DataError(f"line 1: the file is {what}", param=self.param)
                for row in self._rows(stream):
                    self.num_bytes_read = stream.tell()
                    num_rows += 1
                    yield row
        except OSError as error:
            raise self._unreadable(error) from error
        if not num_rows:
            raise DataError("the file is empty: it needs at least one row", param=self.param)

    def has_choices(self) -> bool:
        """Whether the file's first good row has choices: it then measures accuracy."""
        next((row for row in self if not isinstance(row, WrongRow)), None)
        return self.format == "choice"

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"the file cannot be read: {error.strerror}", param=self.param)

    def _rows(self, stream: BinaryIO) -> Iterator[Row | WrongRow]:
        if self.format == "plain":
            yield from text_pieces(stream)
            return
        for where, body in json_rows(stream):
            try:
                if isinstance(body, RowError):
                    raise body
                yield self._row(body, where)
            except RowError as error:
                yield WrongRow(where, str(error))

    def _row(self, body: dict[str, Any], where: str) -> Row:
        if any(all(name in body for name in pair) for pair in _PREFERENCES):
            raise DataError(
                f"{where}: rows of preferences (two answers to compare) are for DPO, which this server does not do: "
                'write the preferred answers as {"messages": [...]}',
                param=self.param,
            )
        found = _format_of(body)
        if self.format == "auto":
            if found is None:
                raise RowError(_unknown(body))
            self.format = found
        if found not in (None, self.format):
            raise RowError(
                f"the format differs from the first row's: this row is {found}, the file is {self.format}; "
                "give one file per format"
            )
        return _PARSERS[self.format](body, where)


def read_rows(source: RowReader) -> list[Row]:
    """All rows of a file that is known to be small.

    Raises:
        DataError: the file cannot be read, is empty, or rows are wrong (the first 20 are listed).
    """
    errors = RowErrors(source.param)
    rows: list[Row] = []
    for row in source:
        if isinstance(row, WrongRow):
            errors.add(row)
        else:
            rows.append(row)
    errors.raise_if_any()
    return rows


def _format_of(body: dict[str, Any]) -> DataFormat | None:
    return next((name for name, fields in _FIELDS if all(field in body for field in fields)), None)


def _unknown(body: dict[str, Any]) -> str:
    known = "; ".join(", ".join(fields) for _, fields in _FIELDS)
    return f"no known format has the row's fields ({names_of(body)}): a row has the fields {known}"
