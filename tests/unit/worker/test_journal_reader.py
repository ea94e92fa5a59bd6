"""Reading a journal while it is being written."""

from __future__ import annotations

from pathlib import Path

from lomo_core.events import Finished, JournalLine, Message, encode_line
from worker.journal_shipper import JournalReader, find_finished


def line(text: str) -> bytes:
    return encode_line(JournalLine(1.0, Message(level="info", message=text)))


def texts(reader: JournalReader, limit: int = 500) -> list[tuple[int, str]]:
    return [(number, getattr(entry.event, "message", "")) for number, entry in reader.read(limit)]


def test_lines_come_once_and_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    reader = JournalReader(path)
    assert texts(reader) == []
    path.write_bytes(line("zero") + line("one")[:10])
    assert texts(reader) == [(0, "zero")]
    assert texts(reader) == []
    path.write_bytes(line("zero") + line("one") + line("two"))
    assert texts(reader, 1) == [(1, "one")]
    assert texts(reader) == [(2, "two")]


def test_it_starts_at_the_first_line_wanted(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join(line(str(number)) for number in range(5)))
    assert texts(JournalReader(path, first=3)) == [(3, "3"), (4, "4")]
    assert texts(JournalReader(path, first=9)) == []


def test_what_is_no_event_becomes_a_warning_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(
        line("a") + b"\xff\xfe\n" + b"[]\n" + b'{"type": "step", "time": 1, "memory": {"x": 1}}\n' + b"\n" + line("b")
    )
    numbered = texts(JournalReader(path))
    assert [number for number, _ in numbered] == [0, 1, 2, 3, 4, 5]
    assert all("not an event" in text for _, text in numbered[1:5])
    assert numbered[5] == (5, "b")


def test_the_word_of_success_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert find_finished(path) is None
    path.write_bytes(line("a"))
    assert find_finished(path) is None
    event = Finished(step=1, model_path="/m", weights_sha256="0", num_trained_tokens=1, peak_bytes=1, seconds=1.0)
    path.write_bytes(line("a") + encode_line(JournalLine(1.0, event)))
    assert find_finished(path) == event
