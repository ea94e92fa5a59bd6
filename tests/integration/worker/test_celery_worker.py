"""The real worker process: killed, stopped, doubled, misconfigured, and rung too often or never."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from jobs import dispatch, migrate, reads
from jobs.db import Database
from local.valkey import Valkey
from tests.conftest import wait_until_true
from worker.node import Node
from worker.tasks import register_tasks

FINISH = [["steps", 3], ["checkpoint"], ["steps", 2], ["finish"]]
ENGINE_DEATH_S = 2.0  # how long an engine may outlive its worker


def test_kill_9_of_the_worker_costs_no_line_and_no_step(bench: Any, start_worker: Any, wait_until: Any) -> None:
    """The worker is frozen first, so that its engine certainly writes lines that it has not shipped when it dies."""
    script = [["steps", 3], ["checkpoint"], ["touch", "started"], ["wait", "frozen"], ["steps", 2], ["touch", "more"]]
    job_id = bench.submit(script, [["steps", 2], ["finish"]])
    worker = start_worker()
    wait_until(lambda: bench.has_touched(job_id, "started") and len(bench.steps(job_id)) == 3, 30, "three steps")
    wait_until(lambda: len(reads.resume_candidates(bench.db, job_id=job_id)) == 1, 30, "the checkpoint")
    worker.process.send_signal(signal.SIGSTOP)
    bench.touch(job_id, "frozen")
    wait_until(lambda: bench.has_touched(job_id, "more"), 30, "two steps more")
    assert bench.steps(job_id) == [1, 2, 3]
    worker.kill()
    wait_until(lambda: not bench.is_engine_alive(job_id), ENGINE_DEATH_S, "the engine's death")

    second = start_worker()
    wait_until(lambda: bench.job(job_id).status == "succeeded", 30, "success")
    assert second.terminate() == 0
    job = bench.job(job_id)
    assert (job.attempt, job.failures) == (2, 1)
    # 4 and 5 of the first attempt came from the file it left; the second went on from the checkpoint of step 3.
    assert bench.steps(job_id) == [1, 2, 3, 4, 5, 4, 5]
    assert "The worker on host-a was restarted" in " ".join(bench.messages(job_id))


def test_kill_9_ends_every_engine_of_the_worker(bench: Any, start_worker: Any, wait_until: Any) -> None:
    job_ids = [bench.submit([["touch", "started"]]) for _ in range(2)]
    worker = start_worker(slots=2, concurrency=3)
    for job_id in job_ids:
        wait_until(lambda job_id=job_id: bench.has_touched(job_id, "started"), 30, "both engines")
    worker.kill()
    wait_until(lambda: not any(map(bench.is_engine_alive, job_ids)), ENGINE_DEATH_S, "the engines' death")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_gives_its_job_back(
    bench: Any, start_worker: Any, wait_until: Any, number: signal.Signals
) -> None:
    """SIGINT goes to the whole foreground group, as from a terminal: the engine must not be in it."""
    job_id = bench.submit([["steps", 3], ["touch", "started"]], [["steps", 1], ["finish"]])
    worker = start_worker()
    wait_until(lambda: bench.has_touched(job_id, "started"), 30, "the engine")
    os.killpg(worker.process.pid, number)
    assert worker.process.wait(30) in (0, 1), worker.log()  # Celery ends with 1 after Ctrl-C
    assert "Traceback" not in worker.log()
    job = bench.job(job_id)
    assert (job.status, job.failures) == ("queued", 0)
    assert not bench.is_engine_alive(job_id)
    second = start_worker()
    wait_until(lambda: bench.job(job_id).status == "succeeded", 30, "success")
    second.terminate()
    assert bench.steps(job_id) == [1, 2, 3, 4]


def test_too_many_rings_and_none_at_all(bench: Any, start_worker: Any, wait_until: Any) -> None:
    app = dispatch.make_celery(bench.settings.broker_url)
    rung = bench.submit(FINISH)
    for _ in range(20):
        assert dispatch.ring(app)
    app.close()
    worker = start_worker()
    wait_until(lambda: bench.job(rung).status == "succeeded", 30, "the job with twenty messages")
    silent = bench.submit(FINISH)  # its message is lost: only the reaper can find it
    wait_until(lambda: bench.job(silent).status == "succeeded", 30, "the job without a message")
    worker.terminate()
    assert [bench.job(job_id).attempt for job_id in (rung, silent)] == [1, 1]
    readiness = reads.read_readiness(bench.db)
    assert readiness.worker_seen_s is not None
    assert readiness.reaper_ticked_s is not None


def test_a_host_is_described_and_seen_while_it_idles(bench: Any, start_worker: Any, wait_until: Any) -> None:
    start_worker()
    host = wait_until(lambda: reads.find_host(bench.db, name="host-a"), 30, "the host")
    assert host.memory_bytes > 2**28
    assert host.available_bytes > 2**26
    assert host.device_kind == ("cuda" if host.devices["gpus"] else "cpu")
    assert host.devices["cpu"]["count"] >= 1
    assert host.slots == 1
    later = wait_until(
        lambda: (now := reads.find_host(bench.db, name="host-a")) and now.last_seen_at > host.last_seen_at and now,
        10,
        "a further sign of life",
    )
    assert later.incarnation == host.incarnation


def test_a_second_worker_of_the_same_name_is_refused(bench: Any, start_worker: Any, wait_until: Any) -> None:
    first = start_worker()
    wait_until(lambda: reads.find_host(bench.db, name="host-a"), 30, "the first worker")
    second = start_worker()
    assert second.process.wait(30) == 2
    assert "A worker named 'host-a' already runs" in second.log()
    assert "Traceback" not in second.log()
    assert first.process.poll() is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"database_url": ""}, "LOMO_DATABASE_URL"),
        ({"slots": 2}, "start it with --concurrency=3"),
        ({"worker_name": "a/b"}, "LOMO_WORKER_NAME"),
        ({"data_dir": "/proc/nowhere"}, "The data folder /proc/nowhere cannot be written"),
    ],
)
def test_a_wrong_setting_is_one_clear_sentence(
    bench: Any, start_worker: Any, changes: dict[str, Any], text: str
) -> None:
    worker = start_worker(**changes)
    assert worker.process.wait(30) == 2, worker.log()
    assert text in worker.log()
    assert "Traceback" not in worker.log()


def test_an_outage_is_one_log_line_for_ring_and_reaper(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings = bench.settings.model_copy(update={"database_url": "postgresql+psycopg://nobody@/none?host=/nonexistent"})
    node = Node(settings, send_ring=list)
    app = dispatch.make_celery("memory://")
    register_tasks(app, node)
    for name in (dispatch.RING_TASK, dispatch.REAP_TASK):
        caplog.clear()
        app.tasks[name]()
        [record] = [record for record in caplog.records if record.name.startswith("worker")]
        assert "without_database" in record.getMessage()
    node.close()


def test_a_broker_that_dies_takes_no_job_with_it(bench: Any, start_worker: Any, wait_until: Any, tmp_path: Any) -> None:
    broker = Valkey(tmp_path / "vk", log_path=tmp_path / "vk.log")
    broker.start()
    job_id = bench.submit([["steps", 1], ["touch", "started"], ["wait", "go"], ["steps", 1], ["finish"]])
    worker = start_worker(broker_url=broker.broker_url)
    wait_until(lambda: bench.has_touched(job_id, "started"), 30, "the engine")
    broker.stop()
    bench.touch(job_id, "go")
    wait_until(lambda: bench.job(job_id).status == "succeeded", 30, "success without a broker")
    broker.start()
    second = bench.submit(FINISH)
    wait_until(lambda: bench.job(second).status == "succeeded", 30, "a job after the broker's return")
    assert worker.terminate() == 0
    broker.stop()


def test_a_worker_may_come_before_the_schema(empty_database_url: str, bench: Any, start_worker: Any) -> None:
    worker = start_worker(database_url=empty_database_url)
    wait_until_true(lambda: "database_unreachable" in worker.log() and " ready." in worker.log(), 30, "the worker")
    migrate.upgrade(empty_database_url)
    bench.db.dispose()
    bench.db = Database(empty_database_url)
    job_id = bench.submit(FINISH)
    wait_until_true(lambda: bench.job(job_id).status == "succeeded", 30, "success")
    assert worker.terminate() == 0
    assert "Traceback" not in worker.log()
