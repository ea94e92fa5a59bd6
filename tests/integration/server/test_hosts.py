"""The worker hosts over the API, and what a queued job says that it waits for."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import event, text, update

from jobs import host_registry, keys
from jobs.host_registry import HostReport
from jobs.models import Job

from .conftest import HOST, Site

GIB = 2**30
DEVICES = {"cpu": {"name": "cpu", "count": 8}, "gpus": [{"name": "NVIDIA L4", "memory_bytes": 24 * GIB}]}


def register(site: Site, name: str = HOST, *, available_bytes: int | None = 16 * GIB, slots: int = 2) -> None:
    """Announce a host, as its worker does."""
    report = HostReport(
        name=name,
        incarnation="1",
        memory_bytes=64 * GIB,
        available_bytes=available_bytes,
        device_kind=None if available_bytes is None else "cuda",
        devices=DEVICES,
        slots=slots,
    )
    host_registry.register_host(site.db, report)


def submit(site: Site, planned_bytes: int | None) -> str:
    """Queue a job over the API, with a plan of this size."""
    job_id = site.submit()
    with site.db.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(planned_bytes=planned_bytes))
    return job_id


def waiting_for(site: Site, job_id: str) -> str | None:
    reason: str | None = site.get(job_id)["lomo"]["waiting_for"]
    return reason


def hosts(site: Site, key: str | None = None) -> list[dict[str, Any]]:
    body = site.client(key).get("/v1/hosts").raise_for_status().json()
    assert body["object"] == "list"
    data: list[dict[str, Any]] = body["data"]
    return data


def test_hosts_show_memory_and_the_callers_jobs_alone(site: Site) -> None:
    assert hosts(site) == []
    register(site)
    job_id = submit(site, 6 * GIB)
    site.claim(job_id)
    [host] = hosts(site)
    assert abs(host.pop("last_seen_at") - time.time()) < 60
    assert host == {
        "object": "host",
        "name": HOST,
        "device_kind": "cuda",
        "devices": DEVICES,
        "memory_bytes": 64 * GIB,
        "available_bytes": 16 * GIB,
        "run_overhead_bytes": None,
        "free_bytes": 10 * GIB,
        "slots": 2,
        "running_jobs": [job_id],
        "num_running": 1,
        "is_alive": True,
    }
    foreign = keys.create_key(site.db, name="foreign", organization_id="org-foreign")
    [seen] = hosts(site, foreign)
    assert (seen["running_jobs"], seen["num_running"], seen["free_bytes"]) == ([], 1, 10 * GIB)


def test_a_silent_or_unmeasured_host_is_shown_as_such(site: Site) -> None:
    register(site, "old", available_bytes=None)
    register(site, "silent")
    with site.db.transaction() as session:
        session.execute(text("UPDATE hosts SET last_seen_at = now() - interval '61 s' WHERE name = 'silent'"))
    old, silent = hosts(site)
    assert (old["device_kind"], old["available_bytes"], old["free_bytes"], old["is_alive"]) == (None, None, None, True)
    assert (silent["name"], silent["is_alive"]) == ("silent", False)


def test_a_queued_job_says_what_it_waits_for(site: Site) -> None:
    large, unplanned = submit(site, 12 * GIB + 1), submit(site, None)
    assert waiting_for(site, large) == waiting_for(site, unplanned) == "worker: no worker host is alive; start one."
    register(site, "tiny", available_bytes=4 * GIB)
    assert waiting_for(site, large) == "memory: needs 12.01 GiB, and no host is large enough: the largest has 4.00 GiB."
    assert waiting_for(site, unplanned) is None
    register(site)
    assert waiting_for(site, large) is None
    site.client().post(f"/v1/fine_tuning/jobs/{unplanned}/cancel").raise_for_status()
    assert waiting_for(site, unplanned) is None
    site.claim(large)
    assert waiting_for(site, large) is None
    second = submit(site, 8 * GIB)
    assert waiting_for(site, second) == "memory: needs 8.00 GiB, the largest free host has 3.99 GiB."
    small = submit(site, 3 * GIB)
    assert waiting_for(site, small) is None
    register(site, slots=1)
    register(site, "tiny", available_bytes=1 * GIB)
    assert waiting_for(site, small) == "slot: every host with room for it runs as many jobs as it may."


def test_hosts_that_went_leave_the_reason_behind(site: Site) -> None:
    """It fitted when it was submitted; then the large host went away."""
    register(site)
    register(site, "tiny", available_bytes=4 * GIB)
    job_id = submit(site, 12 * GIB)
    assert waiting_for(site, job_id) is None
    with site.db.transaction() as session:
        session.execute(
            text("UPDATE hosts SET last_seen_at = now() - interval '61 s' WHERE name = :name"), {"name": HOST}
        )
    job = site.get(job_id)
    assert job["status"] == "queued"
    assert "no host is large enough: the largest has 4.00 GiB" in job["lomo"]["waiting_for"]


@pytest.mark.parametrize("status", ["queued", "ended"])
def test_reasons_cost_a_list_one_query(site: Site, status: str) -> None:
    """However many jobs it has, and none at all where nothing waits."""
    register(site)
    for _ in range(3):
        job_id = submit(site, 20 * GIB)
        if status == "ended":
            site.client().post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    statements: list[str] = []
    engine = site.server.services.db._engine

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    data = site.client().get("/v1/fine_tuning/jobs").raise_for_status().json()["data"]
    event.remove(engine, "before_cursor_execute", note)
    assert sum("FROM hosts" in statement for statement in statements) == (1 if status == "queued" else 0)
    assert {job["lomo"]["waiting_for"] is None for job in data} == {status == "ended"}
