"""From an engine's `engine.log` to the database, in bounded parts, whatever the engine prints and how fast.

Like the journal, the file is the buffer: what was not shipped is shipped when the database is back, or by the next
attempt's worker. Unlike the journal it is not all worth keeping: an engine that prints faster than this reads, which is
no engine of ours, has the middle of its output left out, with a line that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import runlog
from jobs.db import Database
from jobs.lifecycle import Claim

_PART_BYTES = 64 << 10  # some 600 lines: a transaction of 10 ms
# Behind by more than this, a log is not read to its end: 16 parts, each of them a second behind at the worst.
_MAX_BEHIND_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LogPart:
    """Lines of a log, and where it goes on behind them."""

    lines: Sequence[str]
    first_byte: int
    next_byte: int


class LogReader:
    """Reads a log that is being written, from byte `first` on."""

    def __init__(self, path: Path, *, first: int = 0) -> None:
        self._path = path
        self._position = first

    def read(self, *, is_last: bool) -> LogPart | None:
        """The next complete lines, or None where there are none (yet). Read for the last time, a line without an end is
        complete, too, as is one that is longer than a part."""
        first, lines = self._position, []
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return None
        with file:
            left_out = file.seek(0, 2) - first - _MAX_BEHIND_BYTES
            if left_out > 0:
                self._position += left_out
                lines.append(f"[{left_out} bytes of output are left out here: they are in {self._path.name}]")
            file.seek(self._position)
            raw = file.read(_PART_BYTES)
        end = raw.rfind(b"\n") + 1
        if not end and (is_last or len(raw) == _PART_BYTES):
            end = len(raw)
        self._position += end
        lines += [runlog.clean_line(line) for line in raw[:end].removesuffix(b"\n").split(b"\n")] if end else []
        return LogPart(lines, first, self._position) if self._position > first else None


def ship_log(db: Database, claim: Claim, path: Path, *, attempt: int) -> None:
    """Ship what is left of the log of an attempt that has ended.

    Raises:
        LeaseLostError: the lease is gone.
        OUTAGES: the database went away; calling again goes on where this stopped.
    """
    reader = LogReader(path, first=runlog.shipped_bytes(db, job_id=claim.lease.job_id, attempt=attempt))
    while part := reader.read(is_last=True):
        ship_part(db, claim, part, attempt=attempt)


def ship_part(db: Database, claim: Claim, part: LogPart, *, attempt: int) -> None:
    """Ship one part; raises as `ship_log`."""
    runlog.ship(db, claim.lease, part.lines, attempt=attempt, first_byte=part.first_byte, next_byte=part.next_byte)
