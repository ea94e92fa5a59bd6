"""The lease as a state machine: random interleavings of workers, users, time and the reaper keep the promises.

Promises: an accepted job exists for ever and ends; a terminal status never changes; only the newest claim writes; event
numbers have no gap; a cancelled job never runs again; a pause happens or is taken back; no host runs more than fits its
memory. Time is simulated by moving the rows' times back.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from jobs import eventlog, lifecycle, reads
from jobs.db import Database
from jobs.errors import InvalidStateError, LeaseLostError
from jobs.lifecycle import Claim, JobFailure
from jobs.owner import Owner
from lomo_core.events import JournalLine, Message

from .conftest import LEASE_S, ORGANIZATION, POLICY, register, submit

GRACE_S = 5.0
CAPACITY_BYTES = {"A": 10, "B": 4, "Z": 20}
TERMINAL = {"succeeded", "failed", "cancelled"}


class LeaseMachine(RuleBasedStateMachine):
    """Workers, users and the reaper in any order."""

    db: Database
    jobs = Bundle("jobs")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        with self.db.transaction() as session:
            session.execute(text("TRUNCATE jobs CASCADE"))
            session.execute(text("UPDATE reaper_state SET last_tick_at = now(), hold_until = now()"))
        for name, available_bytes in CAPACITY_BYTES.items():
            register(self.db, name, available_bytes=available_bytes)
        self.accepted: set[str] = set()
        self.ended: dict[str, str] = {}
        self.owner: dict[str, Claim] = {}
        self.cancelled: set[str] = set()
        self.pausing: set[str] = set()
        self.lines: dict[tuple[str, int], int] = {}

    @rule(target=jobs, priority=st.integers(-1, 1), planned_bytes=st.sampled_from([None, 1, 4, 7, 20]))
    def submit(self, priority: int, planned_bytes: int | None) -> str:
        job = submit(self.db, priority=priority, planned_bytes=planned_bytes)
        self.accepted.add(job.id)
        return job.id

    @rule(target=claims, host=st.sampled_from("AB"))
    def claim(self, host: str) -> object:
        claimed = lifecycle.claim(self.db, owner=f"{host}/1", lease_s=LEASE_S)
        if claimed is None:
            return multiple()
        assert claimed.lease.job_id not in self.owner, "claimed while somebody owns it"
        assert claimed.lease.job_id not in self.cancelled, "a cancelled job runs again"
        assert self.status(claimed.lease.job_id) == "running"
        self.owner[claimed.lease.job_id] = claimed
        return claimed

    @rule(claimed=claims)
    def renew(self, claimed: Claim) -> None:
        job_id = claimed.lease.job_id
        with self.owned(claimed):
            asked = lifecycle.renew(self.db, claimed.lease, lease_s=LEASE_S)
            assert asked.cancel == (job_id in self.cancelled), "cancel is not delivered with the renewal"
            assert asked.pause == (job_id in self.pausing), "pause is not delivered with the renewal"

    @rule(claimed=claims, repeat=st.booleans())
    def ship(self, claimed: Claim, repeat: bool) -> None:
        key = (claimed.lease.job_id, claimed.lease.attempt)
        number = self.lines.get(key, 0)
        line = JournalLine(1.0, Message(level="info", message=f"line {number}"))
        with self.owned(claimed):
            new = eventlog.ship(self.db, claimed.lease, [(number, line)], attempt=key[1], relative=str)
            assert new == 1
            self.lines[key] = number + 1
            if repeat:
                assert eventlog.ship(self.db, claimed.lease, [(number, line)], attempt=key[1], relative=str) == 0

    @rule(claimed=claims, how=st.sampled_from(["succeed", "fail", "cancelled", "paused", "retry", "release"]))
    def finish(self, claimed: Claim, how: str) -> None:
        lease = claimed.lease
        with self.owned(claimed):
            match how:
                case "succeed":
                    lifecycle.succeed(self.db, lease, model_path="m", weights_sha256="w", trained_tokens=1)
                case "fail":
                    lifecycle.fail(self.db, lease, JobFailure(code="x", message="x"))
                case "cancelled":
                    lifecycle.cancelled(self.db, lease)
                    self.cancelled.add(lease.job_id)
                case "paused":
                    lifecycle.paused(self.db, lease)
                case "retry":
                    lifecycle.retry(self.db, lease, reason="killed", policy=POLICY)
                case "release":
                    lifecycle.release(self.db, lease, reason="stopping")
            self.gave_back(lease.job_id)

    def gave_back(self, job_id: str) -> None:
        """Nobody owns the job now; a pause that was asked for has happened, unless the job has ended."""
        del self.owner[job_id]
        if job_id in self.pausing:
            self.pausing.discard(job_id)
            assert self.status(job_id) in {"paused", *TERMINAL}, "a pause was forgotten"

    @rule(job_id=jobs)
    def pause(self, job_id: str) -> None:
        before = self.status(job_id)
        try:
            lifecycle.request_pause(self.db, owner=Owner(ORGANIZATION), job_id=job_id)
        except InvalidStateError:
            assert before in {"paused", *TERMINAL} or job_id in self.cancelled
        else:
            assert before in {"queued", "running"}
            if before == "running":
                self.pausing.add(job_id)

    @rule(job_id=jobs)
    def resume(self, job_id: str) -> None:
        before = self.status(job_id)
        try:
            lifecycle.resume(self.db, owner=Owner(ORGANIZATION), job_id=job_id)
        except InvalidStateError:
            assert before != "paused"
            assert job_id not in self.pausing
        else:
            assert before == "paused" or job_id in self.pausing
            self.pausing.discard(job_id)

    def status(self, job_id: str) -> str:
        return reads.get_job(self.db, owner=Owner(ORGANIZATION), job_id=job_id).status

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        try:
            lifecycle.request_cancel(self.db, owner=Owner(ORGANIZATION), job_id=job_id)
        except InvalidStateError:
            assert job_id in self.ended
        else:
            self.cancelled.add(job_id)

    @rule(seconds=st.sampled_from([1, 10, 29, 31, 40]))
    def advance(self, seconds: int) -> None:
        with self.db.transaction() as session:
            session.execute(
                text(
                    "UPDATE jobs SET lease_expires_at = lease_expires_at - make_interval(secs => :s),"
                    " run_after = run_after - make_interval(secs => :s)"
                ),
                {"s": seconds},
            )

    @rule()
    def reap(self) -> None:
        for job_id in lifecycle.reap(self.db, every_s=3600, lease_s=LEASE_S, grace_s=GRACE_S, policy=POLICY):
            assert job_id in self.owner, "reaped a job that nobody owned"
            self.gave_back(job_id)

    @rule(host=st.sampled_from("AB"))
    def restart_worker(self, host: str) -> None:
        for job_id in lifecycle.release_dead(self.db, host=host, incarnation="2", policy=POLICY):
            self.gave_back(job_id)

    @invariant()
    def promises(self) -> None:
        with self.db.read() as session:
            rows = session.execute(
                text(
                    "SELECT id, status, last_seq, (SELECT count(*) FROM events e WHERE e.job_id = j.id),"
                    " (SELECT coalesce(max(seq), 0) FROM events e WHERE e.job_id = j.id) FROM jobs j"
                )
            ).all()
        assert {row[0] for row in rows} == self.accepted, "an accepted job is gone"
        for job_id, status, last_seq, count, highest in rows:
            assert last_seq == count == highest, "event numbers have a gap"
            assert self.ended.setdefault(job_id, status) == status if job_id in self.ended else True
            assert (status == "running") == (job_id in self.owner)
            if status in TERMINAL:
                self.ended[job_id] = status
            if job_id in self.cancelled:
                assert status in {"running", *TERMINAL}, "a cancelled job went back into the queue"
        for state in reads.list_hosts(self.db):
            planned_bytes = sum(job.planned_bytes or 0 for job in state.running)
            assert planned_bytes <= CAPACITY_BYTES[state.host.name], "a host runs more than fits"

    def teardown(self) -> None:
        """With time passing and one honest worker, everything ends."""
        for claimed in list(self.owner.values()):
            lifecycle.release(self.db, claimed.lease, reason="stopping")
        for job_id in self.accepted:
            if self.status(job_id) == "paused":
                lifecycle.resume(self.db, owner=Owner(ORGANIZATION), job_id=job_id)
        self.advance(3600)
        while (claimed := lifecycle.claim(self.db, owner="Z/1", lease_s=LEASE_S)) is not None:
            lifecycle.succeed(self.db, claimed.lease, model_path="m", weights_sha256="w", trained_tokens=1)
        with self.db.read() as session:
            left = session.scalar(
                text("SELECT count(*) FROM jobs WHERE status NOT IN ('succeeded','failed','cancelled')")
            )
        assert left == 0, "a job never ends"

    def owned(self, claimed: Claim) -> _Owned:
        return _Owned(self.owner.get(claimed.lease.job_id) == claimed)


class _Owned:
    """Expects the block to work for the owner and to raise LeaseLostError for anybody else."""

    def __init__(self, is_owner: bool) -> None:
        self._is_owner = is_owner

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, traceback: object) -> bool:
        if self._is_owner:
            return False
        assert isinstance(error, LeaseLostError), f"a stale owner wrote: {error!r}"
        return True


@pytest.mark.slow
def test_random_interleavings_keep_the_promises(db: Database) -> None:
    machine = type("Machine", (LeaseMachine,), {"db": db})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
