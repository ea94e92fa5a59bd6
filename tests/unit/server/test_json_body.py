"""What a JSON body may hold: everything else is refused with a sentence, whatever a parser would make of it."""

from __future__ import annotations

import pytest

from jobs.errors import InvalidRequestError
from server.json_body import MAX_DEPTH, parse_json


def nested(levels: int) -> bytes:
    """An object `levels` deep."""
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_reads_an_object() -> None:
    assert parse_json(b' {"a": [1, 2.5, null, true, "\xc3\xbc"], "b": {"c": -9223372036854775807}} ') == {
        "a": [1, 2.5, None, True, "ü"],
        "b": {"c": -9223372036854775807},
    }


def test_depth_limit_is_exact() -> None:
    assert parse_json(nested(MAX_DEPTH))
    with pytest.raises(InvalidRequestError, match="deeper than 64"):
        parse_json(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"   ",
        b"[]",
        b'"text"',
        b"null",
        b"{",
        b"{} {}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":1' + b"0" * 5000 + b"}",
        b'{"a":123456789012345678901234}',
        b'{"a":9223372036854775808}',
        b'{"a":1,"a":2}',
        b'{"b":{"a":1,"\\u0061":2}}',
        b'{"a":"\\u0000"}',
        b'{"a\\u0000":1}',
        b'{"a":[["\\u0000"]]}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":' + b"[" * 100_000,
        nested(100_000),
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_refuses(raw: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_json(raw)
    assert caught.value.code == "invalid_json"
    assert len(caught.value.message) < 200
