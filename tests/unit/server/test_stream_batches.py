"""What a stream makes of the batches in its queue: all that is new to its reader, once, in one piece."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from server import feeds
from server.feeds import Batch
from server.hub import Queue, Signal
from server.sse import _join


def batch(*seqs: int, is_last: bool = False) -> Batch:
    return Batch.of(seqs[0], [f"<{seq}>".encode() for seq in seqs], is_last=is_last)


def joined(items: Sequence[object], last: int) -> tuple[bytes, int, bool] | None:
    queue: Queue = asyncio.Queue()
    for item in items[1:]:
        queue.put_nowait(item)
    found = _join(items[0], queue, last)
    return None if found is None else (found.frames, found.last_seq, found.is_last)


def test_what_waits_goes_out_in_one_piece() -> None:
    assert joined([batch(3, 4), None, batch(5), batch(6, 7, is_last=True)], last=2) == (b"<3><4><5><6><7>", 7, True)


@pytest.mark.parametrize(("last", "frames"), [(2, b"<3><4><5>"), (3, b"<4><5>"), (4, b"<5>"), (5, b""), (9, b"")])
def test_a_batch_of_which_a_part_was_read_is_taken_from_there_on(last: int, frames: bytes) -> None:
    assert joined([batch(3, 4, 5)], last) == (frames, max(last, 5), False)


def test_numbers_with_nothing_to_show_count() -> None:
    some = Batch.of(3, [b"<3>", b"", b"<5>"], is_last=False)
    assert (some.after(3), some.after(4), some.last_seq) == (b"<5>", b"<5>", 5)


def test_an_end_without_frames_ends_the_stream() -> None:
    assert joined([Batch.of(6, [], is_last=True)], last=5) == (b"", 5, True)
    assert joined([Batch.of(6, [], is_last=True)], last=8) == (b"", 8, True)


@pytest.mark.parametrize("items", [[batch(4)], [batch(3), batch(5)], [Signal.LAGGED], [batch(3), Signal.LAGGED]])
def test_after_a_gap_the_stream_reads_again(items: Sequence[object]) -> None:
    assert joined(items, last=2) is None


def test_the_servers_stop_comes_after_what_was_before_it() -> None:
    queue: Queue = asyncio.Queue()
    queue.put_nowait(Signal.STOPPED)
    found = _join(batch(1), queue, 0)
    assert found is not None
    assert (found.frames, queue.get_nowait()) == (b"<1>", Signal.STOPPED)


def test_a_page_that_is_not_full_has_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "PAGE_EVENTS", 2)
    assert (batch(1).has_more, batch(1, 2).has_more) == (False, True)
