"""Reads TensorBoard event files as TensorBoard does: checksums, versions and purges, with tensorboardX's messages."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

START = 1


def read_events(path: Path) -> list[Any]:
    """The messages of one file; every checksum must be right and the first message must be the version."""
    raw, events, at = path.read_bytes(), [], 0
    while at < len(raw):
        head = raw[at : at + 8]
        (length,) = struct.unpack("<Q", head)
        content = raw[at + 12 : at + 12 + length]
        assert _unmasked(raw[at + 8 : at + 12]) == crc32c(head)
        assert _unmasked(raw[at + 12 + length : at + 16 + length]) == crc32c(content)
        events.append(event_pb2.Event.FromString(content))
        at += 16 + length
    assert events[0].file_version == "brain.Event:2"
    return events[1:]


def shown(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a tag: files in order of their names, steps forgotten at each `SessionLog.START`."""
    points: list[tuple[int, float]] = []
    for path in sorted(folder.glob("*tfevents*")):
        for event in read_events(path):
            if event.HasField("session_log") and event.session_log.status == START:
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return points


def _unmasked(raw: bytes) -> int:
    rotated = (struct.unpack("<I", raw)[0] - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF
