"""One transition at a time, and what two claimers, a lost lease and a blind reaper do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from jobs import lifecycle, reads
from jobs.db import Database
from jobs.errors import InvalidStateError, LeaseLostError, NotFoundError
from jobs.lifecycle import JobFailure
from jobs.models import Job
from jobs.owner import Owner
from jobs.status import JobStatus

from .conftest import LEASE_S, ORGANIZATION, POLICY, claim, submit


def get(db: Database, job_id: str) -> Job:
    return reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job_id)


def statuses(db: Database, job_id: str) -> list[str]:
    """The status changes of a job, in order, as its events tell them."""
    events = reads.events_since(db, job_id=job_id, seq=0, limit=1000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1)), "event numbers have a gap"
    return [event.status for event in events if event.status is not None]


def expire(db: Database, *, seconds: float) -> None:
    """Let time pass for the leases."""
    with db.transaction() as session:
        session.execute(
            text("UPDATE jobs SET lease_expires_at = lease_expires_at - make_interval(secs => :s)"), {"s": seconds}
        )


def reap(db: Database) -> list[str]:
    return lifecycle.reap(db, every_s=5, lease_s=LEASE_S, grace_s=5, policy=POLICY)


def test_a_job_runs_to_success(db: Database) -> None:
    job = submit(db)
    assert job.status == JobStatus.QUEUED
    claimed = claim(db)
    assert claimed.lease.job_id == job.id
    assert claimed.lease.attempt == 1
    name = lifecycle.succeed(db, claimed.lease, model_path="runs/x/model", weights_sha256="ab", trained_tokens=7)
    done = get(db, job.id)
    assert (done.status, done.fine_tuned_model, done.weights_sha256, done.trained_tokens) == (
        "succeeded",
        name,
        "ab",
        7,
    )
    assert done.finished_at is not None
    assert done.lease_token is None
    assert statuses(db, job.id) == ["queued", "running", "succeeded"]
    model = reads.find_model(db, owner=Owner(ORGANIZATION), model_id=name)
    assert model is not None
    assert reads.find_model(db, owner=Owner("org-other"), model_id=name) is None


def test_claims_go_by_priority_then_fairness_then_age(db: Database) -> None:
    first = submit(db, organization_id="org-a")
    second = submit(db, organization_id="org-a")
    other = submit(db, organization_id="org-b")
    urgent = submit(db, organization_id="org-a", priority=5)
    order = [claim(db).lease.job_id for _ in range(4)]
    assert order == [urgent.id, other.id, first.id, second.id]
    assert lifecycle.claim(db, owner="host/1", lease_s=LEASE_S) is None


def test_many_claimers_share_nothing(db: Database) -> None:
    submitted = {submit(db).id for _ in range(6)}
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda n: lifecycle.claim(db, owner=f"host/{n}", lease_s=LEASE_S), range(20)))
    taken = [claimed.lease.job_id for claimed in claims if claimed is not None]
    assert len(taken) == len(set(taken)), "a job was claimed twice"
    remaining = set()
    while (claimed := lifecycle.claim(db, owner="host/x", lease_s=LEASE_S)) is not None:
        remaining.add(claimed.lease.job_id)
    assert set(taken) | remaining == submitted


def test_an_expired_lease_that_nobody_reaped_may_be_renewed(db: Database) -> None:
    submit(db)
    claimed = claim(db)
    expire(db, seconds=3600)
    assert lifecycle.renew(db, claimed.lease, lease_s=LEASE_S) == lifecycle.Requests(cancel=False, pause=False)
    assert reap(db) == []


def test_a_reaped_job_is_requeued_and_its_old_owner_is_fenced_off(db: Database) -> None:
    job = submit(db)
    old = claim(db)
    expire(db, seconds=LEASE_S + 6)
    assert reap(db) == [job.id]
    new = claim(db, owner="host/2")
    assert new.lease.attempt == 2
    for write in (
        lambda: lifecycle.renew(db, old.lease, lease_s=LEASE_S),
        lambda: lifecycle.say(db, old.lease, "late"),
        lambda: lifecycle.fail(db, old.lease, JobFailure(code="x", message="late")),
        lambda: lifecycle.succeed(db, old.lease, model_path="m", weights_sha256="w", trained_tokens=1),
        lambda: lifecycle.release(db, old.lease, reason="late"),
        lambda: lifecycle.cancelled(db, old.lease),
    ):
        with pytest.raises(LeaseLostError):
            write()
    lifecycle.renew(db, new.lease, lease_s=LEASE_S)
    assert statuses(db, job.id) == ["queued", "running", "queued", "running"]


def test_after_an_outage_the_reaper_holds_its_fire(db: Database) -> None:
    """The reaper was blind for an hour, so every lease looks dead: live workers must get the time to renew."""
    job = submit(db)
    claimed = claim(db)
    expire(db, seconds=3600)
    with db.transaction() as session:
        session.execute(text("UPDATE reaper_state SET last_tick_at = last_tick_at - interval '1 hour'"))
    assert reap(db) == []
    lifecycle.renew(db, claimed.lease, lease_s=LEASE_S)
    with db.transaction() as session:
        session.execute(text("UPDATE reaper_state SET hold_until = now()"))
    assert reap(db) == []
    expire(db, seconds=LEASE_S + 6)
    assert reap(db) == [job.id]


def test_a_job_that_is_lost_too_often_fails(db: Database) -> None:
    job = submit(db)
    for attempt in range(1, POLICY.max_failures + 1):
        claimed = claim(db)
        assert claimed.lease.attempt == attempt
        status = lifecycle.retry(db, claimed.lease, reason="The engine was killed by signal 9", policy=POLICY)
    assert status == JobStatus.FAILED
    failed = get(db, job.id)
    assert failed.error is not None
    assert failed.error["code"] == "engine_lost"
    assert "signal 9" in failed.error["message"]


def test_a_retry_waits_for_its_backoff(db: Database) -> None:
    submit(db)
    policy = lifecycle.RetryPolicy(max_failures=3, backoff_s=60)
    assert lifecycle.retry(db, claim(db).lease, reason="killed", policy=policy) == JobStatus.QUEUED
    assert lifecycle.claim(db, owner="host/1", lease_s=LEASE_S) is None
    assert reads.due_jobs(db) == 0
    assert [policy.wait_s(n) for n in (1, 2, 3)] == [60, 120, 240]


def test_a_released_job_counts_no_failure(db: Database) -> None:
    job = submit(db)
    lifecycle.release(db, claim(db).lease, reason="The worker is stopping")
    again = get(db, job.id)
    assert (again.status, again.failures, again.attempt) == ("queued", 0, 1)


def test_cancelling_a_queued_job_ends_it_at_once(db: Database) -> None:
    job = submit(db)
    assert lifecycle.request_cancel(db, owner=Owner(ORGANIZATION), job_id=job.id).status == "cancelled"
    assert lifecycle.claim(db, owner="host/1", lease_s=LEASE_S) is None
    with pytest.raises(InvalidStateError, match="already been cancelled"):
        lifecycle.request_cancel(db, owner=Owner(ORGANIZATION), job_id=job.id)


@pytest.mark.parametrize("ending", ["cancelled", "released", "lost", "retried", "succeeded"])
def test_a_running_job_that_was_asked_to_cancel_never_runs_again(db: Database, ending: str) -> None:
    job = submit(db)
    lease = claim(db).lease
    asked = lifecycle.request_cancel(db, owner=Owner(ORGANIZATION), job_id=job.id)
    assert asked.status == "running"
    assert lifecycle.renew(db, lease, lease_s=LEASE_S).cancel
    lifecycle.request_cancel(db, owner=Owner(ORGANIZATION), job_id=job.id)  # twice is harmless
    match ending:
        case "cancelled":
            lifecycle.cancelled(db, lease)
        case "released":
            lifecycle.release(db, lease, reason="stopping")
        case "lost":
            expire(db, seconds=LEASE_S + 6)
            reap(db)
        case "retried":
            lifecycle.retry(db, lease, reason="killed", policy=POLICY)
        case "succeeded":
            lifecycle.succeed(db, lease, model_path="m", weights_sha256="w", trained_tokens=1)
    assert get(db, job.id).status == ("succeeded" if ending == "succeeded" else "cancelled")
    messages = [event.message for event in reads.events_since(db, job_id=job.id, seq=0, limit=100)]
    assert messages.count("Cancellation requested.") == 1


def test_a_foreign_job_is_absent(db: Database) -> None:
    job = submit(db)
    with pytest.raises(NotFoundError):
        lifecycle.request_cancel(db, owner=Owner("org-other"), job_id=job.id)
    with pytest.raises(NotFoundError):
        reads.get_job(db, owner=Owner("org-other"), job_id=job.id)


def test_a_restarted_worker_gives_back_what_its_earlier_self_held(db: Database) -> None:
    mine, other = submit(db), submit(db)
    claim(db, owner="host-a/1")
    claim(db, owner="host-b/1")
    assert lifecycle.release_dead(db, host="host-a", incarnation="2", policy=POLICY) == [mine.id]
    assert get(db, other.id).status == "running"
    again = claim(db, owner="host-a/2")
    assert again.lease.job_id == mine.id
    assert lifecycle.release_dead(db, host="host-a", incarnation="2", policy=POLICY) == []


def test_a_job_that_this_version_cannot_read_fails_and_blocks_nobody(db: Database) -> None:
    broken, good = submit(db), submit(db)
    with db.transaction() as session:
        session.execute(
            text("""UPDATE jobs SET spec = spec || '{"lomo": {"optimizer": "adam"}}' WHERE id = :id"""),
            {"id": broken.id},
        )
    assert lifecycle.claim(db, owner="host/1", lease_s=LEASE_S) is None
    failed = get(db, broken.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "invalid_spec"
    assert claim(db).lease.job_id == good.id
