"""Pausing and resuming: what is allowed when, and who wins where two things are asked at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from jobs import lifecycle, reads
from jobs.db import Database
from jobs.errors import InvalidStateError, LeaseLostError, NotFoundError
from jobs.lifecycle import JobFailure, RetryPolicy
from jobs.models import Job
from jobs.owner import Owner

from .conftest import LEASE_S, ORGANIZATION, POLICY, claim, submit


def get(db: Database, job_id: str) -> Job:
    return reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job_id)


def statuses(db: Database, job_id: str) -> list[str]:
    return [event.status for event in reads.events_since(db, job_id=job_id, seq=0, limit=1000) if event.status]


def messages(db: Database, job_id: str) -> list[str]:
    return [event.message for event in reads.events_since(db, job_id=job_id, seq=0, limit=1000)]


def pause(db: Database, job_id: str) -> Job:
    return lifecycle.request_pause(db, owner=Owner(ORGANIZATION), job_id=job_id)


def resume(db: Database, job_id: str) -> Job:
    return lifecycle.resume(db, owner=Owner(ORGANIZATION), job_id=job_id)


def test_a_queued_job_is_paused_at_once_and_nobody_claims_it(db: Database) -> None:
    job = submit(db)
    paused = pause(db, job.id)
    assert (paused.status, paused.pause_requested_at) == ("paused", None)
    assert lifecycle.claim(db, owner="host/1", lease_s=LEASE_S) is None
    assert resume(db, job.id).status == "queued"
    assert claim(db).lease.job_id == job.id
    assert statuses(db, job.id) == ["queued", "paused", "queued", "running"]
    assert "goes on from the beginning" in " ".join(messages(db, job.id))


def test_a_running_job_is_paused_by_its_worker_and_gives_its_slot_back(db: Database) -> None:
    job = submit(db)
    claimed = claim(db)
    asked = pause(db, job.id)
    assert (asked.status, asked.pause_requested_at is not None) == ("running", True)
    assert pause(db, job.id).last_seq == asked.last_seq, "asked twice, said once"
    assert lifecycle.renew(db, claimed.lease, lease_s=LEASE_S).pause
    assert lifecycle.paused(db, claimed.lease) == "paused"
    paused = get(db, job.id)
    assert (paused.status, paused.lease_token, paused.pause_requested_at) == ("paused", None, None)
    [attempt] = reads.list_attempts(db, job_id=job.id)
    assert attempt.outcome == "paused"
    with pytest.raises(LeaseLostError):
        lifecycle.renew(db, claimed.lease, lease_s=LEASE_S)
    resume(db, job.id)
    again = claim(db)
    assert (again.lease.attempt, again.failures) == (2, 0)
    assert not lifecycle.renew(db, again.lease, lease_s=LEASE_S).pause


def test_a_pause_is_taken_back_before_and_after_the_engine_has_stopped(db: Database) -> None:
    job = submit(db)
    claimed = claim(db)
    pause(db, job.id)
    assert resume(db, job.id).status == "running"
    assert not lifecycle.renew(db, claimed.lease, lease_s=LEASE_S).pause
    # Its worker had seen the request, and has stopped the engine: the job must not stay paused.
    assert lifecycle.paused(db, claimed.lease) == "queued"
    assert get(db, job.id).failures == 0


def test_a_paused_job_can_be_cancelled(db: Database) -> None:
    job = submit(db)
    pause(db, job.id)
    assert lifecycle.request_cancel(db, owner=Owner(ORGANIZATION), job_id=job.id).status == "cancelled"
    with pytest.raises(InvalidStateError, match="already been cancelled: only a paused job"):
        resume(db, job.id)


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_what_has_ended_is_neither_paused_nor_resumed(db: Database, end: str) -> None:
    job = submit(db)
    lease = claim(db).lease
    match end:
        case "succeeded":
            lifecycle.succeed(db, lease, model_path="m", weights_sha256="w", trained_tokens=1)
        case "failed":
            lifecycle.fail(db, lease, JobFailure(code="x", message="x"))
        case "cancelled":
            lifecycle.cancelled(db, lease)
    for change in (pause, resume):
        with pytest.raises(InvalidStateError, match=f"{job.id} has already"):
            change(db, job.id)
    assert get(db, job.id).status == end


def test_paused_twice_and_resumed_while_it_runs_are_refused(db: Database) -> None:
    job = submit(db)
    with pytest.raises(InvalidStateError, match="is queued: only a paused job can be resumed"):
        resume(db, job.id)
    pause(db, job.id)
    with pytest.raises(InvalidStateError, match="is already paused"):
        pause(db, job.id)
    resume(db, job.id)
    claim(db)
    with pytest.raises(InvalidStateError, match="is running: only a paused job"):
        resume(db, job.id)
    lifecycle.request_cancel(db, owner=Owner(ORGANIZATION), job_id=job.id)
    with pytest.raises(InvalidStateError, match="is being cancelled"):
        pause(db, job.id)


def test_another_organizations_job_is_absent(db: Database) -> None:
    job = submit(db)
    for change in (lifecycle.request_pause, lifecycle.resume):
        with pytest.raises(NotFoundError):
            change(db, owner=Owner("org-other"), job_id=job.id)


def test_success_wins_over_a_pause(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    pause(db, job.id)
    lifecycle.succeed(db, lease, model_path="m", weights_sha256="w", trained_tokens=1)
    done = get(db, job.id)
    assert (done.status, done.pause_requested_at) == ("succeeded", None)


def test_a_cancel_wins_over_a_pause_that_was_asked_for_before(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    pause(db, job.id)
    lifecycle.request_cancel(db, owner=Owner(ORGANIZATION), job_id=job.id)
    assert lifecycle.paused(db, lease) == "cancelled"


@pytest.mark.parametrize("how", ["released", "killed", "reaped", "restarted"])
def test_a_pause_outlives_the_worker_that_should_have_made_it(db: Database, how: str) -> None:
    job = submit(db)
    lease = claim(db).lease
    pause(db, job.id)
    match how:
        case "released":
            lifecycle.release(db, lease, reason="stopping")
        case "killed":
            assert lifecycle.retry(db, lease, reason="killed", policy=POLICY) == "paused"
        case "reaped":
            with db.transaction() as session:
                session.execute(text("UPDATE jobs SET lease_expires_at = now() - interval '1 hour'"))
            assert lifecycle.reap(db, every_s=5, lease_s=LEASE_S, grace_s=5, policy=POLICY) == [job.id]
        case "restarted":
            assert lifecycle.release_dead(db, host="host", incarnation="2", policy=POLICY) == [job.id]
    paused = get(db, job.id)
    assert (paused.status, paused.failures) == ("paused", 0 if how == "released" else 1)


def test_an_engine_that_dies_too_often_fails_even_when_it_should_pause(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    pause(db, job.id)
    assert lifecycle.retry(db, lease, reason="killed", policy=RetryPolicy(max_failures=1, backoff_s=0)) == "failed"


def test_pause_and_cancel_at_once_end_in_a_cancel(db: Database) -> None:
    """Whoever is first: a job that was cancelled is cancelled, running or not."""
    job_ids = [submit(db).id for _ in range(12)]
    leases = {lease.job_id: lease for lease in (claim(db).lease for _ in range(6))}

    def ask(number: int) -> None:
        job_id = job_ids[number // 2]
        change = (lifecycle.request_pause, lifecycle.request_cancel)[number % 2]
        try:
            change(db, owner=Owner(ORGANIZATION), job_id=job_id)
        except InvalidStateError:
            assert number % 2 == 0, "a cancel was refused"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(2 * len(job_ids))))
    for lease in leases.values():
        lifecycle.paused(db, lease)
    assert {get(db, job_id).status for job_id in job_ids} == {"cancelled"}


def test_a_pause_and_a_claim_at_once_lose_neither(db: Database) -> None:
    job_ids = [submit(db).id for _ in range(8)]

    def act(number: int) -> None:
        if number % 2:
            lifecycle.claim(db, owner=f"host/{number}", lease_s=LEASE_S)
        else:
            pause(db, job_ids[number // 2])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, range(2 * len(job_ids))))
    for job_id in job_ids:
        job = get(db, job_id)
        assert job.status == "paused" or (job.status == "running" and job.pause_requested_at is not None)
