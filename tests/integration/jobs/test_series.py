"""Charts of long runs: what is read from spans is what the single steps would give."""

from __future__ import annotations

import math

import pytest
from alembic import command
from sqlalchemy import text

from jobs import eventlog, lifecycle, migrate, reads, series
from jobs.db import Database
from jobs.lifecycle import Claim
from jobs.models import Job
from jobs.owner import Owner

from .conftest import ORGANIZATION, POLICY, claim, submit
from .test_eventlog import lines, step

NUM_STEPS = 9000  # more than two spans of the longest kind


def ship(db: Database, held: Claim, steps: range, *, first_line: int = 0, batch: int = 500, shift: float = 0.0) -> None:
    for start in range(0, len(steps), batch):
        part = [step(n, loss=math.sin(n) + shift) for n in steps[start : start + batch]]
        numbered = [(first_line + start + offset, line) for offset, (_, line) in enumerate(lines(*part))]
        eventlog.ship(db, held.lease, numbered, attempt=held.lease.attempt, relative=str)


def job_now(db: Database, job: Job) -> Job:
    return reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id)


def by_hand(losses: dict[int, float], *, first: int, last: int, points: int) -> list[tuple[int, float, float]]:
    """Last step, least and largest loss of each point, from all steps."""
    buckets: dict[int, list[int]] = {}
    for number in range(max(first, 1), last + 1):
        if number in losses:
            buckets.setdefault((number - first) * points // (last + 1 - first), []).append(number)
    return [
        (numbers[-1], min(losses[n] for n in numbers), max(losses[n] for n in numbers)) for numbers in buckets.values()
    ]


def chart(db: Database, job: Job, *, first: int, last: int, points: int) -> list[tuple[int, float, float]]:
    columns = series.read_metrics(db, job_now(db, job), max_points=points, first_step=first, last_step=last)
    return list(zip(columns["step"], columns["loss_min"], columns["loss_max"], strict=True))


@pytest.fixture(scope="module")
def losses() -> dict[int, float]:
    return {number: math.sin(number) for number in range(1, NUM_STEPS + 1)}


def test_a_chart_covers_every_step_once(db: Database, losses: dict[int, float]) -> None:
    """Points end where a span ends, so they are compared by what they hold together, and by the extremes of each."""
    job = submit(db)
    ship(db, claim(db), range(1, NUM_STEPS + 1))
    for first, last, points in (
        (0, NUM_STEPS, 100), (0, NUM_STEPS, 2), (1, NUM_STEPS, 30), (17, 8999, 40), (4097, 8192, 1), (5, 20, 1),
        (100, 131, 1), (100, 131, 2), (3, 8999, 1), (0, 12_000, 2), (8990, 9000, 3),
    ):  # fmt: skip
        found = chart(db, job, first=first, last=last, points=points)
        assert 0 < len(found) <= points
        assert [place for place, _, _ in found] == sorted({place for place, _, _ in found})
        assert found[-1][0] == min(last, NUM_STEPS)
        start = max(first, 1)
        for place, low, high in found:
            held = [losses[n] for n in range(start, place + 1)]
            assert (low, high) == (min(held), max(held)), (first, last, points, place)
            start = place + 1


@pytest.mark.parametrize("points", [20, 300])
def test_a_window_of_few_steps_is_as_before(db: Database, losses: dict[int, float], points: int) -> None:
    job = submit(db)
    ship(db, claim(db), range(1, 301), batch=7)
    assert chart(db, job, first=0, last=300, points=points) == by_hand(losses, first=0, last=300, points=points)


def test_steps_that_are_repeated_after_a_resume_replace_what_was_drawn(db: Database) -> None:
    job = submit(db)
    held = claim(db)
    ship(db, held, range(1, 1001), batch=33)
    lifecycle.retry(db, held.lease, reason="killed", policy=POLICY)
    again = claim(db)
    ship(db, again, range(401, 701), batch=33, shift=10.0)
    found = chart(db, job, first=0, last=700, points=7)
    assert found[-1][0] == 700
    assert all(high <= 1 for place, _, high in found if place <= 400)
    assert all(low >= 9 for place, low, _ in found if place > 512)
    assert max(high for _, _, high in found) > 10


def test_the_migration_makes_the_spans_of_runs_that_there_are(db: Database, database_url: str) -> None:
    job = submit(db)
    ship(db, claim(db), range(1, NUM_STEPS + 1))
    query = text("SELECT * FROM metric_spans ORDER BY span, number")
    with db.read() as session:
        shipped = session.execute(query).all()
    command.downgrade(migrate.alembic_config(database_url), "0010")
    migrate.upgrade(database_url)
    with db.read() as session:
        migrated = session.execute(query).all()
    assert len(shipped) == 9000 // 16 + 9000 // 256 + 9000 // 4096
    assert [row[:6] + row[7:] for row in migrated] == [row[:6] + row[7:] for row in shipped]
    assert chart(db, job, first=0, last=NUM_STEPS, points=2)
