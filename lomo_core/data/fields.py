"""Reading the fields of a parsed JSON row; every complaint names the field and what belongs there. Torch-free."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from lomo_core.data.rows import RowError

# No chat row is deeper than a few; Python's own parser ends in RecursionError near 1000 levels.
MAX_DEPTH = 64
TOO_DEEP = f"the JSON is nested too deeply: more than {MAX_DEPTH} levels"
# Schemas of tools nest by a few levels; templates write them out recursively.
_MAX_SCHEMA_DEPTH = 100


def parse_json(text: str) -> Any:
    """Parse strict JSON: no NaN, no endless nesting or numbers.

    Raises:
        RowError: the text is not strict JSON.
    """
    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_repeats)
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise RowError(TOO_DEEP) from error
    except ValueError as error:
        raise RowError(f"not valid JSON ({error})") from error


def refuse_constant(name: str) -> NoReturn:
    """What `json` calls for NaN and infinities, which Python would take."""
    raise ValueError(f"{name} is not a JSON number")


def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What `json` calls for an object: of a key that is there twice Python would take the last, and others the first.

    Raises:
        RowError: one is.
    """
    body = dict(pairs)
    if len(body) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RowError(f"the key {shorten(repeated)} is there twice in one object")
    return body


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


def shorten(value: object) -> str:
    """A JSON value for an error message, at most 40 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
