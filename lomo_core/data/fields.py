"""Reading the fields of a parsed JSON row; every complaint names the field and what belongs there. Torch-free."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from lomo_core.data.json_faults import hint
from lomo_core.data.rows import RowError

# No chat row is deeper than a few; Python's own parser ends in RecursionError near 1000 levels.
MAX_DEPTH = 64
TOO_DEEP = f"the JSON is nested too deeply: more than {MAX_DEPTH} levels"
# Python's own limit is 4300; a double has 309 at most.
_MAX_DIGITS = 309
_MAX_NAMED_FIELDS = 5
# Beyond what Postgres' JSON can hold, or UTF-8, and what would command a terminal or turn the direction of writing.
_UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
# Schemas of tools nest by a few levels; templates write them out recursively.
_MAX_SCHEMA_DEPTH = 100


def parse_json(text: str) -> Any:
    """Parse strict JSON: no NaN, no endless nesting or numbers.

    Raises:
        RowError: the text is not strict JSON.
    """
    try:
        return json.loads(
            text,
            parse_constant=refuse_constant,
            parse_int=parse_int,
            parse_float=parse_float,
            object_pairs_hook=refuse_repeats,
        )
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON ({error.msg}, column {error.colno}){hint(text, error)}") from error
    except RecursionError as error:
        raise RowError(TOO_DEEP) from error
    except ValueError as error:
        raise RowError(f"not valid JSON ({error})") from error


def refuse_constant(name: str) -> NoReturn:
    """What `json` calls for NaN and infinities, which Python would take."""
    raise ValueError(f"{name} is not a JSON number")


def parse_int(digits: str) -> int:
    """What `json` calls for whole numbers: Python's own complaint of too many digits is for programmers.

    Raises:
        ValueError: there are more than any number of a data set has.
    """
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def parse_float(text: str) -> float:
    """What `json` calls for other numbers, of which Python would make infinities.

    Raises:
        ValueError: it is too large.
    """
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What `json` calls for an object: of a key that is there twice Python would take the last, and others the first.

    Raises:
        RowError: one is.
    """
    body = dict(pairs)
    if len(body) == len(pairs):
        return body
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise RowError(f"the key {shorten(name)} is there twice in one object")
        seen.add(name)
    raise AssertionError("fewer keys than pairs, and none twice")


def depth_exceeds(value: object, limit: int) -> bool:
    """Whether nested dicts and lists go deeper than `limit`; by levels, without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def string_field(raw: dict[str, Any], name: str, where: str = "") -> str:
    """The string under `name` of an object at `where` (empty: the row itself).

    Raises:
        RowError: it is missing, no string, or no valid Unicode.
    """
    path = f"{where}.{name}" if where else name
    if name not in raw:
        raise RowError(f"{path} is missing: it must be a string")
    value = raw[name]
    if not isinstance(value, str):
        raise RowError(f"{path} must be a string, not {kind_name(value)}")
    check_text(value, path)
    return value


def check_text(value: str, where: str) -> None:
    """Refuse text that cannot be written as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds half of a surrogate pair (an escape such as \\ud83d alone)") from error


def check_tree(value: object, where: str, *, depth: int = 0) -> None:
    """Refuse JSON that a template could not write out: nested too deeply, or with text that is not Unicode."""
    if depth > _MAX_SCHEMA_DEPTH:
        raise RowError(f"{where} is nested too deeply")
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, list):
        for item in value:
            check_tree(item, where, depth=depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, where)
            check_tree(item, where, depth=depth + 1)


def kind_name(value: object) -> str:
    """What a JSON value is, with its article."""
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]


def names_of(body: dict[str, Any]) -> str:
    """The first fields of a row, for an error message."""
    return ", ".join(map(shorten, sorted(body)[:_MAX_NAMED_FIELDS])).replace('"', "") or "nothing"


def shorten(value: object) -> str:
    """A JSON value for an error message, at most 40 characters."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 40 else text[:37] + "..."


def printable(text: str) -> str:
    """A text that a file holds, fit for JSON, logs and terminals."""
    return _UNPRINTABLE.sub("\ufffd", text)
