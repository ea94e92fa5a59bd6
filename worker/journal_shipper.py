"""From the engine's journal file to the database: read by offset, shipped in batches, nothing lost.

The file is the buffer. While the database is away the engine goes on writing it, and what was not shipped is shipped
when the database is back, or by the next attempt's worker. A last line without its newline is still being written, or
was when its engine died, and is left alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from jobs import eventlog, lifecycle
from jobs.db import Database
from jobs.eventlog import NumberedLine
from jobs.lifecycle import Claim
from lomo_core.events import Checkpoint, Failed, Finished, JournalLine, Message, decode_line
from worker.engine_process import ENGINE_LOG_NAME
from worker.log_shipper import LogPart, LogReader, ship_part
from worker.outage import OUTAGES, Backoff

# A transaction of 0.1 s, for which the job's row is locked. Of 500 lines a journal that lies there goes a fifth slower.
MAX_BATCH_LINES = 2000
_SHOWN_CHARS = 200  # of a line that cannot be read: enough to see what it is
_TAIL_BYTES = 65_536  # holds the last line: a `finished` event is two paths and some numbers

log = structlog.get_logger(__name__)


class JournalReader:
    """Reads complete lines of a journal that is being written, each once; `first` is the number of the first wanted."""

    def __init__(self, path: Path, *, first: int = 0) -> None:
        self._path = path
        self._first = first
        self._offset = 0
        self._number = 0

    def read(self, limit: int = MAX_BATCH_LINES) -> list[NumberedLine]:
        """The next complete lines, at most `limit`; none if there are none (yet)."""
        lines: list[NumberedLine] = []
        try:
            file = self._path.open("rb")
        except FileNotFoundError:  # the engine is still importing
            return lines
        with file:
            file.seek(self._offset)
            while len(lines) < limit and (raw := file.readline()).endswith(b"\n"):
                if self._number >= self._first:
                    lines.append((self._number, _decode(raw)))
                self._offset += len(raw)
                self._number += 1
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Who hears of the lines of a journal."""

    on_lines: Callable[[Sequence[NumberedLine]], Sequence[str]]
    """Called once with each batch, before it is shipped; returns warnings for the job's events."""
    on_checkpoint: Callable[[], None]
    """Called after each batch that published one or more."""


class JournalShipper:
    """Ships one attempt's journal, and the log beside it, in a thread of its own; keeps the journal's last words."""

    def __init__(
        self,
        db: Database,
        claim: Claim,
        path: Path,
        *,
        relative: Callable[[str], str],
        every_s: float,
        listeners: Listeners,
    ) -> None:
        self._db = db
        self._claim = claim
        self._reader = JournalReader(path)
        self._log_reader = LogReader(path.with_name(ENGINE_LOG_NAME))
        self._relative = relative
        self._every_s = every_s
        self._listeners = listeners
        self._ended = threading.Event()
        self._aborted = threading.Event()
        self.finished: Finished | None = None
        """The engine's word that its model is complete."""
        self.failed: Failed | None = None
        """The engine's word on why it gave up."""

    def run(self) -> None:
        """Ship until `end` and the journal's last complete line, or until `abort`.

        Raises:
            LeaseLostError: the lease is gone; nothing more may be written.
        """
        while True:
            # Looked at before reading: what the engine wrote before its end is then certainly seen.
            is_last = self._ended.is_set()
            lines = self._reader.read()
            if lines:
                self._note(lines)
                warnings = self._listeners.on_lines(lines)
                if not self._ship(lines) or not all(self._warn(warning) for warning in warnings):
                    return
            part = self._log_reader.read(is_last=is_last)
            if part is not None and not self._try(partial(self._ship_log, part)):
                return
            if len(lines) < MAX_BATCH_LINES:
                if is_last and part is None:
                    return
                self._ended.wait(self._every_s)

    def end(self) -> None:
        """The engine has ended: ship the rest and return."""
        self._ended.set()

    def abort(self) -> None:
        """Return as soon as possible; the rest stays in the file."""
        self._aborted.set()
        self._ended.set()

    def _ship(self, lines: Sequence[NumberedLine]) -> bool:
        """Ship one batch. Returns False if that was given up."""
        lease = self._claim.lease
        if not self._try(lambda: eventlog.ship(self._db, lease, lines, attempt=lease.attempt, relative=self._relative)):
            return False
        if any(isinstance(line.event, Checkpoint) for _, line in lines):
            self._listeners.on_checkpoint()
        return True

    def _warn(self, message: str) -> bool:
        return self._try(lambda: lifecycle.say(self._db, self._claim.lease, message, level="warn"))

    def _ship_log(self, part: LogPart) -> None:
        ship_part(self._db, self._claim, part, attempt=self._claim.lease.attempt)

    def _try(self, write: Callable[[], object]) -> bool:
        """Try until something is in the database. Returns False if that was given up."""
        backoff = Backoff("shipping the journal")
        while not self._aborted.is_set():
            try:
                write()
            except OUTAGES as error:
                self._aborted.wait(backoff.failed(error))
            else:
                backoff.worked()
                return True
        return False

    def _note(self, lines: Sequence[NumberedLine]) -> None:
        for _, line in lines:
            if isinstance(line.event, Finished):
                self.finished = line.event
            elif isinstance(line.event, Failed):
                self.failed = line.event


def ship_leftovers(
    db: Database, claim: Claim, path: Path, *, attempt: int, first: int, relative: Callable[[str], str]
) -> int:
    """Ship what an earlier attempt left in its journal, from line `first` on. Returns the number of lines.

    Raises:
        LeaseLostError: the lease is gone.
        OUTAGES: the database went away; calling again goes on where this stopped.
    """
    reader = JournalReader(path, first=first)
    num_shipped = 0
    while lines := reader.read():
        num_shipped += eventlog.ship(db, claim.lease, lines, attempt=attempt, relative=relative)
    return num_shipped


def find_finished(path: Path) -> Finished | None:
    """The `finished` event of a journal, its last line if its engine got that far; None otherwise."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            *complete, _ = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    event = _decode(complete[-1]).event if complete else None
    return event if isinstance(event, Finished) else None


def _decode(raw: bytes) -> JournalLine:
    """A line that is no event (a defect of the engine) must not hold up those behind it, nor vanish."""
    try:
        return decode_line(raw)
    except ValueError as error:
        log.warning("journal_line_unreadable", error=str(error))
        shown = raw[:_SHOWN_CHARS].decode("utf-8", errors="replace").strip()
        text = f"The engine wrote a line that is not an event: {shown}"
        return JournalLine(time.time(), Message(level="warn", message=text))
