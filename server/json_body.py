"""JSON from strangers: stricter than any one parser, because each value that gets through must also survive Postgres.

Measured without this: NaN, lone surrogates and NUL each made a 500 somewhere, deep nesting a recursion error.
"""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

from jobs.errors import InvalidRequestError

# A create body is five levels deep; orjson itself would stop at 1024 and Postgres later.
MAX_DEPTH = 64
# What a Postgres bigint holds. Anything larger would silently become a float in orjson and others.
_MAX_INT = 2**63 - 1


def parse_json(raw: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidRequestError: not JSON (RFC 8259), not an object, too deep, a key twice, NUL, or a number out of range.
    """
    if not raw.strip():
        raise _invalid("The request has no body: send a JSON object")
    try:
        loose = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _invalid(f"The request's body is not valid JSON ({error})") from error
    if not isinstance(loose, dict):
        raise _invalid("The request's body is not a JSON object")
    if not _is_shallow(loose):
        raise _invalid(f"The request's body is nested deeper than {MAX_DEPTH} levels")
    # A second reading, for what orjson lets pass: keys given twice and large integers. It recurses, hence the order.
    try:
        strict: dict[str, Any] = json.loads(raw, object_pairs_hook=_without_duplicates, parse_int=_int)
    except ValueError as error:
        raise _invalid(str(error)) from error
    return strict


def _invalid(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{what}.", code="invalid_json")


def _is_shallow(value: dict[str, Any]) -> bool:
    """Whether nested objects and lists are at most MAX_DEPTH deep; by levels, without recursion."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return True
    return False


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("The request's body gives a key twice")
    for key, value in pairs:
        if "\0" in key or _has_nul(value):
            raise ValueError("The request's body holds a NUL character")
    return found


def _has_nul(value: Any) -> bool:
    """Whether a string, or a string in lists, holds NUL; objects have been looked at when they were built."""
    if isinstance(value, list):
        return any(_has_nul(item) for item in value)
    return isinstance(value, str) and "\0" in value


def _int(digits: str) -> int:
    # 20 characters hold every 64-bit integer; more digits than 4300 would be an error of int() itself.
    number = int(digits) if len(digits) <= 20 else math.inf
    if not -_MAX_INT <= number <= _MAX_INT:
        raise ValueError("The request's body holds an integer of more than 64 bits")
    return int(number)
