"""What people and scripts read: data on stdout as a table or as JSON, talk on stderr; units and times in words."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Without a terminal there is no width to fit into: `lomo jobs list | grep` needs whole lines.
_UNLIMITED = 100_000
_STATUS_STYLES = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "paused": "yellow",
}
NOTHING = "-"
"""Shown where a value is not known (yet)."""


class Format(StrEnum):
    """How data is written to stdout."""

    TABLE = "table"
    JSON = "json"


def make_talk() -> Console:
    """The console of messages and progress: stderr, so that stdout holds data alone."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def say(text: str) -> None:
    """Write one sentence to stderr."""
    typer.echo(text, err=True)


def write_json(value: Any) -> None:
    """Write a JSON document to stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def write_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, whole: Sequence[str] = ("ID",)) -> None:
    """Write rows to stdout under their headings. In a terminal, columns other than `whole` are cut to fit."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    lines = list(rows)
    for index, name in enumerate(columns):
        width = max([len(name), *(len(row[index]) for row in lines)])
        # Only columns that rich may wrap are made narrower; that their cells are cut instead is said in `_cell`.
        table.add_column(name, no_wrap=name in whole, min_width=width if name in whole else None)
    for row in lines:
        table.add_row(*(_cell(name, value) for name, value in zip(columns, row, strict=True)))
    _print_table(table)


def write_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Write one object to stdout, a field per line."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, Text(printable(value), style=_STATUS_STYLES.get(value, "") if name == "status" else ""))
    _print_table(table)


def format_bytes(num_bytes: float | None) -> str:
    """`1.9 GiB`."""
    if num_bytes is None:
        return NOTHING
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def format_seconds(seconds: float | None) -> str:
    """`1m13s`, in the two largest units."""
    if seconds is None:
        return NOTHING
    left = max(0, round(seconds))
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m{left % 60:02d}s"
    if left < 86400:
        return f"{left // 3600}h{left % 3600 // 60:02d}m"
    return f"{left // 86400}d{left % 86400 // 3600:02d}h"


def format_number(value: float | None, digits: int = 4) -> str:
    """A figure with so many significant digits: `0.01234`."""
    return NOTHING if value is None else f"{value:.{digits}g}"


def format_time(timestamp: float | None) -> str:
    """Local time to the second."""
    return NOTHING if timestamp is None else f"{datetime.fromtimestamp(timestamp).astimezone():%Y-%m-%d %H:%M:%S}"


def format_age(timestamp: float) -> str:
    """How long ago, in the largest unit: `5m ago`."""
    left = max(0, int(time.time() - timestamp))
    for unit, seconds in (("d", 86400), ("h", 3600), ("m", 60)):
        if left >= seconds:
            return f"{left // seconds}{unit} ago"
    return f"{left}s ago"


def _print_table(table: Table) -> None:
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _UNLIMITED)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())  # rich fills the last column up with spaces


def _cell(column: str, value: str) -> Text:
    """What comes from the server is text, never markup, and cannot drive the terminal."""
    style = _STATUS_STYLES.get(value, "") if column == "STATUS" else ""
    return Text(printable(value), style=style, no_wrap=True, overflow="ellipsis")


def printable(text: str) -> str:
    """Replace control characters (a file's name or an error may hold escape sequences)."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def write_json_line(value: Any) -> None:
    """Write a JSON value to stdout as one line, at once."""
    typer.echo(json.dumps(value, ensure_ascii=False))
