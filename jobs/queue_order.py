"""The queue as its users see it: who is before whom, and when a place may become free.

The order is that of the claims (`placement.py`): priority, then fairness between organizations, then age. It changes
with every claim, so a place is one of the moment. Jobs whose wait after a failure is not over stand in it where they
will be.

When a job starts is foretold from the ends of the running ones, as far as these are known. The length of a queued job's
own run is not, so that whoever stands behind one that takes the last known place gets no time: none is better than a
wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import select, text

from jobs.db import Database
from jobs.models import Job
from jobs.reads import HostState
from jobs.status import JobStatus

# As in `placement.py`, but whatever the host. Measured with 10 000 queued jobs: 46 ms for all, 6 ms for the
# places of 20 of them.
_QUEUE = """
    WITH busy AS (
        SELECT organization_id, count(*) AS num_running FROM jobs WHERE status = 'running' GROUP BY organization_id
    ), queue AS (
        SELECT q.id, q.organization_id, q.project_id, q.planned_bytes, greatest(q.run_after, now()) AS due_at,
            row_number() OVER (ORDER BY q.priority DESC, coalesce(busy.num_running, 0), q.created_at, q.id) AS place
        FROM jobs q LEFT JOIN busy ON busy.organization_id = q.organization_id
        WHERE q.status = 'queued'
    )
"""
_PLACES = text(f"{_QUEUE} SELECT id, organization_id, project_id, planned_bytes, due_at FROM queue ORDER BY place")  # noqa: S608
_POSITIONS = text(f"{_QUEUE} SELECT id, place FROM queue WHERE id = ANY(:job_ids)")  # noqa: S608


@dataclass(frozen=True, slots=True)
class Place:
    """A queued job, at its place."""

    job_id: str
    organization_id: str
    project_id: str
    planned_bytes: int | None
    due_at: datetime
    """Not before this: now, or the end of its wait after a failure."""


@dataclass(slots=True)
class _Room:
    """A host over time: what runs there, each with its end in seconds from now (infinite: not known)."""

    state: HostState
    runs: list[tuple[float, float, int]] = field(default_factory=list)
    """Start, end and needed bytes."""

    def earliest_s(self, needed_bytes: int, *, due_s: float) -> float:
        """When a run fits that then stays; infinite where that cannot be told."""
        times = sorted({due_s, *(time for start, end, _ in self.runs for time in (start, end) if time > due_s)})
        earliest = math.inf
        for time in reversed([time for time in times if math.isfinite(time)]):
            if not self._has_room(needed_bytes, at_s=time):
                break
            earliest = time
        return earliest

    def _has_room(self, needed_bytes: int, *, at_s: float) -> bool:
        present = [size for start, end, size in self.runs if start <= at_s < end]
        host = self.state.host
        return len(present) < host.slots and sum(present) + needed_bytes <= (host.available_bytes or 0)


def read_places(db: Database) -> list[Place]:
    """All queued jobs of all organizations, first to last."""
    with db.read() as session:
        return [Place(*row) for row in session.execute(_PLACES)]


def read_positions(db: Database, *, job_ids: Sequence[str]) -> dict[str, int]:
    """The places of those of the given jobs that are queued; 1 is the next to be claimed."""
    if not job_ids:
        return {}
    with db.read() as session:
        return {row.id: row.place for row in session.execute(_POSITIONS, {"job_ids": list(job_ids)})}


def list_running(db: Database) -> Sequence[Job]:
    """The running jobs of all organizations."""
    with db.read() as session:
        return session.scalars(select(Job).where(Job.status == JobStatus.RUNNING)).all()


def foretell(
    places: Sequence[Place], hosts: Sequence[HostState], *, left_s: Mapping[str, float | None], now: datetime
) -> dict[str, float]:
    """Seconds until each queued job starts, of those of which it can be told. `left_s` has the seconds that running
    jobs still need, None where that is not known."""
    rooms = [
        _Room(
            state,
            [(0.0, _known(left_s.get(run.id)), state.needed_bytes(run.planned_bytes)) for run in state.running],
        )
        for state in hosts
        if state.is_alive
    ]
    starts: dict[str, float] = {}
    # Each job takes a slot for good, so that there is nothing left to tell after as many as there are slots.
    num_slots = sum(room.state.host.slots for room in rooms)
    for place in places:
        if len(starts) == num_slots:
            break
        due_s = max(0.0, (place.due_at - now).total_seconds())
        found = [(room.earliest_s(room.state.needed_bytes(place.planned_bytes), due_s=due_s), room) for room in rooms]
        start, room = min(found, key=lambda item: item[0], default=(math.inf, None))
        if room is not None and math.isfinite(start):
            starts[place.job_id] = start
            room.runs.append((start, math.inf, room.state.needed_bytes(place.planned_bytes)))
    return starts


def _known(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
