"""A run's figures as TensorBoard event files, one per attempt, in `tensorboard/` of the job's folder.

Written by hand, because each library that writes this format imports PyTorch or TensorFlow, which the worker must not
load, and the format is small: TFRecords (length, masked CRC-32C, data, masked CRC-32C) of `Event` messages
(tensorflow/core/lib/io/record_writer.cc, tensorflow/core/util/event.proto, framework/summary.proto). The tests read the
files with the message classes and the checksum of tensorboardX.

An attempt that goes on from step n writes `SessionLog.START` at step n + 1 first, on which TensorBoard forgets what it
has read of steps from there on (`purge_step` of the usual writers); names of files sort by attempt, which is the order
in which TensorBoard reads them. So no step shows twice.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path

import google_crc32c

from worker.journal_shipper import JournalReader
from worker.tracked import Point, Restart, read_tracked

FOLDER_NAME = "tensorboard"

_MASK_DELTA = 0xA282EAD8  # tensorflow/core/lib/hash/crc32c.h
_VERSION = "brain.Event:2"  # the first that purges by SessionLog.START
_START = 1  # SessionLog.SessionStatus
_MAX_SINGLE = (2 - 2**-23) * 2.0**127  # IEEE 754 binary32
# Wire types of protocol buffers: https://protobuf.dev/programming-guides/encoding/
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def event_path(job_folder: Path, *, attempt: int) -> Path:
    """Where an attempt's figures are. TensorBoard takes files with `tfevents` in their names, in order of the names."""
    return job_folder / FOLDER_NAME / f"events.out.tfevents.attempt-{attempt:06d}"


class EventFile:
    """Writes one event file, from its beginning; it and its folder are made with the first figures.

    A step with 13 figures takes 12 us in a batch of 500, and 60 for opening the file (measured).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_begun = False

    def write(self, tracked: Iterable[Point | Restart]) -> None:
        """Append, and hand all to the system before returning.

        Raises:
            OSError: the disk does not take it; the file may end within a record.
        """
        records = b"".join(_record(_encode(each)) for each in tracked)
        if not records:
            return
        if not self._is_begun:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            records = _record(_bytes_field(3, _VERSION.encode())) + records
        with self._path.open("ab" if self._is_begun else "wb") as file:
            self._is_begun = True
            file.write(records)


def rewrite(path: Path, *, journal: Path) -> None:
    """Make an attempt's event file anew from its whole journal: what a killed worker left may lack its end.

    Raises:
        OSError: see `EventFile.write`; what was there is as it was.
    """
    partial, reader = path.with_name(f".partial-{os.getpid()}"), JournalReader(journal)
    file = EventFile(partial)
    while lines := reader.read():
        file.write(read_tracked(lines))
    if partial.exists():
        partial.replace(path)


def _encode(tracked: Point | Restart) -> bytes:
    """An `Event`: wall_time = 1, step = 2, summary = 5, session_log = 7."""
    head = _key(1, _FIXED64) + struct.pack("<d", tracked.time_s) + _key(2, _VARINT) + _varint(tracked.step)
    if isinstance(tracked, Restart):
        return head + _bytes_field(7, _key(1, _VARINT) + _varint(_START))
    return head + _bytes_field(5, _encode_summary(tracked.values))


def _encode_summary(values: Mapping[str, float]) -> bytes:
    """A `Summary`: a field 1 for each value, with its tag = 1 and simple_value = 2."""
    layout, befores = _layout(tuple(values))
    singles = map(_to_single, values.values())
    return layout.pack(*chain.from_iterable(zip(befores, singles, strict=True)))


@lru_cache
def _layout(tags: tuple[str, ...]) -> tuple[struct.Struct, tuple[bytes, ...]]:
    """How the values of these tags are packed, and what comes before each: the same at each of a million steps."""
    befores = []
    for tag in tags:
        content = _bytes_field(1, tag.encode()) + _key(2, _FIXED32)
        befores.append(_key(1, _BYTES) + _varint(len(content) + 4) + content)
    return struct.Struct("<" + "".join(f"{len(before)}sf" for before in befores)), tuple(befores)


def _to_single(value: float) -> float:
    """A figure that has outgrown 32 bits, as a gradient's norm may, is infinite there; `struct` would refuse it."""
    return value if abs(value) <= _MAX_SINGLE else math.copysign(math.inf, value)


def _bytes_field(number: int, content: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(content)) + content


@lru_cache
def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked_crc(length) + content + _masked_crc(content)


def _masked_crc(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)
