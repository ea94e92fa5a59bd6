"""Reading a log that is being written: whole lines, each once, in bounded parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker import log_shipper
from worker.log_shipper import LogReader


def append(path: Path, raw: bytes) -> None:
    with path.open("ab") as file:
        file.write(raw)


def read(reader: LogReader, *, is_last: bool = False) -> list[str]:
    part = reader.read(is_last=is_last)
    return [] if part is None else list(part.lines)


def test_only_whole_lines_are_read_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    reader = LogReader(path)
    assert read(reader) == []
    append(path, b"one\n\ntw")
    assert read(reader) == ["one", ""]
    assert read(reader) == []
    append(path, b"o\nthree")
    assert read(reader) == ["two"]
    assert read(reader, is_last=True) == ["three"]
    assert read(reader, is_last=True) == []


def test_parts_join_up_and_a_reader_begins_where_another_stopped(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    lines = [f"line {number} " + "x" * 90 for number in range(2000)]
    append(path, "\n".join([*lines, ""]).encode())
    found: list[str] = []
    position = 0
    while part := LogReader(path, first=position).read(is_last=True):
        assert part.first_byte == position
        assert part.next_byte - position <= log_shipper._PART_BYTES
        position = part.next_byte
        found += part.lines
    assert found == lines


def test_a_line_without_an_end_is_cut_into_parts(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    append(path, b"x" * (log_shipper._PART_BYTES + 10))
    reader = LogReader(path)
    [cut] = read(reader)
    assert len(cut) < 5000
    assert read(reader) == []
    assert read(reader, is_last=True) == ["x" * 10]


def test_of_a_flood_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_shipper, "_MAX_BEHIND_BYTES", 20)
    path = tmp_path / "engine.log"
    append(path, b"0123456789\n" * 100)
    lines = read(LogReader(path), is_last=True)
    assert lines[0] == "[1080 bytes of output are left out here: they are in engine.log]"
    assert lines[-1] == "0123456789"
    assert len(lines) == 3
