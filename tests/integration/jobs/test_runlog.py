"""The log's rows: numbered without a gap, shipped once, bounded, and plain text whatever was printed."""

from __future__ import annotations

import pytest

from jobs import lifecycle, runlog
from jobs.db import Database
from jobs.errors import LeaseLostError, NotFoundError
from jobs.owner import Owner
from jobs.repository import Lease

from .conftest import ORGANIZATION, POLICY, claim, submit


def ship(db: Database, lease: Lease, *lines: str, first_byte: int, attempt: int = 1) -> None:
    next_byte = first_byte + sum(len(line) + 1 for line in lines)
    runlog.ship(db, lease, lines, attempt=attempt, first_byte=first_byte, next_byte=next_byte)


def shipped(db: Database, job_id: str) -> list[tuple[int, int, str]]:
    return [(line.seq, line.attempt, line.text) for line in runlog.lines_since(db, job_id=job_id, seq=0, limit=100_000)]


def test_a_part_is_written_once_and_numbers_go_on_over_attempts(db: Database) -> None:
    job = submit(db)
    first = claim(db).lease
    ship(db, first, "a", "b", first_byte=0)
    ship(db, first, "a", "b", first_byte=0)
    ship(db, first, "d", first_byte=6)  # a part is missing before it
    assert runlog.shipped_bytes(db, job_id=job.id, attempt=1) == 4
    lifecycle.release(db, first, reason="stopping")
    second = claim(db).lease
    ship(db, second, "c", first_byte=4, attempt=1)
    ship(db, second, "x", first_byte=0, attempt=2)
    assert shipped(db, job.id) == [(1, 1, "a"), (2, 1, "b"), (3, 1, "c"), (4, 2, "x")]
    with pytest.raises(LeaseLostError):
        ship(db, first, "late", first_byte=6)


def test_the_newest_lines_are_kept_with_their_numbers(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "MAX_LINES", 5)
    job = submit(db)
    lease = claim(db).lease
    for number in range(4):
        ship(db, lease, *"abc", first_byte=6 * number)
    assert [seq for seq, _, _ in shipped(db, job.id)] == [8, 9, 10, 11, 12]


def test_pages_are_newest_first(db: Database) -> None:
    job = submit(db)
    ship(db, claim(db).lease, *"abcde", first_byte=0)
    page = runlog.list_lines(db, owner=Owner(ORGANIZATION), job_id=job.id, limit=2)
    assert ([line.text for line in page.items], page.has_more) == (["e", "d"], True)
    rest = runlog.list_lines(db, owner=Owner(ORGANIZATION), job_id=job.id, limit=3, before=4)
    assert ([line.text for line in rest.items], rest.has_more) == (["c", "b", "a"], False)
    with pytest.raises(NotFoundError):
        runlog.list_lines(db, owner=Owner("org-other"), job_id=job.id, limit=2)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (b"plain \xc3\xa4 text\r", "plain \u00e4 text"),
        (b"\x1b[1;31mred\x1b[0m and \x1b[2Kcleared", "red and cleared"),
        (b"\x1b]0;a title\x07text", "text"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"\x1bP1$q never ends", ""),
        (b" 10%|#   |\r 20%|##  |\r 30%|### |", " 30%|### |"),
        (b"nul \x00 bell \x07 back \x08", "nul \ufffd bell \ufffd back \ufffd"),
        (b"\xc2\x9b31mC1", "C1"),
        (b"bad \xff utf-8 \xed\xa0\x80", "bad \ufffd utf-8 \ufffd\ufffd\ufffd"),
        (b"\ttab", "\ttab"),
        (b"\x1b", "\ufffd"),
        (b"x" * 5000, "x" * 4096 + "..."),
    ],
)
def test_a_line_is_plain_text(db: Database, raw: bytes, clean: str) -> None:
    assert runlog.clean_line(raw) == clean
    submit(db)
    lease = claim(db).lease
    ship(db, lease, runlog.clean_line(raw), first_byte=0)
    assert [text for _, _, text in shipped(db, lease.job_id)] == [clean]
    assert lifecycle.retry(db, lease, reason="x", policy=POLICY) == "queued"
