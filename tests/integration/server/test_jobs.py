"""The job object through its life, its series, and the doorbell that rings for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import update

from jobs import dispatch, eventlog, lifecycle
from jobs.dispatch import JOBS_QUEUE, make_celery
from jobs.lifecycle import RetryPolicy
from jobs.models import Job
from local.valkey import Valkey
from lomo_core import events as engine

from .conftest import HOST, MODEL, TRAIN_ROW, Run, Site, make_step

POLICY = RetryPolicy(max_failures=3, backoff_s=0.0)


def claim_again(site: Site, run: Run) -> Run:
    """Lose a run's worker and claim its job for another attempt."""
    lifecycle.retry(site.db, run.claim.lease, reason="The engine died", policy=POLICY)
    return site.claim(run.job_id)


def test_a_queued_job(site: Site) -> None:
    job = site.get(site.submit(suffix="docs", seed=7, lomo={"optimizer": "adalomo", "priority": 3}))
    assert (job["status"], job["seed"], job["user_provided_suffix"]) == ("queued", 7, "docs")
    lomo = job["lomo"]
    assert (lomo["optimizer"], lomo["learning_rate"], lomo["priority"]) == ("adalomo", 5e-4, 3)
    assert (lomo["attempt"], lomo["host"], lomo["eta_s"], lomo["model_path"]) == (0, None, None, None)
    assert (lomo["memory"]["measured"], lomo["memory"]["measured_peak_bytes"]) == (None, None)


def test_a_running_job(site: Site) -> None:
    run = site.run()
    run.start()
    run.step(1, 2)
    run.say(engine.Evaluation(step=2, num_rows=200, choice_accuracy=0.36))
    job = site.get(run.job_id)
    assert (job["status"], job["trained_tokens"], job["finished_at"]) == ("running", None, None)
    lomo = job["lomo"]
    assert (lomo["attempt"], lomo["host"], lomo["step"], lomo["total_steps"]) == (1, HOST, 2, 100)
    assert (lomo["loss"], lomo["tokens_per_second"]) == (5.0, 128.0)
    assert (lomo["num_parameters"], lomo["num_train_rows"]) == (1_000_000, 8)
    assert (lomo["device"], lomo["device_bytes"]) == ("cpu (test)", 2**34)
    assert lomo["memory"]["measured"]["parameters_bytes"] == 1000
    assert lomo["memory"]["measured_peak_bytes"] == 2002
    [evaluation] = lomo["evaluations"]
    assert (evaluation["step"], evaluation["choice_accuracy"], evaluation["valid_loss"]) == (2, 0.36, None)


def test_a_succeeded_job(site: Site) -> None:
    run = site.run()
    run.step(1)
    name = run.succeed()
    job = site.get(run.job_id)
    assert (job["status"], job["fine_tuned_model"], job["trained_tokens"]) == ("succeeded", name, 9)
    assert job["finished_at"] >= job["created_at"]
    assert Path(job["lomo"]["model_path"]) == site.settings.data_dir / "runs" / run.job_id / "model"
    assert job["lomo"]["weights_sha256"] == "ab" * 32
    # The lease has ended; where the job ran is still told.
    assert (job["lomo"]["host"], job["lomo"]["eta_s"], job["estimated_finish"]) == (HOST, None, None)


@pytest.mark.parametrize(
    ("stored", "unreadable", "shown"),
    [
        (
            {"lomo": {"optimizer": "lomo", "galore": {"rank": 8}, "step": "x"}, "n_epochs": 99, "batch_size": 2},
            ["lomo.galore", "lomo.step", "n_epochs"],
            {"model": MODEL, "seed": 1, "training_file": "file-1"},
        ),
        (
            {"model": 7, "seed": None, "training_file": ["a"], "lomo": "none", "new": True},
            ["lomo", "model", "new", "seed", "training_file"],
            {"model": None, "seed": None, "training_file": None},
        ),
    ],
)
def test_a_job_of_another_version_is_shown_with_what_can_be_read(
    site: Site, stored: dict[str, Any], unreadable: list[str], shown: dict[str, Any]
) -> None:
    good, foreign = site.submit(), site.submit()
    with site.db.transaction() as session:
        spec = {"model": MODEL, "training_file": "file-1", "seed": 1, **stored}
        session.execute(update(Job).where(Job.id == foreign).values(spec=spec))
    client = site.client()
    job = site.get(foreign)
    assert {key: job[key] for key in shown} == shown
    assert (job["status"], job["lomo"]["attempt"], job["lomo"]["step"]) == ("queued", 0, 0)
    assert job["lomo"]["unreadable"] == unreadable
    if isinstance(stored["lomo"], dict):
        assert (job["lomo"]["optimizer"], job["lomo"]["galore"]) == ("lomo", {"rank": 8})
        assert job["hyperparameters"] == {"n_epochs": 99, "batch_size": 2, "learning_rate_multiplier": None}
    listed = client.get("/v1/fine_tuning/jobs?include[]=loss_curve")
    assert [item["id"] for item in listed.json()["data"]] == [foreign, good]
    assert "unreadable" not in listed.json()["data"][1]["lomo"]
    assert client.get(f"/v1/fine_tuning/jobs/{foreign}/checkpoints").json()["data"] == []
    assert client.post(f"/v1/fine_tuning/jobs/{foreign}/cancel").json()["status"] == "cancelled"


def test_time_left_follows_the_wall_clock(site: Site) -> None:
    """Steps of 0.5 s that come every 2 s: checkpoints and evaluations count."""
    run = site.run()
    run.start()
    now = time.time()
    steps = [engine.JournalLine(now - 2 * (10 - step), make_step(step)) for step in range(1, 11)]
    lines = list(enumerate(steps, start=run.num_lines))
    eventlog.ship(site.db, run.claim.lease, lines, attempt=1, relative=str)
    job = site.get(run.job_id)
    assert job["lomo"]["eta_s"] == pytest.approx(2 * 90, abs=2.1)
    assert job["estimated_finish"] == pytest.approx(now + 180, abs=4)


def test_another_attempt_replaces_repeated_steps(site: Site) -> None:
    first = site.run()
    first.start()
    first.step(*range(1, 11))
    second = claim_again(site, first)
    second.say(
        engine.Started(
            step=5,
            total_steps=100,
            num_parameters=1,
            num_train_rows=1,
            num_truncated_rows=0,
            num_trainable_tokens=1,
            device="cpu",
            device_bytes=None,
        )
    )
    second.step(6, 7)
    job = site.get(first.job_id)
    assert (job["lomo"]["attempt"], job["lomo"]["failures"], job["lomo"]["step"]) == (2, 1, 7)
    body = site.client().get(f"/v1/fine_tuning/jobs/{first.job_id}/metrics").json()
    assert body["columns"]["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert body["columns"]["attempt"] == [1, 1, 1, 1, 1, 2, 2]
    assert [(attempt["number"], attempt["outcome"], attempt["host"]) for attempt in body["attempts"]] == [
        (1, "requeued", HOST),
        (2, None, HOST),
    ]
    curve = site.client().get("/v1/fine_tuning/jobs?include[]=loss_curve").json()["data"][0]["lomo"]["loss_curve"]
    assert curve[-1][0] == 7


def test_metrics_are_thinned_and_windowed(site: Site) -> None:
    run = site.run()
    run.start(total_steps=500)
    run.step(*range(1, 501), total_steps=500)
    url = f"/v1/fine_tuning/jobs/{run.job_id}/metrics"
    whole = site.client().get(url).json()
    assert (whole["object"], whole["job_id"]) == ("fine_tuning.job.metrics", run.job_id)
    assert whole["columns"]["step"] == list(range(1, 501))
    assert {len(column) for column in whole["columns"].values()} == {500}
    thinned = site.client().get(url, params={"max_points": 50}).json()["columns"]
    assert len(thinned["step"]) <= 50
    assert thinned["step"][-1] == 500
    # The spike at the start survives.
    assert max(thinned["loss_max"]) == 10.0
    window = site.client().get(url, params={"first_step": 101, "last_step": 110}).json()["columns"]
    assert window["step"] == list(range(101, 111))
    for query in ("first_step=10&last_step=5", "first_step=600", "first_step=10&last_step=9", "last_step=1000000000"):
        assert site.client().get(f"{url}?{query}").status_code == 200, query
    for query in ("max_points=0", "max_points=2001", "first_step=-1", "last_step=1000000001"):
        assert site.client().get(f"{url}?{query}").status_code == 400, query


def test_pages_of_events_and_checkpoints(site: Site) -> None:
    run = site.run()
    run.say(
        *(
            engine.Checkpoint(step=step, path=f"c/{step}", manifest_sha256="0", num_bytes=1, train_loss=None)
            for step in (10, 20, 30)
        )
    )
    client, url = site.client(), f"/v1/fine_tuning/jobs/{run.job_id}"
    first = client.get(f"{url}/checkpoints?limit=1").json()
    assert ([item["step_number"] for item in first["data"]], first["has_more"]) == ([30], True)
    assert first["first_id"] == first["last_id"] == first["data"][0]["id"]
    rest = client.get(f"{url}/checkpoints?after={first['last_id']}").json()
    # Of three only the newest two are kept: that is what the job asked for.
    assert ([item["step_number"] for item in rest["data"]], rest["has_more"]) == ([20], False)
    assert client.get(f"{url}/checkpoints?after=ftckpt_none").status_code == 404
    page = client.get(f"{url}/events?limit=4").json()
    assert ([event["seq"] for event in page["data"]], page["has_more"]) == ([6, 5, 4, 3], True)
    rest = client.get(f"{url}/events?after={page['data'][-1]['id']}").json()
    assert ([event["seq"] for event in rest["data"]], rest["has_more"]) == ([2, 1], False)
    assert client.get(f"{url}/events?after=ftevent-x").status_code == 404


def test_lists_begin_at_an_empty_cursor(site: Site, subtests: pytest.Subtests) -> None:
    job_id = site.submit()
    client, job = site.client(), f"/v1/fine_tuning/jobs/{job_id}"
    lists = ("/v1/files", "/v1/fine_tuning/jobs", f"{job}/events", f"{job}/checkpoints", f"{job}/logs")
    for url in (*lists, "/v1/webhook_endpoints"):
        with subtests.test(url=url):
            from_the_beginning = client.get(f"{url}?after=")
            assert from_the_beginning.status_code == 200, from_the_beginning.text
            assert from_the_beginning.json()["data"] == client.get(url).json()["data"]


def test_a_job_shows_its_first_and_latest_evaluations(site: Site) -> None:
    run = site.run()
    run.say(*(engine.Evaluation(step=step, num_rows=1, valid_loss=1.0) for step in range(301)))
    shown = [evaluation["step"] for evaluation in site.get(run.job_id)["lomo"]["evaluations"]]
    assert shown == [0, *range(202, 301)]
    everything = site.client().get(f"/v1/fine_tuning/jobs/{run.job_id}/metrics").json()["evaluations"]
    assert [evaluation["step"] for evaluation in everything] == list(range(301))


def test_metadata_filters(site: Site) -> None:
    file_id = site.upload()
    both = site.submit(training_file=file_id, metadata={"a": "1", "b c": "ü&="})
    one = site.submit(training_file=file_id, metadata={"a": "1"})
    none = site.submit(training_file=file_id)

    def found(**query: str) -> list[str]:
        return [job["id"] for job in site.client().get("/v1/fine_tuning/jobs", params=query).json()["data"]]

    assert found() == [none, one, both]
    assert found(**{"metadata[a]": "1"}) == [one, both]
    assert found(**{"metadata[a]": "1", "metadata[b c]": "ü&="}) == [both]
    assert found(**{"metadata[a]": "2"}) == []
    assert found(metadata="null") == [none]
    # What no job can have is not the same as no filter.
    assert found(**{"metadata[]": "1"}) == []
    assert found(**{f"metadata[{'k' * 65}]": "1"}) == []
    assert found(**{"metadata[a\nb]": "1"}) == []


def test_a_file_in_use_stays(site: Site) -> None:
    file_id = site.upload()
    job_id = site.submit(training_file=file_id)
    refused = site.client().delete(f"/v1/files/{file_id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_state")
    assert job_id in refused.json()["error"]["message"]
    site.client().post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    assert site.client().delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert site.client().get(f"/v1/files/{file_id}/content").status_code == 404


def test_files_that_cannot_be_trained_on(site: Site) -> None:
    notes = site.upload(b"notes", purpose="user_data")
    for param in ("training_file", "validation_file"):
        body = {"model": MODEL, "training_file": site.upload()} | {param: notes}
        response = site.client().post("/v1/fine_tuning/jobs", json=body)
        assert response.status_code == 400
        assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("invalid_file_purpose", param)


def test_the_format_of_a_file_is_the_jobs(site: Site) -> None:
    text, rows = site.upload(b"Once upon a time.", name="tale.txt"), site.upload(b"[" + TRAIN_ROW + b"]")
    assert site.client().get(f"/v1/files/{text}").json()["num_lines"] is None
    assert site.client().get(f"/v1/files/{rows}").json()["num_lines"] == 1
    spec = site.run(training_file=text, validation_file=rows).claim.spec
    assert (spec.training_format, spec.validation_format) == ("plain", "auto")
    spec = site.run(training_file=rows).claim.spec
    assert (spec.training_format, spec.validation_format) == ("auto", "auto")


def test_options_that_do_not_fit_together_are_a_400_and_no_job(site: Site) -> None:
    body = {"model": MODEL, "training_file": site.upload(), "lomo": {"optimizer": "adamw", "precision": "fp16"}}
    response = site.client().post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("lomo.precision", "invalid_value")
    assert "fp16 weights need the loss scaling of lomo and adalomo" in error["message"]
    assert site.client().get("/v1/fine_tuning/jobs").json()["data"] == []


def test_lost_bytes_are_a_404(site: Site) -> None:
    file_id = site.upload()
    (site.settings.files_dir / file_id).unlink()
    assert site.client().get(f"/v1/files/{file_id}/content").status_code == 404


def test_the_doorbell_rings_once(site: Site, valkey_server: Valkey) -> None:
    site.submit()
    with redis.Redis.from_url(valkey_server.client_url) as client:
        site.wait_until(lambda: client.llen(JOBS_QUEUE) == 1, 10, "the message")
        # The message names no job: the row is the truth.
        [message] = client.lrange(JOBS_QUEUE, 0, -1)  # type: ignore[misc]
    assert b"ftjob" not in message


def test_a_broker_that_is_down_does_not_fail_the_request(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = make_celery("redis://127.0.0.1:1/0")
    answers: list[bool] = []
    ring = dispatch.ring
    monkeypatch.setattr(dispatch, "ring", lambda _app: answers.append(ring(dead)))
    started = time.monotonic()
    job_id = site.submit()
    assert site.get(job_id)["status"] == "queued"
    site.wait_until(lambda: answers == [False], 20, "the failed ring")
    assert time.monotonic() - started < 20
    dead.close()
