"""Killing what a job consists of, with the real engine: no death of engine or worker changes the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import reads, series
from jobs.db import Database
from jobs.owner import Owner
from tests.conftest import wait_until_true
from tests.support.known_host import give_calibration
from tests.support.tiny_model import chat_rows, make_tiny_model
from tests.support.worker_bench import MODEL, ORGANIZATION, SHORT, Bench, CeleryWorker, is_alive
from worker.settings import WorkerSettings

pytestmark = pytest.mark.slow

JOB_TIMEOUT_S = 180.0  # 15 s on an idle machine, most of it three times the engine's imports
ENGINE_DEATH_S = 2.0  # how long an engine may outlive its worker
NUM_STEPS = 300  # of 5 to 20 ms: long enough to be killed twice
LOMO = {
    "learning_rate": 0.02,
    "clip": {"mode": "group", "threshold": 1.0},
    "max_seq_length": 64,
    "checkpoint_every_steps": 25,
    "max_steps": NUM_STEPS,
}


@pytest.fixture
def bench(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Bench]:
    """A data folder with the tiny model, and the real engine on one thread."""
    settings = WorkerSettings(
        database_url=database_url,
        broker_url=broker_url,
        data_dir=tmp_path / "data",
        worker_name="host-a",
        ship_every_s=0.02,
        **SHORT,
    )
    make_tiny_model(settings.data_dir / "models" / MODEL)
    give_calibration(settings)
    bench = Bench(Database(database_url), settings)
    yield bench
    bench.db.dispose()


@pytest.fixture
def workers(bench: Bench, tmp_path: Path) -> Iterator[Any]:
    """`workers()` starts one more worker; what still runs at the end is killed."""
    started: list[CeleryWorker] = []

    def start() -> CeleryWorker:
        log_path = tmp_path / f"worker-{len(started)}.log"
        started.append(CeleryWorker(bench.settings, log_path=log_path, concurrency=2))
        return started[-1]

    yield start
    for worker in started:
        worker.end()


def submit(bench: Bench) -> str:
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows(64))
    values = {"model": MODEL, "training_file": bench.store(rows), "seed": 5, "n_epochs": 50, "batch_size": 4}
    return bench.submit_spec({**values, "lomo": LOMO})


def wait_for_success(bench: Bench, job_id: str) -> None:
    wait_until_true(lambda: bench.job(job_id).status in {"succeeded", "failed"}, JOB_TIMEOUT_S, f"the end of {job_id}")
    assert bench.job(job_id).status == "succeeded", bench.messages(job_id)


def wait_for_step(bench: Bench, job_id: str, *, attempt: int, checkpoint: bool) -> None:
    """Wait until an attempt has trained a step, and published a checkpoint where that is asked for."""

    def reached() -> bool:
        events = [event for event in bench.events(job_id) if event.attempt == attempt]
        published = any(event.message.startswith("Checkpoint created") for event in events)
        return any(event.type == "metrics" for event in events) and (published or not checkpoint)

    wait_until_true(reached, JOB_TIMEOUT_S, f"a step of attempt {attempt}")
    assert bench.job(job_id).status == "running", "the job ended before it could be killed: raise NUM_STEPS"


def engine_pid(worker: CeleryWorker, job_id: str, *, attempt: int) -> int:
    """The number of an attempt's engine, from the worker's log."""
    lines = [json.loads(line) for line in worker.log().splitlines() if line.startswith("{")]
    found = [
        int(line["pid"])
        for line in lines
        if (line["event"], line.get("job_id"), line.get("attempt")) == ("engine_started", job_id, attempt)
    ]
    assert len(found) == 1
    return found[0]


def losses(bench: Bench, job_id: str) -> list[float]:
    """The loss of each step; of a step that was repeated, the last."""
    job = reads.get_job(bench.db, owner=Owner(ORGANIZATION), job_id=job_id)
    columns = series.read_metrics(bench.db, job, max_points=NUM_STEPS)
    assert columns["step"] == list(range(1, NUM_STEPS + 1))
    return columns["loss"]


def test_two_kills_change_no_bit_of_the_result(bench: Bench, workers: Any) -> None:
    first = workers()
    undisturbed = submit(bench)
    wait_for_success(bench, undisturbed)

    killed = submit(bench)
    wait_for_step(bench, killed, attempt=1, checkpoint=True)
    first.kill_child(engine_pid(first, killed, attempt=1))
    wait_for_step(bench, killed, attempt=2, checkpoint=True)
    second_engine = engine_pid(first, killed, attempt=2)
    first.kill()
    wait_until_true(lambda: not is_alive(second_engine), ENGINE_DEATH_S, "the engine's death")
    second = workers()
    wait_for_success(bench, killed)
    assert second.terminate() == 0

    job, same = bench.job(killed), bench.job(undisturbed)
    assert (job.attempt, job.failures) == (3, 2)
    assert (same.attempt, same.failures) == (1, 0)
    assert job.weights_sha256 == same.weights_sha256
    assert losses(bench, killed) == losses(bench, undisturbed)
    assert len(bench.events(killed)) > len(bench.events(undisturbed))  # both gap-free: see Bench.events
    resumed = [text for text in bench.messages(killed) if ", from step " in text]
    assert len(resumed) == 2
