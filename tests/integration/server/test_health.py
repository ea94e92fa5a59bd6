"""Probes: alive is not ready, and not ready says why."""

from __future__ import annotations

from sqlalchemy import text

from jobs import host_registry, lifecycle
from jobs.host_registry import HostReport
from jobs.lifecycle import RetryPolicy

from .conftest import Site


def checks(site: Site) -> tuple[int, dict[str, str]]:
    response = site.client("").get("/readyz")
    return response.status_code, response.json()["checks"]


def execute(site: Site, statement: str) -> None:
    with site.db.transaction() as session:
        session.execute(text(statement))


def test_ready_with_a_worker_and_a_reaper(site: Site) -> None:
    assert checks(site)[0] == 503
    host_registry.register_host(site.db, HostReport(name="gpu1", incarnation="1", memory_bytes=1, devices={}))
    policy = RetryPolicy(max_failures=3, backoff_s=1)
    lifecycle.reap(site.db, every_s=5, lease_s=60, grace_s=15, policy=policy)
    assert checks(site) == (200, {"database": "ok", "schema": "ok", "worker": "ok", "reaper": "ok"})
    execute(site, "UPDATE hosts SET last_seen_at = now() - interval '61 s'")
    execute(site, "UPDATE reaper_state SET last_tick_at = now() - interval '1 h'")
    status, found = checks(site)
    assert (status, found["database"], found["schema"]) == (503, "ok", "ok")
    assert found["worker"].startswith("no worker has been seen for 6")
    assert found["reaper"].startswith("Celery beat has not ticked for 36")


def test_a_database_of_another_schema(site: Site) -> None:
    execute(site, "UPDATE alembic_version SET version_num = '0000'")
    assert checks(site)[1]["schema"] == (
        f"at 0000, needs {site.server.services.schema_revision}: run `python -m jobs migrate`"
    )
    execute(site, "DROP TABLE alembic_version")
    assert checks(site)[1]["schema"].startswith("at nothing, needs ")
    assert site.client("").get("/healthz").json() == {"status": "ok"}
