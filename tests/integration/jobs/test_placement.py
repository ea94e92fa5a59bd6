"""A host takes what fits its measured memory, keeps room for the job whose turn it is, and promises no byte twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import text

from jobs import host_registry, lifecycle, reads, submission
from jobs.db import Database
from jobs.lifecycle import Lease
from jobs.owner import Owner
from jobs.planning import PlannedJob

from .conftest import LEASE_S, POLICY, register, submit


def take(db: Database, host: str = "small", *, incarnation: str = "1") -> Lease | None:
    """What the host claims next."""
    claimed = lifecycle.claim(db, owner=f"{host}/{incarnation}", lease_s=LEASE_S)
    return None if claimed is None else claimed.lease


def take_id(db: Database, host: str = "small") -> str | None:
    """Its id alone."""
    lease = take(db, host)
    return None if lease is None else lease.job_id


def capacity(db: Database, **options: float) -> int | None:
    room = reads.largest_room(db, **options)
    return None if room is None else room.capacity_bytes


def finish(db: Database, lease: Lease | None) -> None:
    assert lease is not None
    lifecycle.succeed(db, lease, model_path="m", weights_sha256="w", trained_tokens=1)


def test_plan_and_peak_are_stored_with_the_job(db: Database) -> None:
    planned = submit(db, planned_bytes=7)
    assert (planned.plan, planned.planned_bytes) == (None, 7)
    spec = {"model": "tiny", "training_file": "file-1", "seed": 1}
    job = submission.submit(
        db,
        planned=PlannedJob(
            spec=lifecycle.JobSpec.model_validate(spec), plan={"memory": {"peak_bytes": 3}}, planned_bytes=5
        ),
        owner=Owner("o"),
        api_key_id=None,
        metadata={},
    )
    stored = reads.get_job(db, owner=Owner("o"), job_id=job.id)
    assert (stored.plan, stored.planned_bytes) == ({"memory": {"peak_bytes": 3}}, 5)


def test_a_job_that_is_too_large_for_a_host_is_passed_over_and_goes_to_a_larger_one(db: Database) -> None:
    register(db, "small", available_bytes=10)
    register(db, "large", available_bytes=20)
    large = submit(db, planned_bytes=11, priority=9)
    exact, second = submit(db, planned_bytes=10), submit(db, planned_bytes=1)
    assert take_id(db) == exact.id
    assert take_id(db) is None, "the host is full"
    assert take_id(db, "large") == large.id
    assert take_id(db, "large") == second.id
    assert take_id(db, "large") is None


def test_a_job_that_fits_a_busy_host_waits_and_then_runs(db: Database) -> None:
    register(db, "small", available_bytes=10)
    submit(db, planned_bytes=6)
    running = take(db)
    waiting = submit(db, planned_bytes=5)
    assert take(db) is None
    finish(db, running)
    assert take_id(db) == waiting.id


def test_a_job_without_a_plan_goes_anywhere_and_counts_as_nothing(db: Database) -> None:
    register(db, "small", available_bytes=10)
    submit(db, planned_bytes=10)
    assert take(db) is not None
    for host in ("small", "never-announced"):
        unplanned = submit(db)
        assert take_id(db, host) == unplanned.id
    submit(db, planned_bytes=0)
    assert take(db) is not None
    submit(db, planned_bytes=1)
    assert take(db) is None


def test_a_host_without_a_measurement_takes_no_planned_job(db: Database) -> None:
    job = submit(db, planned_bytes=1)
    assert take(db, "small") is None, "never announced"
    register(db, "small", available_bytes=None)
    assert take(db, "small") is None, "announced by a worker that does not measure"
    register(db, "small", available_bytes=10, incarnation="2")
    assert take(db, "small", incarnation="3") is None, "measured by an earlier worker"
    lease = take(db, "small", incarnation="2")
    assert lease is not None
    assert lease.job_id == job.id


def test_what_an_earlier_incarnation_holds_counts_until_it_is_freed(db: Database) -> None:
    register(db, "small", available_bytes=10)
    lost = submit(db, planned_bytes=6)
    assert take_id(db) == lost.id
    register(db, "small", available_bytes=10, incarnation="2")
    other = submit(db, planned_bytes=6)
    assert take(db, incarnation="2") is None
    assert lifecycle.release_dead(db, host="small", incarnation="2", policy=POLICY) == [lost.id]
    first, second = take(db, incarnation="2"), take(db, incarnation="2")
    assert first is not None
    assert first.job_id == lost.id
    assert second is None
    finish(db, first)
    last = take(db, incarnation="2")
    assert last is not None
    assert last.job_id == other.id


def test_small_jobs_do_not_keep_a_large_one_waiting_for_ever(db: Database) -> None:
    """Two slots' worth of small jobs are always there: the large one runs as soon as those before it have ended."""
    register(db, "small", available_bytes=10)
    before = [submit(db, planned_bytes=4) for _ in range(2)]
    found = [take(db) for _ in before]
    large = submit(db, planned_bytes=7)
    stream = [submit(db, planned_bytes=4) for _ in range(4)]
    finish(db, found[0])
    assert take(db) is None, "a small job took the room that the large one waits for"
    finish(db, found[1])
    assert take_id(db) == large.id
    assert take(db) is None
    statuses = [reads.get_job(db, owner=Owner(job.organization_id), job_id=job.id).status for job in stream]
    assert statuses == ["queued"] * 4


def test_behind_a_large_job_only_those_are_taken_that_leave_it_room(db: Database) -> None:
    register(db, "small", available_bytes=10)
    submit(db, planned_bytes=5)
    before = take(db)
    large = submit(db, planned_bytes=7)
    fitting = [submit(db, planned_bytes=2), submit(db, planned_bytes=1), submit(db, planned_bytes=1)]
    assert take_id(db) == fitting[0].id, "2 and 7 fit together"
    assert take_id(db) == fitting[1].id, "2, 1 and 7 do too"
    assert take_id(db) is None, "2, 1, 1 and 7 do not, though 2 bytes are free now"
    finish(db, before)
    assert take_id(db) == large.id
    assert take_id(db) is None


def test_a_large_job_holds_up_neither_unplanned_ones_nor_hosts_that_it_does_not_fit(db: Database) -> None:
    register(db, "small", available_bytes=10)
    register(db, "large", available_bytes=20)
    submit(db, planned_bytes=8)
    assert take(db, "large") is not None
    submit(db, planned_bytes=20)
    unplanned, small = submit(db), submit(db, planned_bytes=3)
    assert take_id(db, "large") == unplanned.id
    assert take_id(db, "large") is None
    assert take_id(db, "small") == small.id


def test_a_job_that_waits_for_its_retry_holds_nobody_up(db: Database) -> None:
    register(db, "small", available_bytes=10)
    submit(db, planned_bytes=2)
    assert take(db) is not None
    large, small = submit(db, planned_bytes=10), submit(db, planned_bytes=2)
    assert take(db) is None
    with db.transaction() as session:
        session.execute(text("UPDATE jobs SET run_after = now() + interval '1 h' WHERE id = :id"), {"id": large.id})
    assert take_id(db) == small.id


def test_slots_that_claim_at_once_never_promise_the_same_bytes(db: Database) -> None:
    """Eight threads at once, again and again: without the lock on the host two of them see the same bytes free."""
    for round_number in range(20):
        host = f"host-{round_number}"
        register(db, host, available_bytes=10, slots=8)
        for _ in range(8):
            submit(db, planned_bytes=4)
        with ThreadPoolExecutor(8) as pool:
            taken = [lease for lease in pool.map(lambda _, name=host: take(db, name), range(8)) if lease is not None]
        assert len(taken) == 2
        assert len({lease.job_id for lease in taken}) == 2
        with db.transaction() as session:
            session.execute(text("DELETE FROM jobs"))


def test_hosts_and_what_runs_there(db: Database) -> None:
    assert reads.list_hosts(db) == []
    assert capacity(db) is None
    register(db, "b", available_bytes=10, slots=2)
    register(db, "a", available_bytes=None, slots=1)
    assert capacity(db) == 10
    first, second = submit(db, planned_bytes=4), submit(db, organization_id="org-other")
    assert [take_id(db, "b"), take_id(db, "b")] == [first.id, second.id]
    a, b = reads.list_hosts(db)
    assert (a.host.name, a.is_alive, a.running, a.free_bytes, a.has_free_slot) == ("a", True, [], None, True)
    assert [(job.id, job.planned_bytes) for job in b.running] == [(first.id, 4), (second.id, None)]
    assert (b.free_bytes, b.has_free_slot) == (6, False)
    assert reads.num_live_hosts(db) == 2


def test_what_a_run_takes_beside_its_plan_counts_for_every_run(db: Database) -> None:
    register(db, "cpu", available_bytes=10, run_overhead_bytes=2)
    register(db, "card", available_bytes=9)
    room = reads.largest_room(db)
    assert room is not None
    assert (room.host, room.available_bytes, room.overhead_bytes, room.capacity_bytes) == ("card", 9, 0, 9)
    whole, half, unplanned = submit(db, planned_bytes=9), submit(db, planned_bytes=3), submit(db)
    other, small = submit(db, planned_bytes=4), submit(db, planned_bytes=3)
    # 3 + 2 and 3 + 2 make 10; 4 + 2 would be one more, and 9 + 2 never fits there.
    taken = [take_id(db, "cpu") for _ in range(3)]
    assert taken == [half.id, unplanned.id, None]
    assert reads.list_hosts(db)[1].free_bytes == 5
    assert take_id(db, "card") == whole.id
    lifecycle.request_cancel(db, owner=Owner(other.organization_id), job_id=other.id)
    assert take_id(db, "cpu") == small.id
    assert reads.list_hosts(db)[1].free_bytes == 0


def test_a_silent_host_is_listed_and_counts_no_more(db: Database) -> None:
    register(db, "large", available_bytes=20)
    register(db, "small", available_bytes=10)
    with db.transaction() as session:
        session.execute(text("UPDATE hosts SET last_seen_at = now() - interval '61 s' WHERE name = 'large'"))
    assert [(state.host.name, state.is_alive) for state in reads.list_hosts(db)] == [("large", False), ("small", True)]
    assert capacity(db) == 10
    assert capacity(db, alive_within_s=120) == 20
    assert reads.num_live_hosts(db) == 1
    host_registry.see_host(db, name="large")
    assert capacity(db) == 20
