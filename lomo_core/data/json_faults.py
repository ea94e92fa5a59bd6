"""What keeps a line from being JSON, in words: a parser says where it gave up, which is seldom what went wrong.

The list is of what people send: files of another kind, exports of spreadsheets and of Python, joined and cut files.
Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_SINGLE_QUOTE = re.compile(r"[\[{]\s*'")
_COMMENTS = ("#", "//", "/*")
# Where other programs end a line and JSON lines do not: CR, vertical tab, form feed, NEL, U+2028, U+2029.
_OTHER_ENDS = re.compile("[\r\x0b\x0c\x85\u2028\u2029]")


def hint(text: str, error: json.JSONDecodeError) -> str:
    """The cure for a line that is no JSON, with a colon before it; empty where nothing more can be said."""
    for is_it, cure in _FAULTS:
        if is_it(text, error):
            return f": {cure}"
    return ""


def _follows(text: str, error: json.JSONDecodeError, char: str) -> bool:
    """Whether a whole value is followed by `char`."""
    return error.msg == "Extra data" and text[error.pos :].startswith(char)


def _has_other_ends(text: str, error: json.JSONDecodeError) -> bool:
    return error.msg == "Extra data" and _OTHER_ENDS.search(text[: error.pos + 1].strip("\r\n")) is not None


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def _has_comma_too_many(text: str, error: json.JSONDecodeError) -> bool:
    return text[: error.pos].rstrip().endswith(",") and text[error.pos : error.pos + 1] in ("}", "]")


# The first that applies is told.
_FAULTS: tuple[tuple[Callable[[str, json.JSONDecodeError], bool], str], ...] = (
    (lambda text, _: "\0" in text, "it holds zero bytes: the file is damaged, or not text"),
    (
        lambda text, _: text.startswith("\ufeff"),
        "a byte order mark stands before the row (files were joined): take it out",
    ),
    (
        lambda text, _: text.lstrip().startswith("<"),
        "this is HTML or XML, perhaps a page that tells why a download failed",
    ),
    (lambda text, _: text.lstrip().startswith(_COMMENTS), "JSON has no comments: take the line out"),
    (
        lambda text, _: _SINGLE_QUOTE.match(text.lstrip()) is not None,
        "JSON has double quotes: write rows with json.dumps, not with str or repr",
    ),
    (
        _has_other_ends,
        "its rows end with a character such as CR or U+2028: end each row with a line feed",
    ),
    (lambda text, error: _follows(text, error, "{"), "two rows are on one line: give each a line of its own"),
    (
        lambda text, error: _follows(text, error, ",") and text.lstrip().startswith("{"),
        "a comma follows the row: take it out",
    ),
    (
        lambda _, error: error.msg.startswith("Invalid control character"),
        r"inside of a text write a tab as \t and the end of a line as \n",
    ),
    (
        lambda text, _: not text.lstrip().startswith(("{", "[")),
        "a row begins with {; this may be CSV, YAML or plain text (whose name has to end in .txt)",
    ),
    (_is_cut, "the line ends inside of the row: write each row on one line, or the file was cut off"),
    (_has_comma_too_many, "the comma before it is one too many"),
)
