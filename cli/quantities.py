"""What people write for a time or a size: `90d`, `24h`, `50GiB`, or `none` for no limit."""

from __future__ import annotations

import re

from cli.errors import UsageError

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_BYTES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_QUANTITY = re.compile(r"(-?[0-9]{1,18}) ?([A-Za-z]*)")
NONE = "none"
"""Written where a limit is to be taken away."""


def parse_seconds(text: str, *, option: str) -> int:
    """A time in seconds: a number, or one with s, m, h or d.

    Raises:
        UsageError: it is no such thing.
    """
    return _parse(text, _SECONDS, option=option, like="90d, 24h, 15m or 3600")


def parse_bytes(text: str, *, option: str) -> int:
    """A size in bytes: a number, or one with KiB, MiB, GiB or TiB.

    Raises:
        UsageError: it is no such thing.
    """
    return _parse(text, _BYTES, option=option, like="50GiB or 1048576")


def parse_count(text: str, *, option: str) -> int:
    """A plain number.

    Raises:
        UsageError: it is no such thing.
    """
    return _parse(text, {"": 1}, option=option, like="5")


def _parse(text: str, units: dict[str, int], *, option: str, like: str) -> int:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise UsageError(f"{option} takes something like {like}, not {text!r}")
    return int(match[1]) * units[match[2]]
