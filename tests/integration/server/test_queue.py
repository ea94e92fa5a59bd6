"""The queue over the API: places, who is ahead, and when a job may start."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import text, update

from jobs import host_registry, keys, queue_order, submission
from jobs.host_registry import HostReport
from jobs.models import Job
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec, LomoOptions

from .conftest import HOST, Run, Site

GIB = 2**30


def register(site: Site, name: str = HOST, *, slots: int = 1, available_bytes: int | None = 16 * GIB) -> None:
    report = HostReport(
        name=name,
        incarnation="1",
        memory_bytes=64 * GIB,
        available_bytes=available_bytes,
        device_kind="cuda",
        devices={},
        slots=slots,
    )
    host_registry.register_host(site.db, report)


def submit(
    site: Site, *, organization_id: str = "org-local", planned_bytes: int | None = GIB, priority: int = 0
) -> str:
    spec = JobSpec(model="tiny", training_file="file-1", seed=1, lomo=LomoOptions(priority=priority))
    planned = PlannedJob(spec=spec, planned_bytes=planned_bytes)
    job = submission.submit(site.db, planned=planned, owner=Owner(organization_id), api_key_id=None, metadata={})
    return job.id


def queue(site: Site, query: str = "", key: str | None = None) -> dict[str, Any]:
    body: dict[str, Any] = site.client(key).get(f"/v1/queue{query}").raise_for_status().json()
    return body


def places(site: Site, key: str | None = None) -> list[tuple[str, int]]:
    return [(item["job_id"], item["position"]) for item in queue(site, key=key)["data"]]


def running(site: Site, *, step_s: float, steps_left: int) -> Run:
    """A running job whose end can be told: two steps, `step_s` apart, the last of them now."""
    run = site.claim(submit(site))
    total = steps_left + 2
    run.start(total_steps=total)
    run.step(1, 2, total_steps=total)
    with site.db.transaction() as session:
        session.execute(
            text("UPDATE metrics SET created_at = now() - make_interval(secs => :s) WHERE job_id = :id AND step = 1"),
            {"s": step_s, "id": run.job_id},
        )
        session.execute(
            text("UPDATE metrics SET created_at = now() WHERE job_id = :id AND step = 2"), {"id": run.job_id}
        )
        session.execute(text("UPDATE jobs SET step_at = now() WHERE id = :id"), {"id": run.job_id})
    return run


def test_places_are_in_the_order_of_the_claims(site: Site) -> None:
    low, first = submit(site, priority=-1), submit(site)
    other = submit(site, organization_id="org-b")
    last, urgent = submit(site), submit(site, priority=9)
    assert places(site) == [(urgent, 1), (first, 2), (last, 4), (low, 5)]
    assert places(site, keys.create_key(site.db, name="b", organization_id="org-b")) == [(other, 3)]
    body = queue(site)
    assert (body["object"], body["num_queued"], body["num_running"], body["has_more"]) == ("list", 5, 0, False)
    assert [item["jobs_ahead"] for item in body["data"]] == [0, 1, 3, 4]
    assert site.get(last)["lomo"]["queue_position"] == 4
    page = queue(site, "?limit=2")
    assert ([item["position"] for item in page["data"]], page["has_more"]) == ([1, 2], True)
    register(site)
    order = [site.claim(job_id).job_id for job_id in (urgent,)]
    assert order == [urgent]
    assert site.get(urgent)["lomo"]["queue_position"] is None
    # Its organization runs one now, and the other none: fairness puts the other one first.
    assert places(site) == [(first, 2), (last, 3), (low, 4)]


def test_a_paused_job_has_no_place_and_comes_back_to_its_own(site: Site) -> None:
    first, second = submit(site), submit(site)
    client = site.client()
    paused = client.post(f"/v1/fine_tuning/jobs/{first}/pause").json()
    assert paused["lomo"]["queue_position"] is None
    assert places(site) == [(second, 1)]
    resumed = client.post(f"/v1/fine_tuning/jobs/{first}/resume").json()
    assert resumed["lomo"]["queue_position"] == 1


def test_the_first_starts_when_the_running_one_ends_and_of_the_second_nobody_knows(site: Site) -> None:
    register(site)
    running(site, step_s=10.0, steps_left=6)
    first, second = submit(site), submit(site)
    found = {item["job_id"]: item["predicted_start"] for item in queue(site)["data"]}
    assert found[first] == pytest.approx(time.time() + 60, abs=5)
    assert found[second] is None


def test_a_free_slot_means_now_and_an_unknown_end_means_nothing(site: Site) -> None:
    register(site, slots=2)
    run = site.claim(submit(site))
    run.start()
    first, second = submit(site), submit(site)
    found = {item["job_id"]: item["predicted_start"] for item in queue(site)["data"]}
    assert found[first] == pytest.approx(time.time(), abs=5)
    assert found[second] is None


def test_memory_counts_as_well_as_slots(site: Site) -> None:
    register(site, slots=3, available_bytes=4 * GIB)
    run = running(site, step_s=10.0, steps_left=3)
    with site.db.transaction() as session:
        session.execute(update(Job).where(Job.id == run.job_id).values(planned_bytes=2 * GIB))
    large, small, huge = (submit(site, planned_bytes=size * GIB) for size in (3, 1, 9))
    found = {item["job_id"]: item["predicted_start"] for item in queue(site)["data"]}
    assert found[large] == pytest.approx(time.time() + 30, abs=5)
    assert found[small] == pytest.approx(time.time(), abs=5), "beside both the running and the large one"
    assert found[huge] is None


def test_a_retry_waits_and_a_dead_host_takes_nothing(site: Site) -> None:
    job_id = submit(site)
    assert queue(site)["data"][0]["predicted_start"] is None
    assert queue(site)["data"][0]["waiting_for"].startswith("worker: ")
    register(site)
    with site.db.transaction() as session:
        session.execute(text("UPDATE jobs SET run_after = now() + interval '40 s'"))
    assert queue(site)["data"][0]["predicted_start"] == pytest.approx(time.time() + 40, abs=5)
    with site.db.transaction() as session:
        session.execute(text("UPDATE hosts SET last_seen_at = now() - interval '1 hour'"))
    [item] = queue(site)["data"]
    assert (item["job_id"], item["predicted_start"]) == (job_id, None)


def test_the_order_is_the_one_that_claims_follow(site: Site) -> None:
    """Against the claims themselves: whoever is at the first place is claimed."""
    register(site, slots=64, available_bytes=10_000 * GIB)
    for number in range(12):
        submit(site, organization_id=f"org-{number % 3}", priority=number % 2)
    while found := queue_order.read_places(site.db):
        site.claim(found[0].job_id)
