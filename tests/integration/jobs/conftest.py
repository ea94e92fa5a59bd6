"""A `Database` over a fresh schema, and the domain objects that the tests of `jobs` start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from jobs import host_registry, lifecycle, submission
from jobs.db import Database
from jobs.host_registry import HostReport
from jobs.lifecycle import Claim, RetryPolicy
from jobs.models import Job
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec, LomoOptions

ORGANIZATION = "org-test"
POLICY = RetryPolicy(max_failures=3, backoff_s=0.0)
LEASE_S = 30.0


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A pool on a database of this test's own. Costs a connection.

    The schema was cloned some time ago; to a reaper that would be a gap in its ticks, after which it holds its fire.
    """
    database = Database(database_url)
    with database.transaction() as session:
        session.execute(text("UPDATE reaper_state SET last_tick_at = now(), hold_until = now()"))
    yield database
    database.dispose()


def make_spec(*, priority: int = 0, model: str = "tiny") -> JobSpec:
    """A valid job."""
    return JobSpec(model=model, training_file="file-1", seed=1, lomo=LomoOptions(priority=priority))


def submit(
    db: Database, *, organization_id: str = ORGANIZATION, priority: int = 0, planned_bytes: int | None = None
) -> Job:
    """Queue a job."""
    planned = PlannedJob(spec=make_spec(priority=priority), planned_bytes=planned_bytes)
    return submission.submit(db, planned=planned, owner=Owner(organization_id), api_key_id=None, metadata={})


def submit_to(db: Database, owner: Owner) -> Job:
    """Queue a job of a project, or of an organization's default one."""
    return submission.submit(db, planned=PlannedJob(spec=make_spec()), owner=owner, api_key_id=None, metadata={})


def register(
    db: Database,
    name: str,
    *,
    available_bytes: int | None,
    run_overhead_bytes: int | None = None,
    incarnation: str = "1",
    slots: int = 4,
) -> None:
    """Announce a host, as its worker does."""
    report = HostReport(
        name=name,
        incarnation=incarnation,
        memory_bytes=2**40,
        available_bytes=available_bytes,
        run_overhead_bytes=run_overhead_bytes,
        device_kind=None if available_bytes is None else "cuda",
        devices={"gpus": []},
        slots=slots,
    )
    host_registry.register_host(db, report)


def claim(db: Database, *, owner: str = "host/1") -> Claim:
    """Claim the next job; there must be one."""
    claimed = lifecycle.claim(db, owner=owner, lease_s=LEASE_S)
    assert claimed is not None
    return claimed
