"""The stream of an organization's jobs, from which the dashboard's list lives."""

from __future__ import annotations

from itertools import pairwise

import pytest

from jobs import keys, submission
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec
from server import hub, sse
from server.describe import describe_jobs

from ...conftest import wait_until_true
from .conftest import Follower, Site

STREAM = "/v1/fine_tuning/jobs?stream=true"


def frames_of(follower: Follower, job_id: str) -> list[dict[str, object]]:
    return [frame.body for frame in follower.frames if frame.event == "job" and frame.body["id"] == job_id]


def test_first_a_page_then_changes(site: Site) -> None:
    old = site.submit()
    follower = site.follow(f"{STREAM}&limit=1")
    follower.wait_for(lambda: bool(follower.frames), "the first page")
    first = follower.frames[0]
    assert first.event == "jobs"
    assert ([job["id"] for job in first.body["data"]], first.body["has_more"]) == ([old], False)
    run = site.claim(old)
    run.start()
    run.step(1)
    follower.wait_for(lambda: any(job["lomo"]["step"] == 1 for job in frames_of(follower, old)), "the step")  # type: ignore[index]
    new = site.submit()
    follower.wait_for(lambda: bool(frames_of(follower, new)), "the new job")
    run.succeed()
    follower.wait_for(lambda: frames_of(follower, old)[-1]["status"] == "succeeded", "the end")
    assert not follower.has_ended
    assert "loss_curve" not in frames_of(follower, old)[-1]["lomo"]  # type: ignore[operator]
    assert frames_of(follower, old)[-1] == site.get(old)


def test_a_busy_job_is_sent_once_a_second_at_most(site: Site) -> None:
    run = site.run()
    follower = site.follow(STREAM)
    follower.wait_for(lambda: bool(follower.frames), "the first page")
    for step in range(1, 41):
        run.step(step)
    run.succeed()
    follower.wait_for(lambda: any(job["status"] == "succeeded" for job in frames_of(follower, run.job_id)), "the end")
    arrivals = [at for at, frame in zip(follower.arrivals, follower.frames, strict=True) if frame.event == "job"]
    assert len(arrivals) < 40
    # A tenth of a second for the way.
    assert all(later - earlier > 0.9 for earlier, later in pairwise(arrivals))


def test_loss_curve_where_asked_for(site: Site) -> None:
    run = site.run()
    run.start()
    run.step(*range(1, 101))
    query = "include[]=loss_curve"
    listed = site.client().get(f"/v1/fine_tuning/jobs?{query}").json()["data"][0]["lomo"]["loss_curve"]
    assert 40 <= len(listed) <= 48
    assert listed[-1] == [100, 0.1]
    assert all(later[0] > earlier[0] for earlier, later in pairwise(listed))
    assert "loss_curve" not in site.get(run.job_id)["lomo"]
    follower = site.follow(f"{STREAM}&{query}")
    follower.wait_for(lambda: bool(follower.frames), "the first page")
    assert follower.frames[0].body["data"][0]["lomo"]["loss_curve"] == listed
    run.message("hello")
    follower.wait_for(lambda: bool(frames_of(follower, run.job_id)), "a change")
    assert frames_of(follower, run.job_id)[0]["lomo"]["loss_curve"] == listed  # type: ignore[index]


def test_other_organizations_are_not_seen(site: Site) -> None:
    foreign = keys.create_key(site.db, name="foreign", organization_id="org-foreign")
    follower = Follower(site.client(foreign), STREAM)
    follower.wait_for(lambda: bool(follower.frames), "the first page")
    assert follower.frames[0].body == {"data": [], "has_more": False}
    site.submit()
    spec = JobSpec(model="tiny", training_file="file-1", seed=1)
    planned = PlannedJob(spec=spec)
    own = submission.submit(site.db, planned=planned, owner=Owner("org-foreign"), api_key_id=None, metadata={})
    follower.wait_for(lambda: len(follower.frames) > 1, "the own job")
    assert {frame.body["id"] for frame in follower.frames[1:]} == {own.id}


def test_pings_are_events(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_EVENT_PING", (sse._EVENT_PING[0], 0.05))
    follower = site.follow(STREAM)
    follower.wait_for(lambda: any(frame.event == "ping" for frame in follower.frames), "a ping")


def test_a_lost_connection_sends_the_page_again(site: Site) -> None:
    site.submit()
    follower = site.follow(STREAM)
    follower.wait_for(lambda: bool(follower.frames), "the first page")
    site.server.services.hub._listener.get_loop().call_soon_threadsafe(site.server.services.hub._wake_all)  # type: ignore[union-attr]
    follower.wait_for(lambda: [frame.event for frame in follower.frames].count("jobs") == 2, "the page again")


def test_what_a_stream_cannot_do(site: Site) -> None:
    for query in ("after=ftjob-1", "metadata[a]=b"):
        assert site.client().get(f"{STREAM}&{query}").status_code == 400
    assert site.client().get("/v1/fine_tuning/jobs?include[]=everything").status_code == 400


def test_a_defect_ends_the_streams_and_not_the_server(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = site.submit()
    follower = site.follow(STREAM)
    follower.wait_for(lambda: bool(follower.frames), "the first page")
    with monkeypatch.context() as patch:

        def fail(*_arguments: object, **_options: object) -> None:
            raise KeyError("defect")

        patch.setattr(hub, "describe_jobs", fail)
        site.client().post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
        follower.join()
    again = site.follow(STREAM)
    again.wait_for(lambda: bool(again.frames), "the first page")
    new = site.submit()
    again.wait_for(lambda: bool(frames_of(again, new)), "the new job")


def test_a_change_during_the_read_of_a_job_is_sent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = site.submit()
    run = site.claim(job_id)
    run.start()
    follower = site.follow(f"{STREAM}&limit=1")
    follower.wait_for(lambda: bool(follower.frames), "the first page")
    steps = iter([2])

    def read_and_change(*arguments: object, **options: object) -> object:
        """What is read is what was before the next step, whose notification comes while the reader is not done."""
        described = describe_jobs(*arguments, **options)  # type: ignore[arg-type]
        step = next(steps, None)
        if step is not None:
            run.step(step)
            [topic] = site.server.services.hub._jobs.values()
            wait_until_true(topic.wake.is_set, 10.0, "the notification of the step")
        return described

    monkeypatch.setattr("server.hub.describe_jobs", read_and_change)
    run.step(1)
    follower.wait_for(lambda: any(job["lomo"]["step"] == 2 for job in frames_of(follower, job_id)), "the last step")  # type: ignore[index]
