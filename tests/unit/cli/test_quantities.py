"""Times and sizes as people write them."""

from __future__ import annotations

import pytest

from cli.errors import UsageError
from cli.quantities import parse_bytes, parse_count, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("90d", 7_776_000), ("24h", 86_400), ("15 m", 900), ("7s", 7), ("3600", 3600), ("0", 0)]
)
def test_times(text: str, seconds: int) -> None:
    assert parse_seconds(text, option="--x") == seconds


@pytest.mark.parametrize(("text", "num_bytes"), [("50GiB", 50 * 2**30), ("1 TiB", 2**40), ("17", 17), ("3B", 3)])
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text, option="--x") == num_bytes


def test_counts() -> None:
    assert parse_count("-3", option="--x") == -3


@pytest.mark.parametrize("text", ["", "soon", "1.5h", "5w", "h", "1h30m", "9" * 19])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="--grace takes something like 90d, 24h, 15m or 3600"):
        parse_seconds(text, option="--grace")


def test_what_is_no_size_or_count() -> None:
    with pytest.raises(UsageError, match="50GiB"):
        parse_bytes("50GB", option="--x")
    with pytest.raises(UsageError, match="like 5"):
        parse_count("5m", option="--x")
