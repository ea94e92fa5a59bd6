"""The service in numbers, of all organizations together, for whoever watches over it (server/prometheus.py)."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text

from jobs.db import Database

MEMORY_CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "other")

_BY_STATUS = text("SELECT status, count(*) FROM jobs GROUP BY status")
# The partial index of queued jobs serves this; a job that waits out a retry is not overdue.
_OLDEST_S = text("""
    SELECT coalesce(extract(epoch FROM now() - min(created_at)), 0)
    FROM jobs WHERE status = 'queued' AND run_after <= now()
""")
_RUNNING_MEMORY = text("""
    SELECT key, sum(value::bigint) FROM jobs, jsonb_each_text(memory) WHERE status = 'running' GROUP BY key
""")
_RATIOS = text("""
    SELECT count(*), sum((run -> 'planned' ->> 'peak_bytes')::float / (memory ->> 'peak_bytes')::float)
    FROM jobs
    WHERE status = 'succeeded' AND (memory ->> 'peak_bytes')::float > 0
        AND run -> 'planned' ->> 'peak_bytes' IS NOT NULL
""")
_TRAINED = text("SELECT coalesce(sum(trained_tokens), 0) FROM jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFigures:
    """One look at all jobs."""

    num_jobs: dict[str, int]
    """By status; a status without jobs is absent."""
    oldest_queued_s: float
    """Since the creation of the oldest job that could start now; 0 without one."""
    running_memory_bytes: dict[str, int]
    """By category, of the jobs that run now, each at its highest step."""
    num_judged: int
    """Succeeded jobs of which plan and measurement are known."""
    sum_of_ratios: float
    """Of their planned by their measured peaks."""
    trained_tokens: int
    """Of all jobs."""


def read_figures(db: Database) -> ServiceFigures:
    """All of them, in one read-only transaction."""
    with db.read() as session:
        memory = {str(key).removesuffix("_bytes"): int(value) for key, value in session.execute(_RUNNING_MEMORY)}
        num_judged, sum_of_ratios = session.execute(_RATIOS).one()
        return ServiceFigures(
            num_jobs={str(status): int(number) for status, number in session.execute(_BY_STATUS)},
            oldest_queued_s=float(session.scalars(_OLDEST_S).one()),
            running_memory_bytes={name: memory.get(name, 0) for name in MEMORY_CATEGORIES},
            num_judged=int(num_judged),
            sum_of_ratios=float(sum_of_ratios or 0.0),
            trained_tokens=int(session.scalars(_TRAINED).one()),
        )
