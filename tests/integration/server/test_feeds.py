"""Streams of a job's figures and of its log: live, resumed, and of jobs that have ended."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import keys, lifecycle, runlog
from lomo_core import events as engine
from server import feeds

from .conftest import Follower, Run, Site

JOBS = "/v1/fine_tuning/jobs"


def follow(site: Site, run: Run, what: str, query: str = "", **headers: str) -> Follower:
    return site.follow(f"{JOBS}/{run.job_id}/{what}?stream=true{query}", headers)


def log(run: Run, *lines: str) -> None:
    """Ship lines of the engine's output, as its worker does."""
    lease = run.claim.lease
    first = runlog.shipped_bytes(run.db, job_id=run.job_id, attempt=lease.attempt)
    next_byte = first + sum(len(line) + 1 for line in lines)
    runlog.ship(run.db, lease, lines, attempt=lease.attempt, first_byte=first, next_byte=next_byte)


def bodies(follower: Follower) -> list[dict[str, Any]]:
    return [frame.body for frame in follower.frames if frame.data != "[DONE]"]


def evaluate(run: Run, step: int) -> None:
    run.say(engine.Evaluation(step=step, num_rows=4, valid_loss=1.5, choice_accuracy=0.25))


# -- figures


def test_each_point_comes_as_it_is_measured_and_then_the_end(site: Site) -> None:
    run = site.run()
    run.step(1)
    follower = follow(site, run, "metrics")
    follower.wait_for(lambda: len(follower.seqs) == 1, "the replay")
    run.message("nothing to see here")
    run.step(2, 3)
    evaluate(run, 3)
    follower.wait_for(lambda: len(follower.seqs) == 4, "live points")
    run.succeed()
    follower.join()
    assert follower.is_done
    assert [frame.event for frame in follower.frames] == ["metrics"] * 3 + ["evaluation", "message"]
    points = bodies(follower)
    assert [point["step"] for point in points] == [1, 2, 3, 3]
    assert (points[1]["loss"], points[1]["peak_bytes"], points[1]["tokens_per_s"]) == (5.0, 2002, 128.0)
    assert (points[3]["valid_loss"], points[3]["num_rows"], points[3]["choice_accuracy"]) == (1.5, 4, 0.25)
    columns = site.client().get(f"{JOBS}/{run.job_id}/metrics").json()["columns"]
    shared = set(columns) & set(points[0])
    assert {"step", "attempt", "time", "loss", "grad_norm", "gradients_bytes", "peak_bytes"} <= shared
    for name in shared:
        assert [point[name] for point in points[:3]] == pytest.approx(columns[name]), name


def test_points_are_resumed_by_the_last_id(site: Site) -> None:
    run = site.run()
    run.step(1, 2)
    run.message("between")
    run.step(3, 4)
    run.succeed()
    whole = follow(site, run, "metrics")
    whole.join()
    assert [point["step"] for point in bodies(whole)] == [1, 2, 3, 4]
    for position, rest in ((whole.seqs[1], [3, 4]), (whole.seqs[-1], [])):
        later = follow(site, run, "metrics", **{"Last-Event-ID": str(position)})
        later.join()
        assert [point["step"] for point in bodies(later)] == rest
        assert later.is_done


def test_a_step_that_is_repeated_after_a_pause_comes_again(site: Site) -> None:
    run = site.run()
    follower = follow(site, run, "metrics")
    run.step(1, 2)
    client = site.client()
    client.post(f"{JOBS}/{run.job_id}/pause")
    lifecycle.paused(site.db, run.claim.lease)
    client.post(f"{JOBS}/{run.job_id}/resume")
    again = site.claim(run.job_id)
    again.step(2, 3)
    again.fail()
    follower.join()
    assert [(point["attempt"], point["step"]) for point in bodies(follower)] == [(1, 1), (1, 2), (2, 2), (2, 3)]


def test_without_a_stream_the_figures_are_columns(site: Site) -> None:
    run = site.run()
    run.step(1)
    client = site.client()
    assert client.get(f"{JOBS}/{run.job_id}/metrics").json()["columns"]["step"] == [1]
    run.succeed()
    headers = {"Accept": "text/event-stream"}
    assert client.get(f"{JOBS}/{run.job_id}/metrics", headers=headers).text.endswith("data: [DONE]\n\n")


# -- log


def test_the_log_comes_live_and_ends_with_the_job(site: Site) -> None:
    run = site.run()
    log(run, "one", "two")
    follower = follow(site, run, "logs")
    follower.wait_for(lambda: len(follower.seqs) == 2, "the replay")
    log(run, "three")
    follower.wait_for(lambda: len(follower.seqs) == 3, "a live line")
    run.step(1)
    log(run, "four")
    run.succeed()
    follower.join()
    assert follower.is_done
    assert follower.seqs == [1, 2, 3, 4]
    assert [line["text"] for line in bodies(follower)] == ["one", "two", "three", "four"]
    first = bodies(follower)[0]
    assert (first["object"], first["id"], first["attempt"]) == (
        "fine_tuning.job.log",
        f"ftlog-{run.job_id.removeprefix('ftjob-')}-1",
        1,
    )
    assert {frame.event for frame in follower.frames[:-1]} == {"log"}


@pytest.mark.parametrize("num_lines", [0, 7, 20])
def test_the_log_of_a_job_that_has_ended(site: Site, num_lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "PAGE_EVENTS", 10)
    run = site.run()
    if num_lines:
        log(run, *(f"line {number}" for number in range(1, num_lines + 1)))
    run.succeed()
    whole = follow(site, run, "logs")
    whole.join()
    assert whole.seqs == list(range(1, num_lines + 1))
    assert whole.is_done
    later = follow(site, run, "logs", **{"Last-Event-ID": str(max(0, num_lines - 2))})
    later.join()
    assert later.seqs == list(range(1, num_lines + 1))[-2:]
    assert later.is_done


def test_several_readers_of_several_feeds_of_one_job(site: Site) -> None:
    run = site.run()
    readers = [follow(site, run, what) for what in ("events", "metrics", "logs") for _ in range(3)]
    for step in range(1, 6):
        run.step(step)
        log(run, f"line {step}")
    run.succeed()
    for reader in readers:
        reader.join()
        assert reader.is_done
    steps = [[point["step"] for point in bodies(reader)] for reader in readers[3:6]]
    texts = [[line["text"] for line in bodies(reader)] for reader in readers[6:]]
    assert steps == [[1, 2, 3, 4, 5]] * 3
    assert texts == [[f"line {step}" for step in range(1, 6)]] * 3
    hub = site.server.services.hub
    site.wait_until(lambda: not hub._feeds and not hub._open.total(), 10, "the streams to be forgotten")


def test_a_log_is_read_in_pages_newest_first(site: Site) -> None:
    run = site.run()
    log(run, *"abcde")
    client = site.client()
    path = f"{JOBS}/{run.job_id}/logs"
    page = client.get(path, params={"limit": 2}).json()
    assert ([line["text"] for line in page["data"]], page["has_more"], page["object"]) == (["e", "d"], True, "list")
    rest = client.get(path, params={"after": page["data"][-1]["id"]}).json()
    assert ([line["seq"] for line in rest["data"]], rest["has_more"]) == ([3, 2, 1], False)
    assert [line["seq"] for line in client.get(path, params={"after": "2"}).json()["data"]] == [1]


@pytest.mark.parametrize("what", ["logs", "metrics"])
def test_what_is_no_place_of_the_feed_and_whose_it_is_not(site: Site, what: str) -> None:
    run = site.run()
    path = f"{JOBS}/{run.job_id}/{what}?stream=true"
    other = f"ftevent-{run.job_id[6:]}-1" if what == "logs" else f"ftlog-{run.job_id[6:]}-1"
    for position in (other, "x", "-1"):
        response = site.client().get(path, headers={"Last-Event-ID": position})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "after")
    stranger = site.client(keys.create_key(site.db, name="b", organization_id="org-b"))
    assert stranger.get(path).status_code == 404
    assert stranger.get(f"{JOBS}/{run.job_id}/{what}").status_code == 404
