"""The append-only writer of `journal.jsonl`; its events and their codec are in `events.py`. Torch-free."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from lomo_core.disk_full import disk_full_named
from lomo_core.events import JOURNAL_NAME, Event, JournalLine, Level, Message, encode_line

_TAIL_BYTES = 1 << 16


class Journal:
    """One write per event, so that a reader never sees two lines mixed, and a killed engine loses at most the last
    one."""

    def __init__(self, run_dir: str | Path, *, show: Callable[[Event], None] | None = None) -> None:
        """`show` gets each event once it is written."""
        self._show = show
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL_NAME
        _drop_torn_line(self.path)
        self._file = self.path.open("ab", buffering=0)

    def write(self, event: Event, *, durable: bool = False) -> None:
        """Append one event; `durable` waits until it is on disk.

        Raises:
            DiskFullError: there is no room for it.
        """
        with disk_full_named("the journal"):
            self._file.write(encode_line(JournalLine(time.time(), event)))
            if durable:
                os.fsync(self._file.fileno())
        if self._show is not None:
            self._show(event)

    def say(self, level: Level, message: str) -> None:
        """Append a sentence for the reader of the log."""
        self.write(Message(level=level, message=message))

    def close(self) -> None:
        """Put everything on disk and close the file."""
        with self._file:
            os.fsync(self._file.fileno())


def _drop_torn_line(path: Path) -> None:
    """Cut an unfinished last line, which a killed engine may have left: nobody has read it as a line yet."""
    if not path.exists():
        return
    with path.open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        keep = size
        while keep > 0:
            start = max(0, keep - _TAIL_BYTES)
            stream.seek(start)
            newline = stream.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep != size:
            stream.truncate(keep)
