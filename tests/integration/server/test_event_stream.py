"""A job's event stream: replay, follow, resume; no event lost or sent twice, whatever happens in between."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy import text

from jobs import key_admin, lifecycle, reads
from jobs.key_admin import KeyPlace
from jobs.keys import Principal
from jobs.owner import Owner
from local.postgres import Postgres
from server import feeds, sse
from server import hub as hub_module
from server.auth import Credential

from .conftest import Follower, Run, RunningServer, Site

# Events before the worker's first line: created, queued, started.
NUM_OPENING = 3


def is_gapless(follower: Follower, *, first: int = 1) -> bool:
    return follower.seqs == list(range(first, first + len(follower.seqs)))


def test_replay_then_follow_then_done(site: Site) -> None:
    run = site.run()
    run.step(1, 2)
    follower = site.follow_job(run.job_id)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING + 2, "the replay")
    run.step(3)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING + 3, "a live event")
    name = run.succeed()
    follower.join()
    assert follower.is_done
    assert is_gapless(follower)
    kinds = [frame.event for frame in follower.frames]
    assert kinds == ["message", "status", "status", "metrics", "metrics", "metrics", "message", "status", "message"]
    step = follower.frames[3].body
    assert step["data"]["memory"]["peak_bytes"] == 2001
    assert (step["seq"], step["attempt"], step["object"]) == (4, 1, "fine_tuning.job.event")
    assert follower.frames[2].body["data"]["status"] == "running"
    last = follower.frames[-2].body
    assert last["data"]["status"] == "succeeded"
    assert name in follower.frames[-3].body["message"]


def test_stream_and_list_show_the_same_objects(site: Site) -> None:
    run = site.run()
    run.fail("Broken")
    follower = site.follow_job(run.job_id)
    follower.join()
    listed = site.client().get(f"/v1/fine_tuning/jobs/{run.job_id}/events", params={"limit": 100}).json()["data"]
    assert [frame.body for frame in follower.frames[:-1]] == listed[::-1]
    assert listed[0]["data"] == {"code": "diverged", "message": "Broken", "param": None, "status": "failed"}


@pytest.mark.parametrize("form", ["header", "seq", "id"])
def test_resume_after_the_last_seen_event(site: Site, form: str) -> None:
    run = site.run()
    run.step(*range(1, 6))
    run.succeed()
    ids = {"header": ("", {"Last-Event-ID": "4"}), "seq": ("&after=4", {})}
    query, headers = ids.get(form, (f"&after=ftevent-{run.job_id[6:]}-4", {}))
    follower = site.follow_job(run.job_id, query, headers)
    follower.join()
    assert follower.seqs == [5, 6, 7, 8, 9, 10]
    assert follower.is_done


@pytest.mark.parametrize("seen", ["10", "999999999"])
def test_done_at_once_where_everything_was_seen(site: Site, seen: str) -> None:
    run = site.run()
    run.step(*range(1, 6))
    run.succeed()
    follower = site.follow_job(run.job_id, headers={"Last-Event-ID": seen})
    follower.join()
    assert [frame.data for frame in follower.frames] == ["[DONE]"]


def test_a_position_from_the_future_does_not_hide_events(site: Site) -> None:
    run = site.run()
    follower = site.follow_job(run.job_id, "&after=999")
    site.wait_until(lambda: run.job_id in site.server.services.hub._feeds, 10, "the subscription")
    run.message("hello")
    follower.wait_for(lambda: follower.seqs == [NUM_OPENING + 1], "the new event")


def test_accept_header_asks_for_a_stream_and_the_parameter_wins(site: Site) -> None:
    job_id = site.submit()
    site.client().post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    accepting = site.client(headers={"Accept": "text/event-stream"})
    response = accepting.get(f"/v1/fine_tuning/jobs/{job_id}/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.startswith("retry: 3000\nid: 1\nevent: message\ndata: {")
    assert response.text.endswith("\n\ndata: [DONE]\n\n")
    listed = accepting.get(f"/v1/fine_tuning/jobs/{job_id}/events?stream=false")
    assert listed.json()["object"] == "list"


@pytest.mark.parametrize(
    ("accept", "is_stream"),
    [
        ("Text/Event-Stream", True),
        ("text/event-stream, */*", True),
        ("text/event-stream;q=0.9, application/json;q=0.5", True),
        ("application/json, text/event-stream", False),
        ("text/event-stream; q=0", False),
        ("*/*", False),
    ],
)
def test_a_stream_is_for_who_prefers_it_to_json(site: Site, accept: str, *, is_stream: bool) -> None:
    job_id = site.submit()
    site.client().post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    response = site.client(headers={"Accept": accept}).get(f"/v1/fine_tuning/jobs/{job_id}/events")
    assert response.headers["content-type"].startswith("text/event-stream") == is_stream


def test_errors_come_before_the_stream(site: Site) -> None:
    run = site.run()
    events = f"/v1/fine_tuning/jobs/{run.job_id}/events?stream=true"
    assert site.client().get("/v1/fine_tuning/jobs/ftjob-none/events?stream=true").status_code == 404
    for wrong in ("x", "-1", "1.5", "ftevent-" + "0" * 24 + "-1", "9" * 30):
        response = site.client().get(f"{events}&after={wrong}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "after")


def test_many_clients_cost_one_query_per_batch(site: Site) -> None:
    run = site.run()
    followers = [site.follow_job(run.job_id) for _ in range(20)]
    hub = site.server.services.hub
    for follower in followers:
        follower.wait_for(lambda follower=follower: len(follower.seqs) == NUM_OPENING, "the replay")  # type: ignore[misc]
    topic = hub._feeds[run.job_id][feeds.EVENTS]
    site.wait_until(lambda: len(topic.queues) == 20 and not topic.wake.is_set(), 10, "20 subscriptions")
    before = hub.num_queries
    for step in range(1, 11):
        run.step(step)
    run.succeed()
    for follower in followers:
        follower.join()
        assert is_gapless(follower)
        assert len(follower.seqs) == NUM_OPENING + 12
    # 11 notifications make at most 11 reads, and not 20 times as many; each stream's key may be looked up once more.
    assert hub.num_queries - before <= 11 + len(followers)


def test_more_events_than_a_page(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "PAGE_EVENTS", 7)
    run = site.run()
    run.message(*(f"line {number}" for number in range(40)))
    follower = site.follow_job(run.job_id)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING + 40, "the replay of several pages")
    run.message(*(f"line {number}" for number in range(40, 80)))
    run.succeed()
    follower.join()
    assert is_gapless(follower)
    assert len(follower.seqs) == NUM_OPENING + 80 + 2


def test_a_client_that_lags_reads_on_from_the_database(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is driven by hand: nothing is taken from it while more batches come than its queue holds."""
    monkeypatch.setattr(hub_module, "_QUEUE_BATCHES", 4)
    run = site.run()
    services = site.server.services
    job = reads.get_job(site.db, owner=Owner("org-local"), job_id=run.job_id)
    watcher = sse.Watcher(Principal("org-local", "0" * 12, "test", "proj_test"), lambda: True)
    assert services.hub._listener is not None
    loop = services.hub._listener.get_loop()

    async def open_stream() -> tuple[AsyncIterator[bytes], bytes]:
        stream = sse.stream_feed(services.hub, feeds.EVENTS, job, watcher=watcher, after=0, event_pings=False)
        return stream, await anext(stream) + await anext(stream)

    stream, opening = asyncio.run_coroutine_threadsafe(open_stream(), loop).result(10)
    topic = services.hub._feeds[run.job_id][feeds.EVENTS]
    for number in range(10):
        run.message(f"line {number}")
        site.wait_until(lambda number=number: topic.position == NUM_OPENING + 1 + number, 10, "the batch")  # type: ignore[misc]
    assert next(iter(topic.queues)).qsize() < 10
    run.succeed()

    async def drain() -> bytes:
        return b"".join([chunk async for chunk in stream])

    body = opening + asyncio.run_coroutine_threadsafe(drain(), loop).result(10)
    ids = [int(line[4:]) for line in body.decode().splitlines() if line.startswith("id: ")]
    assert ids == list(range(1, NUM_OPENING + 10 + 2 + 1))
    assert body.endswith(b"data: [DONE]\n\n")
    assert run.job_id not in services.hub._feeds


def test_lost_database_connections_lose_no_event(site: Site) -> None:
    run = site.run()
    follower = site.follow_job(run.job_id)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING, "the replay")
    for step in range(1, 4):
        with site.db.transaction() as session:
            session.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        run.step(step)
        follower.wait_for(lambda step=step: len(follower.seqs) == NUM_OPENING + step, "the event")  # type: ignore[misc]
    run.succeed()
    follower.join()
    assert follower.is_done
    assert is_gapless(follower)


def test_a_restart_of_the_database(site: Site, postgres_server: Postgres) -> None:
    run = site.run()
    follower = site.follow_job(run.job_id)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING, "the replay")
    postgres_server.stop()
    try:
        down = site.client().get(f"/v1/fine_tuning/jobs/{run.job_id}")
        assert (down.status_code, down.headers["retry-after"]) == (503, "2")
        assert down.json()["error"]["code"] == "database_unavailable"
        ready = site.client().get("/readyz")
        assert (ready.status_code, ready.json()["checks"]) == (503, {"database": "does not answer"})
        assert site.client().get("/healthz").json() == {"status": "ok"}
    finally:
        postgres_server.start()
    assert site.get(run.job_id)["status"] == "running"
    run.step(1)
    run.succeed()
    follower.join()
    assert follower.is_done
    assert is_gapless(follower)


def test_pings(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_EVENT_PING", (sse._EVENT_PING[0], 0.05))
    monkeypatch.setattr(sse, "_COMMENT_PING", (sse._COMMENT_PING[0], 0.05))
    run = site.run()
    visible = site.follow_job(run.job_id, "&pings=true")
    visible.wait_for(lambda: [frame.event for frame in visible.frames].count("ping") >= 2, "two pings")
    assert {frame.data for frame in visible.frames if frame.event == "ping"} == {"{}"}
    with site.client().stream("GET", f"/v1/fine_tuning/jobs/{run.job_id}/events?stream=true") as response:
        assert any(line == ": ping" for line in response.iter_lines())
    run.succeed()
    visible.join()


def test_a_client_that_leaves_is_forgotten(site: Site) -> None:
    run = site.run()
    hub = site.server.services.hub
    with site.client().stream("GET", f"/v1/fine_tuning/jobs/{run.job_id}/events?stream=true") as response:
        # Kept: an iterator that is dropped closes its response.
        lines = response.iter_lines()
        assert next(lines) == "retry: 3000"
        site.wait_until(lambda: hub._open.total() == 1, 10, "the stream to be counted")
    site.wait_until(lambda: not hub._feeds and hub._open.total() == 0, 10, "the stream to be forgotten")


@pytest.mark.parametrize(
    "end",
    [
        "revoked_at = now()",
        "expires_at = now()",
        "scopes = '{files:read}'",
        # Rotated, and the grace of the secret before is over.
        "previous_sha256 = secret_sha256, secret_sha256 = '', previous_expires_at = now()",
    ],
)
def test_a_key_that_ends_ends_its_streams(site: Site, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(sse, "RECHECK_S", 0.1)
    run = site.run()
    follower = site.follow_job(run.job_id)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING, "the replay")
    with site.db.transaction() as session:
        session.execute(text(f"UPDATE api_keys SET {end}"))  # noqa: S608 - the ends stand above
    follower.join()
    assert not follower.is_done
    assert follower.error is None


def test_a_stream_outlives_a_rotation_until_its_grace_is_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "RECHECK_S", 0.1)
    run = site.run()
    follower = site.follow_job(run.job_id)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING, "the replay")
    place = KeyPlace(organization_id="org-local")
    _, token = key_admin.rotate(site.db, place, site.key.split("-")[2], grace_s=3600)
    checks: list[bool] = []
    find_fresh = site.server.services.authenticator.find_fresh

    def find_and_note(credential: Credential) -> Principal | None:
        found = find_fresh(credential)
        checks.append(found is not None)
        return found

    monkeypatch.setattr(site.server.services.authenticator, "find_fresh", find_and_note)
    follower.wait_for(lambda: len(checks) > 2, "some checks of the key")
    assert not follower.has_ended
    with site.db.transaction() as session:
        session.execute(text("UPDATE api_keys SET previous_expires_at = now()"))
    follower.join()
    assert checks[:2] == [True, True]
    assert site.client(token).get("/v1/models").status_code == 200


def test_limit_of_streams(site: Site) -> None:
    run = site.run()
    hub = site.server.services.hub
    hub.settings = site.settings.model_copy(update={"max_streams_per_key": 1})
    follower = site.follow_job(run.job_id)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING, "the replay")
    refused = site.client().get(f"/v1/fine_tuning/jobs/{run.job_id}/events?stream=true")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")


def test_a_stopping_server_ends_its_streams(site: Site) -> None:
    second = RunningServer.start(site.settings)
    run = site.run()
    client = httpx.Client(base_url=f"http://127.0.0.1:{second.port}", headers={"Authorization": f"Bearer {site.key}"})
    with client:
        job = Follower(client, f"/v1/fine_tuning/jobs/{run.job_id}/events?stream=true")
        jobs = Follower(client, "/v1/fine_tuning/jobs?stream=true")
        job.wait_for(lambda: len(job.seqs) == NUM_OPENING, "the replay")
        jobs.wait_for(lambda: bool(jobs.frames), "the first page")
        started = time.monotonic()
        second.stop()
        # Well below the grace of 5 s after which uvicorn would cut them off.
        assert time.monotonic() - started < 3
        job.join()
        jobs.join()
    assert job.error is None
    assert not job.is_done
    # The client goes on at the other server, where it was.
    run.step(1)
    lifecycle.cancelled(site.db, run.claim.lease)
    resumed = site.follow_job(run.job_id, headers={"Last-Event-ID": str(job.seqs[-1])})
    resumed.join()
    assert job.seqs + resumed.seqs == list(range(1, NUM_OPENING + 3))


def test_events_arrive_soon(site: Site) -> None:
    """Measured on an idle machine: median below 10 ms. The limit is for a loaded one."""
    run = site.run()
    follower = site.follow_job(run.job_id)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING, "the replay")
    shipped = [ship_and_wait(run, follower, step) for step in range(1, 31)]
    delays_ms = [
        1000 * (arrival - sent) for arrival, sent in zip(follower.arrivals[NUM_OPENING:], shipped, strict=True)
    ]
    print(f"emit to client: median {statistics.median(delays_ms):.1f} ms, max {max(delays_ms):.1f} ms")
    assert statistics.median(delays_ms) < 100


def ship_and_wait(run: Run, follower: Follower, step: int) -> float:
    """Ship one step and wait for it. Returns when it was shipped."""
    sent = time.time()
    run.step(step)
    follower.wait_for(lambda: len(follower.seqs) == NUM_OPENING + step, "the event")
    return sent
