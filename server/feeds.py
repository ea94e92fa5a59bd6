"""What can be followed of a job: its events, the figures among them, and its log. Each is numbered, read from Postgres
in batches after a number, and comes as server-sent events whose ids are the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from jobs import reads, runlog
from jobs.db import Database
from jobs.models import Event, Job
from jobs.status import TERMINAL
from server.describe import describe_event, describe_log_line, describe_point

# Events per query: at some 600 bytes each a frame of 300 KB. Lines of a log are shorter.
PAGE_EVENTS = 500


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames of what is numbered `first_seq` to `last_seq`, without a gap; not everything that is numbered need be
    shown."""

    first_seq: int
    last_seq: int
    frames: bytes
    ends: Sequence[int]
    """Where in `frames` each number's frame ends."""
    is_last: bool
    """Whether nothing comes after it, because the job has ended."""
    has_more: bool
    """Whether it is a whole page, so that another may be there already."""

    @classmethod
    def of(cls, first_seq: int, frames: Sequence[bytes], *, is_last: bool) -> Batch:
        """The batch of these frames, one for each number."""
        return cls(
            first_seq,
            first_seq + len(frames) - 1,
            b"".join(frames),
            tuple(accumulate(map(len, frames))),
            is_last=is_last,
            has_more=len(frames) >= PAGE_EVENTS,
        )

    def after(self, seq: int) -> bytes:
        """The frames of what comes after number `seq`."""
        place = min(seq, self.last_seq) - self.first_seq
        return self.frames if place < 0 else self.frames[self.ends[place] :]


@dataclass(frozen=True, slots=True)
class Feed:
    """Something of a job that can be followed."""

    name: str
    read: Callable[[Database, str, int], Batch | None]
    """The next batch of a job after a number, or None where there is none yet."""
    position: Callable[[Job], int]
    """The highest number that the job has given."""


def encode_frame(data: str, *, event: str, seq: int | None = None) -> bytes:
    """One server-sent event. `data` is JSON on one line (an encoder escapes line ends), so it cannot break out."""
    number = "" if seq is None else f"id: {seq}\n"
    return f"{number}event: {event}\ndata: {data}\n\n".encode()


def _read_events(db: Database, job_id: str, after: int) -> Batch | None:
    return _batch_of_events(db, job_id, after, _event_frame)


def _read_points(db: Database, job_id: str, after: int) -> Batch | None:
    return _batch_of_events(db, job_id, after, _point_frame)


def _batch_of_events(db: Database, job_id: str, after: int, encode: Callable[[Event], bytes]) -> Batch | None:
    events = reads.events_since(db, job_id=job_id, seq=after, limit=PAGE_EVENTS)
    if not events:
        return None
    return Batch.of(events[0].seq, [encode(event) for event in events], is_last=events[-1].status in TERMINAL)


def _event_frame(event: Event) -> bytes:
    name = "status" if event.status else event.type
    return encode_frame(describe_event(event).model_dump_json(), event=name, seq=event.seq)


def _point_frame(event: Event) -> bytes:
    point = describe_point(event)
    if point is None:
        return b""
    name = "evaluation" if point.object.endswith("evaluation") else "metrics"
    return encode_frame(point.model_dump_json(), event=name, seq=event.seq)


def _read_log(db: Database, job_id: str, after: int) -> Batch | None:
    lines, has_ended = runlog.follow(db, job_id=job_id, seq=after, limit=PAGE_EVENTS)
    is_last = has_ended and len(lines) < PAGE_EVENTS
    if not lines and not is_last:
        return None
    frames = [encode_frame(describe_log_line(line).model_dump_json(), event="log", seq=line.seq) for line in lines]
    return Batch.of(lines[0].seq if lines else after + 1, frames, is_last=is_last)


EVENTS = Feed("events", _read_events, lambda job: job.last_seq)
"""Every event."""
POINTS = Feed("metrics", _read_points, lambda job: job.last_seq)
"""The figures of steps and evaluations; numbered as the events that bring them."""
LOG = Feed("logs", _read_log, lambda job: job.last_log_seq)
"""The lines of its log."""
